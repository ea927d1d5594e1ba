"""Config files: loading, overrides, and conversion to a frozen `Config`.

A config file starts from `defaults()`, a `ConfigDict` with every key, and changes some of them.
`load_config` runs the file, applies the overrides of the command line, and converts the result
to a validated `Config`. Only config files and this module handle a `ConfigDict`.
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
    """Returns a `ConfigDict` with every key and its default, for a config file to change."""
    # Neither locked nor type-safe: `config_from_dict` checks keys and types with better messages.
    return ConfigDict(dataclasses.asdict(Config()), type_safe=False)


def parse_arg(arg: str, **known: Any) -> types.SimpleNamespace:
    """Parses `name=value,…`, the part of `--config FILE:…` after the colon.

    Args:
      arg: the text.
      known: names and their defaults; a value must have the type of its default.

    Raises `UserError` for another name or type.
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
    """Returns the config of a file or preset, with overrides.

    Args:
      spec: `FILE` or `FILE:name=value,…`, where FILE is a path or the name of a preset.
      overrides: text of the value by dotted key, as on the command line.

    Raises `UserError` for a missing file, an unknown key, or an invalid value.
    """
    return config_from_dict(_with_overrides(read_config_file(spec).to_dict(), overrides or {}))


def read_config_file(spec: str) -> ConfigDict:
    """Returns the `ConfigDict` of a config file or preset; raises `UserError` as `load_config`."""
    config = call_config_function(spec, "get_config", "Config")
    if not isinstance(config, ConfigDict):
        path = spec.partition(":")[0]
        raise UserError(f"get_config in {path!r} must return the ConfigDict of defaults().")
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
    """Returns `config` with other values, given as text by dotted key; raises `UserError`."""
    return config_from_dict(_with_overrides(config_to_dict(config), overrides))


def config_from_dict(raw: dict[str, Any]) -> Config:
    """Converts nested plain values to a validated `Config`; raises `UserError`."""
    config = _convert(Config, raw, "")
    validate(config)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """Returns nested plain values, the inverse of `config_from_dict`."""
    return dataclasses.asdict(config)


def flatten_config(config: Config) -> dict[str, Any]:
    """Returns plain values by dotted key."""
    return dict(_flatten(config_to_dict(config), ""))


def config_differences(old: Config, new: Config) -> dict[str, str]:
    """Returns a description of each value that differs, by dotted key."""
    before = flatten_config(old)
    return {
        key: f"{key} is {before[key]!r} there and {value!r} here"
        for key, value in flatten_config(new).items()
        if value != before[key]
    }


def _flatten(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _with_overrides(raw: dict[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    for key, text in overrides.items():
        *parents, last = key.split(".")
        node: Any = raw
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise _unknown_key(key, _dotted_keys(raw))
        node[last] = _literal(text)
    return raw


def _dotted_keys(raw: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for name, value in raw.items():
        keys += (
            _dotted_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
        )
    return keys


def _unknown_key(key: str, known: list[str]) -> UserError:
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
            raise _unknown_key(prefix + name, [prefix + k for k in hints])
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
    """Returns `value` as a `kind`: a plain type, a `Literal`, or one of both `| None`."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value is None and "none" in choices:  # `_literal` reads none as None
            return "none"
        if value not in choices:
            raise UserError(f"{key} must be one of {', '.join(choices)}, not {value!r}.")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{key} must be {_TYPE_NAMES[kind]}, not {value!r}.")
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
