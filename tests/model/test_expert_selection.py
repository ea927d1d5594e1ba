"""Routing functions: golden vectors of the paper, its traps, and properties of every router."""

import math
from fractions import Fraction
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_jax.config import expert_capacity, rows_per_group
from switch_jax.config.schema import MoEConfig
from switch_jax.model.moe import expert_selection
from switch_jax.model.moe.expert_selection import (
    Scores,
    balance_stats,
    expert_counts,
    load_balancing_loss,
)
from switch_jax.model.moe.router import hash_expert
from switch_jax.model.moe.slot_dispatch import LocalDispatcher

# The probabilities of the paper's Fig 11: six tokens, three experts.
TENTHS = [(1, 7, 2), (7, 2, 1), (5, 3, 2), (8, 1, 1), (3, 1, 6), (7, 1, 2)]
FIG11 = np.array(TENTHS, np.float32) / 10
ALL = np.ones(6, bool)
DROPPED = -1


def moe_config(num_experts: int = 3, **values) -> MoEConfig:
    return MoEConfig(num_experts=num_experts, min_capacity=1, **values)


def scores(probs=FIG11, mask=ALL, uniform=None) -> Scores:
    """Returns scores of a router that ranks experts by probability."""
    return Scores(jnp.asarray(probs), jnp.asarray(probs), jnp.asarray(mask), uniform)


def route(moe: MoEConfig, capacity: int, uniform=None) -> tuple[np.ndarray, ...]:
    """Returns expert, slot and gate of each assignment of Fig 11; -1, -1 where it was dropped."""
    router = jax.jit(partial(expert_selection.ROUTERS[moe.router], moe=moe, capacity=capacity))
    expert, gate, slot = map(np.asarray, router(scores(uniform=uniform)))
    kept = (expert < moe.num_experts) & (slot < capacity)
    return np.where(kept, expert, DROPPED), np.where(kept, slot, DROPPED), gate


def balance(probs, mask):
    return load_balancing_loss(balance_stats(scores(probs, mask)))


def test_golden_load_balancing_loss():
    np.testing.assert_allclose(expert_counts(jnp.array(FIG11.argmax(-1)), 3), [4, 1, 1], rtol=0)
    np.testing.assert_allclose(balance(FIG11, ALL), 1.275, rtol=1e-6)
    grouped = jax.vmap(balance)(FIG11.reshape(2, 3, 3), ALL.reshape(2, 3))
    np.testing.assert_allclose(grouped, [1.266667, 1.5], rtol=1e-6)
    np.testing.assert_allclose(grouped.mean(), 1.383333, rtol=1e-6)


def test_load_balancing_loss_ignores_padding_and_is_between_1_and_E():
    padded = np.concatenate([FIG11, np.full((3, 3), 1 / 3, np.float32)])
    mask = np.arange(9) < 6
    np.testing.assert_allclose(balance(padded, mask), 1.275, rtol=1e-6)
    assert balance(FIG11, ~ALL) == 0
    one_hot = np.eye(4, dtype=np.float32)
    mask = np.ones(4, bool)
    np.testing.assert_allclose(balance(one_hot, mask), 1)
    np.testing.assert_allclose(balance(one_hot[[2] * 4], mask), 4)


def test_load_balancing_loss_counts_sampled_experts_and_not_the_most_probable_ones():
    sampled = np.eye(3, dtype=np.float32)[[2] * 6]
    loss = load_balancing_loss(balance_stats(Scores(FIG11, sampled, ALL)))
    np.testing.assert_allclose(loss, 3 * FIG11[:, 2].mean(), rtol=1e-6)


def test_load_balancing_loss_has_a_gradient_through_P_only():
    gradient = jax.grad(lambda p: balance(p, ALL))(FIG11)
    np.testing.assert_allclose(gradient, 3 * np.tile([4, 1, 1], (6, 1)) / 36, rtol=1e-6)


