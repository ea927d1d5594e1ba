"""T5's span corruption in NumPy: spans of a text are replaced by sentinels and become the target.

    tokens    Thank you for inviting me to your party last week
    inputs    Thank you <extra_id_0> me to your party <extra_id_1> week </s>
    targets   <extra_id_0> for inviting <extra_id_1> last </s>

15 % of the tokens are noise, in spans of 3 on average. The numbers of noise tokens and spans depend
on the length alone, so the lengths after corruption are known beforehand. The placement is uniform
over all alternations of that many kept and noise spans that begin with a kept span.

Span i has sentinel i of the vocabulary. A text of more than 2009 tokens has more than 100 spans, so
it needs a vocabulary with more sentinels than T5's.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from switch_jax.data.counter_rng import random_bits
from switch_jax.errors import UserError

NOISE_DENSITY = 0.15
MEAN_SPAN = 3.0


class SpanLengths(NamedTuple):
    """Numbers of tokens before and after corruption; inputs and targets include the EOS."""

    tokens: int
    inputs: int
    targets: int


def noise_and_spans(length: int) -> tuple[int, int]:
    """Returns the numbers of noise tokens and of noise spans of `length` ≥ 2 tokens."""
    # In float32, as in T5: 190 tokens, and some other lengths, give one more than in float64.
    noise = min(max(round(np.float32(length) * np.float32(NOISE_DENSITY)), 1), length - 1)
    return noise, max(round(noise / MEAN_SPAN), 1)


def corrupted_lengths(length: int) -> SpanLengths:
    """Returns the lengths of inputs and targets of `length` ≥ 1 tokens."""
    if length == 1:  # a single token is kept
        return SpanLengths(1, 2, 2)
    noise, spans = noise_and_spans(length)
    return SpanLengths(length, length - noise + spans + 1, noise + spans + 1)


def span_lengths(inputs_length: int, targets_length: int) -> SpanLengths:
    """Returns the lengths of the longest text whose corruption fits.

    For example, 512 inputs hold 568 tokens and need 114 targets.

    Raises `UserError` if `inputs_length` is below 3, or if the text needs more targets than
    `targets_length`.
    """
    if inputs_length < 3:
        raise UserError(f"data.inputs_length must be at least 3, not {inputs_length}.")
    tokens = range(3, 2 * inputs_length)  # longer texts never have fewer inputs
    count = bisect.bisect_right(tokens, inputs_length, key=lambda n: corrupted_lengths(n).inputs)
    lengths = corrupted_lengths(2 + count)
    if lengths.targets > targets_length:
        raise UserError(
            f"data.targets_length={targets_length} is too short: span corruption with"
            f" data.inputs_length={inputs_length} needs {lengths.targets}."
        )
    return lengths


def noise_mask(length: int, seed: int, examples: np.ndarray) -> np.ndarray:
    """[B, L] bool: True at noise tokens.

    Args:
      length: L, the number of tokens, at least 1.
      examples: [B] numbers of the examples; a row depends on `seed` and its number only.
    """
    padded = max(length, 2)
    noise, spans = noise_and_spans(padded)
    kept_lengths = _partitions(padded - noise, spans, seed, examples, stream=0)
    noise_lengths = _partitions(noise, spans, seed, examples, stream=1)
    all_lengths = np.stack([kept_lengths, noise_lengths], axis=2).reshape(len(examples), -1)
    borders = np.zeros((len(examples), padded), bool)
    np.put_along_axis(borders, np.cumsum(all_lengths, axis=1)[:, :-1], True, axis=1)
    return np.logical_xor.accumulate(borders, axis=1)[:, :length]


def corrupt_spans(
    tokens: np.ndarray, seed: int, examples: np.ndarray, sentinels: Sequence[int], eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts texts of equal length.

    Args:
      tokens: [B, L] integers.
      examples: [B] numbers of the examples; a row depends on `seed` and its number only.
      sentinels: ids of `<extra_id_0>`, `<extra_id_1>`, …, at least as many as there are spans.

    Returns inputs [B, I] and targets [B, T], int32, both with a final EOS; I and T are
    given by `corrupted_lengths(L)`.
    """
    mask = noise_mask(tokens.shape[1], seed, examples)
    ids = np.array(sentinels)
    return _replace_runs(tokens, mask, ids, eos_id), _replace_runs(tokens, ~mask, ids, eos_id)


def _partitions(total: int, parts: int, seed: int, examples: np.ndarray, stream: int) -> np.ndarray:
    """[B, parts] positive integers; rows sum to `total` and are uniform over all such rows.

    A row is a choice of parts - 1 cuts among the total - 1 places between neighbours: the places
    with the smallest random numbers.
    """
    cuts = np.full((len(examples), parts + 1), total)
    cuts[:, 0] = 0
    if parts > 1:
        bits = random_bits(seed, examples, total - 1, stream)
        cuts[:, 1:-1] = 1 + np.argpartition(bits, parts - 2, axis=1)[:, : parts - 1]
        cuts.sort(axis=1)
    return np.diff(cuts, axis=1)


def _replace_runs(
    tokens: np.ndarray, mask: np.ndarray, sentinels: np.ndarray, eos_id: int
) -> np.ndarray:
    """Replaces each run of Trues in `mask` [B, L] by the next sentinel, and appends an EOS.

    Every row of `mask` has the same number of Trues and of runs, so rows stay equally long.
    """
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    sentinel_of_run = sentinels[np.cumsum(starts, axis=1) - 1]  # -1, unused, before the first
    kept = np.where(starts, sentinel_of_run, tokens)[~mask | starts].reshape(len(tokens), -1)
    return np.pad(kept, ((0, 0), (0, 1)), constant_values=eos_id).astype(np.int32)
