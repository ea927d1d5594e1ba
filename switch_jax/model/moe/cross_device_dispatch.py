"""The way of tokens to the slots of their experts where a group spans devices.

`dispatch.py` gives out slots before tokens leave, for a device sees its whole groups. Here nobody
does: tokens travel to the device that owns their expert, which sees all the group has for it and
gives out the slots. They arrive in token order, so that they get the slots they would get on one
device.

How many a device sends to another varies, and what is sent has a fixed size, with room for more
than the mean. The fewer tokens, the more room: with thousands of experts a device has about one
token for each other device. Then they take two hops, first to a device that differs from theirs in
the minor digit of its number, then in the major one: dozens of tokens a parcel instead of one.
Only travelling wastes room that way; experts compute the slots of `moe.capacity_factor`.

Axis letters: see `routing.py`; N items of a device: assignments, or what it has received.
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
from switch_jax.model.moe.router import RoutingSpec
from switch_jax.model.moe.routing import Assignment, expert_counts, position_in_expert
from switch_jax.model.moe.slot_dispatch import (
    GROUPED,
    SLOTS,
    TOKENS,
    gather_rows,
    gather_sum,
    slots_of_tokens,
    tokens_of_slots,
)


class Hop(NamedTuple):
    """Where the items of a device go, as bins of so many places each, and back; int32.

    The bins of a hop are parcels to other devices, those of the last leg the device's experts.
    """

    place_N: jax.Array  # bin · room + place, or bins · room for an item that found none
    held_M: jax.Array  # the item in a place, or N for an empty one


@partial(jax.tree_util.register_dataclass, data_fields=["legs"], meta_fields=["sizes"])
@dataclasses.dataclass(frozen=True)
class Route:
    """The legs of all devices, whose arrays are split over slice × data × expert, and between
    them hops among so many devices each.
    """

    legs: tuple[Hop, ...]
    sizes: tuple[int, ...]


_BATCH = partition_spec(("batch",))


def padded_size(mean: float) -> int:
    """Places in a parcel for `mean` tokens: three standard deviations above it."""
    return math.ceil(mean + 3 * math.sqrt(mean))


def split_hops(devices: int, tokens: float) -> tuple[int, ...]:
    """How many devices take part in each hop; their product is `devices`.

    Args:
      devices: owners of experts.
      tokens: assignments of a device that find slots, at the most.

    The number of hops, one or two, is the one that moves the fewer places.
    """
    divisors = (size for size in range(2, devices) if devices % size == 0)
    choices = [(devices,), *((size, devices // size) for size in divisors)]
    return min(choices, key=lambda sizes: sum(n * padded_size(tokens / n) for n in sizes))


def make_route(
    assignment: Assignment, num_experts: int, capacity: int, spec: RoutingSpec
) -> tuple[Route, Assignment]:
    """The way of every assignment, and the assignment with the slots they got.

    Args:
      assignment: of the part of a group that each device has, leaves [G, S, K]; its slots do not
        matter.
      num_experts: E.
      capacity: C, of an expert in a whole group.
      spec: of which `span` and `factor` count.

    An assignment whose expert was full, or that found no room on the way, has slot C.
    """
    devices = jax.sharding.get_abstract_mesh().shape["expert"]
    owned, groups = num_experts // devices, devices // spec.devices_per_group
    bins = owned * groups
    factor = max(spec.capacity_factor or 1.0, 1.0)

    def local(expert_GxSxK):
        _, S, K = expert_GxSxK.shape
        assignments = S * max(factor, K)
        sizes = split_hops(devices, assignments)
        # What an item must know: its owner, expert and group there, and which choice it is.
        group = axis_index("expert") // spec.devices_per_group
        choice_K = jnp.arange(K, dtype=jnp.int32)
        nobody = num_experts * groups * K
        code_GxSxK = (expert_GxSxK * groups + group) * K + choice_K
        code_N = jnp.where(expert_GxSxK < num_experts, code_GxSxK, nobody).reshape(-1)
        legs = []
        for size, stride in zip(sizes, _strides(sizes)):
            peer_N = jnp.where(code_N < nobody, code_N // (bins * K) // stride % size, size)
            places = min(padded_size(assignments / size), len(code_N))
            legs.append(_leg(peer_N, position_in_expert(peer_N[:, None], size)[:, 0], size, places))
            code_M = code_N.at[legs[-1].held_M].get(mode="fill", fill_value=nobody)
            code_N = _exchange(code_M, size, stride)
        choice_N = jnp.where(code_N < nobody, code_N % (bins * K), bins * K)
        legs.append(_leg(choice_N // K, _ranks(choice_N, bins, K), bins, capacity))
        place_N = legs[-1].place_N
        slot_N = jnp.where(place_N < bins * capacity, place_N % capacity, capacity)
        for leg, size, stride in _backwards(legs, sizes):
            slot_N = _exchange(slot_N, size, stride)
            slot_N = slot_N.at[leg.place_N].get(mode="fill", fill_value=capacity)
        return Route(tuple(legs), sizes), slot_N.reshape(expert_GxSxK.shape)

    route, slot_GxSxK = shard_map(local, in_specs=GROUPED, out_specs=(_BATCH, GROUPED))(
        assignment.expert_SxK
    )
    return route, assignment._replace(slot_SxK=slot_GxSxK)


def dispatch_across_devices(
    x_GxSxD: jax.Array, route: Route, num_experts: int, capacity: int
) -> jax.Array:
    """[E, G, C, D]: the tokens in their slots, zeros in empty ones; as `dispatch.dispatch`."""
    devices = jax.sharding.get_abstract_mesh().shape["expert"]

    def local(x_GxSxD, route):
        _, S, D = x_GxSxD.shape
        first, *others = route.legs
        K = first.place_N.size // S
        x_NxD = gather_rows(x_GxSxD[0], first.held_M // K, first.place_N.reshape(S, K))
        for leg, size, stride in zip(others, route.sizes, _strides(route.sizes)):
            x_NxD = _exchange(x_NxD, size, stride)
            x_NxD = gather_rows(x_NxD, leg.held_M, leg.place_N[:, None])
        return x_NxD.reshape(num_experts // devices, -1, capacity, D)

    return shard_map(local, in_specs=(TOKENS, _BATCH), out_specs=SLOTS)(x_GxSxD, route)


def combine_across_devices(
    slots_ExGxCxD: jax.Array, gate_GxSxK: jax.Array, route: Route
) -> jax.Array:
    """[G, S, D]: Σ over a token's slots of gate · what the slot holds; as `dispatch.combine`."""

    def local(slots_ExGxCxD, gate_GxSxK, route):
        _, S, K = gate_GxSxK.shape
        first, *_, last = route.legs
        y_NxD = slots_ExGxCxD.reshape(-1, slots_ExGxCxD.shape[-1])
        y_NxD = gather_rows(y_NxD, last.place_N, last.held_M[:, None])
        for leg, size, stride in _backwards(route.legs, route.sizes):
            y_NxD = _exchange(y_NxD, size, stride)
            if leg is not first:
                y_NxD = gather_rows(y_NxD, leg.place_N, leg.held_M[:, None])
        gate_SxK = pvary(gate_GxSxK[0], "model")  # as the slots' D is
        return gather_sum(y_NxD, gate_SxK, first.place_N.reshape(S, K), first.held_M)[None]

    in_specs = (SLOTS, GROUPED, _BATCH)
    return shard_map(local, in_specs=in_specs, out_specs=TOKENS)(slots_ExGxCxD, gate_GxSxK, route)


