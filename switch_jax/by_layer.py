"""Parameters by layer: names that are the same whatever blocks the layers of a stack come in.

Equal blocks are stacked, so a layer's weights are one slice of a parameter, and of which depends on
where the experts are: `encoder/layers/3/mlp/wi` is slice 3 of `encoder/runs/0/layers/0/mlp/wi` in a
dense model, and slice 1 of `encoder/runs/0/layers/1/mlp/wi` where every fourth layer is sparse.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from switch_jax.schema import STACKS, Config

_STACKED = re.compile(r"(\w+)/runs/(\d+)/layers/(\d+)/(.+)")


class Slice(NamedTuple):
    """A part of a parameter of the model."""

    name: str
    block: int | None  # its place along the leading axis; None: it is the whole parameter


def slices(names: Iterable[str], config: Config) -> dict[str, Slice]:
    """Where the parameters of a model of `config` lie, by their names by layer."""
    blocks = {stack: list(_blocks(config, stack)) for stack in STACKS}
    found = {}
    for name in names:
        match = _STACKED.fullmatch(name)
        if match is None:
            found[name] = Slice(name, None)
            continue
        stack, run, place, own = match[1], int(match[2]), int(match[3]), match[4]
        for block, first in enumerate(blocks[stack][run]):
            found[f"{stack}/layers/{first + place}/{own}"] = Slice(name, block)
    return found


def _blocks(config: Config, stack: str) -> Iterable[range]:
    """For each run of a stack, the numbers of its blocks' first layers."""
    start = 0
    for run in config.runs(stack):
        end = start + run.blocks * run.layers
        yield range(start, end, run.layers)
        start = end


def shapes(stacked: Mapping[str, tuple[int, ...]], config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes by layer of parameters with these shapes."""
    return {
        name: stacked[whole] if block is None else stacked[whole][1:]
        for name, (whole, block) in slices(stacked, config).items()
    }
