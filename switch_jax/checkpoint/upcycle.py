"""A dense model with experts made of its feed-forward layers, read slice by slice.

Experts are copies, so a model that is much larger than memory can be written from one that fits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from switch_jax.checkpoint.interop.foreign import ForeignCheckpoint, Index, foreign_parameters
from switch_jax.checkpoint.pretrained import PretrainedModel
from switch_jax.checkpoint.transfer import parameter_origins
from switch_jax.config import Config, LoRAConfig
from switch_jax.errors import UserError
from switch_jax.model import SwitchTransformer, is_adapter, logical_axes, merge_adapters


def upcycle_dense_model(source: PretrainedModel, config: Config) -> ForeignCheckpoint:
    """The parameters of a model of `config` that begin as `transfer.py` says.

    Raises `UserError` as `transfer.plan` does, and for a `config` without experts.
    """
    if not config.sparse:
        raise UserError(
            "There are no experts to make; say how many with --config.moe.num_experts=8 or the"
            " like."
        )
    merged = {name: s for name, s in source.shapes.items() if not is_adapter(name)}
    target = foreign_parameters(config)
    shapes = {name: stacked.shape for name, stacked in target.items()}
    origins = parameter_origins(shapes, config, merged, source.config)

    # Few blocks of a parameter come from different ones: as many as a sparse block has layers.
    @functools.lru_cache(maxsize=4)
    def old(name: str) -> np.ndarray:
        return _restored(source, name)

    @functools.lru_cache(maxsize=1)
    def fresh(name: str) -> np.ndarray:
        return _initialised(config, name)

    def read(name: str, index: Index) -> np.ndarray:
        stacked = "/runs/" in name
        block, own = (index[0], index[1:]) if stacked else (None, index)
        part = origins.get(name, {}).get(block)
        if part is None:
            return fresh(name)[index]
        value = old(part.name) if part.block is None else old(part.name)[part.block]
        shape = shapes[name][1:] if stacked else shapes[name]
        if len(value.shape) < len(shape):  # dense weights, which every expert gets
            return value
        if value.shape != shape:  # a larger vocabulary
            grown = fresh(name).copy()
            grown[tuple(map(slice, value.shape))] = value
            value = grown
        return value[own]

    clean = dataclasses.replace(config, init_from=None, init_rules="", lora=LoRAConfig())
    return ForeignCheckpoint(clean, read, vocabulary=source.vocabulary)


def _restored(source: PretrainedModel, name: str) -> np.ndarray:
    """A parameter with what its adapters add."""
    where = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    wanted = {
        other: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        for other, shape in source.shapes.items()
        if other == name or (is_adapter(other) and other.startswith(f"{name}."))
    }
    return np.asarray(merge_adapters(source.restore(wanted), source.config)[name])


def _initialised(config: Config, name: str) -> np.ndarray:
    """A parameter as training would begin with it; the others are not computed."""

    def one():
        model = SwitchTransformer(config, jax.random.key(config.train.seed))
        return dict(zip(logical_axes(model), jax.tree.leaves(model)))[name]

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(jax.jit(one)())
