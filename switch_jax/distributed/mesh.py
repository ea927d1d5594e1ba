"""Device mesh: sizes of the mesh axes, the mesh, and whether it divides the model and the batch."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from switch_jax.config import STACKS, Config, MeshConfig, rows_per_group
from switch_jax.distributed.sharding import BATCH_AXES, MESH_AXES
from switch_jax.errors import UserError


def resolve_mesh(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """Returns the size of each mesh axis; -1 becomes `num_devices` / the other sizes.

    Raises `UserError` where the mesh needs more devices than there are.
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
    """Returns the mesh of a config over `devices` (default: all).

    A product of sizes below the number of devices uses the first devices. An axis of size -1 gets
    the largest size that divides the model and its batch; with several processes it gets all
    devices, because every process must take part.

    Raises `UserError` where the mesh does not divide the model, the teacher's model (if there is
    one) or the batch, and where it does not match the TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _largest_fitting(config, teacher, len(devices))
    shape = tuple(sizes.values())
    devices = devices[: math.prod(shape)]
    slices = {getattr(device, "slice_index", None) for device in devices}
    if len(slices) == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif sizes["slice"] == len(slices):
        within_slice, across_slices = (1, *shape[1:]), (len(slices), 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(
            within_slice, across_slices, devices, allow_split_physical_axes=True
        )
    else:
        raise UserError(
            f"The devices are on {len(slices)} slices and mesh.slice is {sizes['slice']};"
            f" set mesh.slice={len(slices)}."
        )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def axes_span(sizes: Mapping[str, int], axes: Collection[str]) -> int:
    """Number of consecutive devices over which the group of a device along `axes` is spread.

    Devices are numbered along the mesh axes, `model` fastest. Slices do not count.
    """
    inner = [axis for axis in MESH_AXES if axis != "slice"]
    first = min((inner.index(axis) for axis in axes if axis in inner), default=len(inner))
    return math.prod(sizes[axis] for axis in inner[first:])


def _largest_fitting(config: Config, teacher: Config | None, num_devices: int) -> dict[str, int]:
    """Returns axis sizes that pass `check_mesh`, the axis of size -1 as large as possible."""
    sizes = resolve_mesh(config.mesh, num_devices)
    free = [axis for axis in MESH_AXES if getattr(config.mesh, axis) == -1]
    if free and jax.process_count() == 1:
        for size in range(sizes[free[0]], 1, -1):
            candidate = sizes | {free[0]: size}
            try:
                check_mesh(config, candidate, teacher)
            except UserError:
                continue
            return candidate
        sizes[free[0]] = 1
    check_mesh(config, sizes, teacher)
    return sizes


def check_mesh(config: Config, sizes: dict[str, int], teacher: Config | None = None) -> None:
    """Raises `UserError` where axes of these sizes do not divide a model or its batch."""
    _check_divides(config, sizes)
    if teacher is not None:
        try:
            _check_divides(teacher, sizes)
        except UserError as error:
            raise UserError(f"Of the teacher, {error}") from error


def _check_divides(config: Config, sizes: dict[str, int]) -> None:
    """Raises `UserError` where axes of these sizes do not divide this model or its batch."""
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
                f" mesh.{axis} can be {_join_first(_divisors(common))}."
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
    """Checks that routing groups fit the devices of the batch axes.

    Raises `UserError` unless each group is either within the rows of one device or spread evenly
    over devices that hold all experts together, and within one microbatch.
    """
    moe, batch, experts = config.moe, config.data.batch_size, sizes["expert"]
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    lengths = {stack: config.length(stack) for stack in STACKS if config.sparse_layers(stack)}

    def rows(length: int, group_size: int) -> int:
        return rows_per_group(dataclasses.replace(moe, group_size=group_size), batch, length)

    def fits(length: int, group_size: int) -> bool:
        group = rows(length, group_size)
        for local_rows in (microbatch // shards, batch // shards):  # training, evaluation
            may_span = moe.in_token_order and group % local_rows == 0 == microbatch % group
            if local_rows % group and not (may_span and experts % (group // local_rows) == 0):
                return False
        return True

    def all_fit(group_size: int) -> bool:
        return all(fits(length, group_size) for length in lengths.values())

    if all_fit(moe.group_size):
        return
    candidates = (r * length for r in _divisors(microbatch) for length in lengths.values())
    suggestion = max((c for c in candidates if c <= moe.group_size and all_fit(c)), default=1)
    stack, length = next((s, n) for s, n in lengths.items() if not fits(n, moe.group_size))
    reason = "" if moe.in_token_order else f" (moe.router={moe.router} must see all of a group)"
    raise UserError(
        f"A {stack} group of {rows(length, moe.group_size)} rows × {length} tokens is neither"
        f" within the {microbatch // shards} rows that a device has of a microbatch nor spread"
        f" evenly over mesh.expert={experts} devices{reason}; set moe.group_size to {suggestion},"
        " or make data.batch_size or mesh.expert larger, or slice × data or train.accumulate"
        " smaller."
    )


def _divisors(n: int) -> list[int]:
    """Returns the divisors of `n` up to 4096."""
    return [i for i in range(1, min(n, 4096) + 1) if n % i == 0]


def _join_first(numbers: list[int]) -> str:
    """Returns the first 12 numbers as a text."""
    shown = [str(n) for n in numbers[:12]]
    return ", ".join(shown) + (" …" if len(numbers) > 12 else "")
