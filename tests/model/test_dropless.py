"""Dropless experts: layout of blocks, grouped matmul, and equality with slots for all tokens."""

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
from switch_jax.model.moe import grouped_matmul as module_of_kernels
from switch_jax.model.moe.expert_layers import SwitchAttention, SwitchMlp
from switch_jax.model.moe.grouped_matmul import (
    block_rows,
    grouped_matmul,
    make_blocks,
    num_blocks,
)
from switch_jax.model.moe.router import RoutingSpec
from switch_jax.model.parameters import named_parameters
from switch_jax.model.sharded import ShardedModel
from tests.support.configs import tiny

T, K, E, R = 12, 2, 4, 3
CLOSE = dict(rtol=1e-5, atol=1e-5)


@jax.jit
def blocks_of(expert_TxK):
    return make_blocks(expert_TxK, E, R)


@given(st.integers(0, 2**32), st.sampled_from([1, 2, E + 1]))
@settings(deadline=None, max_examples=100)
def test_every_assignment_has_a_row_in_a_used_block_of_its_expert(seed, num_loaded):
    """Holds for any load, all tokens in one expert too; experts from E on are on other devices."""
    expert = np.random.default_rng(seed).integers(0, num_loaded, (T, K)).astype(np.int32)
    row, assignment, block_expert, used = map(np.asarray, blocks_of(expert))
    assert len(block_expert) * R == len(assignment)
    flat_row, local = row.reshape(-1), expert.reshape(-1) < E
    assert len(set(flat_row[local])) == local.sum()
    assert (flat_row[~local] == len(assignment)).all()
    for a in np.flatnonzero(local):
        assert assignment[flat_row[a]] == a
        assert block_expert[flat_row[a] // R] == expert.reshape(-1)[a]
    assert (assignment < T * K).sum() == local.sum()
    counts = np.bincount(expert[expert < E], minlength=E)
    assert used == sum(-(-counts // R))
    assert (assignment[used * R :] == T * K).all()


@given(st.integers(1, 100_000), st.integers(1, 2048))
@settings(deadline=None)
def test_block_rows_are_a_power_of_two_and_enough_blocks_exist(assignments, experts):
    rows = block_rows(assignments, experts)
    assert rows in (8, 16, 32, 64, 128, 256)
    worst = min(experts, assignments)  # as many experts as possible, each with one row in a block
    needed = worst + max(assignments - worst, 0) // rows
    assert num_blocks(assignments, experts, rows) >= needed


def test_grouped_matmul_equals_one_matmul_a_block_forward_and_backward():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(12, 5)).astype(np.float32), rng.normal(size=(E, 5, 7)).astype("f")
    expert, used = jnp.array([0, 1, 2, 2]), jnp.int32(3)
    direction = rng.normal(size=(12, 7)).astype(np.float32)

    def ours(x, w):
        return jnp.sum(direction * grouped_matmul(x, w, expert, used))

    def naive(x, w):
        y = jnp.einsum("BRX,BXY->BRY", x.reshape(4, 3, 5), w[expert]).at[3].set(0)
        return jnp.sum(direction * y.reshape(12, 7))

    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, w) for f in (ours, naive))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), got, want)
    assert np.abs(got[1][1][3]).max() == 0  # expert 3 has no block


B, L, D = 16, 8, 16
BIG = 100.0  # a capacity factor that drops nothing


def layer(kind: type, **values):
    config = tiny(**{"model.init_scale": 1.0}, **values)
    module = kind(config, jax.random.key(0))
    module.router.kernel[...] = 50 * module.router.kernel[...]
    return module


def loss_and_gradients(module, x, mask, factor, keys=None):
    rows = 2

    def loss(module, x):
        spec = RoutingSpec(jnp.zeros(mask.shape, jnp.int32), mask, rows, factor)
        if isinstance(module, SwitchMlp):
            y, routing = module(x, spec, keys)
        else:
            (query, (key, _)), routing = module.project(x, spec, keys)
            y = query - 2 * key
        weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        return jnp.sum(weights * y), (y, routing.stats)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(module, x)


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
def test_dropless_equals_slots_for_all_tokens(inputs, kind, values):
    x, mask = inputs
    module = layer(kind, **values)
    (_, (y, stats)), gradients = loss_and_gradients(module, x, mask, None)
    (_, (want, want_stats)), want_gradients = loss_and_gradients(module, x, mask, BIG)
    np.testing.assert_allclose(y, want, **CLOSE)
    pairs = list(zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients)))
    # Router, experts and input; the output projection of attention is not used here.
    assert sum(np.abs(expected).max() > 1e-3 for _, expected in pairs) >= 4
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert stats.dropped == want_stats.dropped == 0


