"""Expert layers: route, send tokens to slots, compute the experts, bring tokens back.

`dispatch.py` moves the tokens; what lies between its two ways is a batched matmul, which XLA
partitions over `expert`, `data` and `model` by itself. `dropless.py` does all of it where there is
no capacity. Axis letters: see `routing.py`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax.config import Config
from switch_jax.distributed import constrain
from switch_jax.model.attention import Attention, QueryKeyValue
from switch_jax.model.feed_forward import Mlp
from switch_jax.model.layers import RowKeys, fold_keys, gathered_weight
from switch_jax.model.moe.cross_device_dispatch import (
    combine_across_devices,
    dispatch_across_devices,
    make_route,
)
from switch_jax.model.moe.dropless import dropless_forward
from switch_jax.model.moe.experts import Experts, FeedForwardExperts, ProjectionExperts
from switch_jax.model.moe.router import Router, RoutingResult, RoutingSpec, router_stats
from switch_jax.model.moe.routing import Assignment
from switch_jax.model.moe.slot_dispatch import (
    combine_from_slots,
    dispatch_to_slots,
    make_slot_indices,
)


class SwitchMlp(nnx.Module):
    """The feed-forward layer of E experts, and the shared one that takes every token."""

    def __init__(self, config: Config, key: jax.Array):
        router_key, experts_key, shared_key = jax.random.split(key, 3)
        self.router = Router(config.moe, config.model.d_model, router_key)
        self.experts = FeedForwardExperts(config, experts_key)
        d_ff = config.moe.shared_d_ff
        shared = dataclasses.replace(config.model, d_ff=d_ff)
        self.shared = Mlp(shared, shared_key) if d_ff else None

    def __call__(
        self, x_BxLxD: jax.Array, spec: RoutingSpec, keys: RowKeys
    ) -> tuple[jax.Array, RoutingResult]:
        """[B, L, D], zero where a token was dropped (or what the shared expert makes of it)."""
        (y_BxLxD,), routed = moe_forward(self.router, self.experts, x_BxLxD, spec, keys)
        y_BxLxD = constrain(y_BxLxD, "batch", None, "activation")
        if self.shared is not None:
            y_BxLxD += self.shared(x_BxLxD, fold_keys(keys, 2))
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

    def project(
        self, x_BxLxD: jax.Array, spec: RoutingSpec, keys: RowKeys
    ) -> tuple[QueryKeyValue, RoutingResult]:
        """Queries, and keys and values, of the same positions."""
        (query, key_value), routed = moe_forward(self.router, self.experts, x_BxLxD, spec, keys)
        key_value_BxLxHxK = self.heads(key_value)
        return (self.heads(query), (key_value_BxLxHxK, key_value_BxLxHxK)), routed


def moe_forward(
    router: Router, experts: Experts, x_BxLxD: jax.Array, spec: RoutingSpec, keys: RowKeys
) -> tuple[tuple[jax.Array, ...], RoutingResult]:
    """Sends the real tokens of a batch through the experts that the router picks.

    Args:
      x_BxLxD: normed activations.
      spec: how they are routed.
      keys: one per row, for exploration and expert dropout; None: neither.

    Returns the experts' outputs, [B, L, ..] and zero where a token was dropped, and the routing.
    """
    moe, E, rate = router.config, router.config.num_experts, router.config.expert_dropout_rate
    B, L, _ = x_BxLxD.shape
    C = moe.capacity(spec.rows_per_group * L, spec.capacity_factor)
    decision = router(x_BxLxD, spec, fold_keys(keys, 0))
    assignment = decision.assignment
    # A capacity that is not in proportion to the tokens may be far above what experts get: it is
    # not a number of slots to compute, but a limit on what is computed.
    limited = (
        moe.expert_capacity is not None
        and spec.capacity_factor is not None
        and spec.devices_per_group == 1
    )
    if spec.capacity_factor is None or limited:
        kept = _within(assignment, C, E) if limited else assignment
        row_assignment = jax.tree.map(lambda leaf: leaf.reshape(B, L, -1), kept)
        outputs = dropless_forward(experts, x_BxLxD, row_assignment, rate, fold_keys(keys, 1))
    else:
        x_GxSxD = x_BxLxD.reshape(*assignment.gate_SxK.shape[:2], -1)
        # The gates are cast first: nothing of a token's size is ever float32 (paper §2.4).
        gate_GxSxK = assignment.gate_SxK.astype(x_BxLxD.dtype)
        group_keys = None if keys is None else fold_keys(keys[:: spec.rows_per_group], 1)
        if spec.devices_per_group == 1:
            indices = make_slot_indices(assignment, E, C)
            slots = _compute(experts, dispatch_to_slots(x_GxSxD, indices), rate, group_keys)
            outputs = tuple(combine_from_slots(y, gate_GxSxK, indices) for y in slots)
        else:
            route, assignment = make_route(assignment, E, C, spec)
            x_ExGxCxD = dispatch_across_devices(x_GxSxD, route, E, C)
            slots = _compute(experts, x_ExGxCxD, rate, group_keys)
            outputs = tuple(combine_across_devices(y, gate_GxSxK, route) for y in slots)
    sums = router_stats(decision._replace(assignment=assignment), C, spec.devices_per_group)
    return tuple(y.reshape(B, L, -1) for y in outputs), RoutingResult(assignment, sums)


def _within(assignment: Assignment, capacity: int, num_experts: int) -> Assignment:
    """Without the assignments that found no slot."""
    kept_GxSxK = assignment.slot_SxK < capacity
    expert_GxSxK = jnp.where(kept_GxSxK, assignment.expert_SxK, num_experts)
    return assignment._replace(expert_SxK=expert_GxSxK)


def _compute(
    experts: Experts, slots_ExGxCxD: jax.Array, rate: float, group_keys: RowKeys
) -> tuple[jax.Array, ...]:
    """[E, G, C, ..]: every slot through its expert."""
    along = ("expert", "expert_group", None)

    def matmul(x_ExGxCxX: jax.Array, own: nnx.Param, last: str) -> jax.Array:
        y = jnp.einsum("EGCX,EXY->EGCY", x_ExGxCxX, gathered_weight(own, x_ExGxCxX.dtype))
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
