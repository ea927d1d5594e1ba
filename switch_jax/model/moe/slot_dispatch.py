"""Dispatch and combine of tokens for groups on one device: a permutation between tokens and slots.

Rows are gathered by index and exchanged with an all-to-all over the mesh axis `expert`, so that
both steps cost O(S·D); there are no one-hot tensors.
Axis letters: see `expert_selection.py`; here N is
the tokens G·S of a device, and M its slots E·G·C.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from switch_jax.distributed import all_to_all, pvary, shard_map
from switch_jax.model.moe.dispatcher import GROUPED, SLOTS, TOKENS, SlotDispatcher
from switch_jax.model.moe.expert_selection import Assignment
from switch_jax.model.moe.gather import gather_rows, gather_sum, take_rows


class SlotIndices(NamedTuple):
    """The permutation between assignments and slots, in both directions; int32.

    flat_slot_GxSxK: slot e·C + c of an assignment, or E·C where it was dropped.
    assignment_GxExC: assignment t·K + k in a slot, or S·K for an empty slot.
    """

    flat_slot_GxSxK: jax.Array
    assignment_GxExC: jax.Array


class LocalDispatcher(SlotDispatcher):
    """Dispatcher for groups on one device, with C slots per expert and group."""

    def assign_slots(self, assignment: Assignment) -> tuple[jax.Array, SlotIndices]:
        """Returns the router's slots, for a device sees its whole groups, and their indices."""

        def of_group(expert_SxK: jax.Array, slot_SxK: jax.Array) -> SlotIndices:
            flat_slot_SxK = flat_slots(expert_SxK, slot_SxK, self.num_experts, self.capacity)
            return SlotIndices(
                flat_slot_SxK, invert_slots(flat_slot_SxK, self.num_experts, self.capacity)
            )

        return assignment.slot_SxK, jax.vmap(of_group)(assignment.expert_SxK, assignment.slot_SxK)

    def dispatch(self, x_GxSxD: jax.Array, indices: SlotIndices) -> jax.Array:
        """[E, G, C, D]: tokens in their slots, zeros in empty slots."""

        def local(x_GxSxD, *indices):
            (G, S, D), (_, E, C) = x_GxSxD.shape, indices[1].shape
            flat_slot_NxK, assignment_M = _flatten_groups(SlotIndices(*indices))
            x_NxD = x_GxSxD.reshape(G * S, D)
            token_M = assignment_M // flat_slot_NxK.shape[1]  # N for an empty slot, as N·K // K
            if _by_token(flat_slot_NxK, assignment_M):
                x_MxD = gather_rows(x_NxD, token_M, flat_slot_NxK)
            else:
                x_MxD = take_rows(x_NxD, token_M)
            return all_to_all(x_MxD.reshape(E, G, C, D), "expert", 0, 1)

        in_specs = (TOKENS, GROUPED, GROUPED)
        return shard_map(local, in_specs=in_specs, out_specs=SLOTS)(x_GxSxD, *indices)

    def combine(
        self, y_ExGxCxD: jax.Array, gate_GxSxK: jax.Array, indices: SlotIndices
    ) -> jax.Array:
        """[G, S, D]: Σ over a token's slots of gate · slot, 0 if all assignments were dropped."""

        def local(y_ExGxCxD, gate_GxSxK, *indices):
            y_ExGxCxD = all_to_all(y_ExGxCxD, "expert", 1, 0)
            G, S, K = gate_GxSxK.shape
            y_MxD = y_ExGxCxD.reshape(-1, y_ExGxCxD.shape[-1])
            flat_slot_NxK, assignment_M = _flatten_groups(SlotIndices(*indices))
            if _by_token(flat_slot_NxK, assignment_M):
                gate_NxK = pvary(gate_GxSxK.reshape(-1, K), "model")  # as D of the slots is
                y_NxD = gather_sum(y_MxD, gate_NxK, flat_slot_NxK, assignment_M)
                return y_NxD.reshape(G, S, -1)
            gate_M = take_rows(gate_GxSxK.reshape(-1), assignment_M)
            y_NxD = jnp.zeros((G * S, y_MxD.shape[-1]), y_MxD.dtype)
            y_NxD = y_NxD.at[assignment_M // K].add(y_MxD * gate_M[:, None], mode="drop")
            return y_NxD.reshape(G, S, -1)

        in_specs = (SLOTS, GROUPED, GROUPED, GROUPED)
        return shard_map(local, in_specs=in_specs, out_specs=TOKENS)(
            y_ExGxCxD, gate_GxSxK, *indices
        )


def flat_slots(
    expert_SxK: jax.Array, slot_SxK: jax.Array, num_experts: int, capacity: int
) -> jax.Array:
    """[S, K] int32: slot e·C + c of each assignment, or E·C where it was dropped."""
    kept_SxK = (expert_SxK < num_experts) & (slot_SxK < capacity)
    return jnp.where(kept_SxK, expert_SxK * capacity + slot_SxK, num_experts * capacity)


def invert_slots(flat_slot_SxK: jax.Array, num_experts: int, capacity: int) -> jax.Array:
    """[E, C] int32, the inverse: assignment t·K + k in a slot, or S·K for an empty slot."""
    flat_slot_N = flat_slot_SxK.reshape(-1)
    N = flat_slot_N.size
    assignment_M = jnp.full(num_experts * capacity, N, jnp.int32)
    assignment_M = assignment_M.at[flat_slot_N].set(jnp.arange(N, dtype=jnp.int32), mode="drop")
    return assignment_M.reshape(num_experts, capacity)


def _by_token(flat_slot_NxK: jax.Array, assignment_M: jax.Array) -> bool:
    """Whether to loop over the K assignments of every token; otherwise over all slots.

    By token, both passes are gathers; by slot, one of them is a scatter-add, which takes several
    times as long per row. By slot is faster where most assignments are empty (expert choice).
    """
    return flat_slot_NxK.size <= 16 * assignment_M.size


def _flatten_groups(indices: SlotIndices) -> tuple[jax.Array, jax.Array]:
    """Indices over all groups of a device at once, with slots in the order [E, G, C].

    Returns the flat slot of each assignment, [G·S, K] with E·G·C for none, and the assignment in
    each slot, [E·G·C] with G·S·K for none.
    """
    flat_slot_GxSxK, assignment_GxExC = indices
    G, S, K = flat_slot_GxSxK.shape
    _, E, C = assignment_GxExC.shape
    group_Gx1x1 = jnp.arange(G, dtype=jnp.int32)[:, None, None]
    expert, slot = jnp.divmod(flat_slot_GxSxK, C)
    flat_slot = jnp.where(flat_slot_GxSxK < E * C, (expert * G + group_Gx1x1) * C + slot, E * G * C)
    assignment = jnp.where(
        assignment_GxExC < S * K, group_Gx1x1 * S * K + assignment_GxExC, G * S * K
    )
    return flat_slot.reshape(G * S, K), assignment.transpose(1, 0, 2).reshape(-1)
