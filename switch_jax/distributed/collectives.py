"""collectives: to be written."""

from collections.abc import Callable
from typing import Any

import jax


def shard_map(local: Callable, *, in_specs: Any, out_specs: Any) -> Callable:
    """`local` as a `shard_map` over the mesh in context, or as it is where there is none."""
    if no_mesh():
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs)


def pvary(x: jax.Array, axis_names: str | tuple[str, ...]) -> jax.Array:
    """`x` in a `shard_map`, the same along these axes, marked as one that may differ."""
    if no_mesh():
        return x
    return jax.lax.pcast(x, axis_names, to="varying")


# In a `shard_map`, along mesh axes; where there is no mesh, there is one device.


def psum(x: jax.Array, axis_names: str | tuple[str, ...]) -> jax.Array:
    """Σ over the devices."""
    return x if no_mesh() else jax.lax.psum(x, axis_names)


def pmax(x: jax.Array, axis_names: str | tuple[str, ...]) -> jax.Array:
    """The largest of the devices'; without a derivative."""
    return x if no_mesh() else jax.lax.pmax(x, axis_names)


def all_gather(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
    """All devices' parts, one after the other along an array axis."""
    return x if no_mesh() else jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)


def reduce_scatter(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
    """Σ over the devices, of which each keeps its part of an array axis."""
    if no_mesh():
        return x
    return jax.lax.psum_scatter(x, axis_name, scatter_dimension=axis, tiled=True)


def all_to_all(
    x: jax.Array,
    axis_name: str,
    split_axis: int,
    concat_axis: int,
    groups: list[list[int]] | None = None,
) -> jax.Array:
    """All-to-all, among all devices or within groups of them."""
    if no_mesh():
        return x
    return jax.lax.all_to_all(
        x, axis_name, split_axis, concat_axis, axis_index_groups=groups, tiled=True
    )


def axis_index(axis_name: str) -> Any:
    """The device's number."""
    return 0 if no_mesh() else jax.lax.axis_index(axis_name)


def axis_size(axis_name: str) -> int:
    """How many devices there are."""
    return 1 if no_mesh() else jax.lax.axis_size(axis_name)


def no_mesh() -> bool:
    """Whether there is no mesh in context."""
    return jax.sharding.get_abstract_mesh().empty
