"""The router of an expert layer: scores of the tokens, their assignment, and what came of it.

Only the router sees noise, only in training, and it works in `moe.router_dtype` whatever the
activations are. Axis letters: see `routing.py`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax.config import MoEConfig
from switch_jax.model.layers import RowKeys, fold_keys, gathered_weight, param
from switch_jax.model.moe.routing import (
    ROUTERS,
    Assignment,
    Scores,
    balance_stats,
    expert_counts,
    load_balancing_loss,
)


class RoutingSpec(NamedTuple):
    """How the tokens of a batch are routed: which are real, in what groups, with how much room."""

    token_BxL: jax.Array  # their ids, which hash routing looks at
    mask_BxL: jax.Array  # bool, false for padding, which is not routed and takes no slot
    rows_per_group: int
    capacity_factor: float | None  # None: nothing is dropped
    devices_per_group: int = 1  # a group is spread over them in equal parts of whole rows


class RouterStats(NamedTuple):
    """What one expert layer did, as float32 sums that add up over groups and microbatches."""

    load_E: jax.Array  # assignments per expert before dropping (ntlb, expert choice: after)
    dropped: jax.Array  # Σ over tokens of the share of their assignments that found no slot
    tokens: jax.Array  # real ones
    entropy: jax.Array  # Σ over tokens of -Σ p log p, nats
    confidence: jax.Array  # Σ over tokens of max p
    z: jax.Array  # Σ over tokens of logsumexp(logits)²
    balance: jax.Array  # Σ over groups of the load-balancing loss, without α


class RouterOutput(NamedTuple):
    """What a router made of the tokens of each group, or of its parts where it spans devices."""

    logits_GxSxE: jax.Array
    scores: Scores  # leaves [G, S, ..]
    assignment: Assignment  # leaves [G, S, K]


class RoutingResult(NamedTuple):
    """The assignments of a layer, leaves [G, S, K], and their statistics."""

    assignment: Assignment
    sums: RouterStats


class Router(nnx.Module):
    """Which experts the tokens of a batch go to, and with what gates."""

    def __init__(self, moe: MoEConfig, d_model: int, key: jax.Array):
        self.config = moe
        E = moe.num_experts
        # normal(0.02) did slightly better in flaxformer's Switch configs than σ = sqrt(0.1 / D).
        draw = 0.02 * jax.random.normal(key, (d_model, E))
        self.kernel = (
            None if moe.router == "hash" else param(draw, "embed", "router", kind="router")
        )
        # Moved by the train step, not by gradients: it only ranks.
        self.bias = (
            param(jnp.zeros(E), "router", kind="router_bias") if moe.balance_bias_rate else None
        )

    def __call__(self, x_BxLxD: jax.Array, spec: RoutingSpec, keys: RowKeys) -> RouterOutput:
        """Decides about the tokens of a batch.

        Args:
          x_BxLxD: normed activations.
          spec: see there.
          keys: one per row, for exploration; None: none.
        """
        moe = self.config
        B, L = spec.mask_BxL.shape
        G, S = (
            B * spec.devices_per_group // spec.rows_per_group,
            spec.rows_per_group * L // spec.devices_per_group,
        )
        C = moe.capacity(S * spec.devices_per_group, spec.capacity_factor)

        def grouped(x_BxLxE: jax.Array) -> jax.Array:
            return x_BxLxE.reshape(G, S, -1)

        logits_BxLxE = self._logits(x_BxLxD, spec, fold_keys(keys, 0))
        probs_BxLxE = _rounded(jax.nn.softmax(logits_BxLxE))
        logits_BxLxE = _rounded(logits_BxLxE)
        scores = Scores(
            probs_SxE=grouped(probs_BxLxE),
            rank_SxE=grouped(self._rank(logits_BxLxE, probs_BxLxE, fold_keys(keys, 1))),
            mask_S=spec.mask_BxL.reshape(G, S),
            chance_SxK=self._chance((L, moe.num_selected), (G, S), fold_keys(keys, 2)),
        )
        assignment = jax.vmap(lambda scores: ROUTERS[moe.router](scores, moe, C))(scores)
        return RouterOutput(grouped(logits_BxLxE), scores, assignment)

    def _logits(self, x_BxLxD: jax.Array, spec: RoutingSpec, keys: RowKeys) -> jax.Array:
        """[B, L, E] in the router's dtype, from a copy of the input in that dtype (trap T5).

        Noise multiplies the copy (trap T2), so that the experts never see it.
        """
        moe, dtype = self.config, jnp.dtype(self.config.router_dtype)
        if self.kernel is None:
            expert_BxL = hash_expert(spec.token_BxL, moe.num_experts)
            return jnp.log(jax.nn.one_hot(expert_BxL, moe.num_experts, dtype=dtype))
        x = x_BxLxD.astype(dtype)
        shape = x.shape[1:]
        if keys is not None and moe.jitter:
            low, high = 1 - moe.jitter, 1 + moe.jitter
            draw = partial(jax.random.uniform, shape=shape, minval=low, maxval=high)
            x *= jax.vmap(draw)(keys).astype(dtype)
        if keys is not None and moe.input_dropout_rate:
            kept = 1 - moe.input_dropout_rate
            draw = partial(jax.random.bernoulli, p=kept, shape=shape)
            x = jnp.where(jax.vmap(draw)(keys), x / kept, 0)
        return jnp.dot(x, gathered_weight(self.kernel, dtype), precision="highest")

    def _rank(self, logits_BxLxE: jax.Array, probs_BxLxE: jax.Array, keys: RowKeys) -> jax.Array:
        """[B, L, E] float32 by which experts are ranked.

        The largest of logits / temperature + Gumbel noise is a draw from the softmax; the k
        largest are k draws without replacement.
        """
        temperature = self.config.sampling_temperature
        if self.bias is not None:
            return probs_BxLxE + gathered_weight(self.bias, jnp.float32)
        if keys is not None and temperature:
            draw = partial(jax.random.gumbel, shape=logits_BxLxE.shape[1:])
            return logits_BxLxE / temperature + jax.vmap(draw)(keys)
        return logits_BxLxE

    def _chance(self, shape: tuple[int, int], group: tuple[int, int], keys: RowKeys):
        """[G, S, K] uniform random numbers, or None where the config needs none."""
        if keys is None or self.config.second_policy != "random":
            return None
        return jax.vmap(partial(jax.random.uniform, shape=shape))(keys).reshape(*group, -1)


def _rounded(x: jax.Array) -> jax.Array:
    """float32 with no more digits than the dtype of `x` has; XLA may keep more by itself."""
    digits = jnp.finfo(x.dtype)
    x32 = x.astype(jnp.float32)
    if x.dtype == jnp.float32:
        return x32
    return jax.lax.reduce_precision(x32, digits.nexp, digits.nmant)


def hash_expert(token: jax.Array, num_experts: int) -> jax.Array:
    """An expert for each token id, spread evenly over ids; the same in all layers and runs.

    The random hash of Roller et al. (2021), with the final mix of MurmurHash3 for a table.
    """
    bits = token.astype(jnp.uint32)
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(multiplier)
    return ((bits ^ (bits >> 16)) % num_experts).astype(jnp.int32)


def router_stats(decision: RouterOutput, capacity: int, span: int = 1) -> RouterStats:
    """The statistics of one layer over its real tokens.

    Args:
      decision: with the slots that assignments have in their group.
      capacity: slots of an expert in a group.
      span: parts of a group, which follow each other.
    """
    logits_GxSxE, scores, assignment = decision
    mask_GxS, expert_GxSxK = scores.mask_S, assignment.expert_SxK
    E = logits_GxSxE.shape[-1]

    def over_tokens(value_GxS: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask_GxS, value_GxS, 0), dtype=jnp.float32)

    wanted_GxSxK = expert_GxSxK < E
    kept_GxSxK = wanted_GxSxK & (assignment.slot_SxK < capacity)
    # A token nobody wanted to take is dropped as a whole.
    kept_share_GxS = kept_GxSxK.sum(-1) / jnp.maximum(wanted_GxSxK.sum(-1), 1)
    parts = jax.vmap(balance_stats)(scores)
    groups = jax.tree.map(lambda x: x.reshape(-1, span, *x.shape[1:]).sum(1), parts)
    return RouterStats(
        load_E=expert_counts(expert_GxSxK, E).astype(jnp.float32),
        dropped=over_tokens(1 - kept_share_GxS),
        tokens=over_tokens(jnp.ones_like(mask_GxS)),
        entropy=over_tokens(jax.scipy.special.entr(scores.probs_SxE).sum(-1)),
        confidence=over_tokens(scores.probs_SxE.max(-1)),
        z=over_tokens(jax.nn.logsumexp(logits_GxSxE, -1) ** 2),
        balance=jnp.sum(jax.vmap(load_balancing_loss)(groups)),
    )