def test_golden_switch_at_capacity_factor_one():
    moe = moe_config()
    assert expert_capacity(moe, 6, 1.0) == 2
    expert, slot, gate = route(moe, 2)
    assert expert[:, 0].tolist() == [1, 0, 0, DROPPED, 2, DROPPED]
    assert slot[:, 0].tolist() == [0, 0, 1, DROPPED, 0, DROPPED]
    np.testing.assert_allclose(gate[[0, 1, 2, 4], 0], [0.7, 0.7, 0.5, 0.6])


def test_golden_switch_at_capacity_factor_one_and_a_half():
    moe = moe_config()
    assert expert_capacity(moe, 6, 1.5) == 3
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
    # First choices fill e0 before t4's second choice.
    assert expert.tolist() == [[1, 2], [0, 1], [0, 1], [0, 1], [2, DROPPED], [0, 2]]
    raw = [[0.7, 0.2], [0.7, 0.2], [0.5, 0.3], [0.8, 0.1], [0.6, 0.3], [0.7, 0.2]]
    normal = [[0.7778, 0.2222], [0.7778, 0.2222], [0.625, 0.375], [0.8889, 0.1111]]
    normal += [[0.6667, 0.3333], [0.7778, 0.2222]]
    np.testing.assert_allclose(gate, normal if renormalize else raw, atol=5e-5)


def test_renormalize_does_not_change_a_single_gate():
    _, _, gate = route(moe_config(router="top_k", top_k=1, renormalize=True), 6)
    np.testing.assert_allclose(gate[:, 0], FIG11.max(-1))


def test_trap_1_the_first_slot_is_used_and_an_expert_keeps_exactly_C():
    """Fig 15 counts from 1 and keeps `position < capacity`: slot 0 stays empty."""
    mask_SxE = np.eye(3)[FIG11.argmax(-1)]
    literal = (np.cumsum(mask_SxE, 0) * mask_SxE).sum(-1)
    literal_kept = literal < 2
    assert literal.min() == 1
    assert np.bincount(FIG11.argmax(-1)[literal_kept], minlength=3).tolist() == [1, 1, 1]

    expert, slot, _ = route(moe_config(), 2)
    assert slot[expert >= 0].min() == 0
    assert np.bincount(expert[expert >= 0]).tolist() == [2, 1, 1]


def test_trap_4_the_argument_is_the_capacity_and_not_the_capacity_factor():
    tokens, factor, moe = 128, 1.25, moe_config(num_experts=8)
    assert expert_capacity(moe, tokens, factor) == 20 != int(factor)
    # An error in the last bit of a float must not change the number of slots.
    assert math.ceil(1.1 * 100 / 10) == 12
    assert expert_capacity(moe_config(num_experts=10), 100, 1.1) == 11


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
    assert expert_capacity(moe, tokens, percent / 100) == expected
    assert expert_capacity(moe, tokens, None) == tokens


@given(batch=st.integers(1, 4096), length=st.integers(1, 1024), size=st.integers(1, 20_000))
@settings(deadline=None)
def test_group_rows_is_the_largest_divisor_that_fits(batch, length, size):
    rows = rows_per_group(MoEConfig(group_size=size), batch, length)
    fits = [r for r in range(1, batch + 1) if batch % r == 0 and r * length <= max(size, length)]
    assert rows == max(fits)


def test_golden_second_policies():
    """Second gates, normalised: .22 .22 .375 .11 .33 .22; the second expert of t4 is full."""
    second = {"all": [2, 1, 1, 1, DROPPED, 2], "none": [DROPPED] * 6}
    second["threshold"] = [2, 1, 1, DROPPED, DROPPED, 2]
    moe = partial(moe_config, router="top_k", top_k=2, renormalize=True)
    for policy, expected in second.items():
        expert, _, gate = route(moe(second_policy=policy), 4)
        assert expert[:, 0].tolist() == [1, 0, 0, 0, 2, 0]
        assert expert[:, 1].tolist() == expected, policy
        np.testing.assert_allclose(gate[3], [0.8889, 0.1111], atol=5e-5)
    # With probability gate / 0.2, which is 1 for all but t3 with 0.5556.
    random = moe(second_policy="random")
    for uniform, expected in ((0.55, second["all"]), (0.56, second["threshold"])):
        expert, _, _ = route(random, 4, jnp.full((6, 2), uniform))
        assert expert[:, 1].tolist() == expected, uniform
    expert, _, _ = route(random, 4)
    assert expert[:, 1].tolist() == second["threshold"]


