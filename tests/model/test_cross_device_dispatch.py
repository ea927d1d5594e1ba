"""Cross-device dispatch: groups that span devices get the slots that they get on one device."""

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
    CrossDeviceDispatcher,
    padded_size,
    split_hops,
)
from switch_jax.model.moe.expert_selection import Assignment, position_in_expert
from switch_jax.model.moe.slot_dispatch import LocalDispatcher
from tests.support.configs import tiny

E, S, D = 16, 12, 4  # S: tokens of each of the eight devices
DEVICES = 8
HOP_SIZES = [(8,), (2, 4), (4, 2)]


def mesh():
    return make_mesh(tiny(**{"mesh.data": 1, "mesh.expert": DEVICES, "moe.num_experts": E}))


def random_assignment(seed: int, top_k: int, devices_per_group: int) -> Assignment:
    """Random assignments with unequal loads; some tokens have no expert."""
    rng = np.random.default_rng(seed)
    G, tokens = DEVICES // devices_per_group, S * devices_per_group
    share = rng.dirichlet(np.ones(E))
    expert = np.stack(
        [rng.choice(E, top_k, replace=False, p=share) for _ in range(G * tokens)]
    ).reshape(G, tokens, top_k)
    expert[rng.random((G, tokens)) < 0.2] = E
    gate = rng.uniform(0.1, 1, expert.shape).astype(np.float32)
    slot = jax.vmap(partial(position_in_expert, num_experts=E))(jnp.asarray(expert))
    return Assignment(jnp.asarray(expert, jnp.int32), jnp.asarray(gate), slot)


@partial(jax.jit, static_argnames=("capacity", "devices_per_group", "sizes"))
def across_devices(assignment, x_GxSxD, direction, capacity, devices_per_group, sizes):
    """Gradients; slots of assignments, dispatched tokens, and the combination of twice these.

    `sizes` is an argument only to recompile for other hops.
    """
    K = assignment.gate_SxK.shape[-1]
    parts = jax.tree.map(lambda leaf: leaf.reshape(DEVICES, S, K), assignment)
    dispatcher = CrossDeviceDispatcher(E, capacity, 0.0, devices_per_group, capacity_factor=1.0)

    def forward(x_GxSxD, gate_GxSxK):
        slot_GxSxK, route = dispatcher.assign_slots(parts)
        slots = dispatcher.dispatch(x_GxSxD.reshape(DEVICES, S, D), route)
        y = dispatcher.combine(2 * slots, gate_GxSxK.reshape(DEVICES, S, K), route)
        return jnp.sum(y.reshape(direction.shape) * direction), (slot_GxSxK, slots, y)

    return jax.grad(forward, (0, 1), has_aux=True)(x_GxSxD, assignment.gate_SxK)


@partial(jax.jit, static_argnames="capacity")
def on_one_device(assignment, x_GxSxD, direction, capacity):
    """The results of `across_devices` with whole groups on one device."""
    dispatcher = LocalDispatcher(E, capacity, 0.0)

    def forward(x_GxSxD, gate_GxSxK):
        slot_GxSxK, indices = dispatcher.assign_slots(assignment)
        slots = dispatcher.dispatch(x_GxSxD, indices)
        y = dispatcher.combine(2 * slots, gate_GxSxK, indices)
        return jnp.sum(y * direction), (slot_GxSxK, slots, y)

    return jax.grad(forward, (0, 1), has_aux=True)(x_GxSxD, assignment.gate_SxK)


@pytest.mark.parametrize("sizes", HOP_SIZES)
@pytest.mark.parametrize("top_k, devices_per_group", [(1, 8), (2, 8), (1, 4), (2, 2)])
def test_slots_results_and_gradients_equal_those_of_one_device(
    monkeypatch, sizes, top_k, devices_per_group
):
    monkeypatch.setattr(cross_device_dispatch, "split_hops", lambda *_: sizes)
    worst_case = DEVICES * S * top_k
    monkeypatch.setattr(cross_device_dispatch, "padded_size", lambda mean: worst_case)
    rng, capacity = np.random.default_rng(1), 2 * devices_per_group
    shape = (DEVICES // devices_per_group, S * devices_per_group, D)
    x, direction = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    for seed in range(3):
        assignment = random_assignment(seed, top_k, devices_per_group)
        want = on_one_device(assignment, x, direction, capacity)
        with jax.set_mesh(mesh()):
            got = across_devices(assignment, x, direction, capacity, devices_per_group, sizes)
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


def test_a_full_send_buffer_drops_assignments_and_changes_nothing_else(monkeypatch):
    monkeypatch.setattr(cross_device_dispatch, "split_hops", lambda *_: (2, 4))
    monkeypatch.setattr(cross_device_dispatch, "padded_size", lambda mean: 4)
    assignment, capacity = random_assignment(5, 1, 8), 100
    x = jnp.ones((1, DEVICES * S, D))
    with jax.set_mesh(mesh()):
        (dx, _), (slot, slots, y) = across_devices(assignment, x, x, capacity, 8, "small buffers")
    kept = (np.asarray(slot) < capacity).reshape(-1)
    real = np.asarray(assignment.expert_SxK).reshape(-1) < E
    assert kept[real].any() and not kept[real].all() and not kept[~real].any()
    used = np.abs(slots).sum(-1) > 0
    assert used.sum() == kept.sum()
    # The used slots of an expert are its first ones.
    assert (used == (np.arange(capacity) < used.sum(-1, keepdims=True))).all()
    gate = np.asarray(assignment.gate_SxK).reshape(-1, 1)
    want = np.where(kept[:, None], 2 * gate, 0) * np.ones(D)
    np.testing.assert_allclose(np.reshape(y, (-1, D)), want)
    np.testing.assert_allclose(dx[0], want)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4096), st.integers(1, 1 << 16))
def test_one_or_two_hops_reach_every_device_with_the_fewest_buffer_slots(devices, tokens):
    def buffer_slots(sizes):
        return sum(size * padded_size(tokens / size) for size in sizes)

    sizes = split_hops(devices, tokens)
    assert np.prod(sizes) == devices and len(sizes) <= 2
    assert buffer_slots(sizes) <= buffer_slots((devices,))


def test_there_are_two_hops_where_devices_outnumber_tokens():
    assert split_hops(1024, 1.25 * 1024) == (32, 32)  # Switch-C's encoder on a pod
    assert split_hops(64, 1.25 * 2**16) == (64,)
    assert split_hops(1, 100) == (1,)


@pytest.mark.parametrize("mean", [1.25, 8, 40, 500])
def test_a_send_buffer_drops_less_than_two_thousandths_of_balanced_traffic(mean):
    sent = np.random.default_rng(0).poisson(mean, 200_000)
    assert np.maximum(sent - padded_size(mean), 0).sum() / sent.sum() < 2e-3
