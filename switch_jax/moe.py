"""Expert layers: route, send tokens to slots, compute the experts, bring tokens back.

`dispatch.py` moves the tokens; what lies between its two ways is a batched matmul, which XLA
partitions over `expert`, `data` and `model` by itself. `dropless.py` does all of it where there is
no capacity. Axis letters: see `routing.py`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax import dispatch, dropless, transit
from switch_jax.layers import (
    Attention,
    Keys,
    Mlp,
    Projected,
    activate,
    fold,
    kernel,
    param,
    weight,
)
from switch_jax.router import Plan, Routed, Router, router_sums
from switch_jax.routing import Assignment
from switch_jax.schema import Config
from switch_jax.sharding import constrain

# x @ an expert's own weights, [.., X] → [.., Y], and the logical name of Y.
MatMul = Callable[[jax.Array, nnx.Param, str], jax.Array]
# Dropout of hidden activations.
Drop = Callable[[jax.Array], jax.Array]


def stacked(key: jax.Array, num_experts: int, shape: tuple[int, int], scale: float) -> jax.Array:
    """[E, *shape]: one draw an expert, so that fan-in is the expert's own."""
    return jax.vmap(lambda k: kernel(k, shape, scale))(jax.random.split(key, num_experts))


class FeedForwardExperts(nnx.Module):
    """Feed-forward networks, as `layers.Mlp` E times."""

    def __init__(self, config: Config, key: jax.Array):
        self.config = config
        model, E = config.model, config.moe.num_experts
        D, F, s = model.d_model, model.d_ff, model.init_scale
        i, g, o = jax.random.split(key, 3)
        self.wi = param(stacked(i, E, (D, F), s), "expert", "embed", "mlp")
        self.gate = (
            param(stacked(g, E, (D, F), s), "expert", "embed", "mlp")
            if model.activation == "geglu"
            else None
        )
        self.wo = param(stacked(o, E, (F, D), s), "expert", "mlp", "embed")

    def __call__(self, x: jax.Array, matmul: MatMul, drop: Drop) -> tuple[jax.Array, ...]:
        """[.., D] → ([.., D],); dropout on the hidden activations (paper §2.4)."""
        gate = None if self.gate is None else matmul(x, self.gate, "mlp")
        h = drop(activate(self.config.model.activation, matmul(x, self.wi, "mlp"), gate))
        return (matmul(h, self.wo, "activation_split"),)


class ProjectionExperts(nnx.Module):
    """Linear maps to queries, and to shared keys and values (paper, Appendix A, Fig 10)."""

    def __init__(self, config: Config, key: jax.Array):
        model, E = config.model, config.moe.num_experts
        D, inner, s = model.d_model, model.num_heads * model.head_dim, model.init_scale
        q, kv = jax.random.split(key)
        query = stacked(q, E, (D, inner), s) / model.head_dim**0.5
        self.query = param(query, "expert", "embed", "heads")
        self.key_value = param(stacked(kv, E, (D, inner), s), "expert", "embed", "heads")

    def __call__(self, x: jax.Array, matmul: MatMul, drop: Drop) -> tuple[jax.Array, ...]:
        """[.., D] → ([.., H·K], [.., H·K]); nothing is hidden, so nothing is dropped out."""
        del drop
        return matmul(x, self.query, "heads"), matmul(x, self.key_value, "heads")


Experts = FeedForwardExperts | ProjectionExperts


class SwitchMlp(nnx.Module):
    """The feed-forward layer of E experts, and the shared one that takes every token."""

    def __init__(self, config: Config, key: jax.Array):
        router_key, experts_key, shared_key = jax.random.split(key, 3)
        self.router = Router(config.moe, config.model.d_model, router_key)
        self.experts = FeedForwardExperts(config, experts_key)
        d_ff = config.moe.shared_d_ff
        shared = dataclasses.replace(config.model, d_ff=d_ff)
        self.shared = Mlp(shared, shared_key) if d_ff else None

    def __call__(self, x_BxLxD: jax.Array, plan: Plan, keys: Keys) -> tuple[jax.Array, Routed]:
        """[B, L, D], zero where a token was dropped (or what the shared expert makes of it)."""
        (y_BxLxD,), routed = through_experts(self.router, self.experts, x_BxLxD, plan, keys)
        y_BxLxD = constrain(y_BxLxD, "batch", None, "activation")
        if self.shared is not None:
            y_BxLxD += self.shared(x_BxLxD, fold(keys, 2))
        return y_BxLxD, routed


