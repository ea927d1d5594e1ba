"""The way of tokens to the slots of their experts, and back.

Both permutations are `shard_map`ped: they build no one-hot tensors, but gather rows by index
and exchange them with an all-to-all over the mesh's `expert` axis, so that they cost O(S·D).
Axis letters: see `routing.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from switch_jax.distributed import all_to_all, partition_spec, pvary, shard_map
from switch_jax.model.moe.routing import Assignment


class SlotIndices(NamedTuple):
    """The permutation between tokens and slots, both ways; all int32.

    slot_GxSxK: e·C + c, or E·C where the assignment was dropped.
    held_GxExC: the assignment t·K + k that a slot holds, or S·K for an empty slot.
    """

    slot_GxSxK: jax.Array
    held_GxExC: jax.Array


def make_slot_indices(assignment: Assignment, num_experts: int, capacity: int) -> SlotIndices:
    """Indices of all groups; the leaves of `assignment` have a leading axis G."""

    def one(assignment: Assignment) -> SlotIndices:
        expert_SxK, _, place_SxK = assignment
        slot_SxK = slots_of_tokens(expert_SxK, place_SxK, num_experts, capacity)
        return SlotIndices(slot_SxK, tokens_of_slots(slot_SxK, num_experts, capacity))

    return jax.vmap(one)(assignment)


def slots_of_tokens(
    expert_SxK: jax.Array, place_SxK: jax.Array, num_experts: int, capacity: int
) -> jax.Array:
    """[S, K] int32: the slot e·C + c of each assignment, or E·C where it was dropped."""
    kept_SxK = (expert_SxK < num_experts) & (place_SxK < capacity)
    return jnp.where(kept_SxK, expert_SxK * capacity + place_SxK, num_experts * capacity)


def tokens_of_slots(slot_SxK: jax.Array, num_experts: int, capacity: int) -> jax.Array:
    """[E, C] int32, the inverse: the assignment t·K + k a slot holds, or S·K for an empty slot."""
    flat_N = slot_SxK.reshape(-1)
    N = flat_N.size
    held = jnp.full(num_experts * capacity, N, jnp.int32)
    held = held.at[flat_N].set(jnp.arange(N, dtype=jnp.int32), mode="drop")
    return held.reshape(num_experts, capacity)


GROUPED = partition_spec(("batch", None, None))
TOKENS = partition_spec(("batch", None, "activation_split"))
SLOTS = partition_spec(("expert", "expert_group", None, "activation_split"))


def dispatch_to_slots(x_GxSxD: jax.Array, indices: SlotIndices) -> jax.Array:
    """[E, G, C, D]: the tokens in their slots, zeros in empty ones.

    Tokens are split over slice × data × expert, slots over `expert` (experts) and slice × data
    (groups); both are cut along D over `model`, so that no shard sends what another sends.
    """

    def local(x_GxSxD, *indices):
        (G, S, D), (_, E, C) = x_GxSxD.shape, indices[1].shape
        slot_NxK, held_M = _flat(SlotIndices(*indices))
        x_NxD = x_GxSxD.reshape(G * S, D)
        token_M = held_M // slot_NxK.shape[1]  # N for an empty slot, as N·K // K
        if _token_major(slot_NxK, held_M):
            slots_MxD = gather_rows(x_NxD, token_M, slot_NxK)
        else:
            slots_MxD = x_NxD.at[token_M].get(mode="fill", fill_value=0)
        return all_to_all(slots_MxD.reshape(E, G, C, D), "expert", 0, 1)

    in_specs = (TOKENS, GROUPED, GROUPED)
    return shard_map(local, in_specs=in_specs, out_specs=SLOTS)(x_GxSxD, *indices)


def combine_from_slots(
    slots_ExGxCxD: jax.Array, gate_GxSxK: jax.Array, indices: SlotIndices
) -> jax.Array:
    """[G, S, D]: Σ over a token's slots of gate · what the slot holds; 0 where all were dropped.

    Gates are of the dtype of the slots: nothing of a token's size is ever float32 (paper §2.4).
    """

    def local(slots_ExGxCxD, gate_GxSxK, *indices):
        slots = all_to_all(slots_ExGxCxD, "expert", 1, 0)
        G, S, K = gate_GxSxK.shape
        slots_MxD = slots.reshape(-1, slots.shape[-1])
        slot_NxK, held_M = _flat(SlotIndices(*indices))
        if _token_major(slot_NxK, held_M):
            gate_NxK = pvary(gate_GxSxK.reshape(-1, K), "model")  # as the slots' D is
            y_NxD = gather_sum(slots_MxD, gate_NxK, slot_NxK, held_M)
            return y_NxD.reshape(G, S, -1)
        gate_M = gate_GxSxK.reshape(-1).at[held_M].get(mode="fill", fill_value=0)
        y_NxD = jnp.zeros((G * S, slots_MxD.shape[-1]), slots_MxD.dtype)
        y_NxD = y_NxD.at[held_M // K].add(slots_MxD * gate_M[:, None], mode="drop")
        return y_NxD.reshape(G, S, -1)

    in_specs = (SLOTS, GROUPED, GROUPED, GROUPED)
    return shard_map(local, in_specs=in_specs, out_specs=TOKENS)(
        slots_ExGxCxD, gate_GxSxK, *indices
    )


def _token_major(slot_NxK: jax.Array, held_M: jax.Array) -> bool:
    """Whether to go through the K places of every token or through all slots.

    The first is gathers forward and backward, the second a scatter-add one way, which is
    several times slower a row; worth it where most places are empty, as for expert choice.
    """
    return slot_NxK.size <= 16 * held_M.size


@jax.custom_vjp
def gather_rows(x_NxD: jax.Array, index_M: jax.Array, inverse_NxJ: jax.Array) -> jax.Array:
    """[M, D]: row index_M[m] of x, or zeros where the index is N.

    `inverse_NxJ` lists where in the result each row went (M: nowhere). With it the backward
    pass is a gather too; the scatter-add of a plain `take` is several times slower.
    """
    del inverse_NxJ
    return _rows(x_NxD, index_M)


def _gather_rows_fwd(x_NxD, index_M, inverse_NxJ):
    return gather_rows(x_NxD, index_M, inverse_NxJ), inverse_NxJ


def _gather_rows_bwd(inverse_NxJ, g_MxD):
    return sum(_rows(g_MxD, index_N) for index_N in inverse_NxJ.T), None, None


gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)


@jax.custom_vjp
def gather_sum(
    x_MxD: jax.Array, weight_NxK: jax.Array, index_NxK: jax.Array, inverse_M: jax.Array
) -> jax.Array:
    """[N, D]: Σ over k of weight · row index_NxK[n, k] of x, nothing where the index is M.

    `inverse_M` is n·K + k for the place that row went to (N·K: none). With it nothing of the
    size N·K·D is made, neither here nor in the backward pass.
    """
    del inverse_M
    # One loop of K gathers; as one gather of all, XLA would write and read [N, K, D].
    pairs = zip(index_NxK.T, weight_NxK.T)
    return sum(_rows(x_MxD, index_N) * weight_N[:, None] for index_N, weight_N in pairs)


def _gather_sum_fwd(x_MxD, weight_NxK, index_NxK, inverse_M):
    y_NxD = gather_sum(x_MxD, weight_NxK, index_NxK, inverse_M)
    return y_NxD, (x_MxD, weight_NxK, index_NxK, inverse_M)


def _gather_sum_bwd(residuals, g_NxD):
    x_MxD, weight_NxK, index_NxK, inverse_M = residuals
    g_MxD = _rows(g_NxD, inverse_M // weight_NxK.shape[1])
    weight_M = _rows(weight_NxK.reshape(-1), inverse_M)
    # The products with rows of x, on the side that has fewer of them.
    if index_NxK.size <= inverse_M.size:
        columns = (jnp.sum(g_NxD * _rows(x_MxD, index_N), axis=1) for index_N in index_NxK.T)
        dweight_NxK = jnp.stack([*columns], axis=1)
    else:
        dweight_NxK = _rows(jnp.sum(g_MxD * x_MxD, axis=1), index_NxK)
    return g_MxD * weight_M[:, None], dweight_NxK, None, None


gather_sum.defvjp(_gather_sum_fwd, _gather_sum_bwd)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x, zeros where the index is beyond them."""
    return x.at[index].get(mode="fill", fill_value=0)


def _flat(indices: SlotIndices) -> tuple[jax.Array, jax.Array]:
    """Indices over all groups of a device at once, with slots in the order [E, G, C].

    Returns the flat slot of each assignment, [G·S, K] with E·G·C for none, and the flat
    assignment of each slot, [E·G·C] with G·S·K for none.
    """
    slot_GxSxK, held_GxExC = indices
    G, S, K = slot_GxSxK.shape
    _, E, C = held_GxExC.shape
    group_G = jnp.arange(G, dtype=jnp.int32)
    expert, place = jnp.divmod(slot_GxSxK, C)
    slot = jnp.where(
        slot_GxSxK < E * C, (expert * G + group_G[:, None, None]) * C + place, E * G * C
    )
    held = jnp.where(held_GxExC < S * K, group_G[:, None, None] * S * K + held_GxExC, G * S * K)
    return slot.reshape(G * S, K), held.transpose(1, 0, 2).reshape(-1)
