"""switch_jax.routing: golden vectors of the paper, its traps, and what always holds."""

import math
from fractions import Fraction
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from switch_jax import routing
from switch_jax.config import MoEConfig

# The probabilities of the paper's Fig 11: six tokens, three experts.
TENTHS = [(1, 7, 2), (7, 2, 1), (5, 3, 2), (8, 1, 1), (3, 1, 6), (7, 1, 2)]
FIG11 = np.array(TENTHS, np.float32) / 10
ALL = np.ones(6, bool)
DROPPED = -1


def moe_config(num_experts: int = 3, **values) -> MoEConfig:
    return MoEConfig(num_experts=num_experts, min_capacity=1, **values)


def route(moe: MoEConfig, capacity: int, probs=FIG11, mask=ALL) -> tuple[np.ndarray, ...]:
    """Expert, slot and gate of each assignment; where it was dropped expert and slot are -1."""
    router = jax.jit(partial(routing.ROUTERS[moe.router], moe=moe, capacity=capacity))
    expert, gate, slot = map(np.asarray, router(probs, mask))
    kept = (expert < moe.num_experts) & (slot < capacity)
    return np.where(kept, expert, DROPPED), np.where(kept, slot, DROPPED), gate


def test_golden_load_balancing_loss():
    loss = routing.load_balancing_loss
    np.testing.assert_allclose(
        routing.expert_counts(jnp.array(FIG11.argmax(-1)), 3), [4, 1, 1], rtol=0
    )
    np.testing.assert_allclose(loss(FIG11, ALL), 1.275, rtol=1e-6)
    grouped = jax.vmap(loss)(FIG11.reshape(2, 3, 3), ALL.reshape(2, 3))
    np.testing.assert_allclose(grouped, [1.266667, 1.5], rtol=1e-6)
    np.testing.assert_allclose(grouped.mean(), 1.383333, rtol=1e-6)


def test_load_balancing_loss_ignores_padding_and_spans_one_to_E():
    padded = np.concatenate([FIG11, np.full((3, 3), 1 / 3, np.float32)])
    mask = np.arange(9) < 6
    np.testing.assert_allclose(routing.load_balancing_loss(padded, mask), 1.275, rtol=1e-6)
    assert routing.load_balancing_loss(FIG11, ~ALL) == 0
    one_hot = np.eye(4, dtype=np.float32)
    mask = np.ones(4, bool)
    np.testing.assert_allclose(routing.load_balancing_loss(one_hot, mask), 1)
    np.testing.assert_allclose(routing.load_balancing_loss(one_hot[[2] * 4], mask), 4)


def test_load_balancing_loss_has_its_gradient_through_P_only():
    gradient = jax.grad(lambda p: routing.load_balancing_loss(p, ALL))(FIG11)
    np.testing.assert_allclose(gradient, 3 * np.tile([4, 1, 1], (6, 1)) / 36, rtol=1e-6)


def test_golden_switch_at_capacity_factor_one():
    moe = moe_config()
    assert routing.capacity(6, moe, 1.0) == 2
    expert, slot, gate = route(moe, 2)
    assert expert[:, 0].tolist() == [1, 0, 0, DROPPED, 2, DROPPED]
    assert slot[:, 0].tolist() == [0, 0, 1, DROPPED, 0, DROPPED]
    np.testing.assert_allclose(gate[[0, 1, 2, 4], 0], [0.7, 0.7, 0.5, 0.6])


def test_golden_switch_at_capacity_factor_one_and_a_half():
    moe = moe_config()
    assert routing.capacity(6, moe, 1.5) == 3
    expert, slot, gate = route(moe, 3)
    assert expert[:, 0].tolist() == [1, 0, 0, 0, 2, DROPPED]
    assert slot[:, 0].tolist() == [0, 0, 1, 2, 0, DROPPED]
    np.testing.assert_allclose(gate[3, 0], 0.8)


def test_golden_no_token_left_behind():
    expert, slot, gate = route(moe_config(router="ntlb", top_k=2), 2)
    assert expert[:, 0].tolist() == [1, 0, 0, 1, 2, 2]
    assert slot[:, 0].tolist() == [0, 0, 1, 1, 0, 1]
    np.testing.assert_allclose(gate[:, 0], [0.7, 0.7, 0.5, 0.1, 0.6, 0.2])


@pytest.mark.parametrize("renormalize", [True, False])
def test_golden_top_2(renormalize):
    moe = moe_config(router="top_k", top_k=2, renormalize=renormalize)
    expert, _, gate = route(moe, 4)
    # e0 is full of first choices when t4's second choice comes.
    assert expert.tolist() == [[1, 2], [0, 1], [0, 1], [0, 1], [2, DROPPED], [0, 2]]
    raw = [[0.7, 0.2], [0.7, 0.2], [0.5, 0.3], [0.8, 0.1], [0.6, 0.3], [0.7, 0.2]]
    normal = [[0.7778, 0.2222], [0.7778, 0.2222], [0.625, 0.375], [0.8889, 0.1111]]
    normal += [[0.6667, 0.3333], [0.7778, 0.2222]]
    np.testing.assert_allclose(gate, normal if renormalize else raw, atol=5e-5)


def test_renormalize_leaves_a_single_gate_alone():
    _, _, gate = route(moe_config(router="top_k", renormalize=True), 6)
    np.testing.assert_allclose(gate[:, 0], FIG11.max(-1))


