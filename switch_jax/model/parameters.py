"""Parameters by layer: names that are the same whatever blocks the layers of a stack come in.

Equal blocks are stacked, so a layer's weights are one slice of a parameter, and of which depends on
where the experts are: `encoder/layers/3/mlp/wi` is slice 3 of `encoder/runs/0/layers/0/mlp/wi` in a
dense model, and slice 1 of `encoder/runs/0/layers/1/mlp/wi` where every fourth layer is sparse.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from switch_jax.config import STACKS, Config
from switch_jax.model.transformer import SwitchTransformer

_STACKED = re.compile(r"(\w+)/runs/(\d+)/layers/(\d+)/(.+)")


class LayerSlice(NamedTuple):
    """A part of a parameter of the model."""

    name: str
    block: int | None  # its place along the leading axis; None: it is the whole parameter


def layer_slices(names: Iterable[str], config: Config) -> dict[str, LayerSlice]:
    """Where the parameters of a model of `config` lie, by their names by layer."""
    blocks = {stack: list(_blocks(config, stack)) for stack in STACKS}
    found = {}
    for name in names:
        match = _STACKED.fullmatch(name)
        if match is None:
            found[name] = LayerSlice(name, None)
            continue
        stack, run, place, own = match[1], int(match[2]), int(match[3]), match[4]
        for block, first in enumerate(blocks[stack][run]):
            found[f"{stack}/layers/{first + place}/{own}"] = LayerSlice(name, block)
    return found


def _blocks(config: Config, stack: str) -> Iterable[range]:
    """For each run of a stack, the numbers of its blocks' first layers."""
    start = 0
    for run in config.block_runs(stack):
        end = start + run.blocks * run.layers
        yield range(start, end, run.layers)
        start = end


def layer_shapes(
    stacked: Mapping[str, tuple[int, ...]], config: Config
) -> dict[str, tuple[int, ...]]:
    """Shapes by layer of parameters with these shapes."""
    return {
        name: stacked[whole] if block is None else stacked[whole][1:]
        for name, (whole, block) in layer_slices(stacked, config).items()
    }


def abstract_model(config: Config) -> SwitchTransformer:
    """The model with shapes for parameters."""
    return jax.eval_shape(lambda: SwitchTransformer(config, jax.random.key(0)))


BATCH_DIMS = ("layers", "expert")


def named_parameters(model: SwitchTransformer) -> dict[str, nnx.Param]:
    """Every parameter by its path, such as `encoder/runs/0/layers/1/mlp/router/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda node: isinstance(node, nnx.Param)
    )
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def logical_axes(model: SwitchTransformer) -> dict[str, tuple[str, ...]]:
    """The names of each parameter's dimensions; stacked blocks have `layers` in front."""
    axes = {}
    for name, leaf in named_parameters(model).items():
        own = leaf.get_metadata()["axes"]
        axes[name] = ("layers",) * (len(leaf.shape) - len(own)) + own
    return axes


def with_parameters(model: SwitchTransformer, values: Mapping[str, Any]) -> SwitchTransformer:
    """The same model with other values (or specs, or shapes) at its leaves."""
    names = list(named_parameters(model))
    return jax.tree.unflatten(jax.tree.structure(model), [values[name] for name in names])
