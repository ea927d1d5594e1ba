"""Shardings: the table from logical axis names to mesh axes, and partition specs made with it.

Mesh axes: `slice` (across pod slices, data only), `data`, `expert`, `model`. The batch is
split over slice × data × expert; experts over `expert`; heads, d_ff and vocabulary over
`model`; with `mesh.fsdp` parameters and optimizer state over `data` as well.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from switch_jax.distributed.collectives import no_mesh

MESH_AXES = ("slice", "data", "expert", "model")
"""Axes of the mesh, in the order of its devices."""
BATCH_AXES = ("slice", "data", "expert")
"""Axes of the mesh over which the rows of a batch are split."""

# Logical axis → mesh axis or axes; None: not split. `fsdp`: `data` if mesh.fsdp is set, else None.
LOGICAL_AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": BATCH_AXES,  # rows, and groups of whole rows
    "expert_group": ("slice", "data"),  # groups, where `expert` splits the experts
    "activation": None,
    "activation_split": "model",  # d_model, split so that each slot is sent once, not per shard
    # parameters
    "layers": None,
    "embed": "fsdp",
    "heads": "model",
    "mlp": "model",
    "vocab": "model",
    "expert": "expert",
    "router": None,
    "norm": None,
    "buckets": None,
    "lora": None,
}


def partition_spec(axes: Sequence[str | None], *, fsdp: bool = False) -> P:
    """Returns the partition spec of an array whose dimensions have these logical axes.

    None: a dimension that is not split. Raises `KeyError` for a name without a rule, so that a
    misspelt axis does not silently mean "replicated".
    """
    mesh_axes = [None if axis is None else LOGICAL_AXIS_RULES[axis] for axis in axes]
    return P(*(("data" if fsdp else None) if a == "fsdp" else a for a in mesh_axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of `x` by logical axes; without a mesh, returns `x`."""
    if no_mesh():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every feature [B, …] of a batch: only rows are split."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, P())


def num_batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of parts into which the rows of a batch are split: slice × data × expert."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def devices_per_group(group_rows: int, batch_rows: int) -> int:
    """Number of devices over which each group of a (micro)batch is spread; without a mesh, 1."""
    if no_mesh():
        return 1
    shards = num_batch_shards(jax.sharding.get_abstract_mesh())
    return max(1, group_rows * shards // batch_rows)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes of a device's shards of all leaves, which are arrays or abstract ones."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
