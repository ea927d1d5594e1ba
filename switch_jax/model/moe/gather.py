"""Gathers of rows with a custom derivative: the backward passes are gathers as well.

The backward pass of a plain gather is a scatter-add, which is several times slower. Here the
caller passes the inverse indices, too. Axis letters: N rows on one side, M rows on the other.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gather_rows(x_NxD: jax.Array, index_M: jax.Array, inverse_NxJ: jax.Array) -> jax.Array:
    """[M, D]: row index_M[m] of x, or zeros where the index is N.

    `inverse_NxJ` lists the result rows of each row of x (M: none); the backward pass sums them.
    """
    del inverse_NxJ
    return take_rows(x_NxD, index_M)


def _gather_rows_fwd(x_NxD, index_M, inverse_NxJ):
    return gather_rows(x_NxD, index_M, inverse_NxJ), inverse_NxJ


def _gather_rows_bwd(inverse_NxJ, g_MxD):
    return sum(take_rows(g_MxD, index_N) for index_N in inverse_NxJ.T), None, None


gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)


@jax.custom_vjp
def gather_sum(
    x_MxD: jax.Array, weight_NxK: jax.Array, index_NxK: jax.Array, inverse_M: jax.Array
) -> jax.Array:
    """[N, D]: Σ over k of weight · row index_NxK[n, k] of x; an index M adds nothing.

    `inverse_M` is n·K + k of the one use of each row of x (N·K: unused). With it no array of
    size N·K·D is made, neither forward nor backward.
    """
    del inverse_M
    # A loop of K gathers: with one gather of all rows, XLA would write and read [N, K, D].
    pairs = zip(index_NxK.T, weight_NxK.T)
    first, *others = (take_rows(x_MxD, index_N) * weight_N[:, None] for index_N, weight_N in pairs)
    return sum(others, start=first)


def _gather_sum_fwd(x_MxD, weight_NxK, index_NxK, inverse_M):
    y_NxD = gather_sum(x_MxD, weight_NxK, index_NxK, inverse_M)
    return y_NxD, (x_MxD, weight_NxK, index_NxK, inverse_M)


def _gather_sum_bwd(residuals, g_NxD):
    x_MxD, weight_NxK, index_NxK, inverse_M = residuals
    g_MxD = take_rows(g_NxD, inverse_M // weight_NxK.shape[1])
    weight_M = take_rows(weight_NxK.reshape(-1), inverse_M)
    # Products with rows of x, on the side that has fewer rows.
    if index_NxK.size <= inverse_M.size:
        columns = (jnp.sum(g_NxD * take_rows(x_MxD, index_N), axis=1) for index_N in index_NxK.T)
        dweight_NxK = jnp.stack([*columns], axis=1)
    else:
        dweight_NxK = take_rows(jnp.sum(g_MxD * x_MxD, axis=1), index_NxK)
    return g_MxD * weight_M[:, None], dweight_NxK, None, None


gather_sum.defvjp(_gather_sum_fwd, _gather_sum_bwd)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows (or, of a vector, elements) of x by index, zeros where the index is out of range."""
    return x.at[index].get(mode="fill", fill_value=0)
