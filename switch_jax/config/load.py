"""Config files: loading, overrides, and conversion to a frozen `Config`.

A config file starts from `defaults()`, a `ConfigDict` with every key, and changes some of them.
`load_config` runs the file, applies the overrides of the command line, and converts the result
to a validated `Config`. Only config files and this module handle a `ConfigDict`.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from switch_jax.config.presets import call_config_function, split_config_spec
from switch_jax.config.schema import Config, key_roles
from switch_jax.config.typed_values import build_dataclass, parse_value, unknown_key
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
        values[name] = parse_value(name, text, type(known[name]))
    return types.SimpleNamespace(**values)


def load_config(
    spec: str,
    overrides: Mapping[str, str] | None = None,
    find_model: Callable[[str], Config] | None = None,
) -> Config:
    """Returns the config of a file or preset, with overrides.

    Args:
      spec: `FILE` or `FILE:name=value,…`, where FILE is a path or the name of a preset.
      overrides: text of the value by dotted key, as on the command line.
      find_model: function from the path of a checkpoint to its config, for
        `init_model=checkpoint`; None: the model is the config's.

    Raises `UserError` for a missing file, an unknown key, or an invalid value.
    """
    try:
        raw = read_config_file(spec).to_dict()
    except RequiredValueError as error:
        raise UserError(
            f"Config {spec!r} has a placeholder without a value ({error}); give it one."
        ) from error
    raw = _with_overrides(raw, overrides or {})
    path = raw.get("init_from")
    if find_model is not None and raw.get("init_model") == "checkpoint" and isinstance(path, str):
        _adopt_model(raw, find_model(path), overrides or {})
    return config_from_dict(raw)


def _adopt_model(raw: dict[str, Any], source: Config, overrides: Mapping[str, str]) -> None:
    """Replaces the default values that belong to parameters in `raw` by those of `source`."""
    default = config_to_dict(Config())
    for group in ("model", "moe"):
        for name, role in key_roles(group).items():
            explicit = f"{group}.{name}" in overrides or raw[group][name] != default[group][name]
            if role == "function" and not explicit:
                raw[group][name] = getattr(getattr(source, group), name)


def read_config_file(spec: str) -> ConfigDict:
    """Returns the `ConfigDict` of a config file or preset; raises `UserError` as `load_config`."""
    config = call_config_function(spec, "get_config", "Config")
    if not isinstance(config, ConfigDict):
        path, _ = split_config_spec(spec)
        raise UserError(
            f"get_config in {path!r} must return the ConfigDict of defaults(), not a"
            f" {type(config).__name__}."
        )
    return config


def override_config(config: Config, overrides: Mapping[str, str]) -> Config:
    """Returns `config` with other values, given as text by dotted key; raises `UserError`."""
    return config_from_dict(_with_overrides(config_to_dict(config), overrides))


def config_from_dict(raw: Any, source: str = "") -> Config:
    """Converts nested plain values to a validated `Config`; raises `UserError`.

    Args:
      raw: dict by key.
      source: where it comes from, as errors call it; "": a config file.
    """
    config = build_dataclass(Config, raw, source)
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


def _with_overrides(raw: dict[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """Returns `raw` with the values of texts by dotted key, read as the types of the schema."""
    kinds = dict(_leaf_types(Config))
    for key, text in overrides.items():
        *parents, last = key.split(".")
        node: Any = raw
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if any(known.startswith(f"{key}.") for known in kinds):
            raise UserError(f"{key} is a group of keys and cannot be {text!r}; set a key of it.")
        if key not in kinds or not isinstance(node, dict):
            raise unknown_key("Config", key, kinds)
        node[last] = parse_value(key, text, kinds[key])
    return raw


def _leaf_types(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted key and type of every value of a dataclass of dataclasses."""
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _leaf_types(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            yield prefix + name, kind
