"""Pretraining objectives: `data.objective` as a mixture of denoisers.

Each text takes one denoiser of the objective at random, at the rates in `OBJECTIVES`. UL2's
denoisers put a mode before the inputs, which the model can be given in fine-tuning, too.
"""

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from switch_jax.config import Config
from switch_jax.data.counter_rng import derived_seed, random_bits
from switch_jax.data.denoising import (
    Denoiser,
    IidDenoising,
    Noise,
    PrefixLM,
    Sizes,
    SpanCorruption,
    noise_mask,
    split_tokens,
)
from switch_jax.data.vocabulary import Vocabulary
from switch_jax.errors import UserError


class WeightedDenoiser(NamedTuple):
    """A denoiser, its share of the texts, and the text of its mode."""

    rate: float
    denoiser: Denoiser
    mode: str = ""


# The denoisers of UL2 (Tay et al. 2022, arXiv 2205.05131, Table 1): noise density and mean span of
# R and X, and S with a quarter of the text as targets on average. S has 20 % of the texts, the
# other six have equal shares. The modes are those of the released checkpoints; the paper calls them
# [R], [X] and [S].
_R = [(0.15, 3.0), (0.15, 8.0)]
_X = [(0.5, 3.0), (0.5, 8.0), (0.15, 64.0), (0.5, 64.0)]
_UL2 = (
    *(WeightedDenoiser(0.8 / 6, SpanCorruption(*noise), "[NLU]") for noise in _R),
    *(WeightedDenoiser(0.8 / 6, SpanCorruption(*noise), "[NLG]") for noise in _X),
    WeightedDenoiser(0.2, PrefixLM(0.25), "[S2S]"),
)
OBJECTIVES = {
    "span_corruption": (WeightedDenoiser(1.0, SpanCorruption()),),
    "iid_denoising": (WeightedDenoiser(1.0, IidDenoising()),),
    "prefix_lm": (WeightedDenoiser(1.0, PrefixLM()),),
    "ul2": _UL2,
}


def uses_sentinels(name: str) -> bool:
    """Whether sentinels stand for what the inputs of an objective omit."""
    return any(part.denoiser.marks_runs for part in OBJECTIVES[name])


