"""The device mesh, and the one table from logical axis names to mesh axes.

Mesh axes: `slice` (across pod slices, data only), `data`, `expert`, `model`. The batch is
split over slice × data × expert; experts over `expert`; heads, d_ff and vocabulary over
`model`; with `mesh.fsdp` parameters and optimizer state over `data` as well.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from switch_jax.distributed.collectives import no_mesh

MESH_AXES = ("slice", "data", "expert", "model")
BATCH_AXES = ("slice", "data", "expert")

# Logical axis → mesh axis or axes. `fsdp` stands for `data` where mesh.fsdp is set.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": BATCH_AXES,  # rows, and groups of whole rows
    "expert_group": ("slice", "data"),  # groups, while the expert axis holds experts
    "activation": None,
    "activation_split": "model",  # d_model, cut so that slots are not sent once per model shard
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


def devices_per_group(group_rows: int, batch_rows: int) -> int:
    """Over how many devices each group of a (micro)batch is spread, by the mesh in context."""
    if no_mesh():
        return 1
    shards = num_batch_shards(jax.sharding.get_abstract_mesh())
    return max(1, group_rows * shards // batch_rows)


def partition_spec(axes: Sequence[str | None], *, fsdp: bool = False) -> P:
    """The partition of an array whose dimensions have these logical names.

    A name without a rule raises `KeyError`: a misspelt axis must not mean «replicated».
    """
    mesh_axes = [None if axis is None else RULES[axis] for axis in axes]
    return P(*(("data" if fsdp else None) if a == "fsdp" else a for a in mesh_axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the sharding of `x` by logical names; does nothing outside a mesh."""
    if no_mesh():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How every feature of a batch lies on the mesh: rows split, the rest whole."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def num_batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Among how many devices the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
