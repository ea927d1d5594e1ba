"""From a mixture of texts to batches.

    formats  python_docs → sources → catalog → mixture   where text lies, how often it is drawn
    vocabulary → vocabularies                            ids of its pieces
    pack → store → rows                                  packed records, without TensorFlow
    blocks → tasks                                       text as it streams, through seqio
    spans  packing  counter                              pure functions of rows
    batch                                                the contract with the model

Only `tasks` uses TensorFlow; it is loaded when asked for.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from switch_jax.config import Config
from switch_jax.data.batch import ALL_ROWS, BatchIterator, ProcessRows, SyntheticIterator
from switch_jax.data.sources.source import Split
from switch_jax.data.token_store import dataset


def open_batches(
    config: Config, split: Split, process_rows: ProcessRows = ALL_ROWS
) -> BatchIterator:
    """One process's endless stream of batches of a mixture, as `data.reader` says.

    Together the feeds' rows make global batches of `data.batch_size`. What the reader
    needs and the config does not name is made on first use, in the cache. Validation does not
    depend on `data.seed`, so that runs of several seeds are measured alike.

    Raises `UserError` for anything missing or impossible.
    """
    config = _seeded(config, split)
    match config.data.reader:
        case "store":
            return dataset.open_batches(config, split, process_rows)
        case "synthetic":
            return SyntheticIterator(config, process_rows)
        case "seqio":
            from switch_jax.data import seqio_reader

            return seqio_reader.open_batches(config, split, process_rows)


def open_batches_by_source(
    config: Config, split: Split, process_rows: ProcessRows = ALL_ROWS
) -> Mapping[str, BatchIterator]:
    """As `open_batches`, each source of the mixture on its own, by name."""
    config = _seeded(config, split)
    match config.data.reader:
        case "store":
            return dataset.open_batches_by_source(config, split, process_rows)
        case "synthetic":
            return {"synthetic": SyntheticIterator(config, process_rows)}
        case "seqio":
            from switch_jax.data import seqio_reader

            return seqio_reader.open_batches_by_source(config, split, process_rows)


def read_task_examples(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Validation examples of the fine-tuning tasks in a mixture, by task.

    Each has `inputs`, `targets` and the `answer` that metrics compare with.
    """
    match config.data.reader:
        case "store":
            return dataset.read_task_examples(config)
        case "synthetic":
            return {}
        case "seqio":
            from switch_jax.data import seqio_reader

            return seqio_reader.read_task_examples(config)


def _seeded(config: Config, split: Split) -> Config:
    if split == "train":
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seed=0))
