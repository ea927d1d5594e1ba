"""Denoisers: published distributions, exact sizes; random permutations."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_jax.data.counter_rng import permute
from switch_jax.data.denoising import (
    IidDenoising,
    Noise,
    PrefixLM,
    SpanCorruption,
    _partitions,
    noise_mask,
)
from switch_jax.data.objectives import OBJECTIVES
from switch_jax.data.vocabulary import EOS
from switch_jax.errors import UserError
from tests.support.objectives import FIRST_SENTINEL, MODES, Pieces, objective, restored
from tests.support.paths import GOLDEN


def text_mask(denoiser, length, numbers, seed=0):
    """Returns the masks [B, L] of texts, and their noise."""
    noise = denoiser.noise(length, seed, numbers)
    rows = [
        noise_mask(length, Noise(*(x[i] for x in noise)), seed, numbers[i : i + 1])[0]
        for i in range(len(numbers))
    ]
    return np.array(rows), noise


def far(counts, expected):
    """Whether counts deviate from their expectation by more than chance, by their chi-squared."""
    counts, expected = np.asarray(counts), np.asarray(expected)
    freedom = counts.size - 1
    return ((counts - expected) ** 2 / expected).sum() > freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "inputs, tokens, targets",
    [(512, 568, 114), (128, 141, 29), (256, 284, 58), (1024, 1137, 229), (2048, 2274, 456)],
)
def test_lengths_equal_t5(inputs, tokens, targets):
    vocabulary = Pieces(range(300))
    assert objective(vocabulary=vocabulary).text_length(inputs, targets) == tokens
    assert objective().largest(tokens)[:2] == (inputs, targets)


def test_span_counts_equal_t5():
    counted = np.load(GOLDEN / "t5_denoising.npz")["span_counts"]
    assert [SpanCorruption().counts(n) for n in range(2, 3001)] == list(map(tuple, counted[1:]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_longest_text_that_fits_is_chosen(name):
    chosen = objective(name, vocabulary=Pieces(range(10_000)))
    for inputs in range(5, 300):
        length = chosen.text_length(inputs, 1000)
        assert chosen.largest(length).inputs <= inputs < chosen.largest(length + 1).inputs


@pytest.mark.parametrize("name", OBJECTIVES)
def test_impossible_lengths_are_refused_with_the_length_needed(name):
    needed = objective(name).largest(objective(name).text_length(300, 300)).targets
    objective(name).text_length(300, needed)
    sentence = rf"targets_length={needed - 1} .*objective={name} .* needs {needed}\."
    with pytest.raises(UserError, match=sentence):
        objective(name).text_length(300, needed - 1)
    with pytest.raises(UserError, match=r"data\.inputs_length must be at least [35]"):
        objective(name).text_length(2, 10)


def test_too_few_sentinels_are_refused():
    few = objective("iid_denoising", vocabulary=Pieces(range(20)))
    assert objective("iid_denoising").text_length(512, 228) == 511  # T5's 100 are enough
    with pytest.raises(UserError, match="has 98 spans, and 'pieces' has 20 sentinels"):
        few.text_length(512, 300)


def test_modes_that_a_vocabulary_cannot_tell_apart_are_refused():
    class Unknown(Pieces):
        def encode(self, text):
            return [2]

    with pytest.raises(UserError, match=r"encodes \[NLG\], \[NLU\], \[S2S\] as the same tokens"):
        objective("ul2", vocabulary=Unknown())
    objective("prefix_lm", vocabulary=Unknown())


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(OBJECTIVES)),
    length=st.integers(1, 400),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    first=st.integers(0, 2**40),
)
def test_noise_can_be_undone_and_sizes_are_exact(name, length, rows, seed, first):
    chosen, numbers = objective(name, seed), first + np.arange(rows)
    tokens = np.random.default_rng(seed).integers(3, 900, (rows, length)).astype(np.uint16)
    sizes = chosen.sizes(np.full(rows, length), numbers)
    largest, seen = chosen.largest(length), []
    for group, inputs, targets in chosen.apply(tokens, numbers, numbers + 7):
        assert inputs.dtype == targets.dtype == np.int32
        for row, its_inputs, its_targets in zip(group, inputs.tolist(), targets.tolist()):
            assert [len(its_inputs), len(its_targets)] == sizes[row].tolist()
            assert len(its_inputs) <= largest.inputs and len(its_targets) <= largest.targets
            assert its_inputs[-1] == its_targets[-1] == EOS
            mode = next((m for m in MODES.values() if m == its_inputs[: len(m)]), [])
            assert bool(mode) == (name == "ul2")
            text = restored(its_inputs[len(mode) : -1], its_targets[:-1])
            assert text == tokens[row].tolist()
            seen.append(row)
    assert sorted(seen) == list(range(rows))


def test_a_single_token_is_kept():
    [(_, inputs, targets)] = objective().apply(np.array([[7]]), np.array([0]), np.array([0]))
    assert inputs.tolist() == [[7, EOS]]
    assert targets.tolist() == [[FIRST_SENTINEL, EOS]]
    assert objective().largest(1) == (2, 2, 1)


def test_a_row_depends_only_on_seed_and_number():
    noise = Noise(*(x[0] for x in SpanCorruption().noise(100, 0, np.arange(1))))
    masks = noise_mask(100, noise, 3, np.arange(50))
    shuffled = np.random.default_rng(0).permutation(50)
    assert (noise_mask(100, noise, 3, shuffled) == masks[shuffled]).all()
    assert (noise_mask(100, noise, 4, np.arange(50)) != masks).any(1).mean() > 0.95
    assert len(np.unique(masks, axis=0)) == 50


@pytest.mark.parametrize("name", OBJECTIVES)
def test_examples_change_the_places_of_noise_but_not_the_sizes(name):
    tokens, numbers = np.tile(np.arange(3, 103), (30, 1)), np.arange(30)
    one, other = (
        {
            row: (list(x), list(y))
            for group, inputs, targets in objective(name).apply(tokens, numbers, examples)
            for row, x, y in zip(group, inputs, targets)
        }
        for examples in (numbers, numbers + 1000)
    )
    for row in range(30):
        assert list(map(len, one[row])) == list(map(len, other[row]))
    changed = np.mean([one[row] != other[row] for row in range(30)])
    # The length of its prefix determines a prefix language model's example.
    assert changed == 0 if name == "prefix_lm" else changed > 0.5


def test_all_placements_are_equally_likely():
    length, rows = 37, 60_000
    assert SpanCorruption().counts(length) == (6, 2)
    noise = Noise(*(x[0] for x in SpanCorruption().noise(length, 0, np.arange(1))))
    mask = noise_mask(length, noise, 0, np.arange(rows))
    assert (mask.sum(1) == 6).all() and not mask[:, 0].any() and mask[:, -1].all()
    first_kept = mask.argmax(1)
    first_noise = (~mask[np.arange(rows)[:, None], (first_kept[:, None] + np.arange(7))]).argmax(1)
    counts = np.zeros((30, 5))
    np.add.at(counts, (first_kept - 1, first_noise - 1), 1)
    # 30 cuts of the kept tokens × 5 of the noise tokens
    assert not far(counts, np.full(counts.shape, rows / counts.size))


def test_iid_masks_have_the_probabilities_of_independent_tokens():
    length, rows, p = 5, 30_000, 0.15
    mask, noise = text_mask(IidDenoising(), length, np.arange(rows))
    assert (mask.sum(1) == noise.tokens).all() and (mask[:, 0] == noise.first).all()
    counts = np.bincount(mask @ (1 << np.arange(length)), minlength=2**length)
    tokens = np.array([i.bit_count() for i in range(2**length)])
    expected = rows * p**tokens * (1 - p) ** (length - tokens)
    rare = expected < 10  # together
    assert not far([*counts[~rare], counts[rare].sum()], [*expected[~rare], expected[rare].sum()])


def test_iid_noise_of_long_texts_is_binomial_and_fits():
    length, rows = 512, 4000
    noise = IidDenoising().noise(length, 0, np.arange(rows))
    assert abs(noise.tokens.mean() - 0.15 * length) < 5 * np.sqrt(0.1275 * length / rows)
    assert 0.9 < noise.tokens.var() / (0.1275 * length) < 1.1
    # A run begins at every noise token behind a kept one.
    assert abs(noise.runs.mean() - 0.1275 * length) < 0.5
    targets = noise.tokens + noise.kept_runs + 1
    largest = IidDenoising().largest(length)
    assert targets.mean() + 4 * targets.std() < largest.targets < targets.mean() + 6 * targets.std()
    assert noise.runs.max() < largest.sentinels < 128


def test_iid_noise_that_does_not_fit_is_drawn_again(monkeypatch):
    rows = np.arange(3000)
    before = IidDenoising().noise(200, 0, rows)
    monkeypatch.setattr("switch_jax.data.denoising._STANDARD_DEVIATIONS", 1)
    limit = IidDenoising().largest(200).targets
    after = IidDenoising().noise(200, 0, rows)
    fits = before.tokens + before.kept_runs + 1 <= limit
    assert 0.7 < fits.mean() < 0.95
    assert (after.tokens + after.kept_runs + 1 <= limit).all()
    assert (after.tokens[fits] == before.tokens[fits]).all()


@pytest.mark.parametrize("density, shortest", [(0.5, 1), (0.25, 20)])
def test_prefixes_have_uniform_lengths(density, shortest):
    length, rows = 41, 30_000
    mask, _ = text_mask(PrefixLM(density), length, np.arange(rows))
    kept = length - mask.sum(1)
    assert (mask == (np.arange(length) >= kept[:, None])).all()
    counts = np.bincount(kept, minlength=length + 1)
    assert not counts[:shortest].any() and not counts[length:].any()
    possible = counts[shortest:length]
    assert not far(possible, np.full(possible.shape, rows / possible.size))


def test_ul2_is_the_published_mixture():
    # Tay et al. 2022, Table 1: mode, noise density, mean span; S is the rest of the texts.
    published = [
        ("[NLU]", 0.15, 3),
        ("[NLU]", 0.15, 8),
        ("[NLG]", 0.5, 3),
        ("[NLG]", 0.5, 8),
        ("[NLG]", 0.15, 64),
        ("[NLG]", 0.5, 64),
    ]
    length, rows = 512, 20_000
    kinds = collections.Counter()
    chosen, tokens = objective("ul2"), np.tile(np.arange(3, 515), (rows, 1))
    shares = []
    for group, inputs, targets in chosen.apply(tokens, np.arange(rows), np.arange(rows)):
        mode = next(name for name, ids in MODES.items() if ids == inputs[0, : len(ids)].tolist())
        runs = (targets[0] > FIRST_SENTINEL - 100).sum()
        noise = targets.shape[1] - runs - 1
        kinds[mode, noise if runs else 0, runs] += len(group)
        if mode == "[S2S]":
            shares += [noise / length] * len(group)
    for mode, density, span in published:
        noise = round(density * length)
        count = kinds.pop((mode, noise, round(noise / span)))
        assert abs(count / rows - 0.8 / 6) < 5 * np.sqrt(0.116 / rows)
    [(key, count)] = kinds.items()
    assert key == ("[S2S]", 0, 0) and abs(count / rows - 0.2) < 5 * np.sqrt(0.16 / rows)
    assert abs(np.mean(shares) - 0.25) < 0.01 and max(shares) > 0.49  # a quarter on average


@pytest.mark.parametrize("total, parts", [(5, 1), (5, 3), (6, 6), (7, 2)])
def test_partitions_are_uniform(total, parts):
    rows = 30_000
    drawn = collections.Counter(
        map(tuple, _partitions(total, parts, 1, np.arange(rows), stream=0).tolist())
    )
    possible = [p for p in itertools.product(range(1, total + 1), repeat=parts) if sum(p) == total]
    assert set(drawn) == set(possible)
    for count in drawn.values():
        assert abs(count - rows / len(possible)) < 5 * np.sqrt(rows / len(possible))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_permute_is_a_bijection(size, seed, epoch):
    image = permute(np.arange(size), size, seed, epoch)
    assert (np.sort(image) == np.arange(size)).all()


def test_permutations_mix_and_differ_between_epochs_and_seeds():
    size = 5000
    image = permute(np.arange(size), size, 0, 0)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.06
    assert (np.diff(image) == 1).sum() < 10
    for other in (permute(np.arange(size), size, *key) for key in ((0, 1), (1, 0))):
        assert (other == image).sum() < 10
