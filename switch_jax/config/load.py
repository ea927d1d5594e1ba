"""Configuration: frozen dataclasses, made once from a `ConfigDict` and its overrides.

`configs/*.py` start from `defaults()`, a `ConfigDict` with every key there is, and change
what they need. `load()` runs such a file, applies the command line's overrides and
converts the result, strictly, to a frozen `Config`. Nothing behind it sees a `ConfigDict`.
"""

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from switch_jax.config.presets import find_config_file, run_config_file
from switch_jax.config.schema import Config
from switch_jax.config.validation import validate
from switch_jax.errors import UserError


def defaults() -> ConfigDict:
    """A `ConfigDict` that holds every key with its default; what `configs/*.py` start from."""
    # Neither locked nor type-safe: `from_dict` checks keys and types, and says it better.
    return ConfigDict(dataclasses.asdict(Config()), type_safe=False)


def fine_tuning(num_experts: int) -> ConfigDict:
    """`defaults()` with the paper's recipe for fine-tuning Switch-Base (sections 4.1 and 5.6).

    16k steps, of which every 200th is evaluated and the best one counts, with more dropout in
    experts than elsewhere; T5's constant learning rate. Batches are to have 2^20 tokens.
    """
    config = defaults()
    config.model.dropout_rate = 0.1
    config.moe.update(num_experts=num_experts, expert_dropout_rate=0.4 * (num_experts > 0))
    config.data.pack = True
    config.optimizer.update(schedule="constant", learning_rate=1e-3, warmup_steps=0)
    config.train.update(steps=16_000, eval_every=200, checkpoint_every=200, keep_best="average")
    return config


def parse_arg(arg: str, **known: Any) -> types.SimpleNamespace:
    """Reads `name=value,…`, the part of `--config file.py:…` behind the colon.

    `known` gives the names that exist with their defaults, whose type a value must have.
    Raises `UserError` for any other name or type.
    """
    values = dict(known)
    for item in filter(None, arg.split(",")):
        name, equals, text = item.partition("=")
        if name not in known or not equals:
            names = ", ".join(f"{k}=…" for k in known) or "none"
            raise UserError(f"The config has no argument {item!r}; there is {names}.")
        values[name] = _check(name, _literal(text), type(known[name]))
    return types.SimpleNamespace(**values)


def load_config(spec: str, overrides: Mapping[str, str] | None = None) -> Config:
    """Runs a config file and applies overrides.

    Args:
      spec: `FILE` or `FILE:name=value,…`, where FILE is a path or the name of a preset.
      overrides: dotted key → text of its value, as on the command line.

    Raises `UserError` for a missing file, an unknown key, or a value that cannot be.
    """
    return config_from_dict(_overridden(read_config_file(spec).to_dict(), overrides or {}))


def read_config_file(spec: str) -> ConfigDict:
    """Returns the `ConfigDict` of a config file or preset; raises `UserError` as `load_config`."""
    config = call_config_function(spec, "get_config", "Config")
    if not isinstance(config, ConfigDict):
        path = spec.partition(":")[0]
        raise UserError(f"get_config in {path!r} must return what it made of defaults().")
    return config


def call_config_function(spec: str, function: str, kind: str, folder: str = "") -> Any:
    """Calls a function of a config file with the part of `spec` behind the colon.

    Args:
      spec: `FILE` or `FILE:argument`, where FILE is a path or the name of a preset.
      function: name of the function.
      kind: of config, as errors call it.
      folder: subfolder of the presets of this kind.

    Raises `UserError` where there is no such file, or it lacks the function.
    """
    path, _, arg = spec.partition(":")
    module = run_config_file(find_config_file(path, kind, folder))
    if function not in module:
        raise UserError(f"{kind} file {path!r} must define {function}(arg='').")
    return module[function](arg)


def override_config(config: Config, overrides: Mapping[str, str]) -> Config:
    """`config` with dotted keys changed to the values of their texts; raises `UserError`."""
    return config_from_dict(_overridden(config_to_dict(config), overrides))


def config_from_dict(raw: dict[str, Any]) -> Config:
    """Converts nested plain values to a validated `Config`; raises `UserError`."""
    config = _convert(Config, raw, "")
    validate(config)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, the inverse of `from_dict`."""
    return dataclasses.asdict(config)


def flatten_config(config: Config) -> dict[str, Any]:
    """Plain values by dotted key."""
    return dict(_flat(config_to_dict(config), ""))


def config_differences(old: Config, new: Config) -> dict[str, str]:
    """How two configs differ, in words by dotted key."""
    before = flatten_config(old)
    return {
        key: f"{key} is {before[key]!r} there and {value!r} here"
        for key, value in flatten_config(new).items()
        if value != before[key]
    }


def _flat(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _overridden(raw: dict[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    for key, text in overrides.items():
        *parents, last = key.split(".")
        node: Any = raw
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise _unknown(key, _dotted(raw))
        node[last] = _literal(text)
    return raw


def _dotted(raw: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for name, value in raw.items():
        keys += _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return keys


def _unknown(key: str, known: list[str]) -> UserError:
    by_last_part = {k.split(".")[-1]: k for k in known}
    close = difflib.get_close_matches(key, known, n=1) or [
        by_last_part[k] for k in difflib.get_close_matches(key.split(".")[-1], by_last_part, n=1)
    ]
    hint = f"did you mean {close[0]!r}?" if close else f"keys are {', '.join(sorted(known))}."
    return UserError(f"Config has no key {key!r}; {hint}")


def _convert(cls: type, raw: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in raw:
        if name not in hints:
            raise _unknown(prefix + name, [prefix + k for k in hints])
    values = {}
    for name, value in raw.items():
        key, kind = prefix + name, hints[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise UserError(f"{key} is a group of keys and cannot be {value!r}.")
            values[name] = _convert(typing.cast(type, kind), value, key + ".")
        else:
            values[name] = _check(key, value, kind)
    return cls(**values)


def _check(key: str, value: Any, kind: Any) -> Any:
    """`value` as a `kind` (a plain type, a `Literal`, or either `| None`)."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value is None and "none" in choices:  # how the command line reads `none`
            return "none"
        if value not in choices:
            raise UserError(f"{key} must be one of {', '.join(choices)}, not {value!r}.")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{key} must be {_NAMES[kind]}, not {value!r}.")
    return value


_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
