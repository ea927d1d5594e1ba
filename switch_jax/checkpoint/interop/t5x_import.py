"""T5X checkpoints of flaxformer's models: dense T5, mT5 and Switch Transformers.

A checkpoint has no configuration: names and shapes tell it. Layers are one by one, or scanned:
stacked along an axis, the second unless a shape says otherwise.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from switch_jax.checkpoint.interop.expert_placement import infer_placement
from switch_jax.checkpoint.interop.foreign import (
    ForeignCheckpoint,
    Index,
    Stacked,
    foreign_parameters,
)
from switch_jax.checkpoint.interop.t5x_arrays import Cut, T5XArray, find_arrays, open_arrays
from switch_jax.config import STACKS, Config, config_from_dict
from switch_jax.errors import UserError
from switch_jax.model import LayerSlice, layer_slices

_TOP = {
    "token_embedder/embedding": "embedding",
    "decoder/logits_dense/kernel": "head",
    **{f"{stack}/{stack}_norm/scale": f"{stack}/final_norm/scale" for stack in STACKS},
    **{f"{stack}/relpos_bias/rel_embedding": f"{stack}/relative_bias/table" for stack in STACKS},
}

# Within a layer.
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
    **{f"pre_{theirs}_layer_norm/scale": f"{ours}/scale" for theirs, ours in _NORMS.items()},
    **{
        f"{theirs}/{projection}/kernel": f"{ours}/{projection}"
        for theirs, ours in _ATTENTIONS.items()
        for projection in ("query", "key", "value", "out")
    },
    **{f"mlp/{theirs}/kernel": f"mlp/{ours}" for theirs, ours in _WEIGHTS.items()},
    **{f"mlp/expert/{theirs}/kernel": f"mlp/experts/{ours}" for theirs, ours in _WEIGHTS.items()},
    "mlp/router/router_weights/w/kernel": "mlp/router/kernel",
    "relpos_bias/rel_embedding": "relative_bias/table",  # in scanned models of T5X
}
_ONE_BY_ONE = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")
_SCANNED = re.compile(r"(encoder|decoder)/\1/(?:subblock_(\d+)/)?(.+)")
_BATCH = 8  # sequences: a checkpoint does not tell, and this one evaluates anywhere
_ASSUMED = (
    "A T5X checkpoint does not tell dropout, lengths, capacities and how losses are weighted: they"
    " are what T5X's configurations begin with; change them with --config.KEY=VALUE."
)


class Part(NamedTuple):
    """Where a parameter of a layer is: an array, or one block of a scanned one."""

    path: str
    array: T5XArray
    axis: int | None = None  # along which blocks are stacked
    block: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        if self.axis is None:
            return self.array.shape
        return (*self.array.shape[: self.axis], *self.array.shape[self.axis + 1 :])

    def read(self, index: Index = ()) -> np.ndarray:
        """The slice at an index along the first dimensions."""
        cut: list[int | slice] = [*index, *[slice(None)] * (len(self.shape) - len(index))]
        if self.axis is not None:
            cut.insert(self.axis, self.block)
        whole: Cut = tuple(cut)
        return self.array.read(whole)


Parts = Mapping[str, Part]


def is_t5x(path: Path) -> bool:
    """Whether a folder is a T5X checkpoint, or has some."""
    return find_arrays(path) is not None


def read_t5x(path: Path) -> ForeignCheckpoint:
    """Opens a checkpoint, or the newest in a folder of some.

    Raises `UserError` for one that is incomplete, or of another model.
    """
    checkpoint = find_arrays(path)
    if checkpoint is None:
        raise UserError(
            f"{path} is no T5X checkpoint; name a folder with the file `checkpoint` or the folder"
            " `state` in it."
        )
    arrays = open_arrays(checkpoint)
    try:
        parts = _parts(arrays.parameters)
        config = _config(parts)
        stacked = foreign_parameters(config)
        slices = layer_slices(stacked, config)
        _check(parts, stacked, slices)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    notes = [_ASSUMED]
    if arrays.others:
        notes.append(f"The optimizer's state ({arrays.others} arrays) is left out.")
    names = {part: name for name, part in slices.items()}
    return ForeignCheckpoint(config, functools.partial(_slice, parts, names), notes=tuple(notes))


def _slice(parts: Parts, names: Mapping[LayerSlice, str], path: str, index: Index) -> np.ndarray:
    if LayerSlice(path, None) in names:
        return parts[path].read(index)
    block, *own = index
    return parts[names[LayerSlice(path, block)]].read(tuple(own))


def _parts(arrays: Mapping[str, T5XArray]) -> dict[str, Part]:
    """Every parameter, by its name by layer; raises `UserError` for arrays that nothing has."""
    parts: dict[str, Part] = {}
    subblocks = {match[1]: 1 for path in arrays if (match := _SCANNED.fullmatch(path))}
    for path in arrays:
        if (match := _SCANNED.fullmatch(path)) and match[2]:
            subblocks[match[1]] = max(subblocks[match[1]], int(match[2]) + 1)
    axes = {stack: _scan_axis(stack, arrays) for stack in subblocks}
    for path, array in arrays.items():
        if path in _TOP:
            parts[_TOP[path]] = Part(path, array)
        elif (match := _ONE_BY_ONE.fullmatch(path)) and match[3] in _LAYER:
            parts[f"{match[1]}/layers/{match[2]}/{_LAYER[match[3]]}"] = Part(path, array)
        elif (match := _SCANNED.fullmatch(path)) and match[3] in _LAYER:
            stack, axis = match[1], axes[match[1]]
            if len(array.shape) <= axis:
                raise UserError(f"{path} has the shape {list(array.shape)}, without layers.")
            for block in range(array.shape[axis]):
                number = block * subblocks[stack] + int(match[2] or 0)
                parts[f"{stack}/layers/{number}/{_LAYER[match[3]]}"] = Part(
                    path, array, axis, block
                )
        else:
            raise UserError(
                f"{path} belongs to no T5, mT5 or Switch Transformer of ours; this model cannot be"
                " converted."
            )
    return _with_shared_biases(parts)


def _scan_axis(stack: str, arrays: Mapping[str, T5XArray]) -> int:
    """Along which axis of scanned arrays the layers are: what in norms is not the width."""
    width = (
        arrays["token_embedder/embedding"].shape[-1] if "token_embedder/embedding" in arrays else 0
    )
    for path, array in arrays.items():
        if path.startswith(f"{stack}/{stack}/") and path.endswith("pre_mlp_layer_norm/scale"):
            return 0 if array.shape[1:] == (width,) != array.shape[:1] else 1
    return 1


def _with_shared_biases(parts: dict[str, Part]) -> dict[str, Part]:
    """`parts` with one table of relative positions a stack; raises `UserError` for several."""
    own = [name for name in parts if re.search(r"/layers/\d+/relative_bias/", name)]
    for name in own:
        shared = re.sub(r"layers/\d+/", "", name)
        first = parts.setdefault(shared, parts[name])
        if not np.array_equal(first.read(), parts[name].read()):
            raise UserError(
                f"{parts[name].path} differs from layer to layer, and models here have one table"
                " of relative positions in each stack; this one cannot be converted."
            )
    return {name: part for name, part in parts.items() if name not in own}


def _config(parts: Parts) -> Config:
    """What the names and shapes of a model tell; raises `UserError`."""
    vocab_size, d_model = _shape(parts, "embedding", 2)
    num_heads, buckets = _shape(parts, "encoder/relative_bias/table", 2)
    joined = _shape(parts, "encoder/layers/0/self_attention/query", 2)[1]
    layers, sparse = {}, {}
    for stack in STACKS:
        own = [name.split("/") for name in parts if name.startswith(f"{stack}/layers/")]
        numbers = {int(name[2]) for name in own}
        if missing := set(range(max(numbers, default=0) + 1)) - numbers:
            raise UserError(f"Layer {min(missing)} of the {stack} is not there; copy it again.")
        layers[stack] = len(numbers)
        sparse[stack] = tuple(sorted({int(name[2]) for name in own if "router" in name}))
    ffs = [name for name in parts if name.endswith(("/mlp/wi", "/mlp/experts/wi"))]
    if not ffs:
        raise UserError("There is no feed-forward layer (mlp/wi); the checkpoint is incomplete.")
    model = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_ff": parts[ffs[0]].shape[-1],
        "num_heads": num_heads,
        "head_dim": joined // num_heads,
        "num_encoder_layers": layers["encoder"],
        "num_decoder_layers": layers["decoder"],
        "activation": "geglu" if any(name.endswith("/gate") for name in parts) else "relu",
        "tied_embeddings": "head" not in parts,
        "relative_buckets": buckets,
        "dtype": "float32",
    }
    moe = {}
    if routers := [name for name in parts if name.endswith("/router/kernel")]:
        moe = {"num_experts": parts[routers[0]].shape[-1], "aux_loss_reduction": "mean"}
        moe |= infer_placement(layers, sparse)
    return config_from_dict({"model": model, "moe": moe, "data": {"batch_size": _BATCH}})


def _shape(parts: Parts, name: str, rank: int) -> tuple[int, ...]:
    if name not in parts:
        raise UserError(f"There is no array for {name}; the checkpoint is incomplete.")
    if len(parts[name].shape) != rank:
        raise UserError(
            f"{parts[name].path} has the shape {list(parts[name].shape)}, not {rank} dimensions."
        )
    return parts[name].shape


def _check(parts: Parts, stacked: Mapping[str, Stacked], slices: Mapping[str, LayerSlice]) -> None:
    """Raises `UserError` where a parameter is missing, or has a shape that does not fit."""
    for name, (whole, block) in slices.items():
        shape = stacked[whole].shape if block is None else stacked[whole].shape[1:]
        if _shape(parts, name, len(shape)) != shape:
            raise UserError(
                f"{parts[name].path} has the shape {list(parts[name].shape)}, and {list(shape)}"
                " would fit the other arrays; the checkpoint is of several models, or of none of"
                " ours."
            )
    unknown = parts.keys() - slices.keys()
    if unknown:
        raise UserError(
            f"{parts[min(unknown)].path} is not in all layers that should have it; this model"
            " cannot be converted."
        )
