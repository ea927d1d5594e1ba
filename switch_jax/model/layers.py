"""Parts that every layer uses: parameters, initialisation, random keys, dropout and RMS norm.

Modules are plain pytrees: constructors take a config and a key, and calls are pure. Random keys
are arguments, one per row, so that noise depends on the number of the row in the global batch, and
not on the mesh or on gradient accumulation. Axis letters: see README.md.
"""

from collections.abc import Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax.distributed import constrain, mesh_platform

# Which parameters decay, are cast, or count to which group depends on the kind.
ParameterKind = Literal[
    "embedding",
    "head",
    "attention",  # dense projections
    "feed_forward",  # dense layers, and the shared expert
    "expert",
    "router",
    "router_bias",
    "relative_bias",
    "norm",
]

FLOAT32_KINDS: frozenset[ParameterKind] = frozenset(
    {"norm", "relative_bias", "router", "router_bias"}
)
"""Kinds of parameters that compute in float32, whatever the activation dtype. Routers compute in
`moe.router_dtype`."""

# One random key per row [B], or None: deterministic.
RowKeys = jax.Array | None


def fold_keys(keys: RowKeys, data: int | jax.Array) -> RowKeys:
    """Returns independent keys [B] for the place in the model that `data` numbers."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def dropout(x_BxLxD: jax.Array, rate: float, keys: RowKeys) -> jax.Array:
    """Applies inverted dropout; the positions L of a row share a mask, as in Mesh TensorFlow.

    Attention weights [B, H, T, S] share it along the queries T.
    """
    if keys is None or rate == 0:
        return x_BxLxD
    keep = dropout_mask((*x_BxLxD.shape[1:-2], 1, x_BxLxD.shape[-1]), rate, keys)
    return jnp.where(keep, x_BxLxD / (1 - rate), 0)


def dropout_mask(shape: tuple[int, ...], rate: float, keys: jax.Array) -> jax.Array:
    """[B, *shape] bool: true with probability 1 - rate, from one key per row."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys)


def param(value: jax.Array, *axes: str, kind: ParameterKind) -> nnx.Param:
    """Returns a parameter with metadata: the logical axes of `value`, and the kind.

    Stacking layers adds a dimension in front and does not change the metadata.
    """
    return nnx.Param(value, axes=axes, kind=kind)


def cast_weights(
    module: Any, dtype: jax.typing.DTypeLike, kept: Collection[ParameterKind] = FLOAT32_KINDS
) -> Any:
    """Returns a module with its weights in the dtype `dtype`, except those of the kinds `kept`.

    Cast outside of a loop over layers, a weight is no result of the loop's body, of which the
    backward pass would keep a copy, and the gradients of all layers are stacked in `dtype`.
    """
    parameters = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, nnx.Param))
    kinds = [parameter.get_metadata()["kind"] for parameter in parameters]
    leaves, structure = jax.tree.flatten(module)
    cast = [x if kind in kept else x.astype(dtype) for x, kind in zip(leaves, kinds, strict=True)]
    return jax.tree.unflatten(structure, cast)


def gathered_weight(parameter: nnx.Param, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns a parameter in the dtype `dtype`, all-gathered where `mesh.fsdp` splits it.

    Without this constraint XLA may move activations instead of weights, and computes wrong results
    on some meshes (jax 0.10 and 0.11, slots and weights both split over `data`).
    """
    return constrain(parameter[...].astype(dtype), *parameter.get_metadata()["axes"])


def linear(x: jax.Array, weight: nnx.Param) -> jax.Array:
    """[.., X] → [.., Y]: x times a weight [X, Y], in the dtype of `x`."""
    w_XxY = gathered_weight(weight, x.dtype)
    return _matmul_on_cpu(x, w_XxY) if mesh_platform() == "cpu" else x @ w_XxY


@jax.custom_vjp
def _matmul_on_cpu(x: jax.Array, w_XxY: jax.Array) -> jax.Array:
    """[.., Y]: x @ w, whose gradient by the weights is computed from a transposed copy of `x`.

    XLA's CPU compiler contracts the first dimension of both factors about half as fast as the last
    of one with the first of the other, and would fold a transposition into the matmul.
    """
    return x @ w_XxY


def _matmul_on_cpu_fwd(x, w_XxY):
    return x @ w_XxY, (x, w_XxY)  # a matmul, which `model.remat` may keep


def _matmul_on_cpu_bwd(residuals, dy):
    x, w_XxY = residuals
    x_XxN = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    return dy @ w_XxY.T, x_XxN @ dy.reshape(-1, dy.shape[-1])


_matmul_on_cpu.defvjp(_matmul_on_cpu_fwd, _matmul_on_cpu_bwd)


def init_kernel(key: jax.Array, shape: tuple[int, int], scale: float) -> jax.Array:
    """[fan_in, fan_out] float32, truncated normal with σ = sqrt(scale / fan_in) (paper §2.4).

    Values beyond 2σ are drawn again, and σ is not corrected for the truncation, as in TensorFlow;
    `variance_scaling` of JAX corrects it, which makes weights 14 % larger.
    """
    stddev = (scale / shape[0]) ** 0.5
    return jax.random.truncated_normal(key, -2, 2, shape) * stddev


class RMSNorm(nnx.Module):
    """RMS norm: x / rms(x) · scale, with the mean square in float32; no mean, no bias.

    Input and output are constrained to be whole along `model`. Without the constraints XLA splits
    the residual stream and communicates more.
    """

    def __init__(self, dim: int):
        self.scale = param(jnp.ones(dim), "norm", kind="norm")

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        """[B, L, D] → [B, L, D], in the dtype of the input."""
        x_BxLxD = constrain(x_BxLxD, "batch", None, "activation")
        x32 = x_BxLxD.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-6)
        y_BxLxD = (x32 * self.scale[...]).astype(x_BxLxD.dtype)
        return constrain(y_BxLxD, "batch", None, "activation")
