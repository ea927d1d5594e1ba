"""T5's span corruption: stretches of a text are cut out and become the target.

    tokens    Thank you for inviting me to your party last week
    inputs    Thank you <extra_id_0> me to your party <extra_id_1> week </s>
    targets   <extra_id_0> for inviting <extra_id_1> last </s>

15 % of the tokens are cut, in spans of 3 on average. How many tokens and spans depends on
the length alone, so lengths after corruption are known beforehand; where the spans lie is
uniform over all ways to alternate that many kept and cut spans, beginning with a kept one.

Sentinels count down from the vocabulary's last id. A text of more than 2000 tokens has more
than 100 spans; its last sentinels are then the vocabulary's rarest pieces, as in T5.
"""

from typing import NamedTuple

import numpy as np

from switch_jax.data.counter_rng import random_bits
from switch_jax.data.vocabulary import EOS
from switch_jax.errors import UserError

NOISE_DENSITY = 0.15
MEAN_SPAN = 3.0


class SpanLengths(NamedTuple):
    """How many tokens corruption takes and gives; inputs and targets include the EOS."""

    tokens: int
    inputs: int
    targets: int


def noise_and_spans(length: int) -> tuple[int, int]:
    """How many of `length` ≥ 2 tokens are cut out, and in how many spans."""
    # In float32, as T5 rounds: of 190 tokens and some other lengths one more is cut than in 64.
    noise = min(max(round(np.float32(length) * np.float32(NOISE_DENSITY)), 1), length - 1)
    return noise, max(round(noise / MEAN_SPAN), 1)


def corrupted_lengths(length: int) -> SpanLengths:
    """The lengths that `length` ≥ 1 tokens have when corrupted."""
    if length == 1:  # one token is kept; nothing is cut
        return SpanLengths(1, 2, 2)
    noise, spans = noise_and_spans(length)
    return SpanLengths(length, length - noise + spans + 1, noise + spans + 1)


def span_lengths(inputs_length: int, targets_length: int) -> SpanLengths:
    """The longest text whose corruption fits; 512 inputs hold 568 tokens and need 114 targets.

    Raises `UserError` where `inputs_length` holds nothing, or the targets that it needs are
    more than `targets_length`.
    """
    if inputs_length < 3:
        raise UserError(f"data.inputs_length must be at least 3, not {inputs_length}.")
    lengths = corrupted_lengths(2)
    while (longer := corrupted_lengths(lengths.tokens + 1)).inputs <= inputs_length:
        lengths = longer
    if lengths.targets > targets_length:
        raise UserError(
            f"data.targets_length={targets_length} is too short: span corruption with"
            f" data.inputs_length={inputs_length} needs {lengths.targets}."
        )
    return lengths


def noise_mask(length: int, seed: int, examples: np.ndarray) -> np.ndarray:
    """Which tokens are cut out.

    Args:
      length: L, the number of tokens, at least 1.
      examples: [B] numbers of the examples; a row depends on `seed` and its number only.

    Returns [B, L] bool.
    """
    padded = max(length, 2)
    noise, spans = noise_and_spans(padded)
    kept_spans = _partitions(padded - noise, spans, seed, examples, stream=0)
    noise_spans = _partitions(noise, spans, seed, examples, stream=1)
    alternating = np.stack([kept_spans, noise_spans], axis=2).reshape(len(examples), -1)
    borders = np.zeros((len(examples), padded), bool)
    np.put_along_axis(borders, np.cumsum(alternating, axis=1)[:, :-1], True, axis=1)
    return np.logical_xor.accumulate(borders, axis=1)[:, :length]


def corrupt_spans(
    tokens: np.ndarray, seed: int, examples: np.ndarray, first_sentinel: int
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts rows of equal length.

    Args:
      tokens: [B, L] integers.
      examples: [B] numbers of the examples; a row depends on `seed` and its number only.
      first_sentinel: id of `<extra_id_0>`.

    Returns inputs [B, I] and targets [B, T], int32, both with a final EOS; I and T are
    those of `corrupted_lengths(L)`.
    """
    mask = noise_mask(tokens.shape[1], seed, examples)
    return _with_sentinels(tokens, mask, first_sentinel), _with_sentinels(
        tokens, ~mask, first_sentinel
    )


def _partitions(total: int, parts: int, seed: int, examples: np.ndarray, stream: int) -> np.ndarray:
    """[B, parts] positive integers that sum to `total`, uniform over all such rows.

    A row is a choice of parts - 1 cuts among the total - 1 places between neighbours: those
    with the smallest random numbers.
    """
    cuts = np.full((len(examples), parts + 1), total)
    cuts[:, 0] = 0
    if parts > 1:
        places = random_bits(seed, examples, total - 1, stream)
        cuts[:, 1:-1] = 1 + np.argpartition(places, parts - 2, axis=1)[:, : parts - 1]
        cuts.sort(axis=1)
    return np.diff(cuts, axis=1)


def _with_sentinels(tokens: np.ndarray, mask: np.ndarray, first_sentinel: int) -> np.ndarray:
    """Puts one sentinel for each run in `mask` and an EOS at the end.

    Every row of `mask` has the same number of Trues and of runs, so rows stay equally long.
    """
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    sentinels = first_sentinel + 1 - np.cumsum(starts, axis=1)
    kept = np.where(starts, sentinels, tokens)[~mask | starts].reshape(len(tokens), -1)
    return np.pad(kept, ((0, 0), (0, 1)), constant_values=EOS).astype(np.int32)
