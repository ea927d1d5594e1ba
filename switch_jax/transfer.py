"""Parameters that training starts from: which are taken from a checkpoint, and which begin anew.

`init_rules` are `PATTERN -> NAME; …`: the first whose regular expression matches the whole path of
a parameter says which one of the checkpoint it is taken from (`\\\\1` is the first group), and with
an empty NAME that it begins anew. Where no rule matches, the path there is the same.

    decoder/(.*) -> encoder/\\\\1        the decoder begins as the encoder
    .*/router/.* ->                    routers begin anew
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from switch_jax import lora, pretrained, sharding
from switch_jax.errors import UserError
from switch_jax.model import SwitchTransformer, named_parameters
from switch_jax.schema import Config
from switch_jax.step import Program, TrainState

Shapes = Mapping[str, tuple[int, ...]]

# The vocabulary may grow: ids that were there before keep their embeddings.
_VOCABULARY = {"embedding": 0, "head": 1}


class Transfer(NamedTuple):
    """What becomes of parameters, by path."""

    loaded: dict[str, str]  # path → path in the checkpoint
    initialised: list[str]
    ignored: list[str]  # of the checkpoint


def plan(target: Shapes, source: Shapes, rules: str) -> Transfer:
    """Decides, for every parameter of `target`, where in `source` it is taken from.

    Raises `UserError` for rules that cannot be read, and for a parameter that is not there, or is
    there with another shape.
    """
    parsed = _parse(rules)
    loaded: dict[str, str] = {}
    initialised = []
    lost = [name for name in source if lora.is_adapter(name) and name not in target]
    if lost:
        raise UserError(
            "The checkpoint of init_from was trained with LoRA; set lora.* to what it was trained"
            " with."
        )
    for name, shape in target.items():
        theirs = _renamed(name, parsed)
        if lora.is_adapter(name) and theirs not in source:
            theirs = ""
        if theirs == "":
            initialised.append(name)
            continue
        if theirs not in source:
            raise UserError(
                f"{name} is taken from {theirs}, which the checkpoint of init_from does not have;"
                f" add a rule such as '{re.escape(name)} ->' to init_rules, and it begins anew."
            )
        if source[theirs] != shape and not grows(name, source[theirs], shape):
            raise UserError(
                f"{name} has the shape {list(shape)} and {theirs} in the checkpoint of init_from"
                f" {list(source[theirs])}; make the models alike, or add a rule such as"
                f" '{re.escape(name)} ->' to init_rules, and it begins anew."
            )
        loaded[name] = theirs
    ignored = sorted(set(source) - set(loaded.values()))
    return Transfer(loaded, initialised, ignored)


def grows(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether a parameter is only longer than it was, by ids of the vocabulary."""
    axis = _VOCABULARY.get(name)
    if axis is None or len(old) != len(new) or new[axis] < old[axis]:
        return False
    return all(i == axis or a == b for i, (a, b) in enumerate(zip(old, new)))


def _parse(rules: str) -> list[tuple[re.Pattern, str]]:
    parsed = []
    for rule in filter(None, map(str.strip, rules.split(";"))):
        pattern, arrow, name = rule.partition("->")
        try:
            if not arrow:
                raise re.error("there is no ->")
            parsed.append((re.compile(pattern.strip()), name.strip()))
        except re.error as error:
            raise UserError(
                f"init_rules has {rule!r}, which cannot be read ({error}); write PATTERN -> NAME,"
                " with a semicolon between two rules."
            ) from error
    return parsed


def _renamed(name: str, rules: list[tuple[re.Pattern, str]]) -> str:
    for pattern, theirs in rules:
        match = pattern.fullmatch(name)
        if match:
            try:
                return match.expand(theirs)
            except (re.error, IndexError) as error:
                raise UserError(
                    f"init_rules has the name {theirs!r}, which does not fit {pattern.pattern!r}"
                    f" ({error}); refer to groups that it has."
                ) from error
    return name


def start(program: Program) -> TrainState:
    """A fresh state, with parameters of `init_from` where the config names it.

    The optimizer always begins anew. All processes must call it. Raises `UserError` as `plan` does.
    """
    state, config = program.init(), program.config
    if config.init_from is None:
        return state
    _, source, restore = pretrained.find(config.init_from, together=True)
    loaded = plan(_shapes(state.params), source, config.init_rules).loaded
    whole = sharding.replicated(program.mesh)
    abstract = {}
    for name, theirs in loaded.items():
        fresh = state.params[name]
        where = fresh.sharding if fresh.shape == source[theirs] else whole
        abstract[theirs] = jax.ShapeDtypeStruct(source[theirs], fresh.dtype, sharding=where)
    restored = restore(abstract)
    params = dict(state.params)
    for name, theirs in loaded.items():
        fresh, old = params[name], restored[theirs]
        if (fresh.shape, fresh.sharding) == (old.shape, old.sharding):
            params[name] = old
        else:
            params[name] = jax.jit(_over, out_shardings=fresh.sharding)(fresh, old)
    return dataclasses.replace(state, params=params)


def _over(fresh: jax.Array, old: jax.Array) -> jax.Array:
    """`fresh` with `old` in its first places."""
    return jax.lax.dynamic_update_slice(fresh, old, [0] * fresh.ndim)


def report(config: Config) -> str:
    """What training would begin with, without an accelerator or data; raises `UserError`."""
    source = pretrained.find(config.init_from or "").shapes
    model = jax.eval_shape(lambda: SwitchTransformer(config, jax.random.key(0)))
    target = _shapes(named_parameters(model))
    return render(plan(target, source, config.init_rules), target, source)


def _shapes(parameters: Mapping[str, Any]) -> Shapes:
    return {name: tuple(array.shape) for name, array in parameters.items()}


def render(transfer: Transfer, target: Shapes, source: Shapes) -> str:
    """A table of what is loaded, what begins anew, and what is left in the checkpoint."""
    lines = []
    for name, theirs in transfer.loaded.items():
        was = "" if theirs == name else f"  from {theirs}"
        if source[theirs] != target[name]:
            was += f"  {_shape(source[theirs])}, the rest initialised"
        lines.append(f"loaded       {name:56} {_shape(target[name])}{was}")
    lines += [f"initialised  {name:56} {_shape(target[name])}" for name in transfer.initialised]
    lines += [f"ignored      {name:56} {_shape(source[name])}" for name in transfer.ignored]
    counts = (len(transfer.loaded), len(transfer.initialised), len(transfer.ignored))
    lines.append("{} loaded, {} initialised, {} ignored".format(*counts))
    return "\n".join(lines)


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
