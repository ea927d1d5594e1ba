"""Grouped matmul: rows in blocks, each block times the weights of its expert.

Rows are sorted by expert and the rows of every expert are padded to whole blocks, so that each
block belongs to one expert. Only used blocks are computed: work follows the load of the experts
instead of the worst case (the idea of MegaBlocks, Gale et al. 2022).

`make_blocks` lays out the rows, and `grouped_matmul` computes them: on TPUs with the kernels of
JAX's port of MegaBlocks, elsewhere with a loop over the blocks. `jax.lax.ragged_dot` is no
alternative: the compilers for TPUs (the gradient of the weights) and GPUs (all of it) compute every
expert for every row.
Axis letters: see `expert_selection.py`; here N is the blocks, and M their rows N·R.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from switch_jax.distributed import MESH_AXES, mesh_platform, no_mesh, pvary
from switch_jax.model.moe.expert_selection import expert_counts, position_in_expert

MIN_BLOCK_ROWS = 8
"""Fewest rows of a block: matrix units need a multiple of it."""
_MAX_BLOCK_ROWS = 256  # few enough to waste little


class Blocks(NamedTuple):
    """Layout of the assignments of T tokens in blocks; int32."""

    row_TxK: jax.Array  # row of each assignment, or M where its expert is on another device
    assignment_M: jax.Array  # assignment t·K + k in a row, or T·K for an empty row
    expert_N: jax.Array  # expert of each block
    num_used: jax.Array  # number of blocks with a token; they come first


def make_blocks(expert_TxK: jax.Array, num_experts: int, rows: int) -> Blocks:
    """Sorts assignments into blocks of `rows` rows; experts from `num_experts` on are skipped."""
    T, K = expert_TxK.shape
    count_E = expert_counts(expert_TxK, num_experts)
    blocks_E = -(-count_E // rows)
    end_E = jnp.cumsum(blocks_E)
    N = num_blocks(T * K, num_experts, rows)
    # First row of each expert; of an expert on another device, the end.
    first_E = jnp.append(rows * (end_E - blocks_E), N * rows)
    local_TxK = expert_TxK < num_experts
    position_TxK = jnp.where(local_TxK, position_in_expert(expert_TxK, num_experts), 0)
    row_TxK = first_E[jnp.minimum(expert_TxK, num_experts)] + position_TxK
    assignment_M = jnp.full(N * rows, T * K, jnp.int32)
    assignment_M = assignment_M.at[row_TxK.reshape(-1)].set(
        jnp.arange(T * K, dtype=jnp.int32), mode="drop"
    )
    # Unused blocks get the last expert; they are not computed.
    expert_N = jnp.minimum(jnp.searchsorted(end_E, jnp.arange(N), side="right"), num_experts - 1)
    return Blocks(row_TxK, assignment_M, expert_N, end_E[-1])


def num_blocks(assignments: int, num_experts: int, rows: int) -> int:
    """Number of blocks that suffices for any load: at most one block per expert is not full."""
    symbolic = export.is_symbolic_dim(assignments)
    return assignments // rows + (num_experts if symbolic else min(num_experts, assignments))


def size_lower_bound(size: int) -> int:
    """`size`, or 1 where it is symbolic, that is, unknown until an exported program is called."""
    return 1 if export.is_symbolic_dim(size) else size


def block_rows(assignments: int, num_experts: int) -> int:
    """Rows of a block: about the mean load of an expert, rounded up to a power of two."""
    mean = max(assignments // num_experts, 1)
    return min(max(2 ** math.ceil(math.log2(mean)), MIN_BLOCK_ROWS), _MAX_BLOCK_ROWS)


@jax.custom_vjp
def grouped_matmul(
    x_MxX: jax.Array, w_ExXxY: jax.Array, expert_N: jax.Array, num_used: jax.Array
) -> jax.Array:
    """[M, Y]: rows of each used block times the weights of its expert, zeros for other blocks.

    Args:
      x_MxX: rows of N blocks of M / N rows, in the dtype of the result.
      w_ExXxY: weights of the device's experts, in any dtype.
      expert_N: expert of each block, in ascending order.
      num_used: number of blocks to compute, the first ones.

    Called inside a `shard_map`; everything is local to a device. A loop of dynamic length has no
    derivative in JAX, hence the custom one.
    """
    if has_kernel():
        sizes_E = _group_sizes(x_MxX, w_ExXxY, expert_N, num_used)
        return _kernel_matmul(x_MxX, w_ExXxY, sizes_E, transpose=False)
    rows = x_MxX.shape[0] // expert_N.shape[0]

    def body(i, y_MxY):
        x_RxX = jax.lax.dynamic_slice_in_dim(x_MxX, i * rows, rows)
        y_RxY = x_RxX @ w_ExXxY[expert_N[i]].astype(x_RxX.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y_MxY, y_RxY, i * rows, 0)

    zeros = jnp.zeros((x_MxX.shape[0], w_ExXxY.shape[2]), x_MxX.dtype)
    return jax.lax.fori_loop(0, num_used, body, pvary(zeros, MESH_AXES))


def _grouped_matmul_fwd(x_MxX, w_ExXxY, expert_N, num_used):
    y_MxY = grouped_matmul(x_MxX, w_ExXxY, expert_N, num_used)
    return y_MxY, (x_MxX, w_ExXxY, expert_N, num_used)


def _grouped_matmul_bwd(residuals, g_MxY):
    x_MxX, w_ExXxY, expert_N, num_used = residuals
    if has_kernel():
        sizes_E = _group_sizes(x_MxX, w_ExXxY, expert_N, num_used)
        dx_MxX = _kernel_matmul(g_MxY, w_ExXxY, sizes_E, transpose=True)
        return dx_MxX, _kernel_weight_gradient(x_MxX, g_MxY, w_ExXxY, sizes_E), None, None
    rows = x_MxX.shape[0] // expert_N.shape[0]

    def body(i, dw_ExXxY):
        x_RxX, g_RxY = (
            jax.lax.dynamic_slice_in_dim(array, i * rows, rows) for array in (x_MxX, g_MxY)
        )
        dw_XxY = jnp.matmul(x_RxX.T, g_RxY, preferred_element_type=jnp.float32)
        return dw_ExXxY.at[expert_N[i]].add(dw_XxY)

    dx_MxX = grouped_matmul(g_MxY, w_ExXxY.swapaxes(1, 2), expert_N, num_used)
    zeros = pvary(jnp.zeros(w_ExXxY.shape, jnp.float32), MESH_AXES)
    dw_ExXxY = jax.lax.fori_loop(0, num_used, body, zeros)
    return dx_MxX, dw_ExXxY.astype(w_ExXxY.dtype), None, None


grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


# Rows, and elements of X and Y, of a tile of the kernels.
_TILE = 256, 512, 512


def has_kernel() -> bool:
    """Whether the grouped matmul is computed by kernels: on a mesh of TPUs."""
    return not no_mesh() and mesh_platform() == "tpu"


def _group_sizes(
    x_MxX: jax.Array, w_ExXxY: jax.Array, expert_N: jax.Array, num_used: jax.Array
) -> jax.Array:
    """[E] int32: rows of every expert in the used blocks."""
    N, E = expert_N.shape[0], w_ExXxY.shape[0]
    expert_N = jnp.where(jnp.arange(N) < num_used, expert_N, E)
    return x_MxX.shape[0] // N * jnp.bincount(expert_N, length=E).astype(jnp.int32)


def _kernel_matmul(
    x_MxX: jax.Array, w_ExXxY: jax.Array, sizes_E: jax.Array, *, transpose: bool
) -> jax.Array:
    """[M, Y]: each row times its expert's weights (transposed: [E, Y, X]); other rows are 0."""
    y_MxY = gmm(
        _whole_tiles(x_MxX),
        w_ExXxY.astype(x_MxX.dtype),
        sizes_E,
        x_MxX.dtype,
        _TILE,
        transpose_rhs=transpose,
        interpret=mesh_platform() != "tpu",
    )[: x_MxX.shape[0]]
    # The kernel writes no rows behind the last expert's.
    return jnp.where(jnp.arange(len(y_MxY))[:, None] < sizes_E.sum(), y_MxY, 0)


def _kernel_weight_gradient(
    x_MxX: jax.Array, g_MxY: jax.Array, w_ExXxY: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """[E, X, Y]: the sum over each expert's rows of row of x times row of g."""
    return tgmm(
        _whole_tiles(x_MxX).T,
        _whole_tiles(g_MxY),
        sizes_E,
        w_ExXxY.dtype,
        _TILE,
        interpret=mesh_platform() != "tpu",
    )


def _whole_tiles(x_MxX: jax.Array) -> jax.Array:
    """Adds rows of zeros up to a multiple of the rows of a tile."""
    return jnp.pad(x_MxX, ((0, -x_MxX.shape[0] % _TILE[0]), (0, 0)))