def test_a_removed_second_choice_takes_no_slot():
    """Without the second choice of t1, that of t2 moves up."""
    moe = moe_config(router="top_k", top_k=2, second_policy="threshold", second_threshold=0.25)
    expert, slot, _ = route(moe, 4)
    assert expert[:, 1].tolist() == [DROPPED, DROPPED, 1, DROPPED, DROPPED, DROPPED]
    assert slot[2, 1] == 1  # after the first choice of t0, not after the second of t1


def test_golden_batch_prioritized():
    """The tokens of e0 by gate: t3 (.8), then t1 and t5 (.7) in order, then t2 (.5)."""
    expert, slot, gate = route(moe_config(router="batch_prioritized"), 2)
    assert expert[:, 0].tolist() == [1, 0, DROPPED, 0, 2, DROPPED]
    assert slot[:, 0].tolist() == [0, 1, DROPPED, 0, 0, DROPPED]
    np.testing.assert_allclose(gate[:, 0], FIG11.max(-1))


def test_golden_expert_choice():
    """e0 takes t3 and t1 (equal to t5, but earlier), e1 t0 and t2, e2 t4 and t0."""
    expert, slot, gate = route(moe_config(router="expert_choice"), 2)
    x = DROPPED
    assert expert.tolist() == [[x, 1, 2], [0, x, x], [x, 1, x], [0, x, x], [x, x, 2], [x, x, x]]
    assert slot.tolist() == [[x, 0, 1], [1, x, x], [x, 1, x], [0, x, x], [x, x, 0], [x, x, x]]
    np.testing.assert_allclose(gate, FIG11)


# Few shapes, because each is compiled; many values.
S, E = 12, 4
ROUTERS = [
    moe_config(E, router=router, **values)
    for router, values in (
        ("switch", {}),
        ("top_k", {"top_k": 1}),
        ("top_k", {"top_k": 2, "renormalize": True}),
        ("top_k", {"top_k": 4, "second_policy": "threshold"}),
        ("ntlb", {}),
        ("ntlb", {"top_k": 2}),
        ("batch_prioritized", {}),
        ("batch_prioritized", {"top_k": 2}),
        ("expert_choice", {}),
    )
]


@cache
def compiled(moe: MoEConfig, capacity: int):
    @jax.jit
    def assign(probs, mask):
        grouped = jax.tree.map(lambda x: x[None], scores(probs, mask))
        assignment = jax.vmap(lambda s: expert_selection.ROUTERS[moe.router](s, moe, capacity))(
            grouped
        )
        _, indices = LocalDispatcher(E, capacity, 0.0).assign_slots(assignment)
        return jax.tree.map(lambda x: x[0], (assignment, *indices))

    return assign


class Case(NamedTuple):
    moe: MoEConfig
    capacity: int
    probs: np.ndarray
    mask: np.ndarray

    def assign(self):
        """Returns the assignment, and the slot indices in both directions."""
        return jax.tree.map(np.asarray, compiled(self.moe, self.capacity)(self.probs, self.mask))

    def kept(self) -> list[tuple[int, int, int, float]]:
        """Returns (token, expert, slot, gate) of every assignment with a slot."""
        (expert, gate, slot), *_ = self.assign()
        return [
            (t, int(expert[t, k]), int(slot[t, k]), gate[t, k])
            for t, k in np.ndindex(expert.shape)
            if expert[t, k] < E and slot[t, k] < self.capacity
        ]