def _leg(bin_N: jax.Array, rank_N: jax.Array, bins: int, places: int) -> Hop:
    """Items to bins, in the order of their ranks; a bin of `bins` is none."""
    place_Nx1 = slots_of_tokens(bin_N[:, None], rank_N[:, None], bins, places)
    return Hop(place_Nx1[:, 0], tokens_of_slots(place_Nx1, bins, places).reshape(-1))


def _ranks(choice_N: jax.Array, bins: int, K: int) -> jax.Array:
    """Position of each item, bin · K + choice, in its bin: first choices first, then in order."""
    rank_N = position_in_expert(choice_N[:, None], bins * K)[:, 0]
    count_BxK = expert_counts(choice_N, bins * K).reshape(bins, K)
    before_BxK = jnp.cumsum(count_BxK, axis=1) - count_BxK
    return rank_N + before_BxK.reshape(-1).at[choice_N].get(mode="fill", fill_value=0)


def _strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """How far apart the devices of each hop are on the expert axis: the first are neighbours."""
    return tuple(math.prod(sizes[:i]) for i in range(len(sizes)))


def _backwards(legs, sizes) -> list[tuple[Hop, int, int]]:
    """The hops from the last to the first, each with the leg that led to it."""
    return list(zip(legs, sizes, _strides(sizes)))[::-1]


def _exchange(x: jax.Array, size: int, stride: int) -> jax.Array:
    """All-to-all of equal parcels among each `size` devices that are `stride` apart."""
    devices = axis_size("expert")
    starts = (s for s in range(devices) if s // stride % size == 0)
    groups = [[start + stride * i for i in range(size)] for start in starts]
    return all_to_all(x, "expert", 0, 0, groups)
