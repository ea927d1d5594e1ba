"""Sequence packing: which pieces of documents share a row.

The lengths of inputs and targets are known beforehand, so the plan is made once and kept in the
cache.
"""

import itertools
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from switch_jax.data.objectives import Objective
from switch_jax.errors import UserError
from switch_jax.files import build_once, cache_root

_OPEN_ROWS = 32  # rows that can still take a piece, at most


class RowPlan(NamedTuple):
    """Pieces of documents, and the pieces of each row.

    Piece i is the tokens starts[i] to starts[i] + lengths[i] of a split; row r consists of the
    pieces members[row_offsets[r] : row_offsets[r + 1]], in that order.
    """

    starts: np.ndarray  # [pieces] int64
    lengths: np.ndarray  # [pieces] int64
    members: np.ndarray  # [pieces] int64, a permutation of the pieces
    row_offsets: np.ndarray  # [rows + 1] int64


def cached_row_plan(
    key: str,
    plan: Callable[[np.ndarray, int, int], RowPlan],
    offsets: np.ndarray,
    inputs_length: int,
    targets_length: int,
) -> RowPlan:
    """Returns `plan(offsets, inputs_length, targets_length)`, cached under the name `key`."""

    def build(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, **plan(offsets, inputs_length, targets_length)._asdict())

    path = build_once(cache_root() / "plans" / f"{key}.npz", build)
    try:
        with np.load(path) as arrays:
            return RowPlan(**arrays)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and it is made again.") from error


def plan_rows(
    offsets: np.ndarray,
    inputs_length: int,
    targets_length: int,
    objective: Objective,
    first_number: int,
) -> RowPlan:
    """Plans rows of text: first fit, in the order of the documents.

    Documents are cut into pieces that fit a row under the objective.

    Args:
      offsets: [documents + 1] int64 begins and ends of the documents in the split's tokens.
      inputs_length, targets_length: tokens of a row.
      first_number: piece i has the number first_number + i, modulo 2^64, in `Objective.sizes`.
    """
    longest = objective.text_length(inputs_length, targets_length)
    pieces = [np.arange(begin, end, longest) for begin, end in itertools.pairwise(offsets)]
    starts = np.concatenate([np.zeros(0, np.int64), *pieces])
    ends = np.repeat(offsets[1:], [len(p) for p in pieces])
    lengths = np.minimum(ends - starts, longest)
    numbers = np.arange(len(lengths), dtype=np.uint64) + np.uint64(first_number)
    sizes = objective.sizes(lengths, numbers).tolist()
    return RowPlan(starts, lengths, *_first_fit(sizes, inputs_length, targets_length))


def plan_pairs(offsets: np.ndarray, inputs_length: int, targets_length: int) -> RowPlan:
    """Plans rows of pairs: first fit, in the order of the pairs.

    Documents are inputs and targets in turn. Piece i is pair i: starts[i] is i, lengths[i] is 1.

    Args:
      offsets: [2 · pairs + 1] int64 begins and ends of the documents in the split's tokens.
      inputs_length, targets_length: tokens of a row.
    """
    lengths = np.diff(offsets).reshape(-1, 2) + 1  # with an EOS
    sizes = np.minimum(lengths, [inputs_length, targets_length])
    numbers = np.arange(len(sizes))
    rows = _first_fit(sizes.tolist(), inputs_length, targets_length)
    return RowPlan(numbers, np.ones_like(numbers), *rows)


def _first_fit(
    sizes: list[list[int]], inputs_length: int, targets_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `members` and `row_offsets` of a plan.

    At most `_OPEN_ROWS` rows are open at a time; the fullest is closed to open another one.

    Args:
      sizes: numbers of input and target tokens of each piece.
    """
    closed: list[list[int]] = []
    open_rows: list[tuple[list[int], int, int]] = []  # pieces, free inputs, free targets
    for piece, size in enumerate(sizes):
        for i, (row, inputs, targets) in enumerate(open_rows):
            if size[0] <= inputs and size[1] <= targets:
                row.append(piece)
                open_rows[i] = (row, inputs - size[0], targets - size[1])
                break
        else:
            if len(open_rows) == _OPEN_ROWS:
                fullest = min(range(_OPEN_ROWS), key=lambda i: open_rows[i][1])
                closed.append(open_rows.pop(fullest)[0])
            open_rows.append(([piece], inputs_length - size[0], targets_length - size[1]))
    closed += [row for row, _, _ in open_rows]
    members = np.array([piece for row in closed for piece in row], np.int64)
    return members, np.cumsum([0, *map(len, closed)], dtype=np.int64)
