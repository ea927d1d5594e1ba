"""The device mesh, and the one table from logical axis names to mesh axes.

Mesh axes: `slice` (across pod slices, data only), `data`, `expert`, `model`. The batch is
split over slice × data × expert; experts over `expert`; heads, d_ff and vocabulary over
`model`; with `mesh.fsdp` parameters and optimizer state over `data` as well.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from switch_jax.data.batch import Feed
from switch_jax.errors import UserError
from switch_jax.schema import STACKS, Config, MeshConfig

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


def resolve(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes, -1 replaced by what is left of `num_devices`.

    Raises `UserError` when the mesh needs more devices than there are.
    """
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if fixed > num_devices:
        raise UserError(
            f"The mesh ({text}) needs {fixed} devices and there are {num_devices};"
            f" make the product of mesh.* at most {num_devices}."
        )
    return {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}


def make_mesh(
    config: Config,
    devices: Sequence[jax.Device] | None = None,
    *,
    teacher: Config | None = None,
) -> Mesh:
    """The mesh of a config over `devices` (default: all), after checking that it divides, and that
    the teacher's model, if there is one, fits it as well.

    A product below the number of devices uses the first ones. An axis of size -1 takes as many
    devices as divide the model and its batch; several processes must all take part, so there
    it takes all or none will do.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _fitting(config, teacher, len(devices))
    for one in filter(None, (config, teacher)):
        _check_dropless(one, sizes, devices)
    shape = tuple(sizes.values())
    devices = devices[: math.prod(shape)]
    slices = {getattr(device, "slice_index", None) for device in devices}
    if len(slices) == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif sizes["slice"] == len(slices):
        inside, between = (1, *shape[1:]), (len(slices), 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, between, devices, allow_split_physical_axes=True
        )
    else:
        raise UserError(
            f"The devices are on {len(slices)} slices and mesh.slice is {sizes['slice']};"
            f" set mesh.slice={len(slices)}."
        )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _fitting(config: Config, teacher: Config | None, num_devices: int) -> dict[str, int]:
    """Sizes of the axes that pass `check`, the free axis as large as it can be."""
    sizes = resolve(config.mesh, num_devices)
    free = [axis for axis in MESH_AXES if getattr(config.mesh, axis) == -1]
    if free and jax.process_count() == 1:
        for size in range(sizes[free[0]], 1, -1):
            candidate = sizes | {free[0]: size}
            try:
                check(config, candidate, teacher)
            except UserError:
                continue
            return candidate
        sizes[free[0]] = 1
    check(config, sizes, teacher)
    return sizes


def check(config: Config, sizes: dict[str, int], teacher: Config | None = None) -> None:
    """Raises `UserError` where a mesh of these sizes does not divide a model or its batch."""
    _check(config, sizes)
    if teacher is not None:
        try:
            _check(teacher, sizes)
        except UserError as error:
            raise UserError(f"Of the teacher, {error}") from error


def _check(config: Config, sizes: dict[str, int]) -> None:
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    divided = [
        ("model.num_heads", config.model.num_heads, "model"),
        ("model.d_ff", config.model.d_ff, "model"),
        ("model.vocab_size", config.model.vocab_size, "model"),
    ]
    if config.sparse:
        divided += [
            ("moe.num_experts", config.moe.num_experts, "expert"),
            ("model.d_model", config.model.d_model, "model"),
            ("moe.shared_d_ff", config.moe.shared_d_ff, "model"),
        ]
    if config.mesh.fsdp:
        divided.append(("model.d_model", config.model.d_model, "data"))
    for key, value, axis in divided:
        if value % sizes[axis]:
            common = math.gcd(*(v for _, v, a in divided if a == axis))
            raise UserError(
                f"{key}={value} does not divide over mesh.{axis}={sizes[axis]};"
                f" mesh.{axis} can be {_words(_divisors(common))}."
            )
    microbatch = config.data.batch_size // config.train.accumulate
    if microbatch % shards:
        raise UserError(
            f"A microbatch of {microbatch} rows (data.batch_size / train.accumulate) does not"
            f" divide over slice × data × expert = {shards} devices;"
            f" make data.batch_size a multiple of {shards * config.train.accumulate}."
        )
    if config.sparse:
        _check_groups(config, sizes, microbatch)


def _check_groups(config: Config, sizes: dict[str, int], microbatch: int) -> None:
    """Raises `UserError` where a group is neither within the rows of a device nor spread evenly
    over devices that have all experts between them, or not within a microbatch.
    """
    moe, batch, experts = config.moe, config.data.batch_size, sizes["expert"]
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    lengths = {stack: config.length(stack) for stack in STACKS if config.sparse_layers(stack)}

    def rows(length: int, group_size: int) -> int:
        return dataclasses.replace(moe, group_size=group_size).group_rows(batch, length)

    def fits(length: int, group_size: int) -> bool:
        group = rows(length, group_size)
        for local_rows in (microbatch // shards, batch // shards):  # training, evaluation
            spread = moe.in_token_order and group % local_rows == 0 == microbatch % group
            if local_rows % group and not (spread and experts % (group // local_rows) == 0):
                return False
        return True

    def all_fit(group_size: int) -> bool:
        return all(fits(length, group_size) for length in lengths.values())

    if all_fit(moe.group_size):
        return
    candidates = (r * length for r in _divisors(microbatch) for length in lengths.values())
    works = max((c for c in candidates if c <= moe.group_size and all_fit(c)), default=1)
    stack, length = next((s, n) for s, n in lengths.items() if not fits(n, moe.group_size))
    why = "" if moe.in_token_order else f" (moe.router={moe.router} must see all of a group)"
    raise UserError(
        f"A {stack} group of {rows(length, moe.group_size)} rows × {length} tokens is neither"
        f" within the {microbatch // shards} rows that a device has of a microbatch nor spread"
        f" evenly over mesh.expert={experts} devices{why}; set moe.group_size to {works}, or make"
        " data.batch_size or mesh.expert larger, or slice × data or train.accumulate smaller."
    )


def span(group_rows: int, batch_rows: int) -> int:
    """Over how many devices each group of a (micro)batch is spread, by the mesh in context."""
    if alone():
        return 1
    shards = num_batch_shards(jax.sharding.get_abstract_mesh())
    return max(1, group_rows * shards // batch_rows)


def _check_dropless(config: Config, sizes: dict[str, int], devices: Sequence[jax.Device]) -> None:
    """Raises `UserError` where a device cannot hold what a dropless expert layer may send it.

    Without capacity, all tokens of an `expert` row may come to one device. Counted is what a
    layer cannot do without at once: inputs, hidden activations and outputs of their experts.
    """
    model, moe, memory = config.model, config.moe, device_memory(devices)
    factors = {"capacity_factor": config.train.accumulate, "eval_capacity_factor": 1}
    dropless = {key: parts for key, parts in factors.items() if getattr(moe, key) is None}
    if not (config.sparse and dropless and memory):
        return
    key, parts = min(dropless.items(), key=lambda item: item[1])
    stack = max(filter(config.sparse_layers, STACKS), key=config.length)
    tokens = config.data.batch_size * config.length(stack) // parts
    tokens //= sizes["slice"] * sizes["data"]
    if moe.sublayer == "attention":
        outputs = 2 * model.num_heads * model.head_dim
    else:
        outputs = {"relu": 1, "geglu": 2}[model.activation] * model.d_ff + model.d_model
    width = model.d_model + outputs // sizes["model"]
    needed = tokens * moe.places * width * jnp.dtype(model.dtype).itemsize
    if needed > memory:
        raise UserError(
            f"moe.{key}=None may send all {tokens:,} {stack} tokens of slice × data to the experts"
            f" of one device, which takes {needed / 1e9:,.1f} GB on a device of"
            f" {memory / 1e9:,.1f} GB; set moe.{key} to a number such as 2.0, make data.batch_size"
            " smaller, or mesh.data or mesh.model larger."
        )


def device_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that one device may use; None where nobody says."""
    # Others do not tell; the devices of a mesh are alike.
    device = next(d for d in devices if d.process_index == jax.process_index())
    if device.platform == "cpu":
        local = max(1, len(jax.local_devices(backend="cpu")))
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (AttributeError, jax.errors.JaxRuntimeError):  # a described device, not a real one
        return None


