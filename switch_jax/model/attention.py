"""Multi-head attention with the relative position bias of T5.

T and S are the lengths of queries and keys. Other axis letters: see README.md.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax.config import MAX_FUSED_LENGTH, ModelConfig
from switch_jax.distributed import constrain, mesh_platform, no_mesh, partition_spec, shard_map
from switch_jax.model.attention_mask import MASKED_SCORE, SegmentMask
from switch_jax.model.fused_attention import fused_attention
from switch_jax.model.layers import (
    RowKeys,
    dropout,
    dropout_mask,
    init_kernel,
    linear,
    param,
)
from switch_jax.model.rematerialization import keep


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

    @jax.named_scope("attention")
    def __call__(
        self,
        query_BxTxHxK: jax.Array,
        keys_values: KeysValues,
        mask: SegmentMask | jax.Array,
        bias_HxTxS: jax.Array | None,
        keys: RowKeys,
    ) -> jax.Array:
        """Returns [B, T, D]; the softmax is in float32.

        Args:
          query_BxTxHxK: queries.
          keys_values: keys and values, [B, S, H, K] each.
          mask: as from `attention_mask`, or bool [B, T, S], true where a query attends to a key;
            its B and T may be 1.
          bias_HxTxS: float32, added to the scores.
          keys: one random key per row, for dropout of the attention weights.
        """
        attend = self._attend_fused if isinstance(mask, SegmentMask) else self._attend
        y_BxTxI = attend(query_BxTxHxK, *keys_values, mask, bias_HxTxS, keys)
        return constrain(linear(y_BxTxI, self.out), "batch", None, "activation")

    def _attend(self, query_BxTxHxK, key_BxSxHxK, value_BxSxHxK, mask_BxTxS, bias_HxTxS, keys):
        """[B, T, H·K]: attention by two einsums."""
        scores = jnp.einsum(
            "BTHK,BSHK->BHTS", query_BxTxHxK, key_BxSxHxK, preferred_element_type=jnp.float32
        )
        if bias_HxTxS is not None:
            scores += bias_HxTxS
        scores = jnp.where(mask_BxTxS[:, None], scores, MASKED_SCORE)
        weights_BxHxTxS = _softmax(scores, query_BxTxHxK.dtype)
        weights_BxHxTxS = dropout(weights_BxHxTxS, self.config.dropout_rate, keys)
        y = jnp.einsum("BHTS,BSHK->BTHK", weights_BxHxTxS, value_BxSxHxK)
        return y.reshape(*y.shape[:2], -1)

    def _attend_fused(self, query_BxTxHxK, key_BxSxHxK, value_BxSxHxK, mask, bias_HxTxS, keys):
        """[B, T, H·K]: attention by the kernels of `fused_attention.py`."""
        rate = self.config.dropout_rate
        if keys is not None and rate:
            # The queries of a row share the mask of the weights: a dropped weight is a dropped
            # value of the key.
            keep_BxHx1xS = dropout_mask(
                (self.config.num_heads, 1, key_BxSxHxK.shape[1]), rate, keys
            )
            keep_BxSxHx1 = keep_BxHx1xS.transpose(0, 3, 1, 2)
            value_BxSxHxK = jnp.where(keep_BxSxHx1, value_BxSxHxK / (1 - rate), 0)
        arrays = (x.reshape(*x.shape[:2], -1) for x in (query_BxTxHxK, key_BxSxHxK, value_BxSxHxK))
        biases = [] if bias_HxTxS is None else [bias_HxTxS]

        def local(query, key, value, query_segment, key_segment, *biases):
            return fused_attention(
                query,
                key,
                value,
                SegmentMask(query_segment, key_segment, mask.causal),
                biases[0] if biases else None,
                self.config.head_dim,
                interpret=mesh_platform() != "tpu",
            )

        heads = partition_spec(("batch", None, "heads"))
        segments = partition_spec(("batch", None))
        bias_specs = [partition_spec(("heads", None, None))] * len(biases)
        return shard_map(
            local,
            in_specs=(heads, heads, heads, segments, segments, *bias_specs),
            out_specs=heads,
            check_vma=False,
        )(*arrays, mask.query_segment_BxT, mask.key_segment_BxS, *biases)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _softmax(scores: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Softmax over the last axis in float32, rounded to `dtype`; its derivative keeps only this.

    That of `jax.nn.softmax` keeps the float32 probabilities as well.
    """
    return jax.nn.softmax(scores, -1).astype(dtype)


def _softmax_fwd(scores, dtype):
    probs = keep(jax.nn.softmax(scores, -1).astype(dtype))
    return probs, probs


def _softmax_bwd(dtype, probs, dprobs):
    del dtype
    probs, dprobs = probs.astype(jnp.float32), dprobs.astype(jnp.float32)
    return (probs * (dprobs - jnp.sum(probs * dprobs, -1, keepdims=True)),)


_softmax.defvjp(_softmax_fwd, _softmax_bwd)


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
        return self.heads(linear(x_BxTxD, self.query))

    def keys_values(self, x_BxSxD: jax.Array) -> KeysValues:
        """Returns keys and values, [B, S, H, K] each, of positions [B, S, D]."""
        return self.heads(linear(x_BxSxD, self.key)), self.heads(linear(x_BxSxD, self.value))


def attention_mask(config: ModelConfig, mask: SegmentMask) -> SegmentMask | jax.Array:
    """Returns a mask as `Attention` takes it: a dense one [B, T, S] selects the einsums.

    With `model.attention=auto`, the kernels are used on a mesh of TPUs. Without a mesh a program
    may be meant for other devices, as an exported one is.
    """
    on_tpus = not no_mesh() and mesh_platform() == "tpu"
    has_kernel = on_tpus and mask.key_segment_BxS.shape[1] <= MAX_FUSED_LENGTH
    fused = config.attention == "fused" or (config.attention == "auto" and has_kernel)
    return mask if fused else mask.dense()
