"""Config keys of `moe` that place experts in given layers."""

import itertools
from collections.abc import Mapping
from typing import Any

from switch_jax.config import STACKS, Config, ModelConfig, MoEConfig
from switch_jax.errors import UserError


def infer_placement(
    layers: Mapping[str, int], sparse: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Returns `every`, `stacks`, `first` and `last` of `moe` for a model.

    Args:
      layers: number of layers, by stack.
      sparse: numbers of the layers with experts, from 0, by stack.

    Raises `UserError` where no values of these keys place the experts in these layers.
    """
    stacks = [stack for stack in STACKS if sparse[stack]]
    model = ModelConfig(num_encoder_layers=layers["encoder"], num_decoder_layers=layers["decoder"])
    counts = range(1, max(layers.values()) + 1)
    ranges = [(None, None), *((n, None) for n in counts), *((None, n) for n in counts)]
    for (first, last), every in itertools.product(ranges, counts):
        if not stacks or any((first or last or layers[stack]) % every for stack in stacks):
            continue
        keys: dict[str, Any] = {"every": every, "first": first, "last": last}
        keys["stacks"] = stacks[0] if len(stacks) == 1 else "both"
        config = Config(model=model, moe=MoEConfig(num_experts=1, **keys))
        if all(config.sparse_layers(stack) == sparse[stack] for stack in STACKS):
            return keys
    raise UserError(
        f"The encoder has experts in its layers {list(sparse['encoder'])} and the decoder in"
        f" {list(sparse['decoder'])}, counted from 0; the keys of moe can place experts only in"
        " the last of every n layers, among all layers or among the first or the last of them."
    )
