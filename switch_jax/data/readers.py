"""Chooses the reader that `data.reader` names: token store, synthetic batches, or seqio.

Only the seqio reader uses TensorFlow, which is imported when the reader is chosen.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from switch_jax.config import Config
from switch_jax.data.batch import (
    ALL_ROWS,
    Batch,
    BatchIterator,
    ProcessRows,
    SyntheticIterator,
    feature_shapes,
)
from switch_jax.data.sources.source import Split
from switch_jax.data.token_store import dataset
from switch_jax.errors import UserError


def open_batches(
    config: Config, split: Split, process_rows: ProcessRows = ALL_ROWS
) -> BatchIterator:
    """Returns an endless iterator over one process's batches of the mixture.

    The rows of all groups of processes together make global batches of `data.batch_size` rows. A
    vocabulary or token store that the config does not name is built in the cache on first use.
    Validation batches do not depend on `data.seed`, so that runs with different seeds compare.

    Raises `UserError` for missing data and for settings that contradict each other.
    """
    _check_batch_bytes(config, process_rows)
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
    _check_batch_bytes(config, process_rows)
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


def _check_batch_bytes(config: Config, process_rows: ProcessRows) -> None:
    """Raises `UserError` where a process's batch takes more bytes than the host's memory."""
    share = len(process_rows.parts) / process_rows.num_parts
    features = feature_shapes(config).values()
    size = share * sum(rows * length * np.dtype(kind).itemsize for (rows, length), kind in features)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UserError(
            f"A batch takes {size / 2**30:,.0f} GiB, more than this host's {memory / 2**30:,.0f};"
            f" lower data.batch_size={config.data.batch_size}, data.inputs_length or"
            " data.targets_length."
        )


def _fix_validation_seed(config: Config, split: Split) -> Config:
    """Returns the config with `data.seed=0` for validation, unchanged for training."""
    if split == "train":
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seed=0))
