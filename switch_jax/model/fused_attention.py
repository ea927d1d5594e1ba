"""Fused attention for TPUs: one Pallas kernel for the forward and one for the backward pass.

Scores and probabilities exist only in the chip's vector memory (VMEM). The einsums of
`attention.py` write [H, T, S] of them per row to main memory and read them again, which is the
largest part of a train step's memory traffic. The backward kernel computes the scores again from
queries and keys.

A program of a kernel handles a block of queries of one row, for as many heads as fill the 128 lanes
of the vector unit. It sees all keys, so that an ordinary softmax is enough. Queries, keys and
values keep the layout of their projections, [B, L, H·K]. The grid is (blocks of heads, blocks of
queries, rows): rows are innermost, so that a block of the bias stays in VMEM while all rows use it,
and its gradient is summed there.

T and S are the lengths of queries and keys, I = H·K, and N is the number of blocks of queries.
Other axis letters: see README.md.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from switch_jax.model.attention_mask import MASKED_SCORE, SegmentMask

_LANES = 128
# Scores of one head in a block of queries with up to two heads: 1 MiB in float32. A backward
# program holds about six such arrays, and four blocks of the bias or its gradient for all of its
# heads, in the 16 MiB of VMEM that a program may use on every TPU. With
# MAX_FUSED_LENGTH keys the smallest block still fits.
_BLOCK_SCORES = 2**18
_VMEM_BYTES = 16 * 2**20


def fused_attention(
    query_BxTxI: jax.Array,
    key_BxSxI: jax.Array,
    value_BxSxI: jax.Array,
    mask: SegmentMask,
    bias_HxTxS: jax.Array | None,
    head_dim: int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Returns softmax(Q Kᵀ + bias) V for every head, [B, T, H·K] in the dtype of the queries.

    Args:
      query_BxTxI: queries of all heads, side by side.
      key_BxSxI: keys.
      value_BxSxI: values.
      mask: which keys a query attends to.
      bias_HxTxS: float32, added to the scores; None: no bias.
      head_dim: K.
      interpret: whether the kernels are interpreted, as on a CPU.
    """
    (_, T, width), S = query_BxTxI.shape, key_BxSxI.shape[1]
    tiling = _Tiling.of(width // head_dim, head_dim, T, S, mask.causal, interpret)
    # Queries of no segment complete the last block; they have no gradients.
    more = -T % tiling.queries
    query_BxTxI = jnp.pad(query_BxTxI, ((0, 0), (0, more), (0, 0)))
    query_segment_BxT = jnp.pad(mask.query_segment_BxT, ((0, 0), (0, more)), constant_values=-1)
    if bias_HxTxS is not None and more:
        bias_HxTxS = jnp.pad(bias_HxTxS, ((0, 0), (0, more), (0, 0)))
    segments = query_segment_BxT[:, None], mask.key_segment_BxS[:, None]
    y_BxTxI = _attention(query_BxTxI, key_BxSxI, value_BxSxI, *segments, bias_HxTxS, tiling)
    return y_BxTxI[:, :T]


class _Tiling(NamedTuple):
    """Sizes of the blocks of a program, and what is static in a kernel."""

    heads: int  # of a program
    queries: int  # of a program
    head_dim: int
    causal: bool
    interpret: bool

    @classmethod
    def of(cls, H: int, K: int, T: int, S: int, causal: bool, interpret: bool) -> "_Tiling":
        """Returns the blocks for H heads of dimension K, T queries and S keys.

        A block is whole along an axis, or a multiple of the lanes.
        """
        whole_lanes = (h for h in range(1, H) if H % h == 0 and h * K % _LANES == 0)
        heads = next(whole_lanes, H)
        queries = _BLOCK_SCORES // (S * max(1, heads**2 // 4)) // _LANES * _LANES
        return cls(heads, min(T, max(queries, _LANES)), K, causal, interpret)

    def head_slices(self) -> list[tuple[int, slice]]:
        """Returns number and columns of each head of a block."""
        K = self.head_dim
        return [(h, slice(h * K, (h + 1) * K)) for h in range(self.heads)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(query, key, value, query_segment, key_segment, bias, tiling: _Tiling) -> jax.Array:
    """[B, T, I]: attention of padded queries; segments are [B, 1, T] and [B, 1, S]."""
    return _forward(query, key, value, query_segment, key_segment, bias, tiling)


def _forward(query, key, value, query_segment, key_segment, bias, tiling: _Tiling) -> jax.Array:
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "query_segment": query_segment,
        "key_segment": key_segment,
        "bias": bias,
    }
    outputs = {"query": (query.shape, query.dtype)}
    return _call(_forward_kernel, tiling, inputs, outputs, matmuls=2)[0]


def _attention_fwd(*arguments):
    return _forward(*arguments), arguments[:-1]


def _attention_bwd(tiling, saved, dy_BxTxI):
    query, key, value, query_segment, key_segment, bias = saved
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "dy": dy_BxTxI,
        "query_segment": query_segment,
        "key_segment": key_segment,
        "bias": bias,
    }
    blocks = query.shape[1] // tiling.queries
    # Each block of queries has its part of the gradients of all keys and values.
    part = (blocks, *key.shape), key.dtype if blocks == 1 else jnp.float32
    outputs = {"query": (query.shape, query.dtype), "key": part, "value": part}
    if bias is not None:
        outputs["bias"] = bias.shape, bias.dtype
    dquery, dkey, dvalue, *dbias = _call(_backward_kernel, tiling, inputs, outputs, matmuls=5)
    dkey, dvalue = (x.sum(0).astype(key.dtype) for x in (dkey, dvalue))
    return dquery, dkey, dvalue, None, None, dbias[0] if dbias else None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _call(
    kernel: Callable,
    tiling: _Tiling,
    inputs: dict[str, jax.Array | None],
    outputs: dict[str, tuple[tuple[int, ...], Any]],
    matmuls: int,
) -> Sequence[jax.Array]:
    """Calls a kernel over the grid; returns its outputs, given by shape and dtype.

    The kernel gets dicts of its inputs (without those that are None) and outputs by name.
    """
    arrays = {name: array for name, array in inputs.items() if array is not None}
    (B, T, heads_width), S = arrays["query"].shape, arrays["key"].shape[1]
    Q, width = tiling.queries, tiling.heads * tiling.head_dim
    blocks = {
        "query": pl.BlockSpec((1, Q, width), lambda h, n, b: (b, n, h)),
        "key": pl.BlockSpec((1, S, width), lambda h, n, b: (b, 0, h)),
        "query_segment": pl.BlockSpec((1, 1, Q), lambda h, n, b: (b, 0, n)),
        "key_segment": pl.BlockSpec((1, 1, S), lambda h, n, b: (b, 0, 0)),
        "bias": pl.BlockSpec((tiling.heads, Q, S), lambda h, n, b: (h, n, 0)),
    }
    blocks |= {"value": blocks["key"], "dy": blocks["query"]}
    key_part = pl.BlockSpec((1, 1, S, width), lambda h, n, b: (n, b, 0, h))
    output_blocks = blocks | {"key": key_part, "value": key_part}
    scores = B * (heads_width // tiling.head_dim) * T * S

    def body(*refs):
        ins, outs = refs[: len(arrays)], refs[len(arrays) :]
        kernel(dict(zip(arrays, ins)), dict(zip(outputs, outs)), tiling)

    return pl.pallas_call(
        body,
        grid=(heads_width // width, T // Q, B),
        in_specs=[blocks[name] for name in arrays],
        out_specs=[output_blocks[name] for name in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * scores * tiling.head_dim,
            transcendentals=scores,
            bytes_accessed=sum(x.nbytes for x in arrays.values())
            + sum(
                math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in outputs.values()
            ),
        ),
        interpret=tiling.interpret,
    )(*arrays.values())


def _forward_kernel(inputs: dict, outputs: dict, tiling: _Tiling) -> None:
    mask_QxS = _mask(inputs, tiling)
    for h, columns in tiling.head_slices():
        value_SxK = inputs["value"][0, :, columns]
        probs_QxS = _probabilities(inputs, h, columns, mask_QxS).astype(value_SxK.dtype)
        y_QxK = _dot(probs_QxS, value_SxK, (1, 0))
        outputs["query"][0, :, columns] = y_QxK.astype(outputs["query"].dtype)


def _backward_kernel(inputs: dict, outputs: dict, tiling: _Tiling) -> None:
    if "bias" in outputs:

        @pl.when(pl.program_id(2) == 0)
        def _():
            outputs["bias"][...] = jnp.zeros_like(outputs["bias"])

    mask_QxS = _mask(inputs, tiling)
    for h, columns in tiling.head_slices():
        query, key, value, dy = (
            inputs[name][0, :, columns] for name in ("query", "key", "value", "dy")
        )
        probs_QxS = _probabilities(inputs, h, columns, mask_QxS)
        dvalue_SxK = _dot(probs_QxS.astype(dy.dtype), dy, (0, 0))
        dprobs_QxS = _dot(dy, value, (1, 1))
        mean_Qx1 = jnp.sum(probs_QxS * dprobs_QxS, -1, keepdims=True)
        dscores_QxS = jnp.where(mask_QxS, probs_QxS * (dprobs_QxS - mean_Qx1), 0)
        if "bias" in outputs:
            outputs["bias"][h] += dscores_QxS
        dscores_QxS = dscores_QxS.astype(query.dtype)
        gradients = {
            "query": _dot(dscores_QxS, key, (1, 0)),
            "key": _dot(dscores_QxS, query, (0, 0)),
            "value": dvalue_SxK,
        }
        for name, gradient in gradients.items():
            place = (0, slice(None), columns) if name == "query" else (0, 0, slice(None), columns)
            outputs[name][place] = gradient.astype(outputs[name].dtype)


def _mask(inputs: dict, tiling: _Tiling) -> jax.Array:
    """[Q, S] bool: the mask of a block of queries."""
    query_1xQ, key_1xS = inputs["query_segment"][0], inputs["key_segment"][0]
    Q, S = query_1xQ.shape[1], key_1xS.shape[1]
    # The vector unit transposes whole tiles of eight rows.
    query_Qx1 = jnp.transpose(jnp.broadcast_to(query_1xQ, (8, Q)))[:, :1]
    mask_QxS = (query_Qx1 == key_1xS) & (key_1xS > 0)
    if tiling.causal:
        query_position = jax.lax.broadcasted_iota(jnp.int32, (Q, S), 0) + pl.program_id(1) * Q
        mask_QxS &= jax.lax.broadcasted_iota(jnp.int32, (Q, S), 1) <= query_position
    return mask_QxS


def _probabilities(inputs: dict, h: int, columns: slice, mask_QxS: jax.Array) -> jax.Array:
    """[Q, S] float32: softmax of the scores of head `h` of the block."""
    scores_QxS = _dot(inputs["query"][0, :, columns], inputs["key"][0, :, columns], (1, 1))
    if "bias" in inputs:
        scores_QxS += inputs["bias"][h]
    scores_QxS = jnp.where(mask_QxS, scores_QxS, MASKED_SCORE)
    exp_QxS = jnp.exp(scores_QxS - jnp.max(scores_QxS, -1, keepdims=True))
    return exp_QxS / jnp.sum(exp_QxS, -1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """Matrix product in float32 over one dimension of `a` and one of `b`."""
    dims = ((contracted[0],), (contracted[1],)), ((), ())
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
