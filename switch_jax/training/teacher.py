"""A model that answers in a train step and learns nothing: the teacher of distillation."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from switch_jax.config import Config
from switch_jax.distributed import partition_spec
from switch_jax.model import (
    SwitchTransformer,
    add_adapter_axes,
    init_adapters,
    logical_axes,
    merge_adapters,
    with_parameters,
)


class Teacher:
    """A teacher on the mesh of its student, split by the same rules.

    Args:
      config: what `distill.teacher` makes of a run: its batches and mesh, another model.

    Attributes:
      abstract_params: shapes and shardings of its parameters (and adapters), by path.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.config = config
        self._model = jax.eval_shape(lambda: SwitchTransformer(config, jax.random.key(0)))
        model_axes = logical_axes(self._model)
        axes = add_adapter_axes(model_axes, config)

        def init() -> dict[str, Any]:
            leaves = jax.tree.leaves(SwitchTransformer(config, jax.random.key(0)))
            return init_adapters(dict(zip(model_axes, leaves)), model_axes, config)

        self.abstract_params: dict[str, jax.ShapeDtypeStruct] = {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype,
                sharding=NamedSharding(mesh, partition_spec(axes[name], fsdp=config.mesh.fsdp)),
            )
            for name, leaf in jax.eval_shape(init).items()
        }

    def __call__(
        self, params: Mapping[str, Any], batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """States [B, T, D] and head [D, V] whose product its logits are; without any noise.

        `batch` is the global one or a microbatch of it.
        """
        model = with_parameters(self._model, merge_adapters(params, self.config))
        factor, rows = self.config.moe.capacity_factor, self.config.data.batch_size
        decoded, _ = model.route(batch, factor=factor, batch_size=rows)
        return model.factors(decoded)