def host_memory(mesh: Mesh) -> str:
    """The memory kind of the devices' host; raises `UserError` where there is none."""
    device = mesh.devices.flat[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if "pinned_host" not in kinds or device.platform == "cpu":
        raise UserError(
            f"optimizer.memory=host is not possible on {device.device_kind}, which has no host"
            " memory of its own; set optimizer.memory=device."
        )
    return "pinned_host"


def spec(axes: Sequence[str | None], *, fsdp: bool = False) -> P:
    """The partition of an array whose dimensions have these logical names.

    A name without a rule raises `KeyError`: a misspelt axis must not mean «replicated».
    """
    mesh_axes = [None if axis is None else RULES[axis] for axis in axes]
    return P(*(("data" if fsdp else None) if a == "fsdp" else a for a in mesh_axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the sharding of `x` by logical names; does nothing outside a mesh."""
    if alone():
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def on_mesh(local: Callable, *, in_specs: Any, out_specs: Any) -> Callable:
    """`local` as a `shard_map` over the mesh in context, or as it is where there is none."""
    if alone():
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs)


def varying(x: jax.Array, axis_names: str | tuple[str, ...]) -> jax.Array:
    """`x` in a `shard_map`, the same along these axes, marked as one that may differ."""
    if alone():
        return x
    return jax.lax.pcast(x, axis_names, to="varying")


# In a `shard_map`, along mesh axes; where there is no mesh, there is one device.


def summed(x: jax.Array, axis_names: str | tuple[str, ...]) -> jax.Array:
    """Σ over the devices."""
    return x if alone() else jax.lax.psum(x, axis_names)


def highest(x: jax.Array, axis_names: str | tuple[str, ...]) -> jax.Array:
    """The largest of the devices'; without a derivative."""
    return x if alone() else jax.lax.pmax(x, axis_names)


def gathered(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
    """All devices' parts, one after the other along an array axis."""
    return x if alone() else jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)


def scattered_sum(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
    """Σ over the devices, of which each keeps its part of an array axis."""
    if alone():
        return x
    return jax.lax.psum_scatter(x, axis_name, scatter_dimension=axis, tiled=True)


def exchanged(
    x: jax.Array,
    axis_name: str,
    split_axis: int,
    concat_axis: int,
    groups: list[list[int]] | None = None,
) -> jax.Array:
    """All-to-all, among all devices or within groups of them."""
    if alone():
        return x
    return jax.lax.all_to_all(
        x, axis_name, split_axis, concat_axis, axis_index_groups=groups, tiled=True
    )


def position(axis_name: str) -> Any:
    """The device's number."""
    return 0 if alone() else jax.lax.axis_index(axis_name)


def size(axis_name: str) -> int:
    """How many devices there are."""
    return 1 if alone() else jax.lax.axis_size(axis_name)


def alone() -> bool:
    """Whether there is no mesh in context."""
    return jax.sharding.get_abstract_mesh().empty


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How every feature of a batch lies on the mesh: rows split, the rest whole."""
    return NamedSharding(mesh, spec(("batch",)))


def feed(mesh: Mesh) -> Feed:
    """The rows of every batch that this process feeds: those that its devices hold.

    Raises `UserError` for a mesh that leaves a process out or cuts the batch within processes.
    """
    parts = num_batch_shards(mesh)
    held: dict[int, set[int]] = {index: set() for index in range(jax.process_count())}
    places: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((parts,))
    for device, (rows,) in places.items():
        held[device.process_index].add(rows.indices(parts)[0])
    shares = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len({len(share) for share in shares}) > 1:
        raise UserError(
            f"A mesh of {mesh.devices.size} devices gives the {len(held)} processes unequal parts"
            f" of the batch; make the product of mesh.* {jax.device_count()}, all there are."
        )
    if sum(map(len, shares)) != parts:
        raise UserError(
            f"mesh.model={mesh.shape['model']} lets processes share some of their rows and not"
            f" others; make it a divisor or a multiple of {jax.local_device_count()}, the devices"
            " of a process."
        )
    mine = tuple(sorted(held[jax.process_index()]))
    first = next(index for index, rows in held.items() if tuple(sorted(rows)) == mine)
    saves = first == jax.process_index()
    return Feed(parts, mine, shares.index(mine), len(shares), saves)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def num_batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Among how many devices the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, min(n, 4096) + 1) if n % i == 0]


def _words(numbers: list[int]) -> str:
    shown = [str(n) for n in numbers[:12]]
    return ", ".join(shown) + (" …" if len(numbers) > 12 else "")
