"""Which parameters of a model are taken from another one, and which begin anew: names and shapes.

Parameters are named by layer (`by_layer.py`), so that the models may have their experts in
different layers. `init_rules` are `PATTERN -> NAME; …`: the first whose regular expression matches
the whole name of a parameter says which one of the checkpoint it is taken from (`\\1` is the first
group), and with an empty NAME that it begins anew. Where no rule matches, the name there is the
same.

    decoder/(.*) -> encoder/\\1        the decoder begins as the encoder
    .*/router/.* ->                    routers begin anew

Where a layer is dense in one model and sparse in the other, its feed-forward weights have no
namesake. From dense to sparse, every expert begins as a copy of the dense weights and the router
anew (sparse upcycling, Komatsuzaki et al. 2022). From sparse to dense, they begin anew, and all
else is taken: how the paper initialises the students of distillation.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from switch_jax.config import Config
from switch_jax.errors import UserError
from switch_jax.model import LayerSlice, is_adapter, layer_shapes, layer_slices

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# The vocabulary may grow: ids that were there before keep their embeddings.
VOCABULARY_AXES = {"embedding": 0, "head": 1}


class Transfer(NamedTuple):
    """What becomes of parameters, by name."""

    loaded: dict[str, str]  # name → name in the checkpoint
    initialised: list[str]
    ignored: list[str]  # of the checkpoint


def plan_transfer(target: Shapes, source: Shapes, rules: str) -> Transfer:
    """Decides, for every parameter of `target`, where in `source` it is taken from.

    Raises `UserError` for rules that cannot be read or match nothing, and for a parameter that is
    not there, or is there with another shape.
    """
    parsed = _parse(rules)
    loaded: dict[str, str] = {}
    initialised = []
    lost = [name for name in source if is_adapter(name) and name not in target]
    if lost:
        raise UserError(
            "The checkpoint of init_from was trained with LoRA; set lora.* to what it was trained"
            " with."
        )
    for name, shape in target.items():
        theirs = _renamed(name, parsed)
        if theirs not in source:
            theirs = _instead(theirs, source)
        if theirs == "":
            initialised.append(name)
            continue
        if theirs not in source:
            raise UserError(
                f"{name} is taken from {theirs}, which the source checkpoint does not have;"
                f" add a rule such as '{re.escape(name)} ->' to init_rules, and it begins anew."
            )
        if not any(fits(name, source[theirs], shape) for fits in (_equal, grows, copied)):
            raise UserError(
                f"{name} has the shape {list(shape)} and {theirs} in the source checkpoint"
                f" {list(source[theirs])}; make the models alike, or add a rule such as"
                f" '{re.escape(name)} ->' to init_rules, and it begins anew."
            )
        loaded[name] = theirs
    for rule in parsed:
        if not rule.used:
            raise UserError(
                f"init_rules has {rule.pattern.pattern!r}, which is the whole name of no parameter"
                f" that a rule before it has not matched, such as {next(iter(target))}; correct it."
            )
    ignored = sorted(set(source) - set(loaded.values()))
    return Transfer(loaded, initialised, ignored)


def _instead(name: str, source: Shapes) -> str:
    """What to take for a parameter that is not in `source`; "": it begins anew."""
    if is_adapter(name):
        return ""
    layer, found, own = name.partition("/mlp/")
    if found and f"{layer}/mlp/wi" in source:  # dense there
        if own.startswith("router/"):
            return ""
        return name.replace("/mlp/experts/", "/mlp/")
    if own in ("wi", "gate", "wo") and f"{layer}/mlp/experts/wi" in source:
        return ""
    return name


def _equal(name: str, old: Shape, new: Shape) -> bool:
    return old == new


def copied(name: str, old: Shape, new: Shape) -> bool:
    """Whether every expert gets the weights of a dense layer."""
    return "/experts/" in name and old == new[1:]


def grows(name: str, old: Shape, new: Shape) -> bool:
    """Whether a parameter is only longer than it was, by ids of the vocabulary."""
    axis = VOCABULARY_AXES.get(name)
    if axis is None or len(old) != len(new) or new[axis] < old[axis]:
        return False
    return all(i == axis or a == b for i, (a, b) in enumerate(zip(old, new)))


class _Rule:
    """A pattern, what to take for names that it matches, and whether it has matched any."""

    def __init__(self, pattern: re.Pattern, theirs: str):
        self.pattern, self.theirs, self.used = pattern, theirs, False


def _parse(rules: str) -> list[_Rule]:
    parsed = []
    for rule in filter(None, map(str.strip, rules.split(";"))):
        pattern, arrow, name = rule.partition("->")
        try:
            if not arrow:
                raise re.error("there is no ->")
            parsed.append(_Rule(re.compile(pattern.strip()), name.strip()))
        except re.error as error:
            raise UserError(
                f"init_rules has {rule!r}, which cannot be read ({error}); write PATTERN -> NAME,"
                " with a semicolon between two rules."
            ) from error
    return parsed


def _renamed(name: str, rules: list[_Rule]) -> str:
    for rule in rules:
        match = rule.pattern.fullmatch(name)
        if match:
            rule.used = True
            try:
                return match.expand(rule.theirs)
            except (re.error, IndexError) as error:
                raise UserError(
                    f"init_rules has the name {rule.theirs!r}, which does not fit"
                    f" {rule.pattern.pattern!r} ({error}); refer to groups that it has."
                ) from error
    return name


# By parameter as the model has it, for each of its blocks that is taken from somewhere, from where.
Origins = dict[str, dict[int | None, LayerSlice]]


def parameter_origins(target: Shapes, config: Config, source: Shapes, made_with: Config) -> Origins:
    """Decides as `plan`, for parameters as models of these two configs have them."""
    ours, theirs = layer_slices(target, config), layer_slices(source, made_with)
    found: Origins = {}
    for name, old in _plan(target, config, source, made_with).loaded.items():
        part = ours[name]
        found.setdefault(part.name, {})[part.block] = theirs[old]
    return found


def transfer_report(target: Shapes, config: Config, source: Shapes, made_with: Config) -> str:
    """What `origins` finds, as a table."""
    shapes = layer_shapes(target, config), layer_shapes(source, made_with)
    return render_transfer(_plan(target, config, source, made_with), *shapes)


def _plan(target: Shapes, config: Config, source: Shapes, made_with: Config) -> Transfer:
    shapes = layer_shapes(target, config), layer_shapes(source, made_with)
    return plan_transfer(*shapes, config.init_rules)


def render_transfer(transfer: Transfer, target: Shapes, source: Shapes) -> str:
    """A table of what is loaded, what begins anew, and what is left in the checkpoint.

    Layers that have the same fate share a line.
    """
    lines: dict[str, list[str]] = {}

    def add(fate: str, name: str, shape: Shape, rest: str = "") -> None:
        pattern, layer = _without_layer(name)
        lines.setdefault(f"{fate:11}  {pattern:48} {_shape(shape)}{rest}", []).append(layer)

    for name, theirs in transfer.loaded.items():
        pattern, other = _without_layer(theirs)
        layer = _without_layer(name)[1]
        rest = "" if theirs == name else f"  from {pattern if layer == other else theirs}"
        if copied(name, source[theirs], target[name]):
            rest += ", for every expert"
        elif source[theirs] != target[name]:
            rest += f"  {_shape(source[theirs])}, the rest initialised"
        add("loaded", name, target[name], rest)
    for name in transfer.initialised:
        add("initialised", name, target[name])
    for name in transfer.ignored:
        add("ignored", name, source[name])
    rows = [line + (f"  layers {','.join(of)}" if of[0] else "") for line, of in lines.items()]
    counts = (len(transfer.loaded), len(transfer.initialised), len(transfer.ignored))
    return "\n".join([*rows, "{} loaded, {} initialised, {} ignored".format(*counts)])


def _without_layer(name: str) -> tuple[str, str]:
    """`encoder/layers/*/mlp/wi` and `3` of `encoder/layers/3/mlp/wi`; the second may be empty."""
    stack, found, rest = name.partition("/layers/")
    number, _, own = rest.partition("/")
    return (f"{stack}/layers/*/{own}", number) if found else (name, "")


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
