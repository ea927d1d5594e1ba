"""Denoisers of text in NumPy: part of a text is noise; the decoder predicts it from the rest.

    tokens            Thank you for inviting me to your party last week
    SpanCorruption    inputs   Thank you <extra_id_0> me to your party <extra_id_1> week </s>
                      targets  <extra_id_0> for inviting <extra_id_1> last </s>
    IidDenoising      the same, but every token is noise independently of the others
    PrefixLM          inputs   Thank you for inviting me to </s>
                      targets  your party last week </s>

The numbers of noise tokens and of runs of noise (`Noise`) determine the lengths of inputs and
targets. Given these numbers, all placements of the noise are equally likely. So a plan of packed
rows needs the numbers only, and every epoch can place the noise differently. (A prefix has one
place.)

Run i has sentinel i of the vocabulary, in the inputs and in the targets.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from switch_jax.data.counter_rng import random_bits

# Streams of random numbers (counter_rng.py).
_KEPT_RUNS, _NOISE_RUNS, _TOKENS, _PREFIX = range(_STREAMS := 4)
_STANDARD_DEVIATIONS = 5  # above the mean: the limit of a sum of random numbers
_CHUNK = 2**22  # random numbers at a time


class Noise(NamedTuple):
    """Numbers that describe the noise of texts: [B] int64, or scalars for equal texts."""

    tokens: np.ndarray  # noise tokens
    runs: np.ndarray  # runs of noise tokens
    kept_runs: np.ndarray  # runs of other tokens
    first: np.ndarray  # 1 if the first token is noise, else 0


class Sizes(NamedTuple):
    """Lengths of inputs and targets, each with the EOS, and the number of sentinels in them."""

    inputs: int
    targets: int
    sentinels: int


class Denoiser(Protocol):
    """A distribution of the noise in a text.

    Attributes:
      marks_runs: whether inputs and targets have sentinels in place of what they omit.
    """

    marks_runs: bool

    def noise(self, length: int, seed: int, numbers: np.ndarray) -> Noise:
        """Returns the noise of B texts of `length` ≥ 1 tokens, given [B] numbers of the texts."""

    def largest(self, length: int) -> Sizes:
        """Returns the largest sizes that a text of `length` ≥ 1 tokens can have."""


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """T5's span corruption: the numbers of noise tokens and runs depend on the length alone.

    A text begins with a kept run and ends with noise; of a single token nothing is noise.
    """

    noise_density: float = 0.15
    mean_span: float = 3.0
    marks_runs = True

    def counts(self, length: int) -> tuple[int, int]:
        """Returns the numbers of noise tokens and of noise runs of `length` ≥ 1 tokens."""
        if length == 1:
            return 0, 0
        # In float32, as in T5: 190 tokens, and some other lengths, give one more than in float64.
        noise = round(np.float32(length) * np.float32(self.noise_density))
        noise = min(max(noise, 1), length - 1)
        return noise, min(max(round(noise / self.mean_span), 1), length - noise)

    def noise(self, length: int, seed: int, numbers: np.ndarray) -> Noise:
        noise, runs = self.counts(length)
        return Noise(*(np.full(len(numbers), n) for n in (noise, runs, max(runs, 1), 0)))

    def largest(self, length: int) -> Sizes:
        noise, runs = self.counts(length)
        return Sizes(length - noise + runs + 1, noise + max(runs, 1) + 1, max(runs, 1))


@dataclasses.dataclass(frozen=True)
class IidDenoising:
    """T5's i.i.d. denoising: each token is noise with the same probability.

    As in T5, the targets end with a sentinel if the text ends with a kept run, and begin without
    one if it begins with noise. The noise of three texts in 10^7 is drawn again, since their
    targets would be longer than `largest` says.
    """

    noise_density: float = 0.15
    marks_runs = True

    def noise(self, length: int, seed: int, numbers: np.ndarray) -> Noise:
        largest = self.largest(length).targets
        noise = np.zeros((4, len(numbers)), np.int64)
        drawn_again = np.arange(len(numbers))
        stream = _TOKENS
        while len(drawn_again):
            noise[:, drawn_again] = self._draw(length, seed, numbers[drawn_again], stream)
            drawn_again = np.flatnonzero(noise[0] + noise[2] + 1 > largest)
            stream += _STREAMS
        return Noise(*noise)

    def _draw(self, length: int, seed: int, numbers: np.ndarray, stream: int) -> np.ndarray:
        """[4, B]: the fields of `Noise`, without a limit."""
        limit = np.uint64(self.noise_density * 2**64)
        rows = max(1, _CHUNK // length)
        parts = []
        for start in range(0, len(numbers), rows):
            mask = random_bits(seed, numbers[start : start + rows], length, stream) < limit
            first = mask[:, 0].astype(np.int64)
            changes = mask[:, 1:] != mask[:, :-1]
            runs = first + (changes & mask[:, 1:]).sum(1)
            parts.append(np.stack([mask.sum(1), runs, changes.sum(1) + 1 - runs, first]))
        return np.concatenate(parts, axis=1)

    def largest(self, length: int) -> Sizes:
        # Each token that is noise or follows noise makes a target token: itself, or the sentinel of
        # a kept run. Each noise token that follows a kept one begins a run. The roots are standard
        # deviations, since neighbours are independent but for the token they share.
        n, q = length, 1 - self.noise_density
        both_kept, begins = q * q, q * (1 - q)
        deviation = math.sqrt(n * (both_kept * (1 - both_kept) + 2 * both_kept * begins))
        targets = math.ceil(n * (1 - both_kept) + 2 + _STANDARD_DEVIATIONS * deviation)
        deviation = math.sqrt(n * begins * (1 - 3 * begins))
        runs = math.ceil(n * begins + 1 + _STANDARD_DEVIATIONS * deviation)
        return Sizes(n + 1, min(n + 2, targets), min(n // 2 + 1, runs))


@dataclasses.dataclass(frozen=True)
class PrefixLM:
    """T5's prefix language modelling: a prefix of random length, without sentinels.

    The length is uniform, from (1 - 2 · `noise_density`) of the text, but at least one token, to
    all tokens but one.
    """

    noise_density: float = 0.5
    marks_runs = False

    def shortest(self, length: int) -> int:
        """Returns the smallest number of tokens of the prefix."""
        share = np.float32(1 - 2 * self.noise_density) * np.float32(length - 1)  # as in T5
        return min(length - 1, max(1, int(np.rint(share))))

    def noise(self, length: int, seed: int, numbers: np.ndarray) -> Noise:
        shortest = self.shortest(length)
        bits = random_bits(seed, numbers, 1, _PREFIX)[:, 0]
        kept = shortest + (bits % np.uint64(length - shortest)).astype(np.int64)
        has_prefix = np.minimum(kept, 1)
        return Noise(length - kept, np.ones_like(kept), has_prefix, 1 - has_prefix)

    def largest(self, length: int) -> Sizes:
        return Sizes(max(length, 2), length - self.shortest(length) + 1, 0)


def noise_mask(length: int, noise: Noise, seed: int, examples: np.ndarray) -> np.ndarray:
    """[B, L] bool: True at noise tokens; uniform over all masks with these numbers.

    Args:
      length: L, the number of tokens, at least 1.
      noise: scalars.
      examples: [B] numbers of the examples; a row depends on `seed` and its number only.
    """
    tokens, runs, kept_runs, first = map(int, noise)
    kept_lengths = _partitions(length - tokens, kept_runs, seed, examples, _KEPT_RUNS)
    noise_lengths = _partitions(tokens, runs, seed, examples, _NOISE_RUNS)
    lengths = np.empty((len(examples), runs + kept_runs), np.int64)
    lengths[:, first::2], lengths[:, 1 - first :: 2] = kept_lengths, noise_lengths
    borders = np.zeros((len(examples), length), bool)
    borders[:, 0] = first
    np.put_along_axis(borders, np.cumsum(lengths, axis=1)[:, :-1], True, axis=1)
    return np.logical_xor.accumulate(borders, axis=1)


def split_tokens(
    tokens: np.ndarray, mask: np.ndarray, marks_runs: bool, sentinels: Sequence[int], eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs [B, I] and targets [B, J], int32, each with a final EOS.

    Args:
      tokens: [B, L] integers.
      mask: [B, L], True at noise; all rows have the same numbers of noise tokens and runs.
      sentinels: ids of `<extra_id_0>`, `<extra_id_1>`, …; the last one marks all further runs.
    """
    sides = []
    for omitted in (mask, ~mask):
        starts = omitted.copy()
        starts[:, 1:] &= ~omitted[:, :-1]
        if marks_runs:
            ids = np.array(sentinels)
            # -1, unused, before the first
            run = np.minimum(np.cumsum(starts, axis=1), len(ids)) - 1
            side = np.where(starts, ids[run], tokens)[~omitted | starts]
        else:
            side = tokens[~omitted]
        side = side.reshape(len(tokens), -1)
        sides.append(np.pad(side, ((0, 0), (0, 1)), constant_values=eos_id).astype(np.int32))
    return sides[0], sides[1]


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
