"""The building blocks of T5: parameters, norm, relative bias, attention, feed-forward.

Modules are plain pytrees: constructors take a config and a key, calls are pure. Random keys
are passed in, one per row, so that noise depends on a row's number in the global batch and
neither on the mesh nor on gradient accumulation. Axis letters: see `routing.py`; T and S are
the lengths of queries and keys, K here is the dimension of a head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax.schema import ModelConfig
from switch_jax.sharding import constrain

# One key per row [B], or None: deterministic.
Keys = jax.Array | None


def fold(keys: Keys, data: int | jax.Array) -> Keys:
    """Independent keys for another place in the model."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def dropout(x_BxLxD: jax.Array, rate: float, keys: Keys) -> jax.Array:
    """Inverted dropout; the positions L of a row share their mask, as in Mesh TensorFlow.

    For attention weights [B, H, T, S] these are the queries.
    """
    if keys is None or rate == 0:
        return x_BxLxD
    shape = (*x_BxLxD.shape[1:-2], 1, x_BxLxD.shape[-1])
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys)
    return jnp.where(keep, x_BxLxD / (1 - rate), 0)


def param(value: jax.Array, *axes: str) -> nnx.Param:
    """A parameter with the logical names of its dimensions (stacking adds names in front)."""
    return nnx.Param(value, axes=axes)


def weight(parameter: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """A parameter for use: in the activation dtype, and whole where `mesh.fsdp` splits it.

    Left to itself, XLA may prefer to move activations instead, and does it wrongly on some
    meshes (jax 0.10 and 0.11, slots and weights both split over `data`).
    """
    return constrain(parameter[...].astype(dtype), *parameter.get_metadata()["axes"])


def kernel(key: jax.Array, shape: tuple[int, int], scale: float) -> jax.Array:
    """[fan_in, fan_out] float32, truncated normal with σ = sqrt(scale / fan_in) (paper §2.4).

    Values beyond 2σ are drawn again and σ is not corrected for it, as in TensorFlow; JAX's
    own `variance_scaling` would correct, and give weights 14 % larger.
    """
    stddev = (scale / shape[0]) ** 0.5
    return jax.random.truncated_normal(key, -2, 2, shape) * stddev


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, with the mean square taken in float32; no mean, no bias.

    Before and after it every `model` shard has all of a token: left to itself, XLA lets the
    residual stream go about in pieces, and sends more of it.
    """

    def __init__(self, dim: int):
        self.scale = param(jnp.ones(dim), "norm")

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        x_BxLxD = constrain(x_BxLxD, "batch", None, "activation")
        x32 = x_BxLxD.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-6)
        y_BxLxD = (x32 * self.scale[...]).astype(x_BxLxD.dtype)
        return constrain(y_BxLxD, "batch", None, "activation")


class RelativeBias(nnx.Module):
    """T5's relative position bias: one table a stack, shared by its layers."""

    def __init__(self, config: ModelConfig, key: jax.Array, *, bidirectional: bool):
        self.config = config
        self.bidirectional = bidirectional
        init = jax.nn.initializers.variance_scaling(config.init_scale, "fan_avg", "uniform")
        table = init(key, (config.num_heads, config.relative_buckets))
        self.table = param(table, "heads", "buckets")

    def __call__(self, query_T: jax.Array, key_S: jax.Array) -> jax.Array:
        """[H, T, S] float32 to add to the scores, from the positions of queries and keys."""
        distance_TxS = key_S[None, :] - query_T[:, None]
        bucket_TxS = relative_buckets(
            distance_TxS,
            self.config.relative_buckets,
            self.config.relative_max_distance,
            bidirectional=self.bidirectional,
        )
        return self.table[...][:, bucket_TxS]


def relative_buckets(
    distance: jax.Array, num_buckets: int, max_distance: int, *, bidirectional: bool
) -> jax.Array:
    """Bucket of each distance key - query, int32 of the same shape.

    Half of the buckets hold one near distance each, the others grow logarithmically up to
    `max_distance` and the last one holds all beyond. An encoder gives half of them to
    either side; a decoder looks only back.
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


# Keys and values of a row's positions, two arrays [B, S, H, K].
KeysValues = tuple[jax.Array, jax.Array]
# Queries [B, T, H, K] of positions, with their keys and values.
Projected = tuple[jax.Array, KeysValues]


class Attention(nnx.Module):
    """Multi-head attention over given queries, keys and values, and its output projection.

    Scores are not divided by sqrt(K): the query's initialiser holds that factor, as in T5.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        D, inner = config.d_model, config.num_heads * config.head_dim
        self.out = param(kernel(key, (inner, D), config.init_scale), "heads", "embed")

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
        keys: Keys,
    ) -> jax.Array:
        """[B, T, D]: attends where `mask_BxTxS` is true; softmax in float32."""
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
        y = y.reshape(*y.shape[:2], -1) @ weight(self.out, y.dtype)
        return constrain(y, "batch", None, "activation")


class DenseAttention(Attention):
    """Attention with T5's linear projections, without biases."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        D, K, inner = config.d_model, config.head_dim, config.num_heads * config.head_dim
        s = config.init_scale
        q, k, v, o = jax.random.split(key, 4)
        super().__init__(config, o)
        self.query = param(kernel(q, (D, inner), s) / K**0.5, "embed", "heads")
        self.key = param(kernel(k, (D, inner), s), "embed", "heads")
        self.value = param(kernel(v, (D, inner), s), "embed", "heads")

    def queries(self, x_BxTxD: jax.Array) -> jax.Array:
        """[B, T, H, K]."""
        return self.heads(x_BxTxD @ weight(self.query, x_BxTxD.dtype))

    def keys_values(self, x_BxSxD: jax.Array) -> KeysValues:
        """What the attended positions offer."""
        key, value = (x_BxSxD @ weight(w, x_BxSxD.dtype) for w in (self.key, self.value))
        return self.heads(key), self.heads(value)


def activate(name: str, x_wi: jax.Array, x_gate: jax.Array | None) -> jax.Array:
    """ReLU(x W_i), or GELU(x W_gate) · (x W_i) with the tanh form of GELU that T5 uses."""
    functions: dict[str, Callable[[jax.Array], jax.Array]] = {
        "relu": jax.nn.relu,
        "geglu": lambda x: jax.nn.gelu(x, approximate=True),
    }
    return functions[name](x_wi) if x_gate is None else functions[name](x_gate) * x_wi


class Mlp(nnx.Module):
    """The dense feed-forward layer, ReLU or GEGLU."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        D, F, s = config.d_model, config.d_ff, config.init_scale
        i, g, o = jax.random.split(key, 3)
        self.wi = param(kernel(i, (D, F), s), "embed", "mlp")
        self.gate = (
            param(kernel(g, (D, F), s), "embed", "mlp") if config.activation == "geglu" else None
        )
        self.wo = param(kernel(o, (F, D), s), "mlp", "embed")

    def __call__(self, x_BxLxD: jax.Array, keys: Keys) -> jax.Array:
        """[B, L, D] → [B, L, D]."""
        dtype = x_BxLxD.dtype
        gate = None if self.gate is None else x_BxLxD @ weight(self.gate, dtype)
        h_BxLxF = activate(self.config.activation, x_BxLxD @ weight(self.wi, dtype), gate)
        h_BxLxF = constrain(h_BxLxF, "batch", None, "mlp")
        h_BxLxF = dropout(h_BxLxF, self.config.dropout_rate, keys)
        return constrain(h_BxLxF @ weight(self.wo, dtype), "batch", None, "activation")