def test_trap_1_the_first_slot_is_used_and_an_expert_keeps_exactly_C():
    """Fig 15 counts from 1 and keeps `position < capacity`, so slot 0 stays empty."""
    mask_SxE = np.eye(3)[FIG11.argmax(-1)]
    literal = (np.cumsum(mask_SxE, 0) * mask_SxE).sum(-1)
    literal_kept = literal < 2
    assert literal.min() == 1
    assert np.bincount(FIG11.argmax(-1)[literal_kept], minlength=3).tolist() == [1, 1, 1]

    expert, slot, _ = route(moe_config(), 2)
    assert slot[expert >= 0].min() == 0
    assert np.bincount(expert[expert >= 0]).tolist() == [2, 1, 1]


def test_trap_4_the_argument_is_the_capacity_and_not_its_factor():
    tokens, factor, moe = 128, 1.25, moe_config(num_experts=8)
    assert routing.capacity(tokens, moe, factor) == 20 != int(factor)
    # The error in the last bit of a float must not cost a slot.
    assert math.ceil(1.1 * 100 / 10) == 12
    assert routing.capacity(100, moe_config(num_experts=10), 1.1) == 11


@given(
    tokens=st.integers(1, 10_000),
    experts=st.integers(1, 2048),
    percent=st.integers(1, 800),
    least=st.integers(1, 64),
    rounding=st.sampled_from(["ceil", "floor"]),
)
@settings(deadline=None)
def test_trap_4_capacity_is_the_papers_formula(tokens, experts, percent, least, rounding):
    moe = MoEConfig(num_experts=experts, min_capacity=least, capacity_rounding=rounding)
    exact = Fraction(percent, 100) * tokens / experts
    rounded = math.ceil(exact) if rounding == "ceil" else math.floor(exact)
    expected = min(max(rounded, least), tokens)
    assert routing.capacity(tokens, moe, percent / 100) == expected
    assert routing.capacity(tokens, moe, None) == tokens


@given(batch=st.integers(1, 4096), length=st.integers(1, 1024), size=st.integers(1, 20_000))
@settings(deadline=None)
def test_group_rows_divides_and_is_maximal(batch, length, size):
    rows = routing.group_rows(batch, length, size)
    fits = [r for r in range(1, batch + 1) if batch % r == 0 and r * length <= max(size, length)]
    assert rows == max(fits)


# Shapes are few, because each is compiled; values are many.
S, E = 12, 4
ROUTERS = [("switch", 1), ("top_k", 2), ("top_k", 4), ("ntlb", 1), ("ntlb", 3)]


@cache
def compiled(router: str, top_k: int, capacity: int):
    moe = moe_config(E, router=router, top_k=top_k)

    @jax.jit
    def run(probs, mask):
        assignment = routing.ROUTERS[router](probs, mask, moe, capacity)
        return (
            assignment,
            routing.slots_of_tokens(assignment, E, capacity),
            routing.tokens_of_slots(assignment, E, capacity),
        )

    return run


@st.composite
def routed(draw):
    """A router's result for random probabilities, of which many are equal."""
    router, top_k = draw(st.sampled_from(ROUTERS))
    capacity = draw(st.sampled_from([1, 3, S]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    skew = rng.integers(0, draw(st.sampled_from([2, 5, 50])), (S, E)) + rng.integers(0, 9, E)
    probs = np.exp(skew / 4).astype(np.float32)
    probs /= probs.sum(-1, keepdims=True)
    mask = rng.random(S) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    assignment, slots, held = compiled(router, top_k, capacity)(probs, mask)
    return (
        (router, top_k),
        capacity,
        probs,
        mask,
        jax.tree.map(np.asarray, (assignment, slots, held)),
    )


@given(routed())
@settings(deadline=None, max_examples=100)
def test_slots_are_unique_and_filled_from_0_in_order(case):
    """First choices before second ones, tokens in order: the places are 0, 1, 2, …"""
    (router, _), capacity, probs, mask, (assignment, _, _) = case
    expert, _, slot = assignment
    choice = np.argsort(-probs, -1, kind="stable")
    taken = {e: [] for e in range(E)}
    for k in range(expert.shape[1]):
        for t in range(S):
            if expert[t, k] < E:
                stage = choice[t].tolist().index(expert[t, k])
                taken[expert[t, k]].append((stage, t, slot[t, k]))
    for places in taken.values():
        assert [slot for _, _, slot in sorted(places)] == list(range(len(places)))
        if router == "ntlb":
            assert len(places) <= capacity
    if router != "ntlb":
        np.testing.assert_array_equal(expert[mask], choice[mask, : expert.shape[1]])


@given(routed())
@settings(deadline=None, max_examples=50)
def test_padding_takes_no_slot(case):
    _, _, _, mask, (assignment, slots, held) = case
    assert (assignment.expert_SxK[~mask] == E).all()
    assert (slots[~mask] == held.size).all()
    K = slots.shape[1]
    assert mask[held[held < S * K] // K].all()


@given(routed())
@settings(deadline=None, max_examples=50)
def test_tokens_of_slots_and_slots_of_tokens_are_inverse(case):
    _, capacity, _, _, (assignment, slots, held) = case
    flat, held = slots.reshape(-1), held.reshape(-1)
    for n in np.flatnonzero(flat < E * capacity):
        assert held[flat[n]] == n
        assert flat[n] // capacity == assignment.expert_SxK.reshape(-1)[n]
    for place in np.flatnonzero(held < flat.size):
        assert flat[held[place]] == place
    assert (flat < E * capacity).sum() == (held < flat.size).sum()


@given(routed())
@settings(deadline=None, max_examples=50)
def test_ntlb_leaves_a_token_behind_only_where_all_its_experts_are_full(case):
    (router, top_k), capacity, probs, mask, (assignment, _, _) = case
    assume(router == "ntlb")
    expert = assignment.expert_SxK[:, 0]
    taken = np.bincount(expert, minlength=E)
    for t in np.flatnonzero(mask & (expert == E)):
        tried = np.argsort(-probs[t], kind="stable")[:top_k]
        assert (taken[tried] == capacity).all()
