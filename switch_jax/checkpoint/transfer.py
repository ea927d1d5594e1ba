"""Parameter transfer: which parameters of a model are loaded from another model's checkpoint.

The other parameters are initialised. Only names and shapes are read here. Parameters are named by
layer (`model/parameters.py`), so the two models may have their experts in different layers.

`init_rules` are `PATTERN -> NAME; …`. The first rule whose regular expression matches the whole
name of a parameter gives the name of the checkpoint's parameter to load (`\\1` is the first group);
with an empty NAME, the parameter is initialised, or left out if only the checkpoint has it. Without
a matching rule, the names are equal.

    decoder/(.*) -> encoder/\\1        loads the decoder from the encoder
    .*/router/.* ->                    initialises the routers

Where a layer is dense in one model and sparse in the other, its feed-forward weights have different
names. From dense to sparse, every expert is a copy of the dense weights, and the router is
initialised (sparse upcycling, Komatsuzaki et al. 2022). From sparse to dense, the feed-forward
weights are initialised and the rest is loaded, as the paper initialises the students of
distillation.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from switch_jax.config import Config, InitRule, parse_init_rules
from switch_jax.errors import UserError
from switch_jax.model import LayerSlice, is_adapter, layer_shapes, layer_slices

Shape = tuple[int, ...]
"""Shape of an array."""
Shapes = Mapping[str, Shape]
"""Shapes of parameters, by path."""

VOCABULARY_AXES = {"embedding": 0, "head": 1}
"""Axis of the vocabulary, along which a parameter may grow: existing ids keep their embeddings."""


# Last part of a parameter's name, or a part before it, and the key that makes a model have it.
_KEYS_OF_PARTS = {
    "head": "model.tied_embeddings",
    "shared": "moe.shared_d_ff",
    "gate": "model.activation",
    "bias": "moe.balance_bias_rate",
    "kernel": "moe.router",
}


class Transfer(NamedTuple):
    """Names of the parameters that are loaded, initialised and ignored."""

    loaded: dict[str, str]  # name in the model → name in the checkpoint
    initialised: list[str]  # names in the model
    ignored: list[str]  # names in the checkpoint


def plan_transfer(target: Shapes, source: Shapes, rules: str) -> Transfer:
    """Decides for every parameter of `target` which parameter of `source` it is loaded from.

    Args:
      target: shapes of the model's parameters, by layer.
      source: shapes of the checkpoint's parameters, by layer.
      rules: `init_rules`.

    Raises `UserError` for rules that cannot be read or match nothing, for a parameter that is
    missing in `source` or has another shape there, and for one that is only in `source`, in a
    sub-layer of which other parameters are loaded: without it they compute something else.
    """
    parsed, used = parse_init_rules(rules), set[InitRule]()
    loaded: dict[str, str] = {}
    initialised = []
    if any(is_adapter(name) and name not in target for name in source):
        raise UserError(
            "The checkpoint of init_from was trained with LoRA; set lora.* to what it was trained"
            " with."
        )
    for name, shape in target.items():
        source_name = _apply_rules(name, parsed, used)
        if source_name not in source:
            source_name = _default_source(source_name, source)
        if source_name == "":
            initialised.append(name)
            continue
        if source_name not in source:
            raise UserError(
                f"{name} is taken from {source_name}, which the source checkpoint does not have;"
                f" add a rule such as '{re.escape(name)} ->' to init_rules, and it is initialised."
            )
        if not _shape_fits(name, source[source_name], shape):
            raise UserError(
                f"{name} has the shape {list(shape)} and {source_name} in the source checkpoint"
                f" {list(source[source_name])}; make the models alike, or add a rule such as"
                f" '{re.escape(name)} ->' to init_rules, and it is initialised."
            )
        loaded[name] = source_name
    ignored = sorted(set(source) - set(loaded.values()))
    loaded_modules = set(map(_module, loaded.values()))
    for name in ignored:
        if name in target or _module(name) not in loaded_modules:
            continue
        if _apply_rules(name, parsed, used) == "":
            continue
        raise UserError(
            f"The source checkpoint has {name}, which this model does not have, and the parameters"
            f" beside it are loaded; set {_key_of(name)} as there, or add a rule such as"
            f" '{_pattern_of(name)} ->' to init_rules, and it is left out."
        )
    for rule in parsed:
        if rule not in used:
            raise UserError(
                f"init_rules has {rule.pattern.pattern!r}, which is the whole name of no parameter"
                f" that a rule before it has not matched, such as {next(iter(target))}; correct it."
            )
    return Transfer(loaded, initialised, ignored)


def _module(name: str) -> str:
    """Returns what computes one function: a sub-layer of a layer, or embedding and head."""
    if name in VOCABULARY_AXES:
        return "vocabulary"
    return "/".join(name.split("/")[:4]) if "/layers/" in name else name


def _key_of(name: str) -> str:
    """Returns the key that decides whether a model has a parameter."""
    own = name.split("/")
    for part, key in _KEYS_OF_PARTS.items():
        if part in own:
            return key
    return "the keys of model and moe"


def _pattern_of(name: str) -> str:
    """Returns a pattern of `init_rules` for the parameters of this name in all layers."""
    return re.sub(r"^.*/layers/\d+/", ".*/", name)


def _default_source(name: str, source: Shapes) -> str:
    """Returns the name to load for a parameter that is not in `source`; "": it is initialised."""
    if is_adapter(name):
        return ""
    layer, separator, weight = name.partition("/mlp/")
    if separator and f"{layer}/mlp/wi" in source:  # the layer is dense in the checkpoint
        if weight.startswith("router/"):
            return ""
        return name.replace("/mlp/experts/", "/mlp/")
    if weight in ("wi", "gate", "wo") and f"{layer}/mlp/experts/wi" in source:
        return ""
    return name


def _shape_fits(name: str, old: Shape, new: Shape) -> bool:
    return old == new or _only_vocabulary_grows(name, old, new) or _is_expert_copy(name, old, new)


def _is_expert_copy(name: str, old: Shape, new: Shape) -> bool:
    """Whether the parameter is of experts, which all get the weights of a dense layer."""
    return "/experts/" in name and old == new[1:]


def _only_vocabulary_grows(name: str, old: Shape, new: Shape) -> bool:
    """Whether the shapes differ only by more ids along the axis of the vocabulary."""
    axis = VOCABULARY_AXES.get(name)
    if axis is None or len(old) != len(new) or new[axis] < old[axis]:
        return False
    return all(i == axis or a == b for i, (a, b) in enumerate(zip(old, new)))


def _apply_rules(name: str, rules: list[InitRule], used: set[InitRule]) -> str:
    """Returns the name of the first rule that matches, which is used; `name` where none does."""
    for rule in rules:
        match = rule.pattern.fullmatch(name)
        if match:
            used.add(rule)
            return match.expand(rule.template)
    return name


# By parameter of the model and by its block: the slice of the checkpoint to load. Blocks that are
# initialised are missing.
Origins = dict[str, dict[int | None, LayerSlice]]


def parameter_origins(
    target: Shapes, config: Config, source: Shapes, source_config: Config
) -> Origins:
    """Returns the slices of the checkpoint that the parameters of a model are loaded from.

    Args:
      target: shapes of the model's parameters, by path.
      config: the model's config.
      source: shapes of the checkpoint's parameters, by path.
      source_config: config of the checkpoint's model.

    Raises `UserError` as `plan_transfer` does.
    """
    slices, source_slices = layer_slices(target, config), layer_slices(source, source_config)
    shapes = layer_shapes(target, config), layer_shapes(source, source_config)
    origins: Origins = {}
    for name, source_name in plan_transfer(*shapes, config.init_rules).loaded.items():
        parameter, block = slices[name]
        origins.setdefault(parameter, {})[block] = source_slices[source_name]
    return origins


def render_transfer(transfer: Transfer, target: Shapes, source: Shapes) -> str:
    """Returns a table of the parameters that are loaded, initialised and ignored.

    Layers with the same entry share a line.
    """
    layers_of_line: dict[str, list[str]] = {}

    def add(status: str, name: str, shape: Shape, details: str = "") -> None:
        pattern, layer = _split_layer(name)
        line = f"{status:11}  {pattern:48} {_format_shape(shape)}{details}"
        layers_of_line.setdefault(line, []).append(layer)

    for name, source_name in transfer.loaded.items():
        source_pattern, source_layer = _split_layer(source_name)
        layer = _split_layer(name)[1]
        origin = source_pattern if layer == source_layer else source_name
        details = "" if source_name == name else f"  from {origin}"
        if _is_expert_copy(name, source[source_name], target[name]):
            details += ", for every expert"
        elif source[source_name] != target[name]:
            details += f"  {_format_shape(source[source_name])}, the rest initialised"
        add("loaded", name, target[name], details)
    for name in transfer.initialised:
        add("initialised", name, target[name])
    for name in transfer.ignored:
        add("ignored", name, source[name])
    rows = [
        line + (f"  layers {','.join(layers)}" if layers[0] else "")
        for line, layers in layers_of_line.items()
    ]
    counts = (len(transfer.loaded), len(transfer.initialised), len(transfer.ignored))
    return "\n".join([*rows, "{} loaded, {} initialised, {} ignored".format(*counts)])


def _split_layer(name: str) -> tuple[str, str]:
    """Returns `encoder/layers/*/mlp/wi` and `3` for `encoder/layers/3/mlp/wi`.

    The second is empty for a parameter outside of the layers.
    """
    stack, separator, rest = name.partition("/layers/")
    number, _, own = rest.partition("/")
    return (f"{stack}/layers/*/{own}", number) if separator else (name, "")


def _format_shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
