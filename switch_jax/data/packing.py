"""Several texts in one row: which ones, decided once, since lengths are known beforehand."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from switch_jax.cache import cache_root, made_once
from switch_jax.data.spans import SpanLengths, corrupted_lengths

_OPEN_ROWS = 32


class Plan(NamedTuple):
    """Pieces of documents and the rows they share.

    Piece i is tokens starts[i] to starts[i] + lengths[i] of the store; row r holds pieces
    members[row_offsets[r] : row_offsets[r + 1]], in that order.
    """

    starts: np.ndarray  # [pieces] int64
    lengths: np.ndarray  # [pieces] int64
    members: np.ndarray  # [pieces] int64, a permutation of the pieces
    row_offsets: np.ndarray  # [rows + 1] int64


def planned(key: str, offsets: np.ndarray, longest: SpanLengths, targets_length: int) -> Plan:
    """`plan`, from the cache where it was made before; `key` tells the arguments apart."""

    def build(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, **plan(offsets, longest, targets_length)._asdict())

    with np.load(made_once(cache_root() / "plans" / f"{key}.npz", build)) as arrays:
        return Plan(**arrays)


def plan(offsets: np.ndarray, longest: SpanLengths, targets_length: int) -> Plan:
    """Cuts documents into pieces and packs them, first fit in order of the documents.

    Args:
      offsets: [documents + 1] where documents begin and end.
      longest: `span_lengths` of the rows; no piece is longer.
      targets_length: of a row.
    """
    pieces = [np.arange(begin, end, longest.tokens) for begin, end in itertools.pairwise(offsets)]
    starts = np.concatenate([np.zeros(0, np.int64), *pieces])
    ends = np.repeat(offsets[1:], [len(p) for p in pieces])
    lengths = np.minimum(ends - starts, longest.tokens)
    sizes = {int(length): corrupted_lengths(int(length)) for length in np.unique(lengths)}
    rows = _first_fit([sizes[int(n)] for n in lengths], longest.inputs, targets_length)
    members = np.array([piece for row in rows for piece in row], np.int64)
    row_offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Plan(starts, lengths, members, row_offsets)


def _first_fit(
    sizes: list[SpanLengths], inputs_length: int, targets_length: int
) -> list[list[int]]:
    """The pieces of each row. A few rows are open at a time; the fullest makes way for a new."""
    done: list[list[int]] = []
    open_rows: list[tuple[list[int], int, int]] = []  # pieces, room for inputs and for targets
    for piece, size in enumerate(sizes):
        for i, (row, inputs, targets) in enumerate(open_rows):
            if size.inputs <= inputs and size.targets <= targets:
                row.append(piece)
                open_rows[i] = (row, inputs - size.inputs, targets - size.targets)
                break
        else:
            if len(open_rows) == _OPEN_ROWS:
                fullest = min(range(_OPEN_ROWS), key=lambda i: open_rows[i][1])
                done.append(open_rows.pop(fullest)[0])
            open_rows.append(([piece], inputs_length - size.inputs, targets_length - size.targets))
    return done + [row for row, _, _ in open_rows]
