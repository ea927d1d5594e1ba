"""Routing as pure functions: scores in, assignments out; no model, no mesh.

Axis letters, here and in `dispatch.py`, `router.py` and `moe.py`:

    B rows of a batch     L tokens of a row      D d_model    F d_ff    H heads
    G groups              S tokens of a group    E experts    C slots of an expert in a group
    K experts a token may be in (for expert choice, E)

Routers work on one group; the expert layer maps them over groups. Where a group spans devices
they work on the part that a device has, and `transit.py` gives out the slots.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from switch_jax.config import MoEConfig


class Scores(NamedTuple):
    """What a router knows about the tokens of a group.

    probs_SxE: float32, softmax of the router's logits, which the gates are taken from.
    rank_SxE: float32, what experts are ranked by: the logits themselves, or with noise where
        experts are drawn, or probabilities with the bias of bias balancing.
    mask_S: bool, false for padding.
    chance_SxK: float32, uniform random numbers for second experts at random; None: no noise.
    """

    probs_SxE: jax.Array
    rank_SxE: jax.Array
    mask_S: jax.Array
    chance_SxK: jax.Array | None = None


class Assignment(NamedTuple):
    """Which experts the tokens of a group go to.

    expert_SxK: int32, E where there is none (padding, or nobody had room).
    gate_SxK: float32, what the expert's output is multiplied by.
    slot_SxK: int32, position among the tokens of that expert; C and above are dropped.
    """

    expert_SxK: jax.Array
    gate_SxK: jax.Array
    slot_SxK: jax.Array


def expert_counts(expert: jax.Array, num_experts: int) -> jax.Array:
    """[E] int32: how often each expert occurs in an array of any shape; others do not count."""
    return jnp.zeros(num_experts, jnp.int32).at[expert.reshape(-1)].add(1, mode="drop")


def top_k_experts(rank_SxE: jax.Array, K: int) -> jax.Array:
    """[S, K] int32: the K experts that each token ranks highest, the first of equals first.

    One maximum after the other: for the few that are asked for no slower than `top_k`, which XLA
    computes on every device for the tokens of all.
    """
    choices = []
    for _ in range(K):
        choices.append(rank_SxE.argmax(-1).astype(jnp.int32))
        chosen_SxE = jnp.arange(rank_SxE.shape[-1]) == choices[-1][:, None]
        rank_SxE = jnp.where(chosen_SxE, -jnp.inf, rank_SxE)
    return jnp.stack(choices, axis=-1)


def first_choices(scores: Scores) -> jax.Array:
    """[S] int32: the expert each token ranks highest, E for padding."""
    E = scores.rank_SxE.shape[-1]
    return jnp.where(scores.mask_S, scores.rank_SxE.argmax(-1).astype(jnp.int32), E)


class BalanceStats(NamedTuple):
    """What experts have of a group, or of a part of one: the parts' add up to the group's."""

    first_E: jax.Array  # float32, first choices before anything is dropped
    prob_E: jax.Array  # float32, Σ p over real tokens
    tokens: jax.Array  # float32, real ones


def balance_stats(scores: Scores) -> BalanceStats:
    """The shares of a group's experts."""
    E, mask_S = scores.probs_SxE.shape[-1], scores.mask_S
    return BalanceStats(
        first_E=expert_counts(first_choices(scores), E).astype(jnp.float32),
        prob_E=jnp.where(mask_S[:, None], scores.probs_SxE, 0).sum(0),
        tokens=mask_S.sum(dtype=jnp.float32),
    )


def load_balancing_loss(group: BalanceStats) -> jax.Array:
    """N Σ f·P of one group, without α (paper, eqs. 4-6); 0 for a group of padding only."""
    count = jnp.maximum(group.tokens, 1)
    return group.first_E.size * jnp.sum(group.first_E / count * group.prob_E / count)


def top_k(scores: Scores, moe: MoEConfig, capacity: int) -> Assignment:
    """Each token to its k best experts; k = 1 is the Switch router (paper §2.1).

    All first choices are placed before any second one, each in token order.
    """
    del capacity
    expert_SxK, gate_SxK = _choose(scores, moe)
    return Assignment(expert_SxK, gate_SxK, position_in_expert(expert_SxK, moe.num_experts))


def batch_prioritized(scores: Scores, moe: MoEConfig, capacity: int) -> Assignment:
    """As `top_k`, but the surest tokens of a group are placed first (Riquelme et al. 2021).

    Sure is whose first gate is largest; among equals the earlier token comes first.
    """
    del capacity
    expert_SxK, gate_SxK = _choose(scores, moe)
    order_S = jnp.argsort(-gate_SxK[:, 0], stable=True)
    slot_SxK = position_in_expert(expert_SxK[order_S], moe.num_experts)
    slot_SxK = jnp.zeros_like(slot_SxK).at[order_S].set(slot_SxK, unique_indices=True)
    return Assignment(expert_SxK, gate_SxK, slot_SxK)


