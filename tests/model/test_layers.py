"""Relative position buckets, initialisation, RMS norm and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_jax.model.attention import DenseAttention, relative_position_buckets
from switch_jax.model.layers import RMSNorm, dropout, fold_keys, init_kernel
from switch_jax.model.moe.expert_layers import SwitchMlp
from tests.support.configs import tiny

# Standard deviation of a standard normal distribution that is truncated at 2.
TRUNCATED_STD = 0.87962566


def buckets(distances, num_buckets, max_distance, bidirectional) -> list[int]:
    return relative_position_buckets(
        jnp.array(distances), num_buckets, max_distance, bidirectional=bidirectional
    ).tolist()


def test_encoder_buckets_distinguish_keys_behind_and_ahead():
    near_and_far = {0: 0, 1: 1, 2: 2, 5: 2, 6: 3, 15: 3, 16: 3, 17: 3, 1000: 3}
    behind = [-d for d in near_and_far]
    assert buckets(behind, 8, 16, True) == list(near_and_far.values())
    ahead = [d for d in near_and_far if d > 0]
    assert buckets(ahead, 8, 16, True) == [4 + near_and_far[d] for d in ahead]


def test_decoder_buckets_are_for_keys_behind():
    table = [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7]
    assert buckets([-d for d in range(20)], 8, 16, False) == table
    assert buckets([-1000, 1, 2, 1000], 8, 16, False) == [7, 0, 0, 0]


def test_buckets_of_the_sizes_that_t5_uses():
    table = {7: 7, 8: 8, 11: 8, 12: 9, 16: 10, 23: 11, 32: 12, 46: 13, 64: 14, 90: 14, 91: 15}
    table |= {127: 15, 128: 15, 5000: 15}
    assert buckets([-d for d in table], 32, 128, True) == list(table.values())
    assert buckets(list(table), 32, 128, True) == [16 + b for b in table.values()]
    table = {15: 15, 16: 16, 31: 21, 32: 21, 64: 26, 112: 30, 113: 31, 128: 31, 5000: 31}
    assert buckets([-d for d in table], 32, 128, False) == list(table.values())


def test_kernels_are_truncated_normal_without_correction_of_the_deviation():
    weights = np.asarray(init_kernel(jax.random.key(0), (400, 500), 0.1))
    sigma = np.sqrt(0.1 / 400)
    np.testing.assert_allclose(weights.std(), TRUNCATED_STD * sigma, rtol=0.01)
    assert 1.99 * sigma < np.abs(weights).max() <= 2 * sigma
    assert abs(weights.mean()) < 0.01 * sigma
    # JAX's initialiser corrects the deviation for the truncation, and fails the checks above.
    init = jax.nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
    corrected = np.asarray(init(jax.random.key(0), (400, 500)))
    assert corrected.std() > 1.1 * weights.std()


def test_experts_are_initialised_with_their_own_fan_in():
    config = tiny(**{"model.d_model": 64, "model.d_ff": 256, "model.activation": "geglu"})
    mlp = SwitchMlp(config, jax.random.key(0))
    for name, fan_in in (("wi", 64), ("gate", 64), ("wo", 256)):
        weights = np.asarray(getattr(mlp.experts, name)[...])
        sigma = np.sqrt(0.1 / fan_in)
        np.testing.assert_allclose(
            weights.std((1, 2)), TRUNCATED_STD * sigma, rtol=0.03, err_msg=name
        )
        assert np.abs(weights).max() <= 2 * sigma
        assert np.abs(np.diff(weights, axis=0)).min((1, 2)).max() > 0, "experts are alike"
    np.testing.assert_allclose(np.asarray(mlp.router.kernel[...]).std(), 0.02, rtol=0.2)


def test_the_initial_query_kernel_has_the_scale_of_the_scores():
    config = tiny(**{"model.d_model": 256, "model.head_dim": 64}).model
    attention = DenseAttention(config, jax.random.key(0))
    sigma = {name: np.sqrt(0.1 / 256) for name in ("query", "key", "value")}
    sigma |= {"query": sigma["query"] / np.sqrt(64), "out": np.sqrt(0.1 / 128)}
    for name, expected in sigma.items():
        weights = np.asarray(getattr(attention, name)[...])
        np.testing.assert_allclose(weights.std(), TRUNCATED_STD * expected, rtol=0.03, err_msg=name)


def test_rms_norm_has_no_mean_and_no_bias():
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 8)).astype(np.float32)
    norm = RMSNorm(8)
    norm.scale[...] = jnp.arange(8.0)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.arange(8)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-6)
    assert norm(jnp.array(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(1), 6)


def test_the_tokens_of_a_row_share_a_dropout_mask_and_rows_do_not(keys):
    x = jnp.ones((6, 10, 64))
    y = np.asarray(dropout(x, 0.25, keys))
    np.testing.assert_array_equal(np.unique(y), [0, np.float32(1 / 0.75)])
    assert (y == y[:, :1]).all(), "a mask differs along the length"
    assert len(np.unique(y[:, 0], axis=0)) == 6, "rows share a mask"
    assert 0.15 < (y == 0).mean() < 0.35
    np.testing.assert_array_equal(dropout(x[2:4], 0.25, keys[2:4]), y[2:4])
    np.testing.assert_array_equal(dropout(x, 0.25, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, keys), x)


def test_folded_keys_are_independent_and_depend_on_their_row_only(keys):
    x = jnp.ones((6, 1, 64))
    assert (dropout(x, 0.5, fold_keys(keys, 0)) != dropout(x, 0.5, fold_keys(keys, 1))).any()
    np.testing.assert_array_equal(
        jax.random.key_data(fold_keys(keys, 3))[2:4], jax.random.key_data(fold_keys(keys[2:4], 3))
    )
    assert fold_keys(None, 3) is None


def test_queries_share_an_attention_dropout_mask_and_heads_do_not(keys):
    """Mesh TensorFlow and T5X also broadcast the mask along the queries."""
    config = tiny(**{"model.dropout_rate": 0.5, "model.num_heads": 4, "model.d_model": 32}).model
    attention = DenseAttention(config, jax.random.key(0))
    B, T, S, H, K = 2, 6, 8, 4, 8
    # With zero queries and no bias all weights are 1/S; each (head, key) has its own output.
    attention.query[...] = 0 * attention.query[...]
    attention.out[...] = jnp.eye(H * K)
    one_hot = jnp.broadcast_to(jnp.eye(S)[None, :, None], (B, S, H, K))
    mask = jnp.ones((B, T, S), bool)
    query = attention.queries(jnp.zeros((B, T, 32)))
    y = attention(query, (0 * one_hot, one_hot), mask, None, keys[:B])
    kept = np.asarray(y).reshape(B, T, H, S) > 0
    assert 0 < kept.mean() < 1
    assert (kept == kept[:, :1]).all(), "queries of a row have different masks"
    assert (kept != kept[:, :, :1]).any(), "heads share their masks"
