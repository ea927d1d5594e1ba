"""Beam search against all possible sequences, samples against their probabilities.

The decode step reads its logits from a table with a row for every prefix, so that a sequence that
continues with another's state is detected.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_jax.errors import UserError
from switch_jax.inference.decoding import (
    Sampler,
    SamplingOptions,
    SpecialIds,
    beam_search,
    decode_loop,
    greedy_choice,
)

END, B = 1, 2
IDS = SpecialIds(start=0, end=END, pad=0)
CLOSE = dict(rtol=1e-5, atol=1e-5)
SIZES = [(3, 4), (4, 3), (5, 2)]  # vocabulary, length


def num_prefixes(V: int, L: int) -> int:
    return sum(V**n for n in range(L))


def random_table(seed: int, V: int, L: int) -> np.ndarray:
    """[B, prefixes, V] float32; spread widely, so that the best scores are rarely close."""
    return 3 * np.random.default_rng(seed).normal(size=(B, num_prefixes(V, L), V)).astype("f")


def table_step(table_BxPxV, K, steps=None):
    """A decode step over the table, with K sequences of an input and state [1, N] of prefixes.

    The positions of its calls are appended to `steps`, a list.
    """
    row_N = jnp.repeat(jnp.arange(len(table_BxPxV)), K)

    def step(token_N, position, prefix_1xN):
        if steps is not None:
            jax.debug.callback(lambda p: steps.append(int(p)), position)
        V = table_BxPxV.shape[2]
        prefix_1xN = jnp.where(position == 0, 0, prefix_1xN * V + token_N + 1)
        return table_BxPxV[row_N, prefix_1xN[0]], prefix_1xN

    return step, jnp.zeros((1, len(row_N)), jnp.int32)


@partial(jax.jit, static_argnames=("K", "L"))
def beams(table_BxPxV, alpha, K, L):
    step, state = table_step(table_BxPxV, K)
    return beam_search(step, state, 1, B, K, L, IDS, alpha)


def log_softmax(x):
    return x - np.logaddexp.reduce(x, -1, keepdims=True)


def prefix_number(tokens, V: int) -> int:
    number = 0
    for token in tokens:
        number = number * V + token + 1
    return number


def log_probability(table_PxV, tokens) -> float:
    logp, V = log_softmax(table_PxV.astype(np.float64)), table_PxV.shape[1]
    return sum(logp[prefix_number(tokens[:i], V), token] for i, token in enumerate(tokens))


def padded(tokens, L: int) -> list[int]:
    return [*tokens, *[0] * (L - len(tokens))]


def every_sequence(table_PxV, alpha, L):
    """All ended sequences by score, then all others by score: (tokens, score)."""
    V = table_PxV.shape[1]
    not_end = [token for token in range(V) if token != END]
    ended = [(*t, END) for n in range(L) for t in itertools.product(not_end, repeat=n)]
    scored = [
        [(log_probability(table_PxV, t) / ((5 + len(t)) / 6) ** alpha, t) for t in kind]
        for kind in (ended, itertools.product(not_end, repeat=L))
    ]
    return [(t, score) for kind in scored for score, t in sorted(kind, reverse=True)]


@pytest.mark.parametrize("V, L", SIZES)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.6, 1.0]))
@settings(deadline=None, max_examples=25, derandomize=True)  # no two scores too close
def test_beam_search_with_enough_beams_finds_every_sequence_in_order(V, L, seed, alpha):
    table = random_table(seed, V, L)
    K = (V - 1) ** L
    sequences = beams(table, alpha, K, L)
    for row in range(B):
        best = every_sequence(table[row], alpha, L)[:K]
        np.testing.assert_allclose(sequences.score_BxK[row], [score for _, score in best], **CLOSE)
        actual = np.asarray(sequences.token_BxKxL[row]).tolist()
        assert actual == [padded(tokens, L) for tokens, _ in best]


def plain_beam_search(table_PxV, alpha, K, L):
    """Beam search over lists of sequences, without an early stop."""
    live, ended, V = [((), 0.0)], [], table_PxV.shape[1]
    logp = log_softmax(table_PxV.astype(np.float64))
    for _ in range(L):
        continued = [
            ((*t, token), s + logp[prefix_number(t, V), token])
            for t, s in live
            for token in range(V)
        ]
        continued = sorted(continued, key=lambda x: -x[1])[: 2 * K]
        ended += [(t, s / ((5 + len(t)) / 6) ** alpha) for t, s in continued if t[-1] == END]
        ended = sorted(ended, key=lambda x: -x[1])[:K]
        live = [(t, s) for t, s in continued if t[-1] != END][:K]
    rest = [(t, s / ((5 + L) / 6) ** alpha) for t, s in live]
    return [*ended, *rest][:K]


@pytest.mark.parametrize("K", [1, 2, 3])
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.6, 2.0]))
@settings(deadline=None, max_examples=50, derandomize=True)  # no two scores too close
def test_beam_search_equals_plain_beam_search_without_early_stop(K, seed, alpha):
    """The early stop changes no result, nor does the other input of the batch."""
    V, L = 3, 4
    table = random_table(seed, V, L)
    sequences = beams(table, alpha, K, L)
    for row in range(B):
        best = plain_beam_search(table[row], alpha, K, L)
        np.testing.assert_allclose(sequences.score_BxK[row], [score for _, score in best], **CLOSE)
        actual = np.asarray(sequences.token_BxKxL[row]).tolist()
        assert actual == [padded(tokens, L) for tokens, _ in best]


def test_the_length_penalty_prefers_the_longer_of_two():
    """Two tokens with log probability -1.1 in total, or one with -1: the penalty decides."""
    V, L, K = 3, 3, 4
    table = np.full((B, num_prefixes(V, L), V), -30.0, np.float32)
    table[:, 0, [END, 2]] = [-1.0, np.log(1 - np.exp(-1))]
    after_2 = prefix_number([2], V)
    table[:, after_2, END] = -1.1 - table[0, 0, 2]
    table[:, after_2, 2] = np.log(1 - np.exp(table[0, after_2, END]))

    short, long = [END, 0, 0], [2, END, 0]
    for alpha, order in ((0.0, [short, long]), (0.6, [short, long]), (1.0, [long, short])):
        sequences = beams(table, alpha, K, L)
        # ((5 + 2) / 6)^alpha: 1.097 for 0.6, too little for 1.1; 1.167 for 1.
        scores = {tuple(short): -1.0, tuple(long): -1.1 / (7 / 6) ** alpha}
        assert np.asarray(sequences.token_BxKxL[0, :2]).tolist() == order
        expected = [scores[tuple(tokens)] for tokens in order]
        np.testing.assert_allclose(sequences.score_BxK[0, :2], expected, rtol=1e-5)


def test_missing_sequences_score_minus_infinity():
    V, L, K = 3, 1, 5
    sequences = beams(random_table(0, V, L), 0.6, K, L)
    assert np.isfinite(sequences.score_BxK[:, :3]).all()
    assert (sequences.score_BxK[:, 3:] == -np.inf).all()
    assert (sequences.token_BxKxL[:, 3:] == 0).all()
    assert sequences.token_BxKxL[0, 0, 0] == END  # ended sequences come before live ones


def test_decoding_stops_when_the_result_cannot_change():
    V, L = 3, 4
    ends_after_2 = np.zeros((B, num_prefixes(V, L), V), np.float32)
    ends_after_2[:, prefix_number([2], V), END] = 20
    ends_after_2[:, 0] = [0, 0, 20]
    endless = ends_after_2.copy()
    endless[1, :, END] = -1e4  # the second input never ends
    for length, table in ((2, ends_after_2), (L, endless)):
        greedy_positions: list[int] = []
        step, state = table_step(jnp.asarray(table), 1, greedy_positions)
        jax.block_until_ready(
            jax.jit(lambda s, step=step: decode_loop(step, s, greedy_choice, B, L, IDS))(state)
        )
        jax.effects_barrier()
        assert sorted(greedy_positions) == list(range(length))

    beam_positions: list[int] = []
    step, state = table_step(jnp.asarray(ends_after_2), 1, beam_positions)
    sequences = jax.jit(lambda s: beam_search(step, s, 1, B, 1, L, IDS, 0.6))(state)
    jax.effects_barrier()
    assert np.asarray(sequences.token_BxKxL)[0, 0].tolist() == [2, END, 0, 0]
    assert sorted(beam_positions) == [0, 1]


def test_greedy_decoding_takes_and_scores_the_best_tokens():
    V, L = 4, 3
    table = random_table(3, V, L)
    step, state = table_step(jnp.asarray(table), 1)
    tokens, score = jax.jit(lambda s: decode_loop(step, s, greedy_choice, B, L, IDS))(state)
    for row in range(B):
        expected: list[int] = []
        while len(expected) < L and END not in expected:
            expected.append(int(table[row, prefix_number(expected, V)].argmax()))
        assert np.asarray(tokens[row]).tolist() == padded(expected, L)
        np.testing.assert_allclose(score[row], log_probability(table[row], expected), rtol=1e-5)


def sampled_frequencies(logits_V, samples: int = 4000, **options) -> np.ndarray:
    """[V] relative frequency of each token among the samples."""
    sampler = Sampler(jax.random.split(jax.random.key(0), samples), **options)
    logits_NxV = jnp.tile(jnp.asarray(logits_V, jnp.float32), (samples, 1))
    tokens = jax.jit(lambda s, logits: s.sample(logits, jnp.int32(5)))(sampler, logits_NxV)
    return np.bincount(tokens, minlength=len(logits_V)) / samples


PROBS = np.array([0.05, 0.4, 0.1, 0.25, 0.2])


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"temperature": 1.0}, PROBS),
        ({"temperature": 0.5}, PROBS**2),
        ({"temperature": 1.0, "top_k": 2}, PROBS * [0, 1, 0, 1, 0]),
        ({"temperature": 1.0, "top_k": 9}, PROBS),
        ({"temperature": 1.0, "top_p": 0.3}, PROBS * [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.5}, PROBS * [0, 1, 0, 1, 0]),
        ({"temperature": 1.0, "top_p": 0.9}, PROBS * [0, 1, 1, 1, 1]),
        # Of the three best, 0.85 in all, the first two have 0.65.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, PROBS * [0, 1, 0, 1, 0]),
        # Of the temperature's probabilities: 0.16, 0.0625 and 0.04 of 0.275, so 0.58 and 0.81.
        ({"temperature": 0.5, "top_p": 0.7}, PROBS**2 * [0, 1, 0, 1, 0]),
    ],
)
def test_sampled_tokens_have_the_configured_probabilities(options, expected):
    expected = expected / expected.sum()
    actual = sampled_frequencies(np.log(PROBS) + 7, **options)
    assert ((actual > 0) == (expected > 0)).all()
    np.testing.assert_allclose(actual, expected, atol=0.04)  # five standard deviations


def test_top_k_keeps_the_first_of_equal_tokens():
    actual = sampled_frequencies(np.zeros(5), temperature=1.0, top_k=2)
    assert (actual[:2] > 0.4).all() and (actual[2:] == 0).all()


def test_sampled_tokens_depend_on_key_and_position_only():
    key_N, logits = jax.random.split(jax.random.key(1), 64), jnp.zeros((64, 1000))
    sampler = Sampler(key_N, 1.0)
    at_3 = sampler.sample(logits, jnp.int32(3))
    alone = Sampler(key_N[7:8], 1.0).sample(logits[:1], jnp.int32(3))
    assert alone[0] == at_3[7]
    assert (sampler.sample(logits, jnp.int32(4)) != at_3).mean() > 0.9
    assert len(np.unique(at_3)) > 50  # different sequences have different keys


@pytest.mark.parametrize(
    "options, words",
    [
        ({"beam_size": 4, "temperature": 1.0}, ["beam_size=4", "temperature=1.0", "one of them"]),
        ({"beam_size": 0}, ["beam_size=0"]),
        ({"num_return": 2}, ["2 results", "beam_size=1"]),
        ({"num_return": 0}, ["num_return=0"]),
        ({"top_k": 3}, ["top_k", "temperature above 0"]),
        ({"top_p": 0.5}, ["top_p", "temperature above 0"]),
        ({"temperature": 1.0, "top_k": -1}, ["top_k=-1"]),
        ({"temperature": 1.0, "top_p": 0.0}, ["top_p=0.0"]),
        ({"temperature": 1.0, "top_p": 1.5}, ["top_p=1.5"]),
        ({"temperature": float("nan")}, ["temperature"]),
        ({"temperature": -1.0}, ["temperature"]),
        ({"length_penalty": -0.5}, ["length_penalty"]),
        ({"seed": -1}, ["seed=-1"]),
    ],
)
def test_wrong_options_are_an_error_of_one_sentence(options, words):
    with pytest.raises(UserError) as error:
        SamplingOptions(**options)
    message = str(error.value)
    assert all(word in message for word in words) and message.count(". ") == 0