class Objective:
    """Inputs and targets of texts under `data.objective`.

    Args:
      name: key of `OBJECTIVES`.
      seed: `data.seed`.
      vocabulary: of the modes and sentinels.

    Attributes:
      denoisers: the denoisers with their rates and modes.
      modes: ids of the mode of each denoiser, without an EOS.
      rates: [denoisers] shares of the texts; they sum to 1.
      has_random_sizes: whether the lengths of inputs and targets depend on more than the text's.

    Raises `UserError` if the vocabulary cannot tell the modes apart.
    """

    def __init__(self, name: str, seed: int, vocabulary: Vocabulary, eos_id: int):
        self.name = name
        self.denoisers = OBJECTIVES[name]
        self.modes = [vocabulary.encode(part.mode) if part.mode else [] for part in self.denoisers]
        self.rates = np.array([part.rate for part in self.denoisers])
        self.has_random_sizes = self.denoisers != OBJECTIVES["span_corruption"]
        self._seed, self._eos_id = seed, eos_id
        self._vocabulary = vocabulary
        names = {part.mode for part in self.denoisers}
        if len({tuple(mode) for mode in self.modes}) < len(names):
            raise UserError(
                f"{vocabulary.name!r} encodes {', '.join(sorted(names))} as the same tokens, which"
                f" data.objective={name} puts before the inputs; use a vocabulary that has their"
                " letters."
            )

    def text_length(self, inputs_length: int, targets_length: int) -> int:
        """Returns the number of tokens of the longest text that fits, whichever noise it takes.

        For example, 512 inputs hold 568 tokens under span corruption and need 114 targets.

        Raises `UserError` if a length is too short, or the vocabulary has too few sentinels.
        """
        shortest = 3 + max(map(len, self.modes))
        if inputs_length < shortest:
            raise UserError(f"data.inputs_length must be at least {shortest}, not {inputs_length}.")
        lengths = range(2, 4 * inputs_length)  # longer texts never have fewer inputs
        fitting = bisect.bisect_right(lengths, inputs_length, key=lambda n: self.largest(n).inputs)
        length = 1 + fitting
        sizes = self.largest(length)
        if sizes.targets > targets_length:
            raise UserError(
                f"data.targets_length={targets_length} is too short: data.objective={self.name}"
                f" with data.inputs_length={inputs_length} needs {sizes.targets}."
            )
        if sizes.sentinels > len(self._vocabulary.sentinels):
            raise UserError(
                f"A row of data.inputs_length={inputs_length} has {sizes.sentinels} spans, and"
                f" {self._vocabulary.name!r} has {len(self._vocabulary.sentinels)} sentinels to"
                " mark them; set it lower, or take a vocabulary with more pieces such as"
                " <extra_id_0>, or, where there are none, a model.vocab_size with room for 100"
                " sentinels behind the pieces."
            )
        return length

    def largest(self, length: int) -> Sizes:
        """Returns the largest sizes that a text of `length` tokens can have."""
        sizes = [part.denoiser.largest(length) for part in self.denoisers]
        return Sizes(
            max(size.inputs + len(mode) for size, mode in zip(sizes, self.modes)),
            max(size.targets for size in sizes),
            max(size.sentinels for size in sizes),
        )

    def sizes(self, lengths: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """[P, 2] lengths of the inputs and targets of P texts, each with an EOS.

        Args:
          lengths: [P] numbers of tokens.
          numbers: [P] uint64 numbers of the texts, which determine the numbers of noise tokens.
        """
        sizes = np.empty((len(lengths), 2), np.int64)
        for length in np.unique(lengths):
            texts = np.flatnonzero(lengths == length)
            for rows, part, noise in self._noise(int(length), numbers[texts]):
                marks = self.denoisers[part].denoiser.marks_runs
                inputs = length - noise.tokens + marks * noise.runs + 1 + len(self.modes[part])
                targets = noise.tokens + marks * noise.kept_runs + 1
                sizes[texts[rows]] = np.stack([inputs, targets], axis=1)
        return sizes

    def apply(
        self, tokens: np.ndarray, numbers: np.ndarray, examples: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields groups of texts: their indices [G], inputs [G, I] and targets [G, J], int32.

        Args:
          tokens: [B, L] texts of equal length.
          numbers: [B] uint64 numbers that determine denoisers and sizes, as for `sizes`.
          examples: [B] uint64 numbers that determine the placement of the noise.
        """
        length, sentinels = tokens.shape[1], self._vocabulary.sentinels
        for rows, part, noise in self._noise(length, numbers):
            marks_runs = self.denoisers[part].denoiser.marks_runs
            for group in _equal_groups(np.stack(noise)):
                indices = rows[group]
                group_noise = Noise(*(numbers_B[group[0]] for numbers_B in noise))
                mask = noise_mask(length, group_noise, self._seed, examples[indices])
                sides = split_tokens(tokens[indices], mask, marks_runs, sentinels, self._eos_id)
                mode = np.tile(np.array(self.modes[part], np.int32), (len(group), 1))
                yield indices, np.concatenate([mode, sides[0]], axis=1), sides[1]

    def _noise(self, length: int, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, int, Noise]]:
        """Yields, for each denoiser in use, indices of its texts, its index, and their noise."""
        if len(self.denoisers) == 1:
            chosen = np.zeros(len(numbers), np.int64)
        else:
            seed = derived_seed(self._seed, "denoiser")
            uniform = random_bits(seed, numbers, 1, 0)[:, 0] / 2**64
            ends = np.cumsum(self.rates)[:-1]
            chosen = np.searchsorted(ends, uniform, side="right")
        for part in np.unique(chosen):
            rows = np.flatnonzero(chosen == part)
            noise = self.denoisers[part].denoiser.noise(length, self._seed, numbers[rows])
            yield rows, int(part), noise


def _equal_groups(columns: np.ndarray) -> list[np.ndarray]:
    """Returns the indices of equal columns of [N, B], group by group."""
    if (columns == columns[:, :1]).all():  # as under span corruption, without the time of a sort
        return [np.arange(columns.shape[1])]
    _, kind_of = np.unique(columns, axis=1, return_inverse=True)
    return [np.flatnonzero(kind_of == kind) for kind in range(kind_of.max() + 1)]


def open_objective(config: Config, vocabulary: Vocabulary) -> Objective:
    """Returns the objective of a config; raises `UserError` if it does not fit the vocabulary."""
    data = config.data
    return Objective(data.objective, data.seed, vocabulary, config.model.eos_id)
