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
import dataclasses
import json
from pathlib import Path
from typing import Protocol

import numpy as np

from switch_jax.config import Config, DataConfig
from switch_jax.data.counter_rng import random_bits
from switch_jax.errors import UserError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ProcessRows:
    """The rows of each global batch that one process feeds, with the batch cut in `parts`.

    Processes whose devices hold the same rows feed the same ones: they are one feed.
    """

    parts: int = 1
    held: tuple[int, ...] = (0,)  # ascending; a mesh need not give a process neighbours
    index: int = 0  # of this feed
    count: int = 1  # of different feeds
    saves: bool = True  # whether this process is the first of its feed

    def rows(self, batch_size: int) -> np.ndarray:
        """Their places in a batch, ascending; raises `UserError`."""
        if batch_size % self.parts:
            raise UserError(
                f"data.batch_size={batch_size} does not divide into {self.parts} parts, one for"
                " each process or device; change one of them."
            )
        return np.arange(batch_size).reshape(self.parts, -1)[list(self.held)].reshape(-1)


ALL_ROWS = ProcessRows()
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
    a folder that belongs to the iterator alone. After `epoch` rows of all processes together it
    begins anew; None where that is not known.
    """

    epoch: int | None

    def __iter__(self) -> "BatchIterator": ...
    def __next__(self) -> Batch: ...
    def save(self, directory: Path) -> None: ...
    def restore(self, directory: Path) -> None: ...


class RowIterator(abc.ABC):
    """A `BatchIterator` whose rows are numbered and depend on their number alone.

    Global batch k holds rows [k·batch_size, (k+1)·batch_size). The only state is the number of
    the next row, so a position can be restored with any number of processes.
    """

    def __init__(self, batch_size: int, feed: ProcessRows, source: str):
        """`source` identifies the data; a position in other data is refused."""
        self._offsets = feed.rows(batch_size)
        self._batch_size = batch_size
        self._saves = feed.saves and feed.index == 0
        self._source = source
        self._next_row = 0
        self.epoch: int | None = None

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
        if self._saves:  # it is the same for all processes
            directory.mkdir(parents=True, exist_ok=True)
            position = json.dumps({"next_row": self._next_row, "source": self._source})
            (directory / "position.json").write_text(position)

    def restore(self, directory: Path) -> None:
        """Raises `UserError` for a position in other data, and `OSError` or `ValueError` for
        one that is missing or damaged.
        """
        position = json.loads((directory / "position.json").read_text())
        if position["source"] != self._source:
            raise UserError(
                f"The position in {directory} belongs to other text, rates, lengths or another"
                " vocabulary or seed; set data.* to what it was made with (the text of python_docs"
                " differs between Pythons)."
            )
        self._next_row = position["next_row"]


class SyntheticIterator(RowIterator):
    """Random tokens without padding; packed, two segments of equal length a row.

    A row is a function of `data.seed` and its number.
    """

    def __init__(self, config: Config, feed: ProcessRows = ALL_ROWS):
        super().__init__(config.data.batch_size, feed, source="synthetic")
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
        batch["decoder_input_tokens"] = shift_right(targets, positions)
        batch["decoder_loss_weights"] = np.ones(targets.shape, np.float32)
        return batch


def shift_right(targets: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
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
        "decoder_input_tokens": shift_right(targets),
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