def no_token_left_behind(scores: Scores, moe: MoEConfig, capacity: int) -> Assignment:
    """Switch routing, then dropped tokens try their next best experts (paper, Appendix B).

    `moe.num_selected` stages; in each, the still unplaced take the places that are left, in token
    order. A token ends in one expert, with that expert's raw probability as its gate.
    """
    probs_SxE, rank_SxE, mask_S, _ = scores
    S, E = probs_SxE.shape
    choice_SxK = top_k_experts(rank_SxE, moe.num_selected)
    prob_SxK = jnp.take_along_axis(probs_SxE, choice_SxK, -1)
    taken_E = jnp.zeros(E + 1, jnp.int32)
    expert_S = jnp.full(S, E, jnp.int32)
    gate_S = jnp.zeros(S, probs_SxE.dtype)
    slot_S = jnp.zeros(S, jnp.int32)
    for stage in range(moe.num_selected):
        open_S = mask_S & (expert_S == E)
        try_S = jnp.where(open_S, choice_SxK[:, stage], E)
        place_S = taken_E[try_S] + position_in_expert(try_S[:, None], E)[:, 0]
        placed_S = open_S & (place_S < capacity)
        expert_S = jnp.where(placed_S, try_S, expert_S)
        gate_S = jnp.where(placed_S, prob_SxK[:, stage], gate_S)
        slot_S = jnp.where(placed_S, place_S, slot_S)
        taken_E = taken_E.at[jnp.where(placed_S, try_S, E)].add(1)
    return Assignment(expert_S[:, None], gate_S[:, None], slot_S[:, None])


def expert_choice(scores: Scores, moe: MoEConfig, capacity: int) -> Assignment:
    """Each expert takes the C tokens that like it most (Zhou et al. 2022), K = E.

    A token may be in several experts or in none. Among equals an expert takes the earlier token.
    Of a group with padding an expert takes fewer, in proportion, so that a text's routing does
    not depend on how much of it is padding.
    """
    probs_SxE, _, mask_S, _ = scores
    E = moe.num_experts
    room = jnp.ceil(capacity * jnp.mean(mask_S, dtype=jnp.float32) - 1e-4).astype(jnp.int32)
    like_ExS = jnp.where(mask_S, probs_SxE.T, -1.0)
    like_ExC, token_ExC = jax.lax.top_k(like_ExS, capacity)
    slot_C = jnp.arange(capacity, dtype=jnp.int32)
    slot_ExC = jnp.where((like_ExC >= 0) & (slot_C < room), slot_C, capacity)
    expert_E = jnp.arange(E, dtype=jnp.int32)
    slot_SxE = jnp.full(probs_SxE.shape, capacity, jnp.int32)
    slot_SxE = slot_SxE.at[token_ExC, expert_E[:, None]].set(slot_ExC, unique_indices=True)
    expert_SxE = jnp.where(slot_SxE < capacity, expert_E, E)
    return Assignment(expert_SxE, probs_SxE, slot_SxE)


Assign = Callable[[Scores, MoEConfig, int], Assignment]

# Hash routing differs in its scores alone: see `router.Router`.
ROUTERS: dict[str, Assign] = {
    "switch": top_k,
    "top_k": top_k,
    "ntlb": no_token_left_behind,
    "batch_prioritized": batch_prioritized,
    "expert_choice": expert_choice,
    "hash": top_k,
}


def _choose(scores: Scores, moe: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """Expert and gate of each token's k best experts, [S, K]; expert E where there is none.

    The gate is the raw probability, through which the router learns; renormalised over one
    expert it would be 1 whatever the router says.
    """
    E, K = moe.num_experts, moe.num_selected
    expert_SxK = top_k_experts(scores.rank_SxE, K)
    gate_SxK = jnp.take_along_axis(scores.probs_SxE, expert_SxK, -1)
    if moe.renormalize and K > 1:
        gate_SxK = gate_SxK / (gate_SxK.sum(-1, keepdims=True) + 1e-9)
    wanted_SxK = scores.mask_S[:, None] & _wanted(gate_SxK, scores.chance_SxK, moe)
    return jnp.where(wanted_SxK, expert_SxK, E), gate_SxK


def _wanted(gate_SxK: jax.Array, chance_SxK: jax.Array | None, moe: MoEConfig) -> jax.Array:
    """[S, K] bool: first choices, and the others that `moe.second_policy` lets through.

    `random` without random numbers, as in evaluation, is `threshold`.
    """
    threshold = moe.second_threshold
    if moe.second_policy == "random" and chance_SxK is not None:
        others_SxK = chance_SxK * threshold < gate_SxK
    elif moe.second_policy in ("random", "threshold"):
        others_SxK = gate_SxK > threshold
    else:
        others_SxK = jnp.full(gate_SxK.shape, moe.second_policy == "all")
    return others_SxK.at[:, 0].set(True)


def position_in_expert(expert_SxK: jax.Array, num_experts: int) -> jax.Array:
    """Position of each assignment among those of its expert: first choices first, then in
    token order; the first position is 0 (the paper's Fig 15 would begin at 1: trap T1).
    """
    S, K = expert_SxK.shape
    N = S * K
    expert_N = expert_SxK.T.reshape(N)
    if (num_experts + 1) * N >= 2**32:  # the keys below would not fit
        order_N = jnp.argsort(expert_N, stable=True)
        return _placed(expert_N, expert_N[order_N], order_N, num_experts).reshape(K, S).T
    # One sort of expert·N + position: it needs no payload, which makes it several times faster.
    key_N = expert_N.astype(jnp.uint32) * N + jnp.arange(N, dtype=jnp.uint32)
    sorted_expert_N, order_N = jnp.divmod(jnp.sort(key_N), jnp.uint32(N))
    return _placed(expert_N, sorted_expert_N, order_N, num_experts).reshape(K, S).T


def _placed(
    expert_N: jax.Array, sorted_expert_N: jax.Array, order_N: jax.Array, num_experts: int
) -> jax.Array:
    """[N] int32: the position of each among its expert's, from the order that sorts by expert."""
    count_E = expert_counts(expert_N, num_experts + 1)
    start_E = jnp.cumsum(count_E) - count_E
    rank_N = jnp.arange(order_N.size, dtype=jnp.int32) - start_E[sorted_expert_N]
    return jnp.zeros_like(rank_N).at[order_N].set(rank_N, unique_indices=True)
