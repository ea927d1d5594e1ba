"""Blocks hold every assignment, and nothing is lost on the way."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from switch_jax.distributed.mesh import make_mesh
from switch_jax.distributed.sharding import batch_sharding, partition_spec
from switch_jax.errors import UserError
from switch_jax.model.layers import fold_keys
from switch_jax.model.moe import dropless
from switch_jax.model.moe.dropless import block_rows, grouped_matmul, make_blocks, num_blocks
from switch_jax.model.moe.layers import SwitchAttention, SwitchMlp
from switch_jax.model.moe.router import RoutingSpec
from switch_jax.model.parameters import named_parameters
from tests.support.configs import tiny

T, K, E, R = 12, 2, 4, 3
CLOSE = dict(rtol=1e-5, atol=1e-5)


@jax.jit
def blocks_of(expert_TxK):
    return make_blocks(expert_TxK, E, R)


@given(st.integers(0, 2**32), st.sampled_from([1, 2, E + 1]))
@settings(deadline=None, max_examples=100)
def test_every_assignment_has_a_row_in_a_used_block_of_its_expert(seed, most):
    """Whatever the load: one expert may have everything; experts from E on are elsewhere."""
    expert = np.random.default_rng(seed).integers(0, most, (T, K)).astype(np.int32)
    slot, held, expert_of, used = map(np.asarray, blocks_of(expert))
    assert len(expert_of) * R == len(held)
    flat, here = slot.reshape(-1), expert.reshape(-1) < E
    assert len(set(flat[here])) == here.sum()
    assert (flat[~here] == len(held)).all()
    for a in np.flatnonzero(here):
        assert held[flat[a]] == a
        assert expert_of[flat[a] // R] == expert.reshape(-1)[a]
    assert (held < T * K).sum() == here.sum()
    counts = np.bincount(expert[expert < E], minlength=E)
    assert used == sum(-(-counts // R))
    assert (held[used * R :] == T * K).all()


@given(st.integers(1, 100_000), st.integers(1, 2048))
@settings(deadline=None)
def test_blocks_are_about_an_experts_share(assignments, experts):
    rows = block_rows(assignments, experts)
    assert rows in (8, 16, 32, 64, 128, 256)
    worst = min(experts, assignments)  # as many experts as possible with a block of one row
    needed = worst + max(assignments - worst, 0) // rows
    assert num_blocks(assignments, experts, rows) >= needed


def test_grouped_matmul_equals_one_matmul_a_block_forward_and_backward():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(12, 5)).astype(np.float32), rng.normal(size=(E, 5, 7)).astype("f")
    expert, used = jnp.array([2, 0, 2, 1]), jnp.int32(3)
    direction = rng.normal(size=(12, 7)).astype(np.float32)

    def ours(x, w):
        return jnp.sum(direction * grouped_matmul(x, w, expert, used))

    def naive(x, w):
        y = jnp.einsum("BRX,BXY->BRY", x.reshape(4, 3, 5), w[expert]).at[3].set(0)
        return jnp.sum(direction * y.reshape(12, 7))

    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, w) for f in (ours, naive))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, want)
    assert np.abs(got[1][1][3]).max() == 0  # no block, no gradient


B, L, D = 16, 8, 16
BIG = 100.0  # a capacity factor with room for all


def layer(kind: type, **values):
    config = tiny(**{"model.init_scale": 1.0}, **values)
    made = kind(config, jax.random.key(0))
    made.router.kernel[...] = 50 * made.router.kernel[...]
    return made


def loss_and_gradients(made, x, mask, factor, keys=None):
    rows = 2

    def loss(made, x):
        plan = RoutingSpec(jnp.zeros(mask.shape, jnp.int32), mask, rows, factor)
        if isinstance(made, SwitchMlp):
            y, routed = made(x, plan, keys)
        else:
            (query, (key, _)), routed = made.project(x, plan, keys)
            y = query - 2 * key
        weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        return jnp.sum(weights * y), (y, routed.sums)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(made, x)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(B, L, D)).astype(np.float32)
    return x, rng.random((B, L)) < 0.8


@pytest.mark.parametrize(
    "kind, values",
    [
        (SwitchMlp, {"model.activation": "geglu", "moe.router": "top_k"}),
        (SwitchAttention, {"moe.num_experts": 8}),
    ],
    ids=["top-2 geglu", "attention"],
)
def test_equals_slots_with_room_for_all(inputs, kind, values):
    x, mask = inputs
    made = layer(kind, **values)
    (_, (y, sums)), gradients = loss_and_gradients(made, x, mask, None)
    (_, (want, want_sums)), want_gradients = loss_and_gradients(made, x, mask, BIG)
    np.testing.assert_allclose(y, want, **CLOSE)
    pairs = list(zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients)))
    # Router, experts and input; what attention does not reach here is its output projection.
    assert sum(np.abs(expected).max() > 1e-3 for _, expected in pairs) >= 4
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert sums.dropped == want_sums.dropped == 0


def test_a_single_token_as_in_decoding(inputs):
    x, _ = inputs
    made = layer(SwitchMlp, **{"moe.num_experts": 16})
    mask = np.ones((1, 1), bool)

    def run(factor):
        plan = RoutingSpec(jnp.zeros((1, 1), jnp.int32), mask, 1, factor)
        return jax.jit(lambda made, x: made(x, plan, None)[0])(made, x[:1, :1])

    got, want = run(None), run(16.0)
    np.testing.assert_allclose(got, want, **CLOSE)


def test_equals_itself_on_a_mesh_noise_and_gradients_included(inputs):
    x, mask = inputs
    values = {"moe.expert_dropout_rate": 0.5, "moe.router": "top_k"}
    values |= {"mesh.data": 2, "mesh.expert": 2, "mesh.model": 2, "mesh.fsdp": True}
    made = layer(SwitchMlp, **values)
    keys = fold_keys(jax.random.split(jax.random.key(1), B), 0)
    (loss, (y, _)), gradients = loss_and_gradients(made, x, mask, None, keys)
    (other, _), _ = loss_and_gradients(made, x, mask, None)
    assert abs(loss - other) > 0.1

    mesh = make_mesh(tiny(**values))
    axes = [p.get_metadata()["axes"] for p in named_parameters(made).values()]
    where = [NamedSharding(mesh, partition_spec(a, fsdp=True)) for a in axes]
    split = jax.device_put(made, jax.tree.unflatten(jax.tree.structure(made), where))
    rows = batch_sharding(mesh)
    with jax.set_mesh(mesh):
        (_, (got, _)), got_gradients = loss_and_gradients(
            split, *jax.device_put((x, mask), rows), None, jax.device_put(keys, rows)
        )
    np.testing.assert_allclose(got, y, **CLOSE)
    for one, expected in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(gradients)):
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)


def test_a_mesh_that_cannot_hold_it_is_refused_with_the_sizes(monkeypatch):
    values = {"moe.eval_capacity_factor": None, "mesh.data": 1, "mesh.expert": 2}
    # 16 × 16 tokens × (16 inputs + 32 hidden + 16 outputs) × 4 bytes
    needed = 16 * 16 * 64 * 4
    monkeypatch.setattr(dropless, "device_memory_bytes", lambda devices: needed)
    make_mesh(tiny(**values))
    monkeypatch.setattr(dropless, "device_memory_bytes", lambda devices: needed - 1)
    with pytest.raises(UserError) as error:
        make_mesh(tiny(**values))
    message = str(error.value)
    assert all(word in message for word in ("moe.eval_capacity_factor", "256", "GB", "mesh.data"))
    make_mesh(tiny(**values | {"mesh.data": 2}))
    make_mesh(tiny(**values | {"mesh.model": 2}))
    make_mesh(tiny(**values | {"moe.eval_capacity_factor": 2.0}))
    assert not re.search(r"\. ", message)
