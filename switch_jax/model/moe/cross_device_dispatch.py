"""Expert-parallel dispatch and combine of tokens for groups that span several devices.

`slot_dispatch.py` computes slots before tokens are sent, because a device sees its whole groups.
Here no device does. Tokens are sent to the device that owns their expert; it receives all tokens
that the group has for this expert, in token order, and computes the slots. They are the slots that
one device would compute for the whole group.

The number of tokens from one device to another varies, but buffers of an all-to-all have a fixed
size: the mean plus a margin, which is relatively larger for fewer tokens. With thousands of
experts a device has about one token for each other device. Tokens then take two hops: first to a
device that differs from the sender only in the minor digit of its index, then in the major digit.
A buffer holds dozens of tokens instead of one. The margin costs only communication; experts
compute the slots of `moe.capacity_factor`.

Axis letters: see `expert_selection.py`; here N is the items of a device, assignments or received
items, and M the slots of its bins.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from switch_jax.distributed import (
    all_to_all,
    axis_index,
    axis_size,
    partition_spec,
    pvary,
    shard_map,
)
from switch_jax.model.moe.dispatcher import GROUPED, SLOTS, TOKENS, SlotDispatcher
from switch_jax.model.moe.expert_selection import Assignment, expert_counts, position_in_expert
from switch_jax.model.moe.gather import gather_rows, gather_sum
from switch_jax.model.moe.slot_dispatch import flat_slots, invert_slots

_BATCH = partition_spec(("batch",))


class Bins(NamedTuple):
    """The items of a device, sorted into bins of equal size; int32."""

    slot_N: jax.Array  # bin · size + position in the bin; number of slots M if the item is dropped
    item_M: jax.Array  # the item in a slot, or N for an empty slot


@partial(jax.tree_util.register_dataclass, data_fields=["bins"], meta_fields=["devices", "stride"])
@dataclasses.dataclass(frozen=True)
class Hop:
    """An all-to-all among each `devices` devices that are `stride` apart on the expert axis."""

    bins: Bins  # the send buffers: one bin per receiver
    devices: int
    stride: int


class Route(NamedTuple):
    """Hops of the items of all devices, arrays split over slice × data × expert."""

    hops: tuple[Hop, ...]
    expert_bins: Bins  # of the receiver: one bin of C slots per expert and group


def padded_size(mean: float) -> int:
    """Size of a send buffer for `mean` items: the mean plus three standard deviations."""
    return math.ceil(mean + 3 * math.sqrt(mean))


def split_hops(devices: int, tokens: float) -> tuple[int, ...]:
    """Number of devices that take part in each hop; their product is `devices`.

    Args:
      devices: number of devices that own experts.
      tokens: assignments of a device that find slots, at most.

    Chooses one or two hops, whichever sends fewer buffer slots.
    """
    divisors = (size for size in range(2, devices) if devices % size == 0)
    choices = [(devices,), *((size, devices // size) for size in divisors)]
    return min(choices, key=lambda sizes: sum(n * padded_size(tokens / n) for n in sizes))


@dataclasses.dataclass(frozen=True)
class CrossDeviceDispatcher(SlotDispatcher):
    """Dispatcher for groups that span devices, with C slots per expert and group.

    Attributes:
      devices_per_group: devices that a group spans; each has one part [1, S] of it.
      capacity_factor: determines the size of send buffers.
    """

    devices_per_group: int
    capacity_factor: float

    def assign_slots(self, assignment: Assignment) -> tuple[jax.Array, Route]:
        """Sends the expert ids of all assignments and returns their slots and route.

        `assignment` has leaves [G, S, K], parts of groups; its slots are ignored. An assignment
        whose expert was full, or that did not fit in a send buffer, gets slot C.
        """
        devices = _expert_devices()
        owned, groups = self.num_experts // devices, devices // self.devices_per_group
        num_bins = owned * groups
        factor = max(self.capacity_factor, 1.0)

        def local(expert_GxSxK):
            _, S, K = expert_GxSxK.shape
            sent = S * max(factor, K)  # assignments of a device, at most
            # The code of an item is what receivers need: expert, group and choice k; expert and
            # group give the owner and the bin there.
            group = axis_index("expert") // self.devices_per_group
            choice_K = jnp.arange(K, dtype=jnp.int32)
            no_item = self.num_experts * groups * K
            code_GxSxK = (expert_GxSxK * groups + group) * K + choice_K
            code_N = jnp.where(expert_GxSxK < self.num_experts, code_GxSxK, no_item).reshape(-1)
            hops: list[Hop] = []
            sizes = split_hops(devices, sent)
            for i, size in enumerate(sizes):
                stride = math.prod(sizes[:i])  # the first hop is among neighbours
                owner_N = code_N // (num_bins * K)
                peer_N = jnp.where(code_N < no_item, owner_N // stride % size, size)
                position_N = position_in_expert(peer_N[:, None], size)[:, 0]
                buffer_size = min(padded_size(sent / size), len(code_N))
                hops.append(Hop(_fill(peer_N, position_N, size, buffer_size), size, stride))
                code_M = code_N.at[hops[-1].bins.item_M].get(mode="fill", fill_value=no_item)
                code_N = _exchange(code_M, hops[-1])
            choice_N = jnp.where(code_N < no_item, code_N % (num_bins * K), num_bins * K)
            position_N = _position_in_bin(choice_N, num_bins, K)
            expert_bins = _fill(choice_N // K, position_N, num_bins, self.capacity)
            # The slots go back to the senders.
            kept_N = expert_bins.slot_N < num_bins * self.capacity
            slot_N = jnp.where(kept_N, expert_bins.slot_N % self.capacity, self.capacity)
            for hop in reversed(hops):
                slot_N = _exchange(slot_N, hop)
                slot_N = slot_N.at[hop.bins.slot_N].get(mode="fill", fill_value=self.capacity)
            return slot_N.reshape(expert_GxSxK.shape), Route(tuple(hops), expert_bins)

        return shard_map(local, in_specs=GROUPED, out_specs=(GROUPED, _BATCH))(
            assignment.expert_SxK
        )

    def dispatch(self, x_GxSxD: jax.Array, indices: Route) -> jax.Array:
        """[E, G, C, D]: tokens in their slots, zeros in empty slots."""
        owned = self.num_experts // _expert_devices()

        def local(x_GxSxD, route):
            _, S, D = x_GxSxD.shape
            first, *later = [*(hop.bins for hop in route.hops), route.expert_bins]
            K = first.slot_N.size // S
            x_NxD = gather_rows(x_GxSxD[0], first.item_M // K, first.slot_N.reshape(S, K))
            for hop, bins in zip(route.hops, later):
                x_NxD = _exchange(x_NxD, hop)
                x_NxD = gather_rows(x_NxD, bins.item_M, bins.slot_N[:, None])
            return x_NxD.reshape(owned, -1, self.capacity, D)

        return shard_map(local, in_specs=(TOKENS, _BATCH), out_specs=SLOTS)(x_GxSxD, indices)

    def combine(self, y_ExGxCxD: jax.Array, gate_GxSxK: jax.Array, indices: Route) -> jax.Array:
        """[G, S, D]: Σ over a token's slots of gate · slot, 0 if all assignments were dropped."""

        def local(y_ExGxCxD, gate_GxSxK, route):
            _, S, K = gate_GxSxK.shape
            first, *later = [*(hop.bins for hop in route.hops), route.expert_bins]
            y_NxD = y_ExGxCxD.reshape(-1, y_ExGxCxD.shape[-1])
            for hop, bins in reversed([*zip(route.hops, later)]):
                y_NxD = gather_rows(y_NxD, bins.slot_N, bins.item_M[:, None])
                y_NxD = _exchange(y_NxD, hop)
            gate_SxK = pvary(gate_GxSxK[0], "model")  # as D of the slots is
            return gather_sum(y_NxD, gate_SxK, first.slot_N.reshape(S, K), first.item_M)[None]

        in_specs = (SLOTS, GROUPED, _BATCH)
        return shard_map(local, in_specs=in_specs, out_specs=TOKENS)(y_ExGxCxD, gate_GxSxK, indices)


