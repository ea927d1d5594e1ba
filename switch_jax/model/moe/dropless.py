"""Experts without capacity: each computes all of its tokens, in blocks of rows.

Tokens are sorted by expert and every expert's are padded to whole blocks; a block belongs to one
expert, and a loop over the blocks that are used multiplies each with its expert's weights, so that
work follows load instead of the worst case (the idea of MegaBlocks, Gale et al. 2022).

On a mesh the tokens of an `expert` row are gathered, each device computes those of its own
experts, and the sums go back: a device must have room for the case that all come to it.
Axis letters: see `routing.py`; M rows in blocks, N blocks, R rows of a block.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export

from switch_jax.config import STACKS, Config
from switch_jax.distributed import (
    MESH_AXES,
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
from switch_jax.model.moe.routing import Assignment, expert_counts, position_in_expert
from switch_jax.model.moe.slot_dispatch import gather_rows

# Rows of a block: multiples of what any matrix unit likes, and few enough to waste little.
SMALLEST, LARGEST = 8, 256


class Blocks(NamedTuple):
    """Where the assignments of T tokens lie; integers.

    slot_TxK: the row of each assignment, or M where its expert is elsewhere.
    held_M: the assignment t·K + k in a row, or T·K for an empty row.
    expert_N: whose weights a block needs.
    used: number of blocks with a token in them; they come first.
    """

    slot_TxK: jax.Array
    held_M: jax.Array
    expert_N: jax.Array
    used: jax.Array


def make_blocks(expert_TxK: jax.Array, num_experts: int, rows: int) -> Blocks:
    """Sorts assignments into blocks of `rows`; an expert of `num_experts` or above has none."""
    T, K = expert_TxK.shape
    count_E = expert_counts(expert_TxK, num_experts)
    blocks_E = -(-count_E // rows)
    end_E = jnp.cumsum(blocks_E)
    N = num_blocks(T * K, num_experts, rows)
    first_E = jnp.append(rows * (end_E - blocks_E), N * rows)  # of an expert elsewhere: beyond
    here_TxK = expert_TxK < num_experts
    rank_TxK = jnp.where(here_TxK, position_in_expert(expert_TxK, num_experts), 0)
    slot_TxK = first_E[jnp.minimum(expert_TxK, num_experts)] + rank_TxK
    held_M = jnp.full(N * rows, T * K, jnp.int32)
    held_M = held_M.at[slot_TxK.reshape(-1)].set(jnp.arange(T * K, dtype=jnp.int32), mode="drop")
    # Unused blocks come out as the last expert's; nobody computes them.
    expert_N = jnp.minimum(jnp.searchsorted(end_E, jnp.arange(N), side="right"), num_experts - 1)
    return Blocks(slot_TxK, held_M, expert_N, end_E[-1])


def num_blocks(assignments: int, num_experts: int, rows: int) -> int:
    """Blocks that suffice however the assignments fall: at most one an expert is not full."""
    open_ended = export.is_symbolic_dim(assignments)
    return assignments // rows + (num_experts if open_ended else min(num_experts, assignments))


def assignments_at_least(size: int) -> int:
    """`size`, or 1 where it is left open until a program is called (`jax.export`)."""
    return 1 if export.is_symbolic_dim(size) else size


def block_rows(assignments: int, num_experts: int) -> int:
    """Rows of a block: about an expert's share, as a power of two."""
    share = max(assignments // num_experts, 1)
    return min(max(2 ** math.ceil(math.log2(share)), SMALLEST), LARGEST)


def dropless_forward(
    experts: Any, x_GxSxD: jax.Array, assignment: Assignment, rate: float, group_keys: RowKeys
) -> tuple[jax.Array, ...]:
    """Sends every assignment through its expert.

    Args:
      experts: a module of `moe.py`, whose parameters are stacked by expert.
      x_GxSxD: tokens of all groups.
      assignment: leaves [G, S, K]; its slots do not matter.
      rate: dropout of hidden activations, where there are keys.
      group_keys: one per group, or None.

    Returns for each of the experts' outputs [G, S, ..]: Σ over a token's experts of gate · output.
    """
    dtype = x_GxSxD.dtype
    parameters = jax.tree.leaves(experts, is_leaf=lambda node: isinstance(node, nnx.Param))
    num_experts = parameters[0].shape[0]

    def local(experts, *arrays):
        x_GxSxD, expert_GxSxK, gate_GxSxK, *key_data = (
            all_gather(array, "expert", 0) for array in arrays
        )
        (G, S, K), E = gate_GxSxK.shape, jax.tree.leaves(experts)[0].shape[0]
        T = G * S
        x_TxD = all_gather(x_GxSxD, "model", 2).reshape(T, -1)
        expert_TxK = expert_GxSxK.reshape(T, K) - E * axis_index("expert")
        expert_TxK = jnp.where((expert_TxK >= 0) & (expert_TxK < E), expert_TxK, E)
        rows = block_rows(assignments_at_least(G) * S * K, num_experts)
        slot_TxK, held_M, expert_N, used = make_blocks(expert_TxK, E, rows)

        def matmul(x_MxX: jax.Array, own: nnx.Param, last: str) -> jax.Array:
            y_MxY = grouped_matmul(x_MxX, pvary(own[...], ("slice", "data")), expert_N, used)
            return reduce_scatter(y_MxY, "model", 1) if last == "activation_split" else y_MxY

        def drop(h_MxF: jax.Array) -> jax.Array:
            if not key_data:
                return h_MxF
            F = h_MxF.shape[1]
            draw = partial(jax.random.bernoulli, p=1 - rate, shape=(S * K, F * axis_size("model")))
            keep_AxF = jax.vmap(draw)(jax.random.wrap_key_data(*key_data)).reshape(T * K, -1)
            keep_AxF = jax.lax.dynamic_slice_in_dim(keep_AxF, F * axis_index("model"), F, 1)
            keep_MxF = keep_AxF.at[held_M].get(mode="fill", fill_value=False)
            return jnp.where(keep_MxF, h_MxF / (1 - rate), 0)

        def back(y_MxY: jax.Array) -> jax.Array:
            y = gather_rows(y_MxY, slot_TxK.reshape(-1), held_M[:, None]).reshape(G, S, K, -1)
            return reduce_scatter(jnp.sum(y * gate_GxSxK[..., None], 2), "expert", 0)

        rows_MxD = gather_rows(x_TxD, held_M // K, slot_TxK)
        return tuple(back(y_MxY) for y_MxY in experts(rows_MxD, matmul, drop))

    # The gates are cast first: nothing of a token's size is ever float32 (paper §2.4).
    arrays = [x_GxSxD, assignment.expert_SxK, assignment.gate_SxK.astype(dtype)]
    in_specs = [
        partition_spec(("batch", None, "activation_split")),
        *[partition_spec(("batch", None, None))] * 2,
    ]
    if group_keys is not None and rate:
        arrays.append(jax.random.key_data(group_keys))
        in_specs.append(partition_spec(("batch", None)))

    def rebuilt(leaves: list) -> Any:
        return jax.tree.unflatten(jax.tree.structure(experts), leaves)

    # Fewer assignments than experts, as in decoding: only what is used is cast.
    G, *own = assignment.expert_SxK.shape
    few = assignments_at_least(G) * math.prod(own) < num_experts
    weights = rebuilt([gathered_weight(p, p.dtype if few else dtype) for p in parameters])
    specs = rebuilt([partition_spec(parameter.get_metadata()["axes"]) for parameter in parameters])
    return shard_map(
        local,
        in_specs=(specs, *in_specs),
        out_specs=partition_spec(("batch", None, "activation_split")),
    )(weights, *arrays)


@jax.custom_vjp
def grouped_matmul(
    x_MxX: jax.Array, w_ExXxY: jax.Array, expert_N: jax.Array, used: jax.Array
) -> jax.Array:
    """[M, Y]: the rows of each used block times the weights of its expert; zeros in the others.

    A loop of dynamic length has no derivative of its own; here both ways are one.
    """
    rows = x_MxX.shape[0] // expert_N.shape[0]

    def body(i, y_MxY):
        x_RxX = jax.lax.dynamic_slice_in_dim(x_MxX, i * rows, rows)
        y_RxY = x_RxX @ w_ExXxY[expert_N[i]].astype(x_RxX.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y_MxY, y_RxY, i * rows, 0)

    zeros = jnp.zeros((x_MxX.shape[0], w_ExXxY.shape[2]), x_MxX.dtype)
    return jax.lax.fori_loop(0, used, body, pvary(zeros, MESH_AXES))


def _grouped_matmul_fwd(x_MxX, w_ExXxY, expert_N, used):
    return grouped_matmul(x_MxX, w_ExXxY, expert_N, used), (x_MxX, w_ExXxY, expert_N, used)


def _grouped_matmul_bwd(residuals, g_MxY):
    x_MxX, w_ExXxY, expert_N, used = residuals
    rows = x_MxX.shape[0] // expert_N.shape[0]

    def body(i, dw_ExXxY):
        x_RxX, g_RxY = (
            jax.lax.dynamic_slice_in_dim(array, i * rows, rows) for array in (x_MxX, g_MxY)
        )
        dw_XxY = jnp.matmul(x_RxX.T, g_RxY, preferred_element_type=jnp.float32)
        return dw_ExXxY.at[expert_N[i]].add(dw_XxY)

    dx_MxX = grouped_matmul(g_MxY, w_ExXxY.swapaxes(1, 2), expert_N, used)
    zeros = pvary(jnp.zeros(w_ExXxY.shape, jnp.float32), MESH_AXES)
    dw_ExXxY = jax.lax.fori_loop(0, used, body, zeros)
    return dx_MxX, dw_ExXxY.astype(w_ExXxY.dtype), None, None


grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


def check_dropless_memory(
    config: Config, sizes: dict[str, int], devices: Sequence[jax.Device]
) -> None:
    """Raises `UserError` where a device cannot hold what a dropless expert layer may send it.

    Without capacity, all tokens of an `expert` row may come to one device. Counted is what a
    layer cannot do without at once: inputs, hidden activations and outputs of their experts.
    """
    model, moe, memory = config.model, config.moe, device_memory_bytes(devices)
    factors = {"capacity_factor": config.train.accumulate, "eval_capacity_factor": 1}
    dropless = {key: parts for key, parts in factors.items() if getattr(moe, key) is None}
    if not (config.sparse and dropless and memory):
        return
    key, parts = min(dropless.items(), key=lambda item: item[1])
    stack = max(filter(config.sparse_layers, STACKS), key=config.length)
    tokens = config.data.batch_size * config.length(stack) // parts
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