class SwitchAttention(Attention):
    """Self-attention whose queries, keys and values come from experts (paper, Appendix A).

    One routing decision serves both sets of experts, keys and values are the same, and the
    output projection is dense. A dropped token asks for nothing and offers zeros.
    """

    def __init__(self, config: Config, key: jax.Array):
        out_key, router_key, experts_key = jax.random.split(key, 3)
        super().__init__(config.model, out_key)
        self.router = Router(config.moe, config.model.d_model, router_key)
        self.experts = ProjectionExperts(config, experts_key)

    def project(self, x_BxLxD: jax.Array, plan: Plan, keys: Keys) -> tuple[Projected, Routed]:
        """Queries, and keys and values, of the same positions."""
        (query, key_value), routed = through_experts(self.router, self.experts, x_BxLxD, plan, keys)
        key_value_BxLxHxK = self.heads(key_value)
        return (self.heads(query), (key_value_BxLxHxK, key_value_BxLxHxK)), routed


def through_experts(
    router: Router, experts: Experts, x_BxLxD: jax.Array, plan: Plan, keys: Keys
) -> tuple[tuple[jax.Array, ...], Routed]:
    """Sends the real tokens of a batch through the experts that the router picks.

    Args:
      x_BxLxD: normed activations.
      plan: how they are routed.
      keys: one per row, for exploration and expert dropout; None: neither.

    Returns the experts' outputs, [B, L, ..] and zero where a token was dropped, and the routing.
    """
    moe, E, rate = router.config, router.config.num_experts, router.config.expert_dropout_rate
    B, L, _ = x_BxLxD.shape
    C = moe.capacity(plan.rows * L, plan.factor)
    decision = router(x_BxLxD, plan, fold(keys, 0))
    assignment = decision.assignment
    # A capacity that is not in proportion to the tokens may be far above what experts get: it is
    # not a number of slots to compute, but a limit on what is computed.
    limited = moe.expert_capacity is not None and plan.factor is not None and plan.span == 1
    if plan.factor is None or limited:
        kept = _within(assignment, C, E) if limited else assignment
        row_assignment = jax.tree.map(lambda leaf: leaf.reshape(B, L, -1), kept)
        outputs = dropless.compute(experts, x_BxLxD, row_assignment, rate, fold(keys, 1))
    else:
        x_GxSxD = x_BxLxD.reshape(*assignment.gate_SxK.shape[:2], -1)
        # The gates are cast first: nothing of a token's size is ever float32 (paper §2.4).
        gate_GxSxK = assignment.gate_SxK.astype(x_BxLxD.dtype)
        group_keys = None if keys is None else fold(keys[:: plan.rows], 1)
        if plan.span == 1:
            indices = dispatch.make_indices(assignment, E, C)
            slots = _compute(experts, dispatch.dispatch(x_GxSxD, indices), rate, group_keys)
            outputs = tuple(dispatch.combine(y, gate_GxSxK, indices) for y in slots)
        else:
            route, assignment = transit.make_route(assignment, E, C, plan)
            x_ExGxCxD = transit.dispatch(x_GxSxD, route, E, C)
            slots = _compute(experts, x_ExGxCxD, rate, group_keys)
            outputs = tuple(transit.combine(y, gate_GxSxK, route) for y in slots)
    sums = router_sums(decision._replace(assignment=assignment), C, plan.span)
    return tuple(y.reshape(B, L, -1) for y in outputs), Routed(assignment, sums)


def _within(assignment: Assignment, capacity: int, num_experts: int) -> Assignment:
    """Without the assignments that found no slot."""
    kept_GxSxK = assignment.slot_SxK < capacity
    expert_GxSxK = jnp.where(kept_GxSxK, assignment.expert_SxK, num_experts)
    return assignment._replace(expert_SxK=expert_GxSxK)


def _compute(
    experts: Experts, slots_ExGxCxD: jax.Array, rate: float, group_keys: Keys
) -> tuple[jax.Array, ...]:
    """[E, G, C, ..]: every slot through its expert."""
    along = ("expert", "expert_group", None)

    def matmul(x_ExGxCxX: jax.Array, own: nnx.Param, last: str) -> jax.Array:
        y = jnp.einsum("EGCX,EXY->EGCY", x_ExGxCxX, weight(own, x_ExGxCxX.dtype))
        return constrain(y, *along, last)

    def drop(h_ExGxCxF: jax.Array) -> jax.Array:
        if group_keys is None or not rate:
            return h_ExGxCxF
        E, _, C, F = h_ExGxCxF.shape
        draw = partial(jax.random.bernoulli, p=1 - rate, shape=(E, C, F))
        keys = constrain(group_keys, "expert_group")  # and not each round of the generator's
        keep = constrain(jax.vmap(draw, out_axes=1)(keys), *along, "mlp")
        return jnp.where(keep, h_ExGxCxF / (1 - rate), 0)

    return experts(constrain(slots_ExGxCxD, *along, "activation"), matmul, drop)
