"""Dispatcher: interface that sends tokens to their experts and combines the experts' outputs.

`expert_layers.moe_forward` chooses one of three:

    slot_dispatch.LocalDispatcher                groups on one device, C slots per expert and group
    cross_device_dispatch.CrossDeviceDispatcher  groups that span devices, C slots as well
    dropless.DroplessDispatcher                  no slots: work follows the load of the experts

The first two move tokens to slots [E, G, C, D] and back, each step a `shard_map`; between the two
steps is a batched matmul, which XLA partitions over `expert`, `data` and `model`. The third is one
`shard_map`, because its layout of rows differs between devices.
Axis letters: see `expert_selection.py`.
"""

import abc
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax.distributed import constrain, partition_spec
from switch_jax.model.layers import RowKeys, gathered_weight
from switch_jax.model.moe.expert_selection import Assignment
from switch_jax.model.moe.experts import Experts

# Shardings of a dispatcher's arrays: indices and gates [G, S, ..], tokens [G, S, D], and slots
# [E, G, C, D]. Tokens are split over slice × data × expert; slots over `expert` (experts) and
# slice × data (groups). Both are split along D over `model`: each shard sends its own part.
GROUPED = partition_spec(("batch", None, None))
TOKENS = partition_spec(("batch", None, "activation_split"))
SLOTS = partition_spec(("expert", "expert_group", None, "activation_split"))

_SLOT_AXES = ("expert", "expert_group", None)


@dataclasses.dataclass(frozen=True)
class Dispatcher(abc.ABC):
    """Runs the experts of a layer on assigned tokens.

    Attributes:
      num_experts: E of the layer.
      capacity: slots C of an expert in a whole group.
      dropout_rate: of hidden activations of the experts.
    """

    num_experts: int
    capacity: int
    dropout_rate: float

    @abc.abstractmethod
    def forward(
        self, experts: Experts, x_BxLxD: jax.Array, assignment: Assignment, keys: RowKeys
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Computes Σ over a token's experts of gate · output of the expert.

        Args:
          experts: parameters of all experts, stacked.
          x_BxLxD: normed activations.
          assignment: leaves [G, S, K], gates in the dtype of `x_BxLxD`.
          keys: one per row, for dropout; None: no dropout.

        Returns this sum for each of the experts' outputs, [B, L, ..] and zero for a dropped token,
        and the slots that assignments got, [G, S, K], where `capacity` and above is dropped.
        """


class SlotDispatcher(Dispatcher):
    """Dispatcher with C slots per expert and group; subclasses move tokens to slots and back."""

    @abc.abstractmethod
    def assign_slots(self, assignment: Assignment) -> tuple[jax.Array, Any]:
        """Returns the slots of assignments [G, S, K], and indices for the methods below."""

    @abc.abstractmethod
    def dispatch(self, x_GxSxD: jax.Array, indices: Any) -> jax.Array:
        """[E, G, C, D]: tokens in their slots, zeros in empty slots."""

    @abc.abstractmethod
    def combine(self, y_ExGxCxD: jax.Array, gate_GxSxK: jax.Array, indices: Any) -> jax.Array:
        """[G, S, D]: Σ over a token's slots of gate · slot, 0 where all assignments were dropped.

        Gates have the dtype of the slots.
        """

    def forward(
        self, experts: Experts, x_BxLxD: jax.Array, assignment: Assignment, keys: RowKeys
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """See `Dispatcher.forward`."""
        (B, L, _), (G, S, _) = x_BxLxD.shape, assignment.gate_SxK.shape
        with jax.named_scope("dispatch"):
            slot_GxSxK, indices = self.assign_slots(assignment)
            x_ExGxCxD = self.dispatch(x_BxLxD.reshape(G, S, -1), indices)
        with jax.named_scope("experts"):
            computed = self._compute(experts, x_ExGxCxD, keys)
        with jax.named_scope("combine"):
            outputs = tuple(
                self.combine(y_ExGxCxD, assignment.gate_SxK, indices).reshape(B, L, -1)
                for y_ExGxCxD in computed
            )
        return outputs, slot_GxSxK

    def _compute(
        self, experts: Experts, x_ExGxCxD: jax.Array, keys: RowKeys
    ) -> tuple[jax.Array, ...]:
        """[E, G, C, ..] for each of the experts' outputs: every slot through its expert."""

        def matmul(x_ExGxCxX: jax.Array, weight: nnx.Param, axis: str) -> jax.Array:
            y_ExGxCxY = jnp.einsum(
                "EGCX,EXY->EGCY", x_ExGxCxX, gathered_weight(weight, x_ExGxCxX.dtype)
            )
            return constrain(y_ExGxCxY, *_SLOT_AXES, axis)

        def dropout(h_ExGxCxF: jax.Array) -> jax.Array:
            if keys is None or not self.dropout_rate:
                return h_ExGxCxF
            E, G, C, F = h_ExGxCxF.shape
            keep_rate = 1 - self.dropout_rate
            draw = partial(jax.random.bernoulli, p=keep_rate, shape=(E, C, F))
            # One key per group, that of its first row. Constrained here: else XLA gathers the
            # state of every round of the generator.
            keys_G = constrain(keys[:: len(keys) // G], "expert_group")
            keep = constrain(jax.vmap(draw, out_axes=1)(keys_G), *_SLOT_AXES, "mlp")
            return jnp.where(keep, h_ExGxCxF / keep_rate, 0)

        return experts(constrain(x_ExGxCxD, *_SLOT_AXES, "activation"), matmul, dropout)
