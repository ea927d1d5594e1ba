"""Import of T5X checkpoints of flaxformer's models: dense T5, mT5 and Switch Transformers.

A checkpoint has no config; the config is derived from the arrays' names and shapes. Layers have an
array each, or are scanned: stacked along an axis, the second unless shapes show that it is the
first.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from switch_jax.checkpoint.interop.expert_placement import infer_placement
from switch_jax.checkpoint.interop.foreign_checkpoint import (
    ForeignCheckpoint,
    SliceIndex,
    StackedShape,
    stacked_shapes,
)
from switch_jax.checkpoint.interop.t5x_arrays import (
    ArrayIndex,
    T5XArray,
    find_t5x_checkpoint,
    open_arrays,
)
from switch_jax.config import STACKS, Config, config_from_dict
from switch_jax.errors import UserError
from switch_jax.model import LayerSlice, layer_slices

# T5X's name → parameter, outside of the layers.
_TOP = {
    "token_embedder/embedding": "embedding",
    "decoder/logits_dense/kernel": "head",
    **{f"{stack}/{stack}_norm/scale": f"{stack}/final_norm/scale" for stack in STACKS},
    **{f"{stack}/relpos_bias/rel_embedding": f"{stack}/relative_bias/table" for stack in STACKS},
}

# T5X's name → parameter, in a layer.
_NORMS = {
    "attention": "self_norm",
    "self_attention": "self_norm",
    "cross_attention": "cross_norm",
    "mlp": "mlp_norm",
}
_ATTENTIONS = {
    "attention": "self_attention",
    "self_attention": "self_attention",
    "encoder_decoder_attention": "cross_attention",
}
_WEIGHTS = {"wi": "wi", "wi_0": "gate", "wi_1": "wi", "wo": "wo"}
_LAYER = {
    **{f"pre_{t5x}_layer_norm/scale": f"{name}/scale" for t5x, name in _NORMS.items()},
    **{
        f"{t5x}/{projection}/kernel": f"{name}/{projection}"
        for t5x, name in _ATTENTIONS.items()
        for projection in ("query", "key", "value", "out")
    },
    **{f"mlp/{t5x}/kernel": f"mlp/{name}" for t5x, name in _WEIGHTS.items()},
    **{f"mlp/expert/{t5x}/kernel": f"mlp/experts/{name}" for t5x, name in _WEIGHTS.items()},
    "mlp/router/router_weights/w/kernel": "mlp/router/kernel",
    "relpos_bias/rel_embedding": "relative_bias/table",  # in scanned models of T5X
}
_UNSCANNED = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")
_SCANNED = re.compile(r"(encoder|decoder)/\1/(?:subblock_(\d+)/)?(.+)")
_BATCH_SIZE = 8  # sequences; not in a checkpoint, and small enough to evaluate on any machine
_ASSUMED = (
    "A T5X checkpoint has no dropout rates, lengths, capacities and loss weights: they are the"
    " defaults of T5X's configurations; change them with --config.KEY=VALUE."
)


class LayerArray(NamedTuple):
    """A parameter of one layer: a whole array, or one block of an array with scanned layers."""

    path: str
    array: T5XArray
    axis: int | None = None  # axis along which blocks are stacked
    block: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        if self.axis is None:
            return self.array.shape
        return (*self.array.shape[: self.axis], *self.array.shape[self.axis + 1 :])

    def read(self, index: SliceIndex = ()) -> np.ndarray:
        """Returns the slice at an index along the first dimensions, float32."""
        full: list[int | slice] = [*index, *[slice(None)] * (len(self.shape) - len(index))]
        if self.axis is not None:
            full.insert(self.axis, self.block)
        array_index: ArrayIndex = tuple(full)
        return self.array.read(array_index)


LayerArrays = Mapping[str, LayerArray]


def is_t5x(path: Path) -> bool:
    """Whether a folder is a T5X checkpoint, or has T5X checkpoints in it."""
    return find_t5x_checkpoint(path) is not None


def read_t5x(path: Path) -> ForeignCheckpoint:
    """Opens a T5X checkpoint, or the newest one in a folder of T5X checkpoints.

    Raises `UserError` for a checkpoint that is incomplete, damaged, or of another model.
    """
    checkpoint = find_t5x_checkpoint(path)
    if checkpoint is None:
        raise UserError(
            f"{path} is no T5X checkpoint; name a folder with the file `checkpoint` or the folder"
            " `state` in it."
        )
    arrays = open_arrays(checkpoint)
    try:
        layer_arrays = _arrays_by_layer(arrays.parameters)
        config = _infer_config(layer_arrays)
        stacked = stacked_shapes(config)
        slices = layer_slices(stacked, config)
        _check_shapes(layer_arrays, stacked, slices)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    notes = [_ASSUMED]
    if arrays.num_optimizer_arrays:
        notes.append(f"The optimizer's state ({arrays.num_optimizer_arrays} arrays) is left out.")
    names = {layer_slice: name for name, layer_slice in slices.items()}
    read_slice = functools.partial(_read_slice, layer_arrays, names)
    return ForeignCheckpoint(config, read_slice, notes=tuple(notes), eos_is_assumed=True)


def _read_slice(
    layer_arrays: LayerArrays, names: Mapping[LayerSlice, str], path: str, index: SliceIndex
) -> np.ndarray:
    if LayerSlice(path, None) in names:
        return layer_arrays[path].read(index)
    block, *index_in_block = index
    return layer_arrays[names[LayerSlice(path, block)]].read(tuple(index_in_block))


def _arrays_by_layer(arrays: Mapping[str, T5XArray]) -> dict[str, LayerArray]:
    """Returns every parameter by its name by layer.

    Raises `UserError` for an array that no model of this program has.
    """
    layer_arrays: dict[str, LayerArray] = {}
    subblocks = {match[1]: 1 for path in arrays if (match := _SCANNED.fullmatch(path))}
    for path in arrays:
        if (match := _SCANNED.fullmatch(path)) and match[2]:
            subblocks[match[1]] = max(subblocks[match[1]], int(match[2]) + 1)
    axes = {stack: _scan_axis(stack, arrays) for stack in subblocks}
    for path, array in arrays.items():
        if path in _TOP:
            layer_arrays[_TOP[path]] = LayerArray(path, array)
        elif (match := _UNSCANNED.fullmatch(path)) and match[3] in _LAYER:
            name = f"{match[1]}/layers/{match[2]}/{_LAYER[match[3]]}"
            layer_arrays[name] = LayerArray(path, array)
        elif (match := _SCANNED.fullmatch(path)) and match[3] in _LAYER:
            stack, axis = match[1], axes[match[1]]
            if len(array.shape) <= axis:
                raise UserError(f"{path} has the shape {list(array.shape)}, without layers.")
            for block in range(array.shape[axis]):
                number = block * subblocks[stack] + int(match[2] or 0)
                name = f"{stack}/layers/{number}/{_LAYER[match[3]]}"
                layer_arrays[name] = LayerArray(path, array, axis, block)
        else:
            raise UserError(
                f"{path} belongs to no T5, mT5 or Switch Transformer; this model cannot be"
                " converted."
            )
    return _with_shared_biases(layer_arrays)


def _scan_axis(stack: str, arrays: Mapping[str, T5XArray]) -> int:
    """Returns the axis of scanned layers: the axis of a norm's scale that is not d_model."""
    embedding = arrays.get("token_embedder/embedding")
    d_model = 0 if embedding is None else embedding.shape[-1]
    for path, array in arrays.items():
        if path.startswith(f"{stack}/{stack}/") and path.endswith("pre_mlp_layer_norm/scale"):
            return 0 if array.shape[1:] == (d_model,) != array.shape[:1] else 1
    return 1


