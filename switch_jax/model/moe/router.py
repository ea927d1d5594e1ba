"""Router: scores of the tokens of a batch, their assignment to experts, and its statistics.

Only the router sees exploration noise, only in training. It computes in `moe.router_dtype`,
whatever the activation dtype. Axis letters: see `expert_selection.py`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax.config import MoEConfig
from switch_jax.model.layers import RowKeys, fold_keys, gathered_weight, param
from switch_jax.model.moe.expert_selection import (
    ROUTERS,
    Assignment,
    Scores,
    balance_stats,
    expert_counts,
    load_balancing_loss,
)


class RoutingSpec(NamedTuple):
    """Routing of a batch: its tokens, groups and capacity."""

    token_BxL: jax.Array  # int32 token ids, used by hash routing
    mask_BxL: jax.Array  # bool, false for padding, which is not routed and takes no slot
    rows_per_group: int
    capacity_factor: float | None  # None: dropless
    # Devices that a group spans, each with an equal part of whole rows.
    devices_per_group: int = 1
    # int32 scalar, set in decoding only: the layer's experts are E of a larger pool of stacked
    # experts, from this one on. None: the stacked experts are the layer's.
    first_expert: jax.Array | None = None


class RouterStats(NamedTuple):
    """Statistics of one expert layer: float32 sums, which add up over groups and microbatches."""

    load_E: jax.Array  # assignments per expert before dropping (ntlb, expert choice: after)
    dropped: jax.Array  # Σ over tokens of the share of a token's assignments without a slot
    tokens: jax.Array  # number of tokens without padding
    entropy: jax.Array  # Σ over tokens of -Σ p log p, nats
    confidence: jax.Array  # Σ over tokens of max p
    z_loss: jax.Array  # Σ over tokens of logsumexp(logits)², without weight
    balance_loss: jax.Array  # Σ over groups of the load-balancing loss, without α
    first_choices_E: jax.Array  # tokens whose highest-ranked expert this is
    probs_E: jax.Array  # Σ over tokens of p


class RouterOutput(NamedTuple):
    """Logits, scores and assignment by group, or by part of a group where it spans devices."""

    logits_GxSxE: jax.Array  # float32
    scores: Scores  # leaves [G, S, ..]
    assignment: Assignment  # leaves [G, S, K]


class RoutingResult(NamedTuple):
    """Assignment, leaves [G, S, K], and statistics of an expert layer."""

    assignment: Assignment
    stats: RouterStats


class Router(nnx.Module):
    """Router of one expert layer: a linear map to logits, and `moe.router`'s assignment."""

    def __init__(self, moe: MoEConfig, d_model: int, key: jax.Array):
        self.config = moe
        E = moe.num_experts
        kernel = moe.router_init_std * jax.random.normal(key, (d_model, E))
        self.kernel = (
            None if moe.router == "hash" else param(kernel, "embed", "router", kind="router")
        )
        # Updated by the train step, without gradients: it changes ranks, not gates.
        self.bias = (
            param(jnp.zeros(E), "router", kind="router_bias") if moe.balance_bias_rate else None
        )

    @jax.named_scope("route")
    def __call__(
        self, x_BxLxD: jax.Array, spec: RoutingSpec, capacity: int, keys: RowKeys
    ) -> RouterOutput:
        """Computes scores and assignment of the tokens of a batch.

        Args:
          x_BxLxD: normed activations.
          spec: tokens, mask and groups.
          capacity: slots C of an expert in a whole group.
          keys: one per row, for exploration noise; None: no noise.
        """
        moe = self.config
        B, L = spec.mask_BxL.shape
        G = B * spec.devices_per_group // spec.rows_per_group
        S = spec.rows_per_group * L // spec.devices_per_group

        def grouped(x_BxLxE: jax.Array) -> jax.Array:
            return x_BxLxE.reshape(G, S, -1)

        logits_BxLxE = self._logits(x_BxLxD, spec, fold_keys(keys, 0))
        probs_BxLxE = _as_float32(jax.nn.softmax(logits_BxLxE))
        logits_BxLxE = _as_float32(logits_BxLxE)
        scores = Scores(
            probs_SxE=grouped(probs_BxLxE),
            rank_SxE=grouped(self._rank(logits_BxLxE, probs_BxLxE, fold_keys(keys, 1))),
            mask_S=spec.mask_BxL.reshape(G, S),
            uniform_SxK=self._uniform((L, moe.num_selected), (G, S), fold_keys(keys, 2)),
        )
        assignment = jax.vmap(lambda scores: ROUTERS[moe.router](scores, moe, capacity))(scores)
        return RouterOutput(grouped(logits_BxLxE), scores, assignment)

    def _logits(self, x_BxLxD: jax.Array, spec: RoutingSpec, keys: RowKeys) -> jax.Array:
        """[B, L, E] logits in `moe.router_dtype`, from a copy of the input in that dtype.

        Noise multiplies the copy, so that the experts get the input without noise.
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
            keep_rate = 1 - moe.input_dropout_rate
            draw = partial(jax.random.bernoulli, p=keep_rate, shape=shape)
            x = jnp.where(jax.vmap(draw)(keys), x / keep_rate, 0)
        return jnp.dot(x, gathered_weight(self.kernel, dtype), precision="highest")

    def _rank(self, logits_BxLxE: jax.Array, probs_BxLxE: jax.Array, keys: RowKeys) -> jax.Array:
        """[B, L, E] float32: values that rank the experts of a token.

        The largest of logits / temperature + Gumbel noise is a sample from the softmax; the k
        largest are k samples without replacement.
        """
        temperature = self.config.sampling_temperature
        if self.bias is not None:
            return probs_BxLxE + gathered_weight(self.bias, jnp.float32)
        if keys is not None and temperature:
            draw = partial(jax.random.gumbel, shape=logits_BxLxE.shape[1:])
            return logits_BxLxE / temperature + jax.vmap(draw)(keys)
        return logits_BxLxE

    def _uniform(
        self, row_shape: tuple[int, int], groups: tuple[int, int], keys: RowKeys
    ) -> jax.Array | None:
        """[G, S, K] float32 random numbers in [0, 1), or None where the config needs none.

        Args:
          row_shape: (L, K), of the numbers of one row.
          groups: (G, S).
          keys: one per row.
        """
        if keys is None or self.config.second_policy != "random":
            return None
        return jax.vmap(partial(jax.random.uniform, shape=row_shape))(keys).reshape(*groups, -1)


def _as_float32(x: jax.Array) -> jax.Array:
    """Converts to float32 and keeps the precision of `x`'s dtype; XLA may compute with more."""
    dtype = jnp.finfo(x.dtype)
    x32 = x.astype(jnp.float32)
    if x.dtype == jnp.float32:
        return x32
    return jax.lax.reduce_precision(x32, dtype.nexp, dtype.nmant)


