"""Hugging Face's names of our parameters: one table, read in both directions.

T5, mT5 and Switch Transformers name everything alike but the feed-forward layers. Others' kernels
are [out, in] and one for each layer and expert; ours are [in, out] and stacked.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from switch_jax.checkpoint.interop.foreign import Index, Stacked
from switch_jax.config import STACKS, Config

SHARED, HEAD = "shared.weight", "lm_head.weight"

# Names that tied weights have besides, or instead, in some files: which one they are the same as.
ALIASES = {
    "encoder.embed_tokens.weight": SHARED,
    "decoder.embed_tokens.weight": SHARED,
    "decoder.lm_head.weight": HEAD,
}

# In T5's first files, and never used: cross-attention has no relative positions.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

# Our sub-layer → theirs within a block; {last} is the feed-forward one, {mlp} the module in it.
_SUBLAYERS = {
    "self_norm": "layer.0.layer_norm",
    "self_attention": "layer.0.SelfAttention",
    "cross_norm": "layer.1.layer_norm",
    "cross_attention": "layer.1.EncDecAttention",
    "mlp_norm": "layer.{last}.layer_norm",
    "mlp": "layer.{last}.{mlp}",
    "mlp/experts": "layer.{last}.mlp.experts.expert_{expert}",
    "mlp/router": "layer.{last}.mlp.router.classifier",
}
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
_FEED_FORWARD = {
    "relu": {"wi": "wi", "wo": "wo"},
    "geglu": {"gate": "wi_0", "wi": "wi_1", "wo": "wo"},
}


class TensorSource(NamedTuple):
    """Where one slice of a parameter of ours is."""

    name: str
    transposed: bool


NameTable = Mapping[tuple[str, Index], TensorSource]


def name_table(config: Config, parameters: Mapping[str, Stacked]) -> NameTable:
    """(path, index) → theirs, for every slice of a model's parameters, in our order.

    Raises `KeyError` for a parameter that Hugging Face's models do not have.
    """
    return {
        (path, index): TensorSource(_name(config, path, index), _transposed(path, stacked))
        for path, stacked in parameters.items()
        for index in stacked.indices()
    }


def _transposed(path: str, stacked: Stacked) -> bool:
    return len(stacked.slice_shape) == 2 and path != "embedding"


def _name(config: Config, path: str, index: Index) -> str:
    match path.split("/"):
        case ["embedding"]:
            return SHARED
        case ["head"]:
            return HEAD
        case [stack, "final_norm", "scale"]:
            return f"{stack}.final_layer_norm.weight"
        case [stack, "relative_bias", "table"]:
            return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        case [stack, "runs", run, "layers", place, *sublayer, leaf]:
            layer = _layer(config, stack, int(run), index[0], int(place))
            within = _SUBLAYERS["/".join(sublayer)].format(
                last=2 if stack == "decoder" else 1,
                mlp="mlp" if config.sparse else "DenseReluDense",
                expert=index[-1],
            )
            return f"{stack}.block.{layer}.{within}{_leaf(config, sublayer, leaf)}.weight"
    raise KeyError(path)


def _leaf(config: Config, sublayer: list[str], leaf: str) -> str:
    if leaf in ("scale", "kernel"):
        return ""
    attention = sublayer[-1].endswith("attention")
    return "." + (_ATTENTION if attention else _FEED_FORWARD[config.model.activation])[leaf]


def _layer(config: Config, stack: str, run: int, block: int, place: int) -> int:
    """Number of a layer in its stack, from its place in a block of a run."""
    runs = config.block_runs(stack)
    before = sum(r.blocks * r.layers for r in runs[:run])
    return before + block * runs[run].layers + place


class Structure(NamedTuple):
    """What names alone tell of a model; by stack where there are two."""

    layers: dict[str, int]
    sparse: dict[str, tuple[int, ...]]  # numbers of the layers with experts
    gated: bool
    own_head: bool


def infer_structure(names: Iterable[str]) -> Structure:
    """The structure of the model that has tensors of these names."""
    layers = {stack: 0 for stack in STACKS}
    sparse: dict[str, set[int]] = {stack: set() for stack in STACKS}
    gated = own_head = False
    for name in names:
        parts = name.split(".")
        gated |= parts[-2:] == ["wi_0", "weight"]
        own_head |= ALIASES.get(name, name) == HEAD
        if parts[0] in STACKS and parts[1] == "block" and parts[2].isdigit():
            number = int(parts[2])
            layers[parts[0]] = max(layers[parts[0]], number + 1)
            if "router" in parts:
                sparse[parts[0]].add(number)
    ordered = {stack: tuple(sorted(numbers)) for stack, numbers in sparse.items()}
    return Structure(layers, ordered, gated, own_head)