def _with_shared_biases(layer_arrays: dict[str, LayerArray]) -> dict[str, LayerArray]:
    """Replaces the relative bias tables of layers by one table per stack.

    Raises `UserError` where the tables of a stack differ.
    """
    per_layer = [name for name in layer_arrays if re.search(r"/layers/\d+/relative_bias/", name)]
    for name in per_layer:
        shared = re.sub(r"layers/\d+/", "", name)
        first = layer_arrays.setdefault(shared, layer_arrays[name])
        if not np.array_equal(first.read(), layer_arrays[name].read()):
            raise UserError(
                f"{layer_arrays[name].path} differs from layer to layer, and models here have one"
                " table of relative positions in each stack; this one cannot be converted."
            )
    return {name: array for name, array in layer_arrays.items() if name not in per_layer}


def _infer_config(layer_arrays: LayerArrays) -> Config:
    """Returns the config of the model with these names and shapes.

    Raises `UserError` where a layer or an array is missing.
    """
    vocab_size, d_model = _shape(layer_arrays, "embedding", 2)
    num_heads, buckets = _shape(layer_arrays, "encoder/relative_bias/table", 2)
    heads_times_dim = _shape(layer_arrays, "encoder/layers/0/self_attention/query", 2)[1]
    layers, sparse = {}, {}
    for stack in STACKS:
        names = [name.split("/") for name in layer_arrays if name.startswith(f"{stack}/layers/")]
        numbers = {int(name[2]) for name in names}
        if missing := set(range(max(numbers, default=0) + 1)) - numbers:
            raise UserError(f"Layer {min(missing)} of the {stack} is not there; copy it again.")
        layers[stack] = len(numbers)
        sparse[stack] = tuple(sorted({int(name[2]) for name in names if "router" in name}))
    wi_names = [name for name in layer_arrays if name.endswith(("/mlp/wi", "/mlp/experts/wi"))]
    if not wi_names:
        raise UserError("There is no feed-forward layer (mlp/wi); the checkpoint is incomplete.")
    model = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_ff": layer_arrays[wi_names[0]].shape[-1],
        "num_heads": num_heads,
        "head_dim": heads_times_dim // num_heads,
        "num_encoder_layers": layers["encoder"],
        "num_decoder_layers": layers["decoder"],
        "activation": "geglu" if any(name.endswith("/gate") for name in layer_arrays) else "relu",
        "tied_embeddings": "head" not in layer_arrays,
        "relative_buckets": buckets,
        "dtype": "float32",
    }
    moe = {}
    if routers := [name for name in layer_arrays if name.endswith("/router/kernel")]:
        moe = {"num_experts": layer_arrays[routers[0]].shape[-1], "aux_loss_reduction": "mean"}
        moe |= infer_placement(layers, sparse)
    return config_from_dict({"model": model, "moe": moe, "data": {"batch_size": _BATCH_SIZE}})