def hash_expert(token: jax.Array, num_experts: int) -> jax.Array:
    """int32 expert of each token id, of the same shape; the same in all layers and runs.

    Experts get about equal numbers of ids: the random hash of Roller et al. (2021), with the final
    mix of MurmurHash3 in place of a table.
    """
    bits = token.astype(jnp.uint32)
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(multiplier)
    return ((bits ^ (bits >> 16)) % num_experts).astype(jnp.int32)


def router_stats(output: RouterOutput, capacity: int, devices_per_group: int = 1) -> RouterStats:
    """Computes the statistics of one layer over its tokens without padding.

    Args:
      output: of the router, with the slots that assignments have in their whole group.
      capacity: slots C of an expert in a whole group.
      devices_per_group: parts of a group, which follow each other along axis G.
    """
    logits_GxSxE, scores, assignment = output
    mask_GxS, expert_GxSxK = scores.mask_S, assignment.expert_SxK
    E = logits_GxSxE.shape[-1]

    def sum_over_tokens(value_GxS: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask_GxS, value_GxS, 0), dtype=jnp.float32)

    assigned_GxSxK = expert_GxSxK < E
    kept_GxSxK = assigned_GxSxK & (assignment.slot_SxK < capacity)
    # A token without any assignment counts as dropped.
    kept_share_GxS = kept_GxSxK.sum(-1) / jnp.maximum(assigned_GxSxK.sum(-1), 1)
    parts = jax.vmap(balance_stats)(scores)
    groups = jax.tree.map(lambda x: x.reshape(-1, devices_per_group, *x.shape[1:]).sum(1), parts)
    return RouterStats(
        load_E=expert_counts(expert_GxSxK, E).astype(jnp.float32),
        dropped=sum_over_tokens(1 - kept_share_GxS),
        tokens=sum_over_tokens(jnp.ones_like(mask_GxS)),
        entropy=sum_over_tokens(jax.scipy.special.entr(scores.probs_SxE).sum(-1)),
        confidence=sum_over_tokens(scores.probs_SxE.max(-1)),
        z_loss=sum_over_tokens(jax.nn.logsumexp(logits_GxSxE, -1) ** 2),
        balance_loss=jnp.sum(jax.vmap(load_balancing_loss)(groups)),
        first_choices_E=parts.first_choices_E.sum(0),
        probs_E=parts.probs_E.sum(0),
    )
