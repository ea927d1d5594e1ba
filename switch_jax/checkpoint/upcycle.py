"""Sparse upcycling: a sparse model whose experts are copies of a dense model's feed-forward layers.

The sparse model is computed slice by slice while it is written, so it may be larger than memory.
"""

import dataclasses
import functools

import jax
import numpy as np

from switch_jax.checkpoint.interop.foreign_checkpoint import (
    ForeignCheckpoint,
    SliceIndex,
    stacked_shapes,
)
from switch_jax.checkpoint.pretrained import PretrainedModel
from switch_jax.checkpoint.transfer import parameter_origins
from switch_jax.config import Config, LoRAConfig
from switch_jax.errors import UserError
from switch_jax.model import SwitchTransformer, is_adapter, logical_axes


def upcycle_dense_model(source: PretrainedModel, config: Config) -> ForeignCheckpoint:
    """Returns the sparse model, with parameters loaded or initialised as in `transfer.py`.

    Args:
      source: the dense model.
      config: config of the sparse model, with its `init_rules`.

    Raises `UserError` as `transfer.plan_transfer` does, and for a `config` without experts.
    """
    if not config.sparse:
        raise UserError(
            "There are no experts to make; say how many with --config.moe.num_experts=8 or the"
            " like."
        )
    merged = {name: s for name, s in source.shapes.items() if not is_adapter(name)}
    target = stacked_shapes(config)
    shapes = {name: stacked.shape for name, stacked in target.items()}
    origins = parameter_origins(shapes, config, merged, source.config)

    # A block of the sparse model has `moe.every` layers, each of which comes from another dense
    # parameter: a small cache avoids loading a parameter again for every block.
    @functools.lru_cache(maxsize=4)
    def loaded(name: str) -> np.ndarray:
        return source.read_merged(name)

    @functools.lru_cache(maxsize=1)
    def initialised(name: str) -> np.ndarray:
        return _initialise(config, name)

    def read_slice(name: str, index: SliceIndex) -> np.ndarray:
        has_blocks = "/runs/" in name
        block, index_in_block = (index[0], index[1:]) if has_blocks else (None, index)
        origin = origins.get(name, {}).get(block)
        if origin is None:
            return initialised(name)[index]
        value = loaded(origin.name)
        if origin.block is not None:
            value = value[origin.block]
        shape = shapes[name][1:] if has_blocks else shapes[name]
        if len(value.shape) < len(shape):  # dense weights, the same for every expert
            return value
        if value.shape != shape:  # a larger vocabulary
            grown = initialised(name).copy()
            grown[tuple(map(slice, value.shape))] = value
            value = grown
        return value[index_in_block]

    own_config = dataclasses.replace(config, init_from=None, init_rules="", lora=LoRAConfig())
    return ForeignCheckpoint(own_config, read_slice, vocabulary=source.vocabulary)


def _initialise(config: Config, name: str) -> np.ndarray:
    """Returns a parameter with the values that training starts from; computes no other."""

    def parameter():
        model = SwitchTransformer(config, jax.random.key(config.train.seed))
        return dict(zip(logical_axes(model), jax.tree.leaves(model)))[name]

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(jax.jit(parameter)())
