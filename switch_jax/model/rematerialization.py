"""Rematerialisation: which results of a block of layers are kept for the backward pass.

Whatever is not kept is computed again in the backward pass, from the input of the block and from
what is kept.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

# Primitives whose results cost less to compute again than to write to memory and to read: casts,
# sharding constraints, element-wise functions, reductions and changes of shape. XLA fuses them into
# the instruction that reads them. A weight that `mesh.fsdp` splits is gathered again.
_CHEAP_PRIMITIVES = """
    abs add add_any and broadcast_in_dim clamp concatenate convert_element_type copy custom_jvp_call
    div eq erf exp exp2 expand_dims expm1 ge gt integer_pow iota is_finite le log log1p logistic lt
    max min mul ne neg not or pad pow reduce_and reduce_max reduce_min reduce_or reduce_precision
    reduce_sum rem reshape rev rsqrt select_n sharding_constraint sign slice split sqrt square
    squeeze stop_gradient sub tanh transpose
"""


def _is_expensive(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a result is kept: of matmuls, kernels, sorts, gathers, exchanges, random bits …"""
    return primitive.name not in _CHEAP_PRIMITIVES.split()


# By `model.remat`: whether a result is kept, as a policy of `jax.checkpoint`.
REMAT_POLICIES: dict[str, Callable] = {
    "none": _is_expensive,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def keep(x: jax.Array) -> jax.Array:
    """Marks `x` as kept with `model.remat=none`, although it is cheap to compute."""
    return checkpoint_name(x, "kept")
