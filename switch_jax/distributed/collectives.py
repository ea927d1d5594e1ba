"""Collectives along mesh axes, which become the identity where there is no mesh.

The same model code runs inside a `shard_map` over a mesh and on one device without a mesh. Without
a mesh every function here returns its input unchanged, `axis_index` returns 0, and `axis_size`
returns 1. With a mesh they are the functions of `jax` and `jax.lax` of the same name
(`reduce_scatter` is `jax.lax.psum_scatter`).
"""

from collections.abc import Callable
from typing import Any

import jax


def no_mesh() -> bool:
    """Whether there is no mesh in context."""
    return jax.sharding.get_abstract_mesh().empty


def mesh_platform() -> str:
    """ "cpu", "gpu" or "tpu": platform of the mesh in context; without a mesh, JAX's default.

    It is known while a function is traced, also for devices that are described and not attached.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def shard_map(
    local: Callable, *, in_specs: Any, out_specs: Any, check_vma: bool = True
) -> Callable:
    """Returns `local` mapped over the shards of the mesh in context; without a mesh, `local`.

    `check_vma`: as of `jax.shard_map`; False where `local` has kernels, for which JAX does not know
    along which axes their results vary.
    """
    if no_mesh():
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


def pvary(x: jax.Array, axis_names: str | tuple[str, ...]) -> jax.Array:
    """Marks `x`, equal along these axes, as varying along them; without a mesh, returns `x`."""
    if no_mesh():
        return x
    return jax.lax.pcast(x, axis_names, to="varying")


def psum(x: jax.Array, axis_names: str | tuple[str, ...]) -> jax.Array:
    """Sums `x` over the devices along these axes; without a mesh, returns `x`."""
    return x if no_mesh() else jax.lax.psum(x, axis_names)


def pmax(x: jax.Array, axis_names: str | tuple[str, ...]) -> jax.Array:
    """Maximum of `x` over the devices along these axes; without a mesh, returns `x`.

    It has no derivative.
    """
    return x if no_mesh() else jax.lax.pmax(x, axis_names)


def all_gather(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
    """Concatenates the devices' `x` along an array axis; without a mesh, returns `x`."""
    return x if no_mesh() else jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)


def reduce_scatter(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
    """Sums `x` over the devices and splits the sum along an array axis, a part for each device.

    Without a mesh, returns `x`.
    """
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
    """Splits `x` along one array axis, sends part i to device i, and concatenates what arrives.

    Without a mesh, returns `x`.

    Args:
      axis_name: mesh axis.
      split_axis: array axis along which `x` is split.
      concat_axis: array axis along which the received parts are concatenated.
      groups: indices along `axis_name` of the devices of each group that exchanges; None: all
        devices in one group.
    """
    if no_mesh():
        return x
    return jax.lax.all_to_all(
        x, axis_name, split_axis, concat_axis, axis_index_groups=groups, tiled=True
    )


def axis_index(axis_name: str) -> Any:
    """Index of this device along a mesh axis, an int32 scalar; without a mesh, 0."""
    return 0 if no_mesh() else jax.lax.axis_index(axis_name)


def axis_size(axis_name: str) -> int:
    """Number of devices along a mesh axis; without a mesh, 1."""
    return 1 if no_mesh() else jax.lax.axis_size(axis_name)
