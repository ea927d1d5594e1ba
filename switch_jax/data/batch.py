"""Batches: their features, which rows a process reads, iterators, and synthetic batches.

A batch is a dict of NumPy arrays with the T5X feature names. B is the number of rows that this
process reads, S and T are the lengths of inputs and targets.

| feature                | shape  | dtype   |                                              |
|------------------------|--------|---------|----------------------------------------------|
| encoder_input_tokens   | [B, S] | int32   | unpacked: model.pad_id is padding            |
| decoder_input_tokens   | [B, T] | int32   | targets shifted right, after model.start_id  |
| decoder_target_tokens  | [B, T] | int32   |                                              |
| decoder_loss_weights   | [B, T] | float32 | 1 where a target counts in the loss, else 0  |
| *_segment_ids          | [B, ·] | int32   | packed only: 0 is padding, 1, 2, … documents |
| *_positions            | [B, ·] | int32   | packed only: position within the segment     |
"""

import abc
import dataclasses
import json
from pathlib import Path
from typing import Protocol

import numpy as np

from switch_jax.config import Config, ModelConfig
from switch_jax.data.counter_rng import random_bits
from switch_jax.errors import UserError

Batch = dict[str, np.ndarray]
"""Arrays of the rows of a process by T5X's feature names, each [rows, length]."""


@dataclasses.dataclass(frozen=True)
class ProcessRows:
    """The rows of each global batch that one process reads.

    A batch is split into `num_parts` equal parts. Processes whose devices hold the same parts read
    the same rows; they form a group.
    """

    num_parts: int = 1
    parts: tuple[int, ...] = (0,)  # read by this process; ascending, not always consecutive
    group: int = 0  # index of this process's group
    num_groups: int = 1
    first_in_group: bool = True  # this process saves the position of its group

    @property
    def is_first(self) -> bool:
        """Whether this is the first process of the first group; it prints and saves for all."""
        return self.group == 0 and self.first_in_group

    def indices(self, batch_size: int) -> np.ndarray:
        """[B] int64 indices of the rows in a global batch, ascending.

        Raises `UserError` where `batch_size` is not a multiple of `num_parts`.
        """
        if batch_size % self.num_parts:
            raise UserError(
                f"data.batch_size={batch_size} does not divide into {self.num_parts} parts, one"
                " for each process or device; change one of them."
            )
        return np.arange(batch_size).reshape(self.num_parts, -1)[list(self.parts)].reshape(-1)


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
    """An endless iterator over this process's rows of each global batch.

    `save` writes the position after the batch last returned into a folder that only this iterator
    uses; `restore` reads it.
    """

    def __iter__(self) -> "BatchIterator": ...
    def __next__(self) -> Batch: ...
    def save(self, directory: Path) -> None: ...
    def restore(self, directory: Path) -> None: ...


def data_of_position(folder: Path) -> str | None:
    """Returns the identity of the data that a `RowIterator` saved with its position.

    It is a hash of text, rates, lengths, vocabulary and seed. None: `folder` has none, as of the
    seqio reader, whose position depends on the number of processes, too.
    """
    file = folder / "position.json"
    return str(json.loads(file.read_text())["source"]) if file.is_file() else None


class RowIterator(abc.ABC):
    """A `BatchIterator` whose rows are numbered; a row depends on its number alone.

    Global batch k holds rows [k·batch_size, (k+1)·batch_size). The only state is the number of
    the next row, so a position can be restored with any number of processes.

    Args:
      source: identifies the data; `restore` refuses a position in other data.
    """

    def __init__(self, batch_size: int, process_rows: ProcessRows, source: str):
        self._indices = process_rows.indices(batch_size)
        self._batch_size = batch_size
        self._saves = process_rows.is_first
        self._source = source
        self._next_row = 0

    @abc.abstractmethod
    def make_rows(self, numbers: np.ndarray) -> Batch:
        """Makes the rows with the given numbers, [B] int64."""

    def __iter__(self) -> "RowIterator":
        return self

    def __next__(self) -> Batch:
        batch = self.make_rows(self._next_row + self._indices)
        self._next_row += self._batch_size
        return batch

    def save(self, directory: Path) -> None:
        """Writes `position.json`; only the first process does, the position is the same in all."""
        if self._saves:
            directory.mkdir(parents=True, exist_ok=True)
            position = json.dumps({"next_row": self._next_row, "source": self._source})
            (directory / "position.json").write_text(position)

    def restore(self, directory: Path) -> None:
        """Reads `position.json`.

        Raises `UserError` for a position in other data, and `OSError` or `ValueError` for one that
        is missing or damaged.
        """
        position = json.loads((directory / "position.json").read_text())
        known = {"source": str, "next_row": int}
        if not isinstance(position, dict) or known != {k: type(x) for k, x in position.items()}:
            raise ValueError(f"{directory} has no position")
        if position["source"] != self._source:
            raise UserError(
                f"The position in {directory} belongs to other text, rates, lengths or another"
                " vocabulary or seed; set data.* to what it was made with (python_docs and"
                " python_docstrings differ between installations)."
            )
        self._next_row = position["next_row"]


