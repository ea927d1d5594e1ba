"""The batch contract between data and model, and batches that need no data.

A batch is a dict of NumPy arrays with the T5X feature names. B is the number of rows this
process feeds, S and T the lengths of inputs and targets.

| feature                | shape  | dtype   |                                              |
|------------------------|--------|---------|----------------------------------------------|
| encoder_input_tokens   | [B, S] | int32   | 0 is padding (unless segment ids say more)   |
| decoder_input_tokens   | [B, T] | int32   | targets shifted right, start token 0         |
| decoder_target_tokens  | [B, T] | int32   |                                              |
| decoder_loss_weights   | [B, T] | float32 | 1 where a target counts                      |
| *_segment_ids          | [B, ·] | int32   | packed only: 0 is padding, 1, 2, … documents |
| *_positions            | [B, ·] | int32   | packed only: position within the segment     |
"""

import abc
import json
from pathlib import Path
from typing import Protocol

import numpy as np

from switch_jax.data.counter import random_bits
from switch_jax.errors import UserError
from switch_jax.schema import Config, DataConfig

Batch = dict[str, np.ndarray]

FEATURES = (
    "encoder_input_tokens",
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_loss_weights",
)
PACKED_FEATURES = (
    "encoder_segment_ids",
    "encoder_positions",
    "decoder_segment_ids",
    "decoder_positions",
)


class BatchIterator(Protocol):
    """An endless stream of this process's rows of each global batch.

    `save` writes, and `restore` reads, the position after the batch last returned, into
    a folder that belongs to the iterator alone.
    """

    def __iter__(self) -> "BatchIterator": ...
    def __next__(self) -> Batch: ...
    def save(self, directory: Path) -> None: ...
    def restore(self, directory: Path) -> None: ...


def rows_per_process(batch_size: int, process_count: int) -> int:
    """How many rows of a global batch each process feeds; raises `UserError`."""
    if batch_size % process_count:
        raise UserError(
            f"data.batch_size={batch_size} is not a multiple of the {process_count} processes;"
            " change one of them."
        )
    return batch_size // process_count


class RowIterator(abc.ABC):
    """A `BatchIterator` whose rows are numbered and depend on their number alone.

    Global batch k holds rows [k·batch_size, (k+1)·batch_size), of which each process feeds
    an equal, contiguous share. The only state is the number of the next row, so a position
    can be restored with any number of processes.
    """

    def __init__(self, batch_size: int, process_index: int, process_count: int, source: str):
        """`source` identifies the data; a position in other data is refused."""
        local = rows_per_process(batch_size, process_count)
        self._offsets = process_index * local + np.arange(local)
        self._batch_size = batch_size
        self._process_index = process_index
        self._source = source
        self._next_row = 0

    @abc.abstractmethod
    def rows(self, numbers: np.ndarray) -> Batch:
        """The rows with the given numbers, [B] int64, as a batch."""

    def __iter__(self) -> "RowIterator":
        return self

    def __next__(self) -> Batch:
        batch = self.rows(self._next_row + self._offsets)
        self._next_row += self._batch_size
        return batch

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # All processes write the same; each renames a file of its own.
        partial = directory / f"position.{self._process_index}.partial"
        partial.write_text(json.dumps({"next_row": self._next_row, "source": self._source}))
        partial.replace(directory / "position.json")

    def restore(self, directory: Path) -> None:
        """Raises `UserError` for a position in other data, and `OSError` or `ValueError` for
        one that is missing or damaged.
        """
        position = json.loads((directory / "position.json").read_text())
        if position["source"] != self._source:
            raise UserError(
                f"The position in {directory} belongs to other text or another vocabulary; set"
                " data.* to what it was made with (the built-in text differs between Pythons)."
            )
        self._next_row = position["next_row"]


class SyntheticIterator(RowIterator):
    """Random tokens without padding; packed, two segments of equal length a row.

    A row is a function of `data.seed` and its number.
    """

    def __init__(self, config: Config, process_index: int = 0, process_count: int = 1):
        data = config.data
        super().__init__(data.batch_size, process_index, process_count, source="synthetic")
        self._config = config

    def rows(self, numbers: np.ndarray) -> Batch:
        data, vocab_size = self._config.data, self._config.model.vocab_size
        lengths = (data.inputs_length, data.targets_length)
        bits = random_bits(data.seed, numbers, sum(lengths), stream=0)
        tokens = (1 + bits % np.uint64(max(1, vocab_size - 1))).astype(np.int32)
        inputs, targets = np.split(tokens, [data.inputs_length], axis=1)
        batch = {"encoder_input_tokens": inputs, "decoder_target_tokens": targets}
        positions = None
        if data.pack:
            for stack, length in zip(("encoder", "decoder"), lengths):
                segments, positions = np.divmod(np.arange(length), -(-length // 2))
                for name, row in (("segment_ids", 1 + segments), ("positions", positions)):
                    batch[f"{stack}_{name}"] = np.tile(row.astype(np.int32), (len(numbers), 1))
            positions = batch["decoder_positions"]
        batch["decoder_input_tokens"] = shifted_right(targets, positions)
        batch["decoder_loss_weights"] = np.ones(targets.shape, np.float32)
        return batch


def shifted_right(targets: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
    """Decoder inputs of targets [B, T]: 0 first, in every segment where `positions` tell them.

    Returns [B, T] of the same dtype.
    """
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return shifted if positions is None else np.where(positions == 0, 0, shifted)


def padded_batch(inputs: np.ndarray, targets: np.ndarray, data: DataConfig) -> Batch:
    """Rows of equal length, unpacked, with padding behind them.

    Args:
      inputs: [B, I] int32, I at most `inputs_length`.
      targets: [B, J] int32, J at most `targets_length`; all of them count.
    """
    weights = np.ones(targets.shape, np.float32)
    targets = _padded(targets, data.targets_length)
    return {
        "encoder_input_tokens": _padded(inputs, data.inputs_length),
        "decoder_input_tokens": shifted_right(targets),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": _padded(weights, data.targets_length),
    }


def _padded(rows: np.ndarray, length: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, length - rows.shape[1])))


def feature_shapes(config: Config) -> dict[str, tuple[tuple[int, int], type]]:
    """Shape and dtype of every feature of a global batch."""
    names = FEATURES + (PACKED_FEATURES if config.data.pack else ())
    lengths = {"encoder": config.data.inputs_length, "decoder": config.data.targets_length}
    return {
        name: (
            (config.data.batch_size, lengths[name.split("_")[0]]),
            np.float32 if name == "decoder_loss_weights" else np.int32,
        )
        for name in names
    }
