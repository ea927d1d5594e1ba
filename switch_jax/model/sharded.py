"""sharded: to be written."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from switch_jax.data import ProcessRows
from switch_jax.distributed import barrier, batch_sharding, num_batch_shards
from switch_jax.errors import UserError


def process_rows(mesh: Mesh) -> ProcessRows:
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
    return ProcessRows(parts, mine, shares.index(mine), len(shares), saves)


Batch = Mapping[str, jax.Array]


class MeshJit:
    """A jitted function, traced, lowered and called with its mesh in context.

    Several processes wait for each other between compiling and the first call, which decides on
    the shapes.
    """

    def __init__(self, mesh: Mesh, function: Callable, **options: Any):
        self._mesh = mesh
        self._jitted = jax.jit(function, **options)
        self._call: Callable | None = self._jitted if jax.process_count() == 1 else None

    def __call__(self, *args: Any) -> Any:
        if self._call is None:
            self._call = self.lower(*args).compile()
            barrier()
        with jax.set_mesh(self._mesh):
            return self._call(*args)

    def trace(self, *args: Any) -> jax.stages.Traced:
        """Traces for (abstract) arguments."""
        with jax.set_mesh(self._mesh):
            return self._jitted.trace(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Lowers for (abstract) arguments; `.compile()` it ahead of time."""
        with jax.set_mesh(self._mesh):
            return self._jitted.lower(*args)
