"""Parameters by path: values, metadata, and names by layer.

The path of a parameter, such as `encoder/runs/0/layers/1/mlp/wi`, names it in checkpoints,
optimizer states and sharding specs. Equal blocks of layers are stacked, so the weights of one layer
are a slice of a parameter, and which slice depends on the layers that have experts. Names by layer
do not depend on it: `encoder/layers/3/mlp/wi` is slice 3 of `encoder/runs/0/layers/0/mlp/wi` in a
dense model, and slice 1 of `encoder/runs/0/layers/1/mlp/wi` where every fourth layer is sparse.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from switch_jax.config import STACKS, Config
from switch_jax.model.layers import ParameterKind
from switch_jax.model.transformer import SwitchTransformer

BATCH_DIMS = ("layers", "expert")
"""Logical axes along which a parameter is a stack of independent matrices."""

# Stack, run, place of the layer in its block, and the rest of the path.
_STACKED = re.compile(r"(\w+)/runs/(\d+)/layers/(\d+)/(.+)")


class ParameterMetadata(NamedTuple):
    """Metadata of a parameter."""

    axes: tuple[str, ...]  # logical names of its dimensions; stacked blocks have "layers" in front
    kind: ParameterKind

    @property
    def num_batch_dims(self) -> int:
        """Number of leading dimensions along which it is a stack of independent matrices."""
        return sum(axis in BATCH_DIMS for axis in self.axes)


class LayerSlice(NamedTuple):
    """Slice of a parameter along its leading axis, or the whole parameter."""

    name: str  # path of the parameter
    block: int | None  # index along the leading axis; None: the whole parameter


def abstract_model(config: Config) -> SwitchTransformer:
    """Returns the model with shapes and dtypes in place of the parameters."""
    return jax.eval_shape(lambda: SwitchTransformer(config, jax.random.key(0)))


def named_parameters(module: Any) -> dict[str, nnx.Param]:
    """Returns every parameter of a module by path, in the order of its pytree leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        module, is_leaf=lambda node: isinstance(node, nnx.Param)
    )
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def parameter_metadata(module: Any) -> dict[str, ParameterMetadata]:
    """Returns the metadata of every parameter of a module by path, in the order of its leaves."""
    by_path = {}
    for name, leaf in named_parameters(module).items():
        metadata = leaf.get_metadata()
        axes = ("layers",) * (len(leaf.shape) - len(metadata["axes"])) + metadata["axes"]
        by_path[name] = ParameterMetadata(axes, metadata["kind"])
    return by_path


def logical_axes(module: Any) -> dict[str, tuple[str, ...]]:
    """Returns the logical axes of every parameter of a module by path, in the order of leaves."""
    return {name: metadata.axes for name, metadata in parameter_metadata(module).items()}


def with_parameters(model: SwitchTransformer, values: Mapping[str, Any]) -> SwitchTransformer:
    """Returns the model with other leaves: parameters by path, or their specs or shapes."""
    names = list(named_parameters(model))
    return jax.tree.unflatten(jax.tree.structure(model), [values[name] for name in names])


def stack_and_sublayer(name: str) -> str:
    """Returns "<stack>/<sub-layer>" of a parameter in a layer: its key in `RouterStatsByStack`."""
    match = _STACKED.fullmatch(name)
    if match is None:
        raise KeyError(f"{name} is in no layer")
    return f"{match[1]}/{match[4].split('/')[0]}"


def layer_slices(names: Iterable[str], config: Config) -> dict[str, LayerSlice]:
    """Returns the slice of a parameter for every name by layer.

    Args:
      names: paths of parameters of a model of `config`.
      config: gives the blocks of each stack.
    """
    blocks = {stack: list(_first_layers(config, stack)) for stack in STACKS}
    slices = {}
    for name in names:
        match = _STACKED.fullmatch(name)
        if match is None:
            slices[name] = LayerSlice(name, None)
            continue
        stack, run, place, rest = match[1], int(match[2]), int(match[3]), match[4]
        for block, first in enumerate(blocks[stack][run]):
            slices[f"{stack}/layers/{first + place}/{rest}"] = LayerSlice(name, block)
    return slices


def layer_shapes(
    stacked: Mapping[str, tuple[int, ...]], config: Config
) -> dict[str, tuple[int, ...]]:
    """Returns shapes by layer from the shapes of (stacked) parameters by path."""
    return {
        name: stacked[whole] if block is None else stacked[whole][1:]
        for name, (whole, block) in layer_slices(stacked, config).items()
    }


def _first_layers(config: Config, stack: str) -> Iterator[range]:
    """Yields, for each run of a stack, the numbers of the first layers of its blocks."""
    start = 0
    for run in config.block_runs(stack):
        end = start + run.blocks * run.layers
        yield range(start, end, run.layers)
        start = end
