"""Fused attention kernels, interpreted, against the einsums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_jax.distributed import make_mesh
from switch_jax.model import fused_attention as module
from switch_jax.model.attention_mask import SegmentMask
from switch_jax.model.fused_attention import fused_attention
from switch_jax.training import TrainProgram
from tests.support.configs import make_batch, tiny


def einsum_attention(query, key, value, mask, bias, head_dim):
    query, key, value = (x.reshape(*x.shape[:2], -1, head_dim) for x in (query, key, value))
    scores = jnp.einsum("BTHK,BSHK->BHTS", query, key)
    scores = scores if bias is None else scores + bias
    probs = jax.nn.softmax(jnp.where(mask.dense()[:, None], scores, -1e9), -1)
    result = jnp.einsum("BHTS,BSHK->BTHK", probs, value)
    return result.reshape(*result.shape[:2], -1)


def value_and_gradients(attention, arrays, cotangent):
    result, pull_back = jax.vjp(attention, *arrays)
    return [result, *pull_back(cotangent)]


def check(rng, B, T, S, H, K, causal, biased):
    def normal(*shape):
        return jnp.array(rng.normal(size=shape), jnp.float32)

    query_segment = np.sort(rng.integers(1, 4, (B, T)), 1)
    key_segment = query_segment if T == S else np.sort(rng.integers(1, 4, (B, S)), 1)
    query_segment, key_segment = query_segment.copy(), key_segment.copy()
    query_segment[:, T - T // 4 :], key_segment[:, S - S // 5 :] = 0, 0  # padding
    mask = SegmentMask(jnp.array(query_segment), jnp.array(key_segment), causal)
    arrays = [normal(B, T, H * K) / K**0.5, normal(B, S, H * K), normal(B, S, H * K)]
    arrays += [normal(H, T, S)] if biased else []

    def of(attention):
        def function(query, key, value, bias=None):
            return attention(query, key, value, mask, bias, K)

        return function

    def interpreted(*args):
        return fused_attention(*args, interpret=True)

    cotangent = normal(B, T, H * K)
    expected = value_and_gradients(of(einsum_attention), arrays, cotangent)
    actual = value_and_gradients(of(interpreted), arrays, cotangent)
    for name, a, e in zip(("value", "query", "key", "value", "bias"), actual, expected):
        np.testing.assert_allclose(a, e, atol=1e-6 * float(jnp.abs(e).max()), err_msg=name)


@settings(max_examples=6, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 40),
    S=st.integers(1, 40),
    H=st.integers(1, 5),
    K=st.sampled_from([4, 32, 64, 128]),
    causal=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 100),
)
def test_values_and_gradients_equal_those_of_the_einsums(B, T, S, H, K, causal, biased, seed):
    S = T if causal else S
    check(np.random.default_rng(seed), B, T, S, H, K, causal, biased)


@pytest.mark.parametrize("T, S", [(300, 300), (260, 64), (128, 384)])
def test_several_blocks_of_queries_add_up(T, S, monkeypatch):
    """Rows of 1,024 and more have several blocks; the last one may be partly padding."""
    monkeypatch.setattr(module, "_BLOCK_SCORES", 128 * S)
    check(np.random.default_rng(0), 2, T, S, 2, 64, T == S, True)


def test_blocks_fill_the_lanes_and_fit_in_vector_memory():
    def tiling(H, K, T, S):
        return module._Tiling.of(H, K, T, S, False, False)[:2]

    assert tiling(12, 64, 512, 512) == (2, 512)
    assert tiling(64, 128, 114, 512) == (1, 114)
    assert tiling(12, 64, 1024, 1024) == (2, 256)
    assert tiling(16, 128, 2048, 2048) == (1, 128)
    assert tiling(3, 32, 64, 64) == (3, 64)  # no multiple of the lanes: all heads
    assert tiling(4, 96, 512, 512) == (4, 128)


@pytest.mark.slow
def test_a_train_step_equals_that_of_the_einsums():
    """Packed rows and dropout; rows split over data × expert, heads over model."""
    values = {"mesh.data": 2, "mesh.expert": 2, "mesh.model": 2}
    values |= {"model.dropout_rate": 0.3, "data.pack": True}
    states = {}
    for attention in ("einsum", "fused"):
        config = tiny(**values, **{"model.attention": attention})
        program = TrainProgram(config, make_mesh(config))
        batch = program.sharded.shard_batch(make_batch(config))
        state, metrics, _ = program.train_step(program.init(), batch)
        losses = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        states[attention] = losses, jax.tree.map(np.asarray, state.params)
    (losses, params), (expected_losses, expected_params) = states["fused"], states["einsum"]
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, value in expected_params.items():
        np.testing.assert_allclose(params[name], value, atol=1e-5, err_msg=name)
