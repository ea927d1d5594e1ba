"""Span corruption: exact counts, uniform placement; random permutations."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_jax.data.counter_rng import permute
from switch_jax.data.span_corruption import (
    _partitions,
    corrupt_spans,
    corrupted_lengths,
    noise_and_spans,
    noise_mask,
    span_lengths,
)
from switch_jax.data.vocabulary import EOS
from switch_jax.errors import UserError
from tests.support.paths import GOLDEN

FIRST_SENTINEL = 31_999
SENTINELS = range(FIRST_SENTINEL, FIRST_SENTINEL - 100, -1)


@pytest.mark.parametrize(
    "inputs, tokens, targets",
    [(512, 568, 114), (128, 141, 29), (256, 284, 58), (1024, 1137, 229), (2048, 2274, 456)],
)
def test_lengths_equal_t5(inputs, tokens, targets):
    assert span_lengths(inputs, targets) == (tokens, inputs, targets)


def test_span_counts_equal_t5():
    counted = np.load(GOLDEN / "t5_span_corruption.npz")["span_counts"]
    assert [noise_and_spans(n) for n in range(2, 3001)] == list(map(tuple, counted[1:]))


def test_the_longest_text_that_fits_is_chosen():
    for inputs in range(3, 300):
        lengths = span_lengths(inputs, 1000)
        assert lengths.inputs <= inputs < corrupted_lengths(lengths.tokens + 1).inputs
        assert lengths == corrupted_lengths(lengths.tokens)


def test_impossible_lengths_are_refused_with_the_length_needed():
    with pytest.raises(UserError, match=r"data\.targets_length=113 .* needs 114"):
        span_lengths(512, 113)
    with pytest.raises(UserError, match=r"data\.inputs_length must be at least 3"):
        span_lengths(2, 10)


def uncorrupted(inputs, targets, num_sentinels):
    """Restores the tokens: replaces each sentinel of the inputs by its span of the targets."""
    sentinels = [FIRST_SENTINEL - i for i in range(num_sentinels)]
    spans_by_sentinel, current = collections.defaultdict(list), None
    for token in targets[:-1]:
        if token in sentinels:
            current = token
        else:
            spans_by_sentinel[current].append(token)
    restored = []
    for token in inputs[:-1]:
        restored += spans_by_sentinel.pop(token) if token in sentinels else [token]
    return restored, spans_by_sentinel


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(2, 700),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    first=st.integers(0, 2**40),
)
def test_corruption_can_be_undone_and_counts_are_exact(length, rows, seed, first):
    examples = first + np.arange(rows)
    tokens = np.random.default_rng(seed).integers(3, 30_000, (rows, length)).astype(np.uint16)
    inputs, targets = corrupt_spans(tokens, seed, examples, SENTINELS, EOS)
    noise, count = noise_and_spans(length)
    assert inputs.dtype == targets.dtype == np.int32
    assert (length, inputs.shape[1], targets.shape[1]) == corrupted_lengths(length)
    assert abs(noise - min(max(0.15 * length, 1), length - 1)) <= 0.51
    mask = noise_mask(length, seed, examples)
    assert (mask.sum(1) == noise).all()
    assert not mask[:, 0].any()  # a kept span comes first
    assert ((np.diff(mask.astype(int), axis=1) == 1).sum(1) == count).all()
    for row in range(rows):
        assert inputs[row, -1] == targets[row, -1] == EOS
        assert targets[row, 0] == FIRST_SENTINEL
        restored, left = uncorrupted(inputs[row].tolist(), targets[row].tolist(), count)
        assert restored == tokens[row].tolist() and not left


def test_a_single_token_is_kept():
    inputs, targets = corrupt_spans(np.array([[7]]), 0, np.array([0]), SENTINELS, EOS)
    assert inputs.tolist() == [[7, EOS]]
    assert targets.tolist() == [[FIRST_SENTINEL, EOS]]
    assert corrupted_lengths(1) == (1, 2, 2)


def test_a_row_depends_only_on_seed_and_number():
    masks = noise_mask(100, 3, np.arange(50))
    shuffled = np.random.default_rng(0).permutation(50)
    assert (noise_mask(100, 3, shuffled) == masks[shuffled]).all()
    assert (noise_mask(100, 4, np.arange(50)) != masks).any(1).mean() > 0.95
    assert len(np.unique(masks, axis=0)) == 50


def test_all_placements_are_equally_likely():
    length, rows = 37, 60_000
    assert noise_and_spans(length) == (6, 2)
    mask = noise_mask(length, 0, np.arange(rows))
    first_kept = mask.argmax(1)
    first_noise = (~mask[np.arange(rows)[:, None], (first_kept[:, None] + np.arange(7))]).argmax(1)
    counts = np.zeros((30, 5))
    np.add.at(counts, (first_kept - 1, first_noise - 1), 1)
    expected = rows / counts.size  # 30 cuts of the kept tokens × 5 of the noise tokens
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 149 + 5 * np.sqrt(2 * 149)


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
