"""Groups that span devices get the slots they would get on one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_jax.distributed.mesh import make_mesh
from switch_jax.model.moe import cross_device_dispatch
from switch_jax.model.moe.cross_device_dispatch import (
    combine_across_devices,
    dispatch_across_devices,
    make_route,
    padded_size,
    split_hops,
)
from switch_jax.model.moe.router import RoutingSpec
from switch_jax.model.moe.routing import Assignment, position_in_expert
from switch_jax.model.moe.slot_dispatch import (
    combine_from_slots,
    dispatch_to_slots,
    make_slot_indices,
)
from tests.support.configs import tiny

E, S, D = 16, 12, 4  # S tokens of each of eight devices
DEVICES = 8
EVERY_WAY = [(8,), (2, 4), (4, 2)]


def mesh():
    return make_mesh(tiny(**{"mesh.data": 1, "mesh.expert": DEVICES, "moe.num_experts": E}))


def draw(seed: int, top_k: int, span: int) -> Assignment:
    """Random assignments of the groups, more to some experts than to others, some to none."""
    rng = np.random.default_rng(seed)
    G, tokens = DEVICES // span, S * span
    share = rng.dirichlet(np.ones(E))
    expert = np.stack(
        [rng.choice(E, top_k, replace=False, p=share) for _ in range(G * tokens)]
    ).reshape(G, tokens, top_k)
    expert[rng.random((G, tokens)) < 0.2] = E
    gate = rng.uniform(0.1, 1, expert.shape).astype(np.float32)
    slot = jax.vmap(partial(position_in_expert, num_experts=E))(jnp.asarray(expert))
    return Assignment(jnp.asarray(expert, jnp.int32), jnp.asarray(gate), slot)


@partial(jax.jit, static_argnames=("capacity", "span", "sizes"))
def travelled(assignment, x_GxSxD, direction, capacity, span, sizes):
    """Slots, what the slots hold, what comes back of it doubled, and gradients.

    `sizes` is here for `jit` alone, which must not take what it made for other hops.
    """
    K = assignment.gate_SxK.shape[-1]
    parts = jax.tree.map(lambda leaf: leaf.reshape(DEVICES, S, K), assignment)
    plan = RoutingSpec(None, None, 0, 1.0, span)

    def forward(x_GxSxD, gate_GxSxK):
        route, placed = make_route(parts, E, capacity, plan)
        slots = dispatch_across_devices(x_GxSxD.reshape(DEVICES, S, D), route, E, capacity)
        y = combine_across_devices(2 * slots, gate_GxSxK.reshape(DEVICES, S, K), route)
        return jnp.sum(y.reshape(direction.shape) * direction), (placed.slot_SxK, slots, y)

    return jax.grad(forward, (0, 1), has_aux=True)(x_GxSxD, assignment.gate_SxK)


@partial(jax.jit, static_argnames="capacity")
def stayed(assignment, x_GxSxD, direction, capacity):
    """The same on one device, where groups are whole."""

    def forward(x_GxSxD, gate_GxSxK):
        indices = make_slot_indices(assignment, E, capacity)
        slots = dispatch_to_slots(x_GxSxD, indices)
        y = combine_from_slots(2 * slots, gate_GxSxK, indices)
        return jnp.sum(y * direction), (assignment.slot_SxK, slots, y)

    return jax.grad(forward, (0, 1), has_aux=True)(x_GxSxD, assignment.gate_SxK)


@pytest.mark.parametrize("sizes", EVERY_WAY)
@pytest.mark.parametrize("top_k, span", [(1, 8), (2, 8), (1, 4), (2, 2)])
def test_slots_results_and_gradients_are_those_of_one_device(monkeypatch, sizes, top_k, span):
    monkeypatch.setattr(cross_device_dispatch, "split_hops", lambda *_: sizes)
    monkeypatch.setattr(
        cross_device_dispatch, "padded_size", lambda mean: DEVICES * S * top_k
    )  # for the worst case
    rng, capacity = np.random.default_rng(1), 2 * span
    shape = (DEVICES // span, S * span, D)
    x, direction = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    for seed in range(3):
        assignment = draw(seed, top_k, span)
        want = stayed(assignment, x, direction, capacity)
        with jax.set_mesh(mesh()):
            got = travelled(assignment, x, direction, capacity, span, sizes)
        (dx, dgate), (slot, slots, y) = got
        (dx_want, dgate_want), (slot_want, slots_want, y_want) = want
        real = np.asarray(assignment.expert_SxK) < E
        slot, slot_want = (np.minimum(np.asarray(s), capacity) for s in (slot, slot_want))
        assert (slot_want[real] == capacity).any() and (slot_want[real] < capacity).any()
        np.testing.assert_array_equal(slot.reshape(slot_want.shape)[real], slot_want[real])
        np.testing.assert_array_equal(slots, slots_want)
        np.testing.assert_allclose(np.reshape(y, y_want.shape), y_want, rtol=1e-6)
        np.testing.assert_allclose(dx, dx_want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dgate, dgate_want, rtol=1e-5, atol=1e-6)


def test_what_finds_no_room_on_the_way_is_dropped_and_nothing_else_changes(monkeypatch):
    monkeypatch.setattr(cross_device_dispatch, "split_hops", lambda *_: (2, 4))
    monkeypatch.setattr(cross_device_dispatch, "padded_size", lambda mean: 4)
    assignment, capacity = draw(5, 1, 8), 100
    x = jnp.ones((1, DEVICES * S, D))
    with jax.set_mesh(mesh()):
        (dx, _), (slot, slots, y) = travelled(assignment, x, x, capacity, 8, "little room")
    kept = (np.asarray(slot) < capacity).reshape(-1)
    real = np.asarray(assignment.expert_SxK).reshape(-1) < E
    assert kept[real].any() and not kept[real].all() and not kept[~real].any()
    held = np.abs(slots).sum(-1) > 0
    assert held.sum() == kept.sum()
    # The slots of an expert that are taken are its first ones.
    assert (held == (np.arange(capacity) < held.sum(-1, keepdims=True))).all()
    gate = np.asarray(assignment.gate_SxK).reshape(-1, 1)
    want = np.where(kept[:, None], 2 * gate, 0) * np.ones(D)
    np.testing.assert_allclose(np.reshape(y, (-1, D)), want)
    np.testing.assert_allclose(dx[0], want)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4096), st.integers(1, 1 << 16))
def test_one_or_two_hops_reach_every_device_with_the_fewest_places(devices, tokens):
    def places(sizes):
        return sum(size * padded_size(tokens / size) for size in sizes)

    sizes = split_hops(devices, tokens)
    assert np.prod(sizes) == devices and len(sizes) <= 2
    assert places(sizes) <= places((devices,))


def test_two_hops_where_devices_outnumber_tokens():
    assert split_hops(1024, 1.25 * 1024) == (32, 32)  # Switch-C's encoder on a pod
    assert split_hops(64, 1.25 * 2**16) == (64,)
    assert split_hops(1, 100) == (1,)


@pytest.mark.parametrize("mean", [1.25, 8, 40, 500])
def test_a_parcel_has_room_for_all_but_a_thousandth_of_balanced_traffic(mean):
    sent = np.random.default_rng(0).poisson(mean, 200_000)
    assert np.maximum(sent - padded_size(mean), 0).sum() / sent.sum() < 2e-3
