"""Table of Hugging Face's tensor names by parameter and slice, for import and export.

T5, mT5 and Switch Transformers differ only in the names of feed-forward layers. Hugging Face has a
kernel [out, in] for each layer and expert; a parameter here has kernels [in, out], stacked.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from switch_jax.checkpoint.interop.foreign_checkpoint import SliceIndex, StackedShape
from switch_jax.config import STACKS, Config

SHARED, HEAD = "shared.weight", "lm_head.weight"

# Other names of tied weights, besides or in place of the first, in some files.
ALIASES = {
    "encoder.embed_tokens.weight": SHARED,
    "decoder.embed_tokens.weight": SHARED,
    "decoder.lm_head.weight": HEAD,
}

# A tensor in T5's first files that no model uses: cross-attention has no relative positions.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

# Sub-layer of a parameter → Hugging Face's module in a block. {last} is the number of the
# feed-forward sub-layer, {mlp} the module in it.
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
    """Hugging Face's tensor of one slice of a parameter."""

    name: str
    transposed: bool


NameTable = Mapping[tuple[str, SliceIndex], TensorSource]


def name_table(config: Config, parameters: Mapping[str, StackedShape]) -> NameTable:
    """Returns the tensor of every slice (path, index) of a model's parameters, in their order.

    Raises `KeyError` for a parameter that Hugging Face's models do not have.
    """
    return {
        (path, index): TensorSource(_name(config, path, index), _transposed(path, stacked))
        for path, stacked in parameters.items()
        for index in stacked.indices()
    }


def _transposed(path: str, stacked: StackedShape) -> bool:
    return len(stacked.slice_shape) == 2 and path != "embedding"


def _name(config: Config, path: str, index: SliceIndex) -> str:
    match path.split("/"):
        case ["embedding"]:
            return SHARED
        case ["head"]:
            return HEAD
        case [stack, "final_norm", "scale"]:
            return f"{stack}.final_layer_norm.weight"
        case [stack, "relative_bias", "table"]:
            return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        case [stack, "runs", run, "layers", position, *sublayer, leaf]:
            layer = _layer(config, stack, int(run), index[0], int(position))
            module = _SUBLAYERS["/".join(sublayer)].format(
                last=2 if stack == "decoder" else 1,
                mlp="mlp" if config.sparse else "DenseReluDense",
                expert=index[-1],
            )
            return f"{stack}.block.{layer}.{module}{_leaf(config, sublayer, leaf)}.weight"
    raise KeyError(path)


def _leaf(config: Config, sublayer: list[str], leaf: str) -> str:
    if leaf in ("scale", "kernel"):
        return ""
    attention = sublayer[-1].endswith("attention")
    return "." + (_ATTENTION if attention else _FEED_FORWARD[config.model.activation])[leaf]


def _layer(config: Config, stack: str, run: int, block: int, position: int) -> int:
    """Returns the number of a layer in its stack, from its position in a block of a run."""
    runs = config.block_runs(stack)
    first_layer = sum(r.blocks * r.layers for r in runs[:run])
    return first_layer + block * runs[run].layers + position


class Structure(NamedTuple):
    """Structure of a model, as far as the names of its tensors have it."""

    layers: dict[str, int]  # number of layers, by stack
    sparse: dict[str, tuple[int, ...]]  # numbers of the layers with experts, by stack
    gated: bool  # whether feed-forward layers are gated
    own_head: bool  # whether the head is another tensor than the embedding


def infer_structure(names: Iterable[str]) -> Structure:
    """Returns the structure of the model that has tensors of these names."""
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