class SyntheticIterator(RowIterator):
    """Random tokens, none of them padding; with packing, two segments of equal length in a row.

    A row is a function of `data.seed` and its number.
    """

    def __init__(self, config: Config, process_rows: ProcessRows = ALL_ROWS):
        super().__init__(config.data.batch_size, process_rows, source="synthetic")
        self._config = config

    def make_rows(self, numbers: np.ndarray) -> Batch:
        data, model = self._config.data, self._config.model
        lengths = (data.inputs_length, data.targets_length)
        bits = random_bits(data.seed, numbers, sum(lengths), stream=0)
        tokens = (bits % np.uint64(max(1, model.vocab_size - 1))).astype(np.int32)
        tokens += tokens >= model.pad_id
        inputs, targets = np.split(tokens, [data.inputs_length], axis=1)
        batch = {"encoder_input_tokens": inputs, "decoder_target_tokens": targets}
        positions = None
        if data.pack:
            for stack, length in zip(("encoder", "decoder"), lengths):
                segments, positions = np.divmod(np.arange(length), -(-length // 2))
                for name, values in (("segment_ids", 1 + segments), ("positions", positions)):
                    row = values.astype(np.int32)
                    batch[f"{stack}_{name}"] = np.tile(row, (len(numbers), 1))
            positions = batch["decoder_positions"]
        batch["decoder_input_tokens"] = shift_right(targets, model.start_id, positions)
        batch["decoder_loss_weights"] = np.ones(targets.shape, np.float32)
        return batch


def shift_right(
    targets: np.ndarray, start_id: int, positions: np.ndarray | None = None
) -> np.ndarray:
    """Returns the decoder inputs of targets: the targets shifted right, after a start token.

    Args:
      targets: [B, T] integers.
      start_id: id of the start token.
      positions: [B, T] positions within the segments of packed targets; every segment then begins
        with the start token.

    Returns [B, T] of the same dtype.
    """
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=start_id)
    if positions is None:
        return shifted
    return np.where(positions == 0, start_id, shifted)


def padding_value(feature: str, model: ModelConfig) -> int:
    """Returns what a feature has at padding: `model.pad_id` for tokens, else 0."""
    return model.pad_id if feature.endswith("_tokens") else 0


def add_padding_rows(batch: Batch, count: int, model: ModelConfig) -> Batch:
    """Returns a batch with `count` more rows of padding behind its own."""
    return {
        name: np.pad(rows, ((0, count), (0, 0)), constant_values=padding_value(name, model))
        for name, rows in batch.items()
    }


def padded_batch(inputs: np.ndarray, targets: np.ndarray, config: Config) -> Batch:
    """Returns an unpacked batch of rows of equal length, padded at the end.

    Args:
      inputs: [B, I] int32, I at most `data.inputs_length`.
      targets: [B, J] int32, J at most `data.targets_length`; all of them count in the loss.
    """
    data, model = config.data, config.model
    weights = np.ones(targets.shape, np.float32)
    targets = _pad(targets, data.targets_length, model.pad_id)
    return {
        "encoder_input_tokens": _pad(inputs, data.inputs_length, model.pad_id),
        "decoder_input_tokens": shift_right(targets, model.start_id),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": _pad(weights, data.targets_length, 0),
    }


def _pad(rows: np.ndarray, length: int, value: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, length - rows.shape[1])), constant_values=value)


def feature_shapes(config: Config) -> dict[str, tuple[tuple[int, int], type]]:
    """Returns the shape and dtype of every feature of a global batch."""
    names = FEATURES + (PACKED_FEATURES if config.data.pack else ())
    lengths = {"encoder": config.data.inputs_length, "decoder": config.data.targets_length}
    return {
        name: (
            (config.data.batch_size, lengths[name.split("_")[0]]),
            np.float32 if name == "decoder_loss_weights" else np.int32,
        )
        for name in names
    }
