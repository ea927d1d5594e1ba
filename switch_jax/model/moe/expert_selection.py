"""Routing of one group as pure functions: from scores to an assignment; no model, no mesh.

Axis letters of all files of `model/moe/`:

    B rows of a batch      L tokens of a row      D d_model      F d_ff      H heads
    G groups               S tokens of a group (where a group spans devices: of one device's part)
    E experts              C slots of an expert in a group (its capacity)
    K experts per token at most (expert choice: E)
    X, Y                   input and output features of a matmul
    M                      slots of all experts and groups, or rows of all blocks, as one axis
    N                      tokens, assignments or blocks, as one axis (each docstring says which)
    T tokens of an `expert` row of the mesh (dropless)      R rows of a block (dropless)

The functions here see one group; `router.Router` maps them over groups. Where a group spans
devices they see the part of one device, and `cross_device_dispatch.py` computes the slots.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from switch_jax.config import MoEConfig


class Scores(NamedTuple):
    """A router's scores of the tokens of a group.

    probs_SxE: float32, softmax of the router's logits; gates are taken from it.
    rank_SxE: float32, values that rank the experts of a token: the logits, logits with noise
        (sampling), or probabilities plus bias (bias balancing).
    mask_S: bool, false for padding.
    uniform_SxK: float32 in [0, 1), random numbers of `moe.second_policy=random`; None: no noise.
    """

    probs_SxE: jax.Array
    rank_SxE: jax.Array
    mask_S: jax.Array
    uniform_SxK: jax.Array | None = None


class Assignment(NamedTuple):
    """Experts, gates and slots of the tokens of a group.

    expert_SxK: int32, E where there is none (padding, or every tried expert was full).
    gate_SxK: float32, factor of the expert's output.
    slot_SxK: int32, position among the tokens of that expert; dropped if C or above.
    """

    expert_SxK: jax.Array
    gate_SxK: jax.Array
    slot_SxK: jax.Array


def expert_counts(expert: jax.Array, num_experts: int) -> jax.Array:
    """[E] int32: occurrences of each expert in an array of any shape; ids from E on are ignored."""
    return jnp.zeros(num_experts, jnp.int32).at[expert.reshape(-1)].add(1, mode="drop")


def top_k_experts(rank_SxE: jax.Array, K: int) -> jax.Array:
    """[S, K] int32: the K highest-ranked experts of each token; the first of equals comes first.

    Takes one maximum after the other. For a small K that is no slower than `jax.lax.top_k`, which
    XLA computes on every device for the tokens of all devices.
    """
    choices = []
    for _ in range(K):
        choices.append(rank_SxE.argmax(-1).astype(jnp.int32))
        chosen_SxE = jnp.arange(rank_SxE.shape[-1]) == choices[-1][:, None]
        rank_SxE = jnp.where(chosen_SxE, -jnp.inf, rank_SxE)
    return jnp.stack(choices, axis=-1)


def first_choices(scores: Scores) -> jax.Array:
    """[S] int32: the highest-ranked expert of each token, E for padding."""
    E = scores.rank_SxE.shape[-1]
    return jnp.where(scores.mask_S, scores.rank_SxE.argmax(-1).astype(jnp.int32), E)


class BalanceStats(NamedTuple):
    """Sums over a group, or a part of one, for the load-balancing loss; parts add up."""

    first_choices_E: jax.Array  # float32, number of first choices, before anything is dropped
    probs_E: jax.Array  # float32, Σ p over tokens without padding
    tokens: jax.Array  # float32, number of tokens without padding


def balance_stats(scores: Scores) -> BalanceStats:
    """Computes the sums of one group for `load_balancing_loss`."""
    E, mask_S = scores.probs_SxE.shape[-1], scores.mask_S
    return BalanceStats(
        first_choices_E=expert_counts(first_choices(scores), E).astype(jnp.float32),
        probs_E=jnp.where(mask_S[:, None], scores.probs_SxE, 0).sum(0),
        tokens=mask_S.sum(dtype=jnp.float32),
    )


def load_balancing_loss(stats: BalanceStats) -> jax.Array:
    """E · Σ f·P of one group, without α (paper, eqs. 4-6); 0 for a group of padding only."""
    count = jnp.maximum(stats.tokens, 1)
    return stats.first_choices_E.size * jnp.sum(
        stats.first_choices_E / count * stats.probs_E / count
    )


def top_k(scores: Scores, moe: MoEConfig, capacity: int) -> Assignment:
    """Assigns each token to its k highest-ranked experts; k = 1 is the Switch router (paper §2.1).

    Slots go to all first choices before any second choice, each in token order.
    """
    del capacity
    expert_SxK, gate_SxK = _select_experts(scores, moe)
    return Assignment(expert_SxK, gate_SxK, position_in_expert(expert_SxK, moe.num_experts))


def batch_prioritized(scores: Scores, moe: MoEConfig, capacity: int) -> Assignment:
    """Assigns as `top_k`, but slots go to confident tokens first (Riquelme et al. 2021).

    Tokens are ordered by the gate of their first choice, largest first; among equals the earlier
    token comes first.
    """
    del capacity
    expert_SxK, gate_SxK = _select_experts(scores, moe)
    order_S = jnp.argsort(-gate_SxK[:, 0], stable=True)
    slot_SxK = position_in_expert(expert_SxK[order_S], moe.num_experts)
    slot_SxK = jnp.zeros_like(slot_SxK).at[order_S].set(slot_SxK, unique_indices=True)
    return Assignment(expert_SxK, gate_SxK, slot_SxK)


def no_token_left_behind(scores: Scores, moe: MoEConfig, capacity: int) -> Assignment:
    """Assigns as the Switch router; dropped tokens try their next experts (paper, Appendix B).

    There are `moe.num_selected` stages. In each, the tokens without a slot take the free slots of
    their next expert, in token order. A token ends in one expert, and that expert's raw
    probability is its gate.
    """
    probs_SxE, rank_SxE, mask_S, _ = scores
    S, E = probs_SxE.shape
    choice_SxK = top_k_experts(rank_SxE, moe.num_selected)
    prob_SxK = jnp.take_along_axis(probs_SxE, choice_SxK, -1)
    used_slots_E = jnp.zeros(E + 1, jnp.int32)
    expert_S = jnp.full(S, E, jnp.int32)
    gate_S = jnp.zeros(S, probs_SxE.dtype)
    slot_S = jnp.zeros(S, jnp.int32)
    for stage in range(moe.num_selected):
        unassigned_S = mask_S & (expert_S == E)
        next_expert_S = jnp.where(unassigned_S, choice_SxK[:, stage], E)
        next_slot_S = used_slots_E[next_expert_S]
        next_slot_S += position_in_expert(next_expert_S[:, None], E)[:, 0]
        assigned_S = unassigned_S & (next_slot_S < capacity)
        expert_S = jnp.where(assigned_S, next_expert_S, expert_S)
        gate_S = jnp.where(assigned_S, prob_SxK[:, stage], gate_S)
        slot_S = jnp.where(assigned_S, next_slot_S, slot_S)
        used_slots_E = used_slots_E.at[jnp.where(assigned_S, next_expert_S, E)].add(1)
    return Assignment(expert_S[:, None], gate_S[:, None], slot_S[:, None])


def expert_choice(scores: Scores, moe: MoEConfig, capacity: int) -> Assignment:
    """Assigns to each expert the C tokens with its highest probabilities (Zhou et al. 2022); K = E.

    A token may be in several experts or in none. Among equals an expert takes the earlier token.
    In a group with padding the capacity is smaller in proportion, so that the routing of a text
    does not depend on its amount of padding.
    """
    probs_SxE, _, mask_S, _ = scores
    E = moe.num_experts
    unpadded = jnp.mean(mask_S, dtype=jnp.float32)
    slots = jnp.ceil(capacity * unpadded - 1e-4).astype(jnp.int32)  # of an expert in this group
    prob_ExS = jnp.where(mask_S, probs_SxE.T, -1.0)
    prob_ExC, token_ExC = jax.lax.top_k(prob_ExS, capacity)
    slot_C = jnp.arange(capacity, dtype=jnp.int32)
    slot_ExC = jnp.where((prob_ExC >= 0) & (slot_C < slots), slot_C, capacity)
    expert_E = jnp.arange(E, dtype=jnp.int32)
    slot_SxE = jnp.full(probs_SxE.shape, capacity, jnp.int32)
    slot_SxE = slot_SxE.at[token_ExC, expert_E[:, None]].set(slot_ExC, unique_indices=True)
    expert_SxE = jnp.where(slot_SxE < capacity, expert_E, E)
    return Assignment(expert_SxE, probs_SxE, slot_SxE)


# (scores, config, capacity C) → assignment of one group.
AssignFunction = Callable[[Scores, MoEConfig, int], Assignment]

# By `moe.router`. Hash routing differs only in its scores: see `router.Router`.
ROUTERS: dict[str, AssignFunction] = {
    "switch": top_k,
    "top_k": top_k,
    "ntlb": no_token_left_behind,
    "batch_prioritized": batch_prioritized,
    "expert_choice": expert_choice,
    "hash": top_k,
}


def _select_experts(scores: Scores, moe: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """Experts and gates of each token's k choices, [S, K]; expert E where there is none.

    A single gate is the raw probability, because the router learns through it: renormalised over
    one expert it would be 1 whatever the logits are.
    """
    E, K = moe.num_experts, moe.num_selected
    expert_SxK = top_k_experts(scores.rank_SxE, K)
    gate_SxK = jnp.take_along_axis(scores.probs_SxE, expert_SxK, -1)
    if moe.renormalize and K > 1:
        gate_SxK = gate_SxK / (gate_SxK.sum(-1, keepdims=True) + 1e-9)
    second_SxK = _second_expert_mask(gate_SxK, scores.uniform_SxK, moe)
    return jnp.where(scores.mask_S[:, None] & second_SxK, expert_SxK, E), gate_SxK


def _second_expert_mask(
    gate_SxK: jax.Array, uniform_SxK: jax.Array | None, moe: MoEConfig
) -> jax.Array:
    """[S, K] bool: true for first choices and for further choices that `moe.second_policy` keeps.

    `random` without random numbers, as in evaluation, is `threshold`.
    """
    threshold = moe.second_threshold
    if moe.second_policy == "random" and uniform_SxK is not None:
        kept_SxK = uniform_SxK * threshold < gate_SxK
    elif moe.second_policy in ("random", "threshold"):
        kept_SxK = gate_SxK > threshold
    else:
        kept_SxK = jnp.full(gate_SxK.shape, moe.second_policy == "all")
    return kept_SxK.at[:, 0].set(True)


def position_in_expert(expert_SxK: jax.Array, num_experts: int) -> jax.Array:
    """[S, K] int32: position of each assignment among the assignments of its expert.

    First choices come first, then token order. Positions start at 0; in the
    paper's Fig 15 they would start at 1, and slot 0 would stay empty.
    """
    S, K = expert_SxK.shape
    N = S * K
    expert_N = expert_SxK.T.reshape(N)
    if (num_experts + 1) * N >= 2**32:  # the keys below would overflow
        order_N = jnp.argsort(expert_N, stable=True)
        position_N = _positions(expert_N, expert_N[order_N], order_N, num_experts)
        return position_N.reshape(K, S).T
    # One sort of expert·N + index: without a payload it is several times faster.
    key_N = expert_N.astype(jnp.uint32) * N + jnp.arange(N, dtype=jnp.uint32)
    sorted_expert_N, order_N = jnp.divmod(jnp.sort(key_N), jnp.uint32(N))
    return _positions(expert_N, sorted_expert_N, order_N, num_experts).reshape(K, S).T


def _positions(
    expert_N: jax.Array, sorted_expert_N: jax.Array, order_N: jax.Array, num_experts: int
) -> jax.Array:
    """[N] int32: position of each assignment in its expert, from the order that sorts by expert."""
    count_E = expert_counts(expert_N, num_experts + 1)
    start_E = jnp.cumsum(count_E) - count_E
    position_N = jnp.arange(order_N.size, dtype=jnp.int32) - start_E[sorted_expert_N]
    return jnp.zeros_like(position_N).at[order_N].set(position_N, unique_indices=True)