def _expert_devices() -> int:
    return jax.sharding.get_abstract_mesh().shape["expert"]


def _fill(bin_N: jax.Array, position_N: jax.Array, num_bins: int, size: int) -> Bins:
    """Puts items into bins at their positions; bin `num_bins` means none."""
    slot_Nx1 = flat_slots(bin_N[:, None], position_N[:, None], num_bins, size)
    return Bins(slot_Nx1[:, 0], invert_slots(slot_Nx1, num_bins, size).reshape(-1))


def _position_in_bin(choice_N: jax.Array, num_bins: int, K: int) -> jax.Array:
    """[N] int32: position of each item bin · K + choice in its bin; first choices come first."""
    position_N = position_in_expert(choice_N[:, None], num_bins * K)[:, 0]
    count_BxK = expert_counts(choice_N, num_bins * K).reshape(num_bins, K)  # B: bins
    before_BxK = jnp.cumsum(count_BxK, axis=1) - count_BxK
    return position_N + before_BxK.reshape(-1).at[choice_N].get(mode="fill", fill_value=0)


def _exchange(x: jax.Array, hop: Hop) -> jax.Array:
    """All-to-all of the bins of a hop; applied once more, it sends the items back."""
    devices, size, stride = axis_size("expert"), hop.devices, hop.stride
    starts = (s for s in range(devices) if s // stride % size == 0)
    groups = [[start + stride * i for i in range(size)] for start in starts]
    return all_to_all(x, "expert", 0, 0, groups)
