"""The building blocks of T5: parameters, norm, relative bias, attention, feed-forward.

Modules are plain pytrees: constructors take a config and a key, calls are pure. Random keys
are passed in, one per row, so that noise depends on a row's number in the global batch and
neither on the mesh nor on gradient accumulation. Axis letters: see `routing.py`; T and S are
the lengths of queries and keys, K here is the dimension of a head.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax.distributed import constrain

ParameterKind = Literal[
    "embedding",
    "head",
    "attention",  # dense projections
    "feed_forward",  # dense layers, and the shared one beside experts
    "expert",
    "router",
    "router_bias",
    "relative_bias",
    "norm",
]

# One key per row [B], or None: deterministic.
RowKeys = jax.Array | None


def fold_keys(keys: RowKeys, data: int | jax.Array) -> RowKeys:
    """Independent keys for another place in the model."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def dropout(x_BxLxD: jax.Array, rate: float, keys: RowKeys) -> jax.Array:
    """Inverted dropout; the positions L of a row share their mask, as in Mesh TensorFlow.

    For attention weights [B, H, T, S] these are the queries.
    """
    if keys is None or rate == 0:
        return x_BxLxD
    shape = (*x_BxLxD.shape[1:-2], 1, x_BxLxD.shape[-1])
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys)
    return jnp.where(keep, x_BxLxD / (1 - rate), 0)


def param(value: jax.Array, *axes: str, kind: ParameterKind) -> nnx.Param:
    """Returns a parameter with metadata: the logical axes of `value`, and the kind.

    Stacking layers adds a dimension in front and does not change the metadata.
    """
    return nnx.Param(value, axes=axes, kind=kind)


def gathered_weight(parameter: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """A parameter for use: in the activation dtype, and whole where `mesh.fsdp` splits it.

    Left to itself, XLA may prefer to move activations instead, and does it wrongly on some
    meshes (jax 0.10 and 0.11, slots and weights both split over `data`).
    """
    return constrain(parameter[...].astype(dtype), *parameter.get_metadata()["axes"])


def init_kernel(key: jax.Array, shape: tuple[int, int], scale: float) -> jax.Array:
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
        self.scale = param(jnp.ones(dim), "norm", kind="norm")

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        x_BxLxD = constrain(x_BxLxD, "batch", None, "activation")
        x32 = x_BxLxD.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-6)
        y_BxLxD = (x32 * self.scale[...]).astype(x_BxLxD.dtype)
        return constrain(y_BxLxD, "batch", None, "activation")
