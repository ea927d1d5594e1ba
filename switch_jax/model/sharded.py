"""Model on a mesh: shapes and shardings of its parameters and batches, and its evaluation step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from switch_jax.config import Config
from switch_jax.data import ProcessRows, feature_shapes
from switch_jax.distributed import (
    barrier,
    batch_sharding,
    num_batch_shards,
    partition_spec,
    replicated,
)
from switch_jax.errors import UserError
from switch_jax.model.lora import add_adapters, init_adapters, merge_adapters
from switch_jax.model.loss import LossSums, token_losses
from switch_jax.model.moe.dropless import check_dropless_memory
from switch_jax.model.parameters import abstract_model, parameter_metadata, with_parameters
from switch_jax.model.transformer import (
    RouterStatsByStack,
    SwitchTransformer,
    collect_router_stats,
)

Batch = Mapping[str, jax.Array]
"""Arrays of a global batch by T5X's feature names, each [rows, length]."""


class ShardedModel:
    """Model on a mesh, without an optimizer.

    Args:
      config: of the model.
      mesh: as from `make_mesh`.

    Attributes:
      metadata: axes and kind of every parameter, LoRA adapters included, by path.
      axes: the axes alone.
      abstract_params: shape, dtype and sharding of every parameter, by path.
      abstract_batch: shape, dtype and sharding of every feature of a global batch.
      eval_step: jitted `(params, batch) → (LossSums, sum of loss weights, router statistics)`.

    Raises `UserError` where a device has too little memory for the buffers of a dropless layer.
    """

    def __init__(self, config: Config, mesh: Mesh):
        check_dropless_memory(config, dict(mesh.shape), list(mesh.devices.flat))
        self.config = config
        self.mesh = mesh
        self._model = abstract_model(config)
        self.metadata = add_adapters(parameter_metadata(self._model), config)
        self.axes = {name: metadata.axes for name, metadata in self.metadata.items()}
        self.abstract_params: dict[str, jax.ShapeDtypeStruct] = {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype,
                sharding=NamedSharding(
                    mesh, partition_spec(self.axes[name], fsdp=config.mesh.fsdp)
                ),
            )
            for name, leaf in jax.eval_shape(self.init_params).items()
        }
        rows = batch_sharding(mesh)
        self.abstract_batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
            for name, (shape, dtype) in feature_shapes(config).items()
        }
        self.eval_step = MeshJit(mesh, self._eval_step, out_shardings=replicated(mesh))

    def init_params(self) -> dict[str, jax.Array]:
        """Returns initial parameters by path; they depend on `train.seed`, not on the mesh."""
        model = SwitchTransformer(self.config, jax.random.key(self.config.train.seed))
        metadata = parameter_metadata(self._model)
        return init_adapters(dict(zip(metadata, jax.tree.leaves(model))), metadata, self.config)

    def model(self, params: Mapping[str, Any]) -> SwitchTransformer:
        """Returns the model with these parameters, LoRA adapters merged."""
        return with_parameters(self._model, merge_adapters(params, self.config))

    def shard_batch(self, batch: Mapping[str, Any]) -> Batch:
        """Places this process's rows of a global batch on the mesh, as global arrays."""
        rows = batch_sharding(self.mesh)
        return {
            # The global shape is an argument, so that it fails if two processes read the same row.
            name: jax.make_array_from_process_local_data(
                rows, values, self.abstract_batch[name].shape
            )
            for name, values in batch.items()
        }

    def _eval_step(
        self, params: Mapping[str, jax.Array], batch: Batch
    ) -> tuple[LossSums, jax.Array, RouterStatsByStack]:
        """Returns sums over a batch, without dropout, at the evaluation capacity factor."""
        model = self.model(params)
        decoded, routes = model.route(batch, capacity_factor=self.config.moe.eval_capacity_factor)
        return (
            token_losses(*model.logit_factors(decoded), batch),
            jnp.sum(batch["decoder_loss_weights"], dtype=jnp.float32),
            collect_router_stats(routes),
        )


def process_rows(mesh: Mesh) -> ProcessRows:
    """Returns the rows of each global batch that this process reads: the rows of its devices.

    Raises `UserError` for a mesh without devices of a process, and for a mesh that splits the batch
    so that two processes have some of their rows in common.
    """
    num_parts = num_batch_shards(mesh)
    parts_of_process: dict[int, set[int]] = {i: set() for i in range(jax.process_count())}
    slices: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((num_parts,))
    for device, (part,) in slices.items():
        parts_of_process[device.process_index].add(part.indices(num_parts)[0])
    groups = sorted({tuple(sorted(parts)) for parts in parts_of_process.values()})
    if len({len(parts) for parts in groups}) > 1:
        raise UserError(
            f"A mesh of {mesh.devices.size} devices gives the {len(parts_of_process)} processes"
            " unequal parts of the batch; make the product of mesh.*"
            f" {jax.device_count()}, all there are."
        )
    if sum(map(len, groups)) != num_parts:
        raise UserError(
            f"mesh.model={mesh.shape['model']} lets processes share some of their rows and not"
            f" others; make it a divisor or a multiple of {jax.local_device_count()}, the devices"
            " of a process."
        )
    parts = parts_of_process[jax.process_index()]
    group = groups.index(tuple(sorted(parts)))
    first = next(i for i, others in parts_of_process.items() if others == parts)
    return ProcessRows(
        num_parts, groups[group], group, len(groups), first_in_group=first == jax.process_index()
    )


class MeshJit:
    """Jitted function that is traced, lowered and called with its mesh in context.

    With several processes, the first call compiles for the shapes of its arguments, then waits at a
    barrier, so that no process begins to run while another one still compiles.

    Args:
      mesh: as from `make_mesh`.
      function: to jit.
      options: of `jax.jit`.
    """

    def __init__(self, mesh: Mesh, function: Callable, **options: Any):
        self._mesh = mesh
        self._jitted = jax.jit(function, **options)
        self._call: Callable | None = self._jitted if jax.process_count() == 1 else None

    def __call__(self, *args: Any) -> Any:
        """Runs the function."""
        if self._call is None:
            self._call = self.lower(*args).compile()
            barrier()
        with jax.set_mesh(self._mesh):
            return self._call(*args)

    def trace(self, *args: Any) -> jax.stages.Traced:
        """Traces the function for (abstract) arguments."""
        with jax.set_mesh(self._mesh):
            return self._jitted.trace(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Lowers the function for (abstract) arguments, to compile it ahead of time."""
        with jax.set_mesh(self._mesh):
            return self._jitted.lower(*args)