def _shape(layer_arrays: LayerArrays, name: str, rank: int) -> tuple[int, ...]:
    """Returns the shape of a parameter; raises `UserError` if it is missing or of another rank."""
    if name not in layer_arrays:
        raise UserError(f"There is no array for {name}; the checkpoint is incomplete.")
    array = layer_arrays[name]
    if len(array.shape) != rank:
        raise UserError(f"{array.path} has the shape {list(array.shape)}, not {rank} dimensions.")
    return array.shape


def _check_shapes(
    layer_arrays: LayerArrays,
    stacked: Mapping[str, StackedShape],
    slices: Mapping[str, LayerSlice],
) -> None:
    """Raises `UserError` where a parameter is missing, unknown, or of another shape."""
    for name, (whole, block) in slices.items():
        shape = stacked[whole].shape if block is None else stacked[whole].shape[1:]
        if _shape(layer_arrays, name, len(shape)) != shape:
            array = layer_arrays[name]
            raise UserError(
                f"{array.path} has the shape {list(array.shape)}, and {list(shape)} would fit the"
                " other arrays; the checkpoint is of several models, or of no supported model."
            )
    unknown = layer_arrays.keys() - slices.keys()
    if unknown:
        raise UserError(
            f"{layer_arrays[min(unknown)].path} is not in all layers that should have it; this"
            " model cannot be converted."
        )