@st.composite
def cases(draw):
    """A router, random probabilities with many equal ones, and padding at any position."""
    moe = draw(st.sampled_from(ROUTERS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    skew = rng.integers(0, draw(st.sampled_from([2, 5, 50])), (S, E)) + rng.integers(0, 9, E)
    probs = np.exp(skew / 4).astype(np.float32)
    probs /= probs.sum(-1, keepdims=True)
    mask = rng.random(S) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    return Case(moe, draw(st.sampled_from([1, 3, S])), probs, mask)


def reference(case: Case) -> list[tuple[int, int, int, float]]:
    """Computes `Case.kept` from the router's specification, one assignment after the other."""
    moe, capacity, probs, mask = case
    tokens = np.flatnonzero(mask)
    used = dict.fromkeys(range(E), 0)  # slots of each expert
    kept = []

    def assign(t, e, gate):
        if used[e] < capacity:
            kept.append((int(t), int(e), used[e], gate))
            used[e] += 1
            return True
        return False

    if moe.router == "expert_choice":
        capacity = math.ceil(capacity * len(tokens) / S)
        for e in range(E):
            for t in tokens[np.argsort(-probs[tokens, e], kind="stable")]:
                assign(t, e, probs[t, e])
        return kept
    choice = np.argsort(-probs, -1, kind="stable")
    if moe.router == "ntlb":
        dropped = list(tokens)
        for k in range(moe.num_selected):
            dropped = [t for t in dropped if not assign(t, choice[t, k], probs[t, choice[t, k]])]
        return kept
    if moe.router == "batch_prioritized":
        tokens = tokens[np.argsort(-probs[tokens].max(-1), kind="stable")]
    for k in range(moe.num_selected):
        for t in tokens:
            total = probs[t, choice[t, : moe.num_selected]].sum() if moe.renormalize else 1
            gate = probs[t, choice[t, k]] / total
            if k == 0 or moe.second_policy == "all" or gate > moe.second_threshold:
                assign(t, choice[t, k], gate)
    return kept


@given(cases())
@settings(deadline=None, max_examples=200)
def test_every_router_assigns_as_specified(case):
    kept, expected = sorted(case.kept()), sorted(reference(case))
    assert [k[:3] for k in kept] == [e[:3] for e in expected]
    np.testing.assert_allclose([k[3] for k in kept], [e[3] for e in expected], rtol=1e-5)


@given(cases())
@settings(deadline=None, max_examples=100)
def test_no_expert_exceeds_its_capacity_and_no_token_its_number_of_experts(case):
    kept = case.kept()
    most = E if case.moe.router == "expert_choice" else case.moe.num_selected
    most = 1 if case.moe.router == "ntlb" else most
    for t in range(S):
        experts = [e for token, e, _, _ in kept if token == t]
        assert len(experts) == len(set(experts)) <= (most if case.mask[t] else 0)
    for e in range(E):
        slots = sorted(slot for _, expert, slot, _ in kept if expert == e)
        assert slots == list(range(len(slots))) and len(slots) <= case.capacity


@given(cases())
@settings(deadline=None, max_examples=100)
def test_routing_does_not_depend_on_padding(case):
    """Neither its probabilities nor its positions matter."""
    changed = case.probs.copy()
    changed[~case.mask] = np.eye(E)[0]
    assert case._replace(probs=changed).kept() == case.kept()

    order = np.argsort(~case.mask, kind="stable")  # padding moved to the end
    moved = case._replace(probs=case.probs[order], mask=case.mask[order])
    original = sorted((int(order[t]), *rest) for t, *rest in moved.kept())
    assert original == sorted(case.kept())


@given(cases())
@settings(deadline=None, max_examples=50)
def test_slot_indices_are_inverse_to_each_other(case):
    assignment, slot, assignment_of_slot = case.assign()
    slot, assignment_of_slot = slot.reshape(-1), assignment_of_slot.reshape(-1)
    for n in np.flatnonzero(slot < assignment_of_slot.size):
        assert assignment_of_slot[slot[n]] == n
        assert slot[n] // case.capacity == assignment.expert_SxK.reshape(-1)[n]
    for m in np.flatnonzero(assignment_of_slot < slot.size):
        assert slot[assignment_of_slot[m]] == m
    assert (slot < assignment_of_slot.size).sum() == (assignment_of_slot < slot.size).sum()


def test_hash_expert_is_murmurhash_and_spreads_over_experts():
    """MurmurHash3's final mix of 1 is 0x514E28B7."""
    assert hash_expert(jnp.int32(1), 2**20) == 0x514E28B7 % 2**20
    counts = np.bincount(hash_expert(jnp.arange(32_000), 64), minlength=64)
    assert counts.min() > 400 and counts.max() < 600
