"""Dropless experts: each computes all of its tokens, in blocks of rows.

On a mesh, the tokens of an `expert` row of the mesh are gathered, each device computes those of
its own experts, and the sums are scattered back. A device must hold the worst case, that all
tokens go to its experts: `check_dropless_memory`.
Axis letters: see `expert_selection.py`; here M is the
rows of all blocks of `grouped_matmul.py`.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax.config import STACKS, Config
from switch_jax.distributed import (
    all_gather,
    axis_index,
    axis_size,
    device_memory_bytes,
    partition_spec,
    pvary,
    reduce_scatter,
    shard_map,
)
from switch_jax.errors import UserError
from switch_jax.model.layers import RowKeys, gathered_weight
from switch_jax.model.moe.dispatcher import GROUPED, TOKENS, Dispatcher
from switch_jax.model.moe.expert_selection import Assignment
from switch_jax.model.moe.experts import Experts
from switch_jax.model.moe.gather import gather_rows
from switch_jax.model.moe.grouped_matmul import (
    block_rows,
    grouped_matmul,
    has_kernel,
    make_blocks,
    size_lower_bound,
)


@dataclasses.dataclass(frozen=True)
class DroplessDispatcher(Dispatcher):
    """Dispatcher without slots: computes every assignment whose slot is below the capacity.

    Attributes:
      first_expert: see `RoutingSpec.first_expert`.
    """

    first_expert: jax.Array | None

    @jax.named_scope("experts")
    def forward(
        self, experts: Experts, x_BxLxD: jax.Array, assignment: Assignment, keys: RowKeys
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """See `Dispatcher.forward`."""
        B, L, _ = x_BxLxD.shape
        expert_GxSxK, gate_GxSxK, slot_GxSxK = assignment
        if self.capacity < slot_GxSxK.shape[1]:
            kept_GxSxK = slot_GxSxK < self.capacity
            expert_GxSxK = jnp.where(kept_GxSxK, expert_GxSxK, self.num_experts)
        if self.first_expert is not None:
            stacked = jax.tree.leaves(experts)[0].shape[0]
            in_pool_GxSxK = expert_GxSxK + self.first_expert
            expert_GxSxK = jnp.where(expert_GxSxK < self.num_experts, in_pool_GxSxK, stacked)
        expert_BxLxK, gate_BxLxK = (x.reshape(B, L, -1) for x in (expert_GxSxK, gate_GxSxK))
        keys = keys if self.dropout_rate else None
        outputs = _run_experts(experts, x_BxLxD, expert_BxLxK, gate_BxLxK, self.dropout_rate, keys)
        return outputs, slot_GxSxK


def _run_experts(
    experts: Experts,
    x_BxLxD: jax.Array,
    expert_BxLxK: jax.Array,
    gate_BxLxK: jax.Array,
    dropout_rate: float,
    keys: RowKeys,
) -> tuple[jax.Array, ...]:
    """[B, L, ..] for each of the experts' outputs: Σ over a token's experts of gate · output.

    `expert_BxLxK` counts the stacked experts; from their number on, an assignment is skipped.
    """
    dtype = x_BxLxD.dtype
    parameters = jax.tree.leaves(experts, is_leaf=lambda node: isinstance(node, nnx.Param))
    num_experts = parameters[0].shape[0]

    def local(experts, *arrays):
        x_BxLxD, expert_BxLxK, gate_BxLxK, *key_data = (
            all_gather(array, "expert", 0) for array in arrays
        )
        (B, L, K), E = gate_BxLxK.shape, jax.tree.leaves(experts)[0].shape[0]
        T = B * L
        x_TxD = all_gather(x_BxLxD, "model", 2).reshape(T, -1)
        expert_TxK = expert_BxLxK.reshape(T, K) - E * axis_index("expert")
        expert_TxK = jnp.where((expert_TxK >= 0) & (expert_TxK < E), expert_TxK, E)
        rows = block_rows(size_lower_bound(B) * L * K, num_experts)
        row_TxK, assignment_M, expert_N, num_used = make_blocks(expert_TxK, E, rows)

        def matmul(x_MxX: jax.Array, weight: nnx.Param, axis: str) -> jax.Array:
            weight_ExXxY = pvary(weight[...], ("slice", "data"))
            y_MxY = grouped_matmul(x_MxX, weight_ExXxY, expert_N, num_used)
            return reduce_scatter(y_MxY, "model", 1) if axis == "activation_split" else y_MxY

        def dropout(h_MxF: jax.Array) -> jax.Array:
            if not key_data:
                return h_MxF
            F, keep_rate = h_MxF.shape[1], 1 - dropout_rate
            shape = (L * K, F * axis_size("model"))
            draw = partial(jax.random.bernoulli, p=keep_rate, shape=shape)
            keep = jax.vmap(draw)(jax.random.wrap_key_data(*key_data)).reshape(T * K, -1)
            keep = jax.lax.dynamic_slice_in_dim(keep, F * axis_index("model"), F, 1)
            keep_MxF = keep.at[assignment_M].get(mode="fill", fill_value=False)
            return jnp.where(keep_MxF, h_MxF / keep_rate, 0)

        def combine(y_MxY: jax.Array) -> jax.Array:
            y = gather_rows(y_MxY, row_TxK.reshape(-1), assignment_M[:, None])
            y_BxLxKxY = y.reshape(B, L, K, -1)
            return reduce_scatter(jnp.sum(y_BxLxKxY * gate_BxLxK[..., None], 2), "expert", 0)

        x_MxD = gather_rows(x_TxD, assignment_M // K, row_TxK)
        return tuple(combine(y_MxY) for y_MxY in experts(x_MxD, matmul, dropout))

    arrays, in_specs = [x_BxLxD, expert_BxLxK, gate_BxLxK], [TOKENS, GROUPED, GROUPED]
    if keys is not None:
        arrays.append(jax.random.key_data(keys))
        in_specs.append(partition_spec(("batch", None)))

    def with_leaves(leaves: list) -> Any:
        return jax.tree.unflatten(jax.tree.structure(experts), leaves)

    # With fewer assignments than experts, as in decoding, only the weights in use are cast.
    B, *rest = expert_BxLxK.shape
    few = size_lower_bound(B) * math.prod(rest) < num_experts
    weights = with_leaves([gathered_weight(p, p.dtype if few else dtype) for p in parameters])
    weight_specs = with_leaves([partition_spec(p.get_metadata()["axes"]) for p in parameters])
    mapped = shard_map(
        local,
        in_specs=(weight_specs, *in_specs),
        out_specs=TOKENS,
        check_vma=not has_kernel(),
    )
    return mapped(weights, *arrays)


def check_dropless_memory(
    config: Config, sizes: dict[str, int], devices: Sequence[jax.Device]
) -> None:
    """Raises `UserError` where a device cannot hold the buffers of a dropless expert layer.

    Without a capacity, all tokens of an `expert` row of the mesh may go to one device. Counts what
    a layer holds at once: inputs, hidden activations and outputs of the experts.

    Args:
      config: of the model and its batches.
      sizes: of the mesh axes, by name.
      devices: of the mesh, all of one kind.
    """
    model, moe, memory = config.model, config.moe, device_memory_bytes(devices)
    microbatches = {"capacity_factor": config.train.accumulate, "eval_capacity_factor": 1}
    dropless = {key: count for key, count in microbatches.items() if getattr(moe, key) is None}
    if not (config.sparse and dropless and memory):
        return
    key, count = min(dropless.items(), key=lambda item: item[1])
    stack = max(filter(config.sparse_layers, STACKS), key=config.length)
    tokens = config.data.batch_size * config.length(stack) // count
    tokens //= sizes["slice"] * sizes["data"]
    if moe.sublayer == "attention":
        outputs = 2 * model.num_heads * model.head_dim
    else:
        outputs = {"relu": 1, "geglu": 2}[model.activation] * model.d_ff + model.d_model
    width = model.d_model + outputs // sizes["model"]
    needed = tokens * moe.max_experts_per_token * width * jnp.dtype(model.dtype).itemsize
    if needed > memory:
        raise UserError(
            f"moe.{key}=None may send all {tokens:,} {stack} tokens of slice × data to the experts"
            f" of one device, which takes {needed / 1e9:,.1f} GB on a device of"
            f" {memory / 1e9:,.1f} GB; set moe.{key} to a number such as 2.0, make data.batch_size"
            " smaller, or mesh.data or mesh.model larger."
        )