def test_a_single_token_as_in_decoding_equals_slots(inputs):
    x, _ = inputs
    module = layer(SwitchMlp, **{"moe.num_experts": 16})
    mask = np.ones((1, 1), bool)

    def output(factor):
        spec = RoutingSpec(jnp.zeros((1, 1), jnp.int32), mask, 1, factor)
        return jax.jit(lambda module, x: module(x, spec, None)[0])(module, x[:1, :1])

    got, want = output(None), output(16.0)
    np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("kernels", [False, True])
def test_dropless_with_noise_and_its_gradients_do_not_depend_on_the_mesh(
    inputs, kernels, monkeypatch
):
    x, mask = inputs
    values = {"moe.expert_dropout_rate": 0.5, "moe.router": "top_k"}
    values |= {"mesh.data": 2, "mesh.expert": 2, "mesh.model": 2, "mesh.fsdp": True}
    module = layer(SwitchMlp, **values)
    keys = fold_keys(jax.random.split(jax.random.key(1), B), 0)
    (loss, (y, _)), gradients = loss_and_gradients(module, x, mask, None, keys)
    (loss_without_noise, _), _ = loss_and_gradients(module, x, mask, None)
    assert abs(loss - loss_without_noise) > 0.1

    if kernels:  # those of TPUs, interpreted
        for module_with_name in (module_of_kernels, dropless):
            monkeypatch.setattr(module_with_name, "has_kernel", lambda: True)
    mesh = make_mesh(tiny(**values))
    axes = [p.get_metadata()["axes"] for p in named_parameters(module).values()]
    shardings = [NamedSharding(mesh, partition_spec(a, fsdp=True)) for a in axes]
    sharded = jax.device_put(module, jax.tree.unflatten(jax.tree.structure(module), shardings))
    rows = batch_sharding(mesh)
    with jax.set_mesh(mesh):
        (_, (got, _)), got_gradients = loss_and_gradients(
            sharded, *jax.device_put((x, mask), rows), None, jax.device_put(keys, rows)
        )
    np.testing.assert_allclose(got, y, **CLOSE)
    for got_gradient, want in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(gradients)):
        np.testing.assert_allclose(got_gradient, want, rtol=1e-4, atol=1e-4)


def test_a_mesh_without_memory_for_a_dropless_layer_is_refused_with_the_sizes(monkeypatch):
    values = {"moe.eval_capacity_factor": None, "mesh.data": 1, "mesh.expert": 2}
    # 16 × 16 tokens × (16 inputs + 32 hidden + 16 outputs) × 4 bytes
    needed = 16 * 16 * 64 * 4

    def check(**more):
        config = tiny(**values | more)
        ShardedModel(config, make_mesh(config))

    monkeypatch.setattr(dropless, "device_memory_bytes", lambda devices: needed)
    check()
    monkeypatch.setattr(dropless, "device_memory_bytes", lambda devices: needed - 1)
    with pytest.raises(UserError) as error:
        check()
    message = str(error.value)
    assert all(word in message for word in ("moe.eval_capacity_factor", "256", "GB", "mesh.data"))
    check(**{"mesh.data": 2})
    check(**{"mesh.model": 2})
    check(**{"moe.eval_capacity_factor": 2.0})
    assert not re.search(r"\. ", message)


def test_the_kernels_of_tpus_equal_the_loop_over_blocks(monkeypatch):
    """Interpreted; experts without a block, and rows behind the last used block."""
    rng = np.random.default_rng(0)
    M, X, Y = 40, 24, 16
    x, w = (jnp.array(rng.normal(size=shape), jnp.float32) for shape in ((M, X), (E, X, Y)))
    expert, used = jnp.array([0, 2, 2, 3, 3]), jnp.int32(3)
    direction = rng.normal(size=(M, Y)).astype(np.float32)

    def value_and_gradients():
        def function(x, w):
            return grouped_matmul(x, w, expert, used)

        y, pull_back = jax.vjp(function, x, w)
        return y, *pull_back(direction)

    expected = value_and_gradients()
    monkeypatch.setattr(module_of_kernels, "has_kernel", lambda: True)
    actual = value_and_gradients()
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, **CLOSE)
    assert np.abs(actual[0][24:]).max() == 0 == np.abs(actual[2][1]).max()
