"""Routing as pure functions: probabilities in, assignments out; no model, no mesh.

Axis letters, here and in `moe.py`:

    B rows of a batch     L tokens of a row      D d_model    F d_ff    H heads
    G groups              S tokens of a group    E experts    C slots of an expert in a group
    K experts per token

Routers work on one group; the expert layer maps them over groups.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from switch_jax.config import MoEConfig


class Assignment(NamedTuple):
    """Which experts the tokens of a group go to.

    expert_SxK: int32, E where there is none (padding, or nobody had room).
    gate_SxK: float32, what the expert's output is multiplied by.
    slot_SxK: int32, position among the tokens of that expert; C and above are dropped.
    """

    expert_SxK: jax.Array
    gate_SxK: jax.Array
    slot_SxK: jax.Array


def group_rows(batch_size: int, length: int, group_size: int) -> int:
    """Rows of a group: the largest divisor of the global batch that keeps it small enough.

    A group is a whole number of rows with at most max(group_size, length) tokens. It depends
    on the config alone, so that the loss is the same on every mesh.
    """
    most = max(group_size, length) // length
    return max(r for r in range(1, min(most, batch_size) + 1) if batch_size % r == 0)


def capacity(tokens: int, moe: MoEConfig, factor: float | None) -> int:
    """Slots of one expert in a group of `tokens` (paper, eq. 3, without a factor k).

    `factor` None is dropless: a slot for every token. Never more than `tokens`, nor less
    than `moe.min_capacity`.
    """
    if factor is None:
        return tokens
    rounded = {"ceil": math.ceil, "floor": math.floor}[moe.capacity_rounding]
    # Rounded first: 1.1 × 320 / 32 must be 11 slots, not 12 for an error in the last bit.
    share = rounded(round(factor * tokens / moe.num_experts, 9))
    return min(max(share, moe.min_capacity), tokens)


def _ranks(expert_SxK: jax.Array, num_experts: int) -> jax.Array:
    """Position of each assignment among those of its expert: first choices first, then in
    token order; the first position is 0 (the paper's Fig 15 would begin at 1: trap T1).
    """
    S, K = expert_SxK.shape
    N = S * K
    expert_N = expert_SxK.T.reshape(N)
    # One sort of expert·N + position: it needs no payload, which makes it several times faster.
    key_N = expert_N.astype(jnp.uint32) * N + jnp.arange(N, dtype=jnp.uint32)
    sorted_expert_N, order_N = jnp.divmod(jnp.sort(key_N), jnp.uint32(N))
    count_E = expert_counts(expert_N, num_experts + 1)
    start_E = jnp.cumsum(count_E) - count_E
    rank_N = jnp.arange(N, dtype=jnp.int32) - start_E[sorted_expert_N]
    rank_N = jnp.zeros_like(rank_N).at[order_N].set(rank_N, unique_indices=True)
    return rank_N.reshape(K, S).T


def expert_counts(expert: jax.Array, num_experts: int) -> jax.Array:
    """[E] int32: how often each expert occurs in an array of any shape; others do not count."""
    return jnp.zeros(num_experts, jnp.int32).at[expert.reshape(-1)].add(1, mode="drop")


def top_k(probs_SxE: jax.Array, mask_S: jax.Array, moe: MoEConfig, capacity: int) -> Assignment:
    """Each token to its k most probable experts; k = 1 is the Switch router (paper §2.1).

    The gate is the raw probability, through which the router learns; renormalised over one
    expert it would be 1 whatever the router says.
    """
    del capacity
    E = probs_SxE.shape[-1]
    gate_SxK, expert_SxK = jax.lax.top_k(probs_SxE, moe.top_k)
    if moe.renormalize and moe.top_k > 1:
        gate_SxK = gate_SxK / (gate_SxK.sum(-1, keepdims=True) + 1e-9)
    expert_SxK = jnp.where(mask_S[:, None], expert_SxK, E)
    return Assignment(expert_SxK, gate_SxK, _ranks(expert_SxK, E))


def no_token_left_behind(
    probs_SxE: jax.Array, mask_S: jax.Array, moe: MoEConfig, capacity: int
) -> Assignment:
    """Switch routing, then dropped tokens try their next best experts (paper, Appendix B).

    `moe.top_k` stages; in each, the still unplaced take the places that are left, in token
    order. A token ends in one expert, with that expert's raw probability as its gate.
    """
    S, E = probs_SxE.shape
    prob_SxK, choice_SxK = jax.lax.top_k(probs_SxE, moe.top_k)
    taken_E = jnp.zeros(E + 1, jnp.int32)
    expert_S = jnp.full(S, E, jnp.int32)
    gate_S = jnp.zeros(S, probs_SxE.dtype)
    slot_S = jnp.zeros(S, jnp.int32)
    for stage in range(moe.top_k):
        open_S = mask_S & (expert_S == E)
        try_S = jnp.where(open_S, choice_SxK[:, stage], E)
        place_S = taken_E[try_S] + _ranks(try_S[:, None], E)[:, 0]
        placed_S = open_S & (place_S < capacity)
        expert_S = jnp.where(placed_S, try_S, expert_S)
        gate_S = jnp.where(placed_S, prob_SxK[:, stage], gate_S)
        slot_S = jnp.where(placed_S, place_S, slot_S)
        taken_E = taken_E.at[jnp.where(placed_S, try_S, E)].add(1)
    return Assignment(expert_S[:, None], gate_S[:, None], slot_S[:, None])


Router = Callable[[jax.Array, jax.Array, MoEConfig, int], Assignment]

ROUTERS: dict[str, Router] = {"switch": top_k, "top_k": top_k, "ntlb": no_token_left_behind}


def tokens_of_slots(assignment: Assignment, num_experts: int, capacity: int) -> jax.Array:
    """[E, C] int32: the assignment t·K + k that a slot holds, or S·K for an empty slot."""
    flat_N = slots_of_tokens(assignment, num_experts, capacity).reshape(-1)
    N = flat_N.size
    held = jnp.full(num_experts * capacity, N, jnp.int32)
    held = held.at[flat_N].set(jnp.arange(N, dtype=jnp.int32), mode="drop")
    return held.reshape(num_experts, capacity)


def slots_of_tokens(assignment: Assignment, num_experts: int, capacity: int) -> jax.Array:
    """[S, K] int32: the slot e·C + c of each assignment, or E·C where it was dropped."""
    expert_SxK, _, slot_SxK = assignment
    kept_SxK = (expert_SxK < num_experts) & (slot_SxK < capacity)
    return jnp.where(kept_SxK, expert_SxK * capacity + slot_SxK, num_experts * capacity)


def load_balancing_loss(probs_SxE: jax.Array, mask_S: jax.Array) -> jax.Array:
    """N Σ f·P of one group, without α (paper, eqs. 4-6); 0 for a group of padding only.

    f counts first choices before anything is dropped; both means are over real tokens.
    """
    E = probs_SxE.shape[-1]
    count = jnp.maximum(mask_S.sum(), 1)
    f_E = expert_counts(jnp.where(mask_S, probs_SxE.argmax(-1), E), E) / count
    P_E = jnp.where(mask_S[:, None], probs_SxE, 0).sum(0) / count
    return E * jnp.sum(f_E * P_E)
