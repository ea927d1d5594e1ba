"""Expert layers: a feed-forward layer and self-attention whose weights are experts.

`moe_forward` is the common part: it routes, and passes the tokens to a dispatcher, which sends
them to their experts and combines the outputs. Axis letters: see `expert_selection.py`.
"""

import dataclasses

import jax
from flax import nnx

from switch_jax.config import Config, MoEConfig, expert_capacity
from switch_jax.distributed import constrain
from switch_jax.model.attention import Attention, QueryKeyValue
from switch_jax.model.feed_forward import Mlp
from switch_jax.model.layers import RowKeys, fold_keys
from switch_jax.model.moe.cross_device_dispatch import CrossDeviceDispatcher
from switch_jax.model.moe.dispatcher import Dispatcher
from switch_jax.model.moe.dropless import DroplessDispatcher
from switch_jax.model.moe.experts import Experts, FeedForwardExperts, ProjectionExperts
from switch_jax.model.moe.router import Router, RoutingResult, RoutingSpec, router_stats
from switch_jax.model.moe.slot_dispatch import LocalDispatcher


class SwitchMlp(nnx.Module):
    """Feed-forward layer of E experts, and optionally a shared expert for every token."""

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
        """[B, L, D] and the routing; a dropped token gets zero plus the shared expert's output.

        Args:
          x_BxLxD: normed activations.
          spec: routing of the batch.
          keys: one per row, for exploration and dropout; None: deterministic.
        """
        (y_BxLxD,), routing = moe_forward(self.router, self.experts, x_BxLxD, spec, keys)
        y_BxLxD = constrain(y_BxLxD, "batch", None, "activation")
        if self.shared is not None:
            y_BxLxD += self.shared(x_BxLxD, fold_keys(keys, 2))
        return y_BxLxD, routing


class SwitchAttention(Attention):
    """Self-attention whose queries, keys and values come from experts (paper, Appendix A).

    The query experts and the key-value experts share one routing, keys equal values, and the output
    projection is dense. A dropped token has zeros as query, key and value.
    """

    def __init__(self, config: Config, key: jax.Array):
        out_key, router_key, experts_key = jax.random.split(key, 3)
        super().__init__(config.model, out_key)
        self.router = Router(config.moe, config.model.d_model, router_key)
        self.experts = ProjectionExperts(config, experts_key)

    def project(
        self, x_BxLxD: jax.Array, spec: RoutingSpec, keys: RowKeys
    ) -> tuple[QueryKeyValue, RoutingResult]:
        """Returns queries, keys and values, [B, L, H, head_dim] each, and the routing."""
        (query, key_value), routing = moe_forward(self.router, self.experts, x_BxLxD, spec, keys)
        key_value_BxLxHxK = self.heads(key_value)
        return (self.heads(query), (key_value_BxLxHxK, key_value_BxLxHxK)), routing


def moe_forward(
    router: Router, experts: Experts, x_BxLxD: jax.Array, spec: RoutingSpec, keys: RowKeys
) -> tuple[tuple[jax.Array, ...], RoutingResult]:
    """Sends the tokens of a batch through the experts that the router selects.

    Args:
      router: selects the experts.
      experts: their parameters, stacked.
      x_BxLxD: normed activations.
      spec: routing of the batch.
      keys: one per row, for exploration and expert dropout; None: neither.

    Returns each of the experts' outputs, [B, L, ..] and zero where a token was dropped, and the
    routing.
    """
    moe, L = router.config, x_BxLxD.shape[1]
    capacity = expert_capacity(moe, spec.rows_per_group * L, spec.capacity_factor)
    output = router(x_BxLxD, spec, capacity, fold_keys(keys, 0))
    dispatcher = _choose_dispatcher(moe, spec, capacity)
    # Gates are cast before they are sent: no array with a row per token is float32 (paper §2.4).
    gate_GxSxK = output.assignment.gate_SxK.astype(x_BxLxD.dtype)
    outputs, slot_GxSxK = dispatcher.forward(
        experts, x_BxLxD, output.assignment._replace(gate_SxK=gate_GxSxK), fold_keys(keys, 1)
    )
    assignment = output.assignment._replace(slot_SxK=slot_GxSxK)
    stats = router_stats(output._replace(assignment=assignment), capacity, spec.devices_per_group)
    return outputs, RoutingResult(assignment, stats)


def _choose_dispatcher(moe: MoEConfig, spec: RoutingSpec, capacity: int) -> Dispatcher:
    """Returns the dispatcher with the least work for this capacity and these groups."""
    values = moe.num_experts, capacity, moe.expert_dropout_rate
    if spec.capacity_factor is None:
        # A slot for every token in every expert would be E slots per token, nearly all empty.
        return DroplessDispatcher(*values, spec.first_expert)
    if spec.devices_per_group > 1:
        # No device sees a whole group, so the router cannot compute slots.
        return CrossDeviceDispatcher(*values, spec.devices_per_group, spec.capacity_factor)
    if moe.expert_capacity is not None:
        # A fixed capacity limits the assignments per expert, and may be far above the load:
        # computing that many slots would be wasteful, so assignments are computed without slots.
        return DroplessDispatcher(*values, spec.first_expert)
    return LocalDispatcher(*values)
