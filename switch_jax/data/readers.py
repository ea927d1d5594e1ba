"""Chooses the reader that `data.reader` names: token store, synthetic batches, or seqio.

Only the seqio reader uses TensorFlow, which is imported when the reader is chosen.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from switch_jax.config import Config
from switch_jax.data.batch import ALL_ROWS, Batch, BatchIterator, ProcessRows, SyntheticIterator
from switch_jax.data.sources.source import Split
from switch_jax.data.token_store import dataset


def open_batches(
    config: Config, split: Split, process_rows: ProcessRows = ALL_ROWS
) -> BatchIterator:
    """Returns an endless iterator over one process's batches of the mixture.

    The rows of all groups of processes together make global batches of `data.batch_size` rows. A
    vocabulary or token store that the config does not name is built in the cache on first use.
    Validation batches do not depend on `data.seed`, so that runs with different seeds compare.

    Raises `UserError` for missing data and for settings that contradict each other.
    """
    config = _fix_validation_seed(config, split)
    match config.data.reader:
        case "store":
            return dataset.open_batches(config, split, process_rows)
        case "synthetic":
            return SyntheticIterator(config, process_rows)
        case "seqio":
            from switch_jax.data import seqio_reader

            return seqio_reader.open_batches(config, split, process_rows)


def open_epoch_by_source(
    config: Config, split: Split, process_rows: ProcessRows = ALL_ROWS
) -> Mapping[str, Iterator[Batch]]:
    """Returns one epoch of each source of the mixture, by name; raises as `open_batches` does.

    The rows of an epoch are the same for any number of processes, and every process has the same
    number of batches; rows behind the last one are padding. Synthetic data has no end.
    """
    config = _fix_validation_seed(config, split)
    match config.data.reader:
        case "store":
            return dataset.open_epoch_by_source(config, split, process_rows)
        case "synthetic":
            return {"synthetic": SyntheticIterator(config, process_rows)}
        case "seqio":
            from switch_jax.data import seqio_reader

            return seqio_reader.open_epoch_by_source(config, split, process_rows)


def read_task_examples(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Returns the validation examples of the fine-tuning tasks in the mixture, by task.

    Each example has `inputs`, `targets`, and the `answer` that metrics compare predictions with.
    """
    match config.data.reader:
        case "store":
            return dataset.read_task_examples(config)
        case "synthetic":
            return {}
        case "seqio":
            from switch_jax.data import seqio_reader

            return seqio_reader.read_task_examples(config)


def _fix_validation_seed(config: Config, split: Split) -> Config:
    """Returns the config with `data.seed=0` for validation, unchanged for training."""
    if split == "train":
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seed=0))
