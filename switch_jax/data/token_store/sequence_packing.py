"""Several texts in one row: which ones, decided once, since lengths are known beforehand."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from switch_jax.data.span_corruption import corrupted_lengths, span_lengths
from switch_jax.files import build_once, cache_root

_OPEN_ROWS = 32
Planner = Callable[[np.ndarray, int, int], "RowPlan"]


class RowPlan(NamedTuple):
    """Pieces of documents and the rows they share.

    Piece i is tokens starts[i] to starts[i] + lengths[i] of the store; row r holds pieces
    members[row_offsets[r] : row_offsets[r + 1]], in that order.
    """

    starts: np.ndarray  # [pieces] int64
    lengths: np.ndarray  # [pieces] int64
    members: np.ndarray  # [pieces] int64, a permutation of the pieces
    row_offsets: np.ndarray  # [rows + 1] int64


def planned(
    key: str, make: Planner, offsets: np.ndarray, inputs_length: int, targets_length: int
) -> RowPlan:
    """What `make` plans, from the cache where it was made before; `key` tells plans apart."""

    def build(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, **make(offsets, inputs_length, targets_length)._asdict())

    with np.load(build_once(cache_root() / "plans" / f"{key}.npz", build)) as arrays:
        return RowPlan(**arrays)


def plan_rows(offsets: np.ndarray, inputs_length: int, targets_length: int) -> RowPlan:
    """Cuts documents into pieces and packs them, first fit in order of the documents.

    No piece is longer than what fills a row when it is corrupted.

    Args:
      offsets: [documents + 1] where documents begin and end.
      inputs_length, targets_length: of a row.
    """
    longest = span_lengths(inputs_length, targets_length).tokens
    pieces = [np.arange(begin, end, longest) for begin, end in itertools.pairwise(offsets)]
    starts = np.concatenate([np.zeros(0, np.int64), *pieces])
    ends = np.repeat(offsets[1:], [len(p) for p in pieces])
    lengths = np.minimum(ends - starts, longest)
    sizes = {int(length): corrupted_lengths(int(length)) for length in np.unique(lengths)}
    fits = [(sizes[int(n)].inputs, sizes[int(n)].targets) for n in lengths]
    return RowPlan(starts, lengths, *_first_fit(fits, inputs_length, targets_length))


def plan_pairs(offsets: np.ndarray, inputs_length: int, targets_length: int) -> RowPlan:
    """As `plan`, of documents that are inputs and targets in turn: piece i is the i-th pair."""
    sides = np.diff(offsets).reshape(-1, 2)
    most = np.array([inputs_length, targets_length])
    fits = [(int(x), int(y)) for x, y in np.minimum(sides + 1, most)]  # with an EOS
    numbers = np.arange(len(fits))
    return RowPlan(numbers, np.ones_like(numbers), *_first_fit(fits, inputs_length, targets_length))


def _first_fit(
    sizes: list[tuple[int, int]], inputs_length: int, targets_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """`members` and `row_offsets` of a plan for pieces with so many inputs and targets.

    A few rows are open at a time; the fullest makes way for a new one.
    """
    done: list[list[int]] = []
    open_rows: list[tuple[list[int], int, int]] = []  # pieces, room for inputs and for targets
    for piece, size in enumerate(sizes):
        for i, (row, inputs, targets) in enumerate(open_rows):
            if size[0] <= inputs and size[1] <= targets:
                row.append(piece)
                open_rows[i] = (row, inputs - size[0], targets - size[1])
                break
        else:
            if len(open_rows) == _OPEN_ROWS:
                fullest = min(range(_OPEN_ROWS), key=lambda i: open_rows[i][1])
                done.append(open_rows.pop(fullest)[0])
            open_rows.append(([piece], inputs_length - size[0], targets_length - size[1]))
    done += [row for row, _, _ in open_rows]
    members = np.array([piece for row in done for piece in row], np.int64)
    return members, np.cumsum([0, *map(len, done)], dtype=np.int64)
