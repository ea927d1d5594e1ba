"""Multi-head attention with the relative position bias of T5.

T and S are the lengths of queries and keys. Other axis letters: see README.md.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax.config import ModelConfig
from switch_jax.distributed import constrain
from switch_jax.model.layers import RowKeys, dropout, gathered_weight, init_kernel, param


class RelativePositionBias(nnx.Module):
    """Relative position bias of T5: one table per stack, shared by its layers."""

    def __init__(self, config: ModelConfig, key: jax.Array, *, bidirectional: bool):
        self.config = config
        self.bidirectional = bidirectional
        init = jax.nn.initializers.variance_scaling(config.init_scale, "fan_avg", "uniform")
        table = init(key, (config.num_heads, config.relative_buckets))
        self.table = param(table, "heads", "buckets", kind="relative_bias")

    def __call__(self, query_T: jax.Array, key_S: jax.Array) -> jax.Array:
        """[H, T, S] float32, the bias of the scores, from positions of queries and keys."""
        distance_TxS = key_S[None, :] - query_T[:, None]
        bucket_TxS = relative_position_buckets(
            distance_TxS,
            self.config.relative_buckets,
            self.config.relative_max_distance,
            bidirectional=self.bidirectional,
        )
        return self.table[...][:, bucket_TxS]


def relative_position_buckets(
    distance: jax.Array, num_buckets: int, max_distance: int, *, bidirectional: bool
) -> jax.Array:
    """Returns the bucket of each distance (key position - query position), int32, same shape.

    Half of the buckets hold one small distance each. The others grow logarithmically up to
    `max_distance`, and the last one holds all larger distances. With `bidirectional` (encoder) half
    of the buckets are for keys behind the query and half for keys ahead; otherwise (decoder) all
    are for keys behind.
    """
    offset = jnp.zeros((), jnp.int32)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = -jnp.minimum(distance, 0)
    exact = num_buckets // 2
    ratio = jnp.maximum(distance, 1).astype(jnp.float32) / exact
    far = exact + (
        jnp.log(ratio) / jnp.log(jnp.float32(max_distance / exact)) * (num_buckets - exact)
    ).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, num_buckets - 1))


# Keys and values, two arrays [B, S, H, K].
KeysValues = tuple[jax.Array, jax.Array]

# Queries [B, T, H, K], and keys and values of the same positions.
QueryKeyValue = tuple[jax.Array, KeysValues]


class Attention(nnx.Module):
    """Multi-head attention over given queries, keys and values, with its output projection.

    Scores are not divided by sqrt(K): the initialiser of the query has that factor, as in T5.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        D, inner = config.d_model, config.num_heads * config.head_dim
        self.out = param(
            init_kernel(key, (inner, D), config.init_scale), "heads", "embed", kind="attention"
        )

    def heads(self, y_BxLxI: jax.Array) -> jax.Array:
        """[B, L, H·K] → [B, L, H, K]."""
        y = y_BxLxI.reshape(*y_BxLxI.shape[:-1], self.config.num_heads, self.config.head_dim)
        return constrain(y, "batch", None, "heads", None)

    def __call__(
        self,
        query_BxTxHxK: jax.Array,
        keys_values: KeysValues,
        mask_BxTxS: jax.Array,
        bias_HxTxS: jax.Array | None,
        keys: RowKeys,
    ) -> jax.Array:
        """Returns [B, T, D]; the softmax is in float32.

        Args:
          query_BxTxHxK: queries.
          keys_values: keys and values, [B, S, H, K] each.
          mask_BxTxS: bool, true where a query attends to a key; its B and T may be 1.
          bias_HxTxS: float32, added to the scores.
          keys: one random key per row, for dropout of the attention weights.
        """
        key_BxSxHxK, value_BxSxHxK = keys_values
        scores = jnp.einsum(
            "BTHK,BSHK->BHTS", query_BxTxHxK, key_BxSxHxK, preferred_element_type=jnp.float32
        )
        if bias_HxTxS is not None:
            scores += bias_HxTxS
        scores = jnp.where(mask_BxTxS[:, None], scores, -1e9)
        weights_BxHxTxS = jax.nn.softmax(scores, -1).astype(query_BxTxHxK.dtype)
        weights_BxHxTxS = dropout(weights_BxHxTxS, self.config.dropout_rate, keys)
        y = jnp.einsum("BHTS,BSHK->BTHK", weights_BxHxTxS, value_BxSxHxK)
        y = y.reshape(*y.shape[:2], -1) @ gathered_weight(self.out, y.dtype)
        return constrain(y, "batch", None, "activation")


class DenseAttention(Attention):
    """Attention with dense projections to queries, keys and values, without biases."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        D, K, inner = config.d_model, config.head_dim, config.num_heads * config.head_dim
        s = config.init_scale
        q, k, v, o = jax.random.split(key, 4)
        super().__init__(config, o)
        self.query = param(
            init_kernel(q, (D, inner), s) / K**0.5, "embed", "heads", kind="attention"
        )
        self.key = param(init_kernel(k, (D, inner), s), "embed", "heads", kind="attention")
        self.value = param(init_kernel(v, (D, inner), s), "embed", "heads", kind="attention")

    def queries(self, x_BxTxD: jax.Array) -> jax.Array:
        """[B, T, D] → [B, T, H, K]."""
        return self.heads(x_BxTxD @ gathered_weight(self.query, x_BxTxD.dtype))

    def keys_values(self, x_BxSxD: jax.Array) -> KeysValues:
        """Returns keys and values, [B, S, H, K] each, of positions [B, S, D]."""
        key, value = (x_BxSxD @ gathered_weight(w, x_BxSxD.dtype) for w in (self.key, self.value))
        return self.heads(key), self.heads(value)
