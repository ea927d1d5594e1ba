"""Typed values of plain ones: dataclasses of nested dicts, and values of the command line's text.

A type is a plain type (`int`, `float`, `bool`, `str`), another class, `Any`, a `Literal`, a
dataclass, a list, tuple, dict or `Mapping` of types, or a union of these. Where a value has another
type, a `UserError` names the key.
"""

import ast
import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from switch_jax.errors import UserError

T = TypeVar("T")

_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "a group of keys",
    Mapping: "a dict",
}


def build_dataclass(cls: type[T], raw: Any, source: str = "", *, ignore_unknown: bool = False) -> T:
    """Returns the dataclass of nested plain values, such as those of a JSON file.

    Args:
      cls: the dataclass; keys without a default must be there.
      raw: a dict by name of the field.
      source: where the values come from, as errors call it; "": the config.
      ignore_unknown: whether keys that no field has are left out, and not an error.

    Raises `UserError` for missing and unknown keys and values of another type.
    """
    return _Reader(source, ignore_unknown).build(cls, raw, "")


def check_value(key: str, value: Any, kind: Any, source: str = "") -> Any:
    """Returns a plain value as a `kind`; raises `UserError`, which names source and key."""
    return _Reader(source, False).check(key, value, kind)


def parse_value(key: str, text: str, kind: Any) -> Any:
    """Returns the value of a text of the command line as a `kind` of a plain type or `Literal`.

    A text stands for itself, with or without quotes. `none` is None where None is allowed.
    Raises `UserError`, which names the key.
    """
    if isinstance(kind, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not types.NoneType]
        if len(kinds) < len(typing.get_args(kind)) and text.lower() == "none":
            return None
        (kind,) = kinds
    if kind is str:
        return _unquoted(text)
    if typing.get_origin(kind) is Literal:
        lower = text.lower()  # None, as Python writes it, is the choice none
        return check_value(key, lower if lower == "none" else _unquoted(text), kind)
    try:
        value = _PARSERS[kind](text)
    except (ValueError, KeyError):
        value = text
    return check_value(key, value, kind)


def unknown_key(subject: str, key: str, known: Iterable[str]) -> UserError:
    """Returns the error for a key that `subject` does not have, with the nearest known one."""
    known = sorted(known)
    by_last_part = {k.split(".")[-1]: k for k in known}
    close = difflib.get_close_matches(key, known, n=1) or [
        by_last_part[k] for k in difflib.get_close_matches(key.split(".")[-1], by_last_part, n=1)
    ]
    hint = f"did you mean {close[0]!r}?" if close else f"keys are {', '.join(known)}."
    return UserError(f"{subject} has no key {_short(key)}; {hint}")


_PARSERS: dict[Any, Any] = {
    int: lambda text: int(text, 0),
    float: float,
    bool: lambda text: {"true": True, "false": False}[text.lower()],
}


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Conversion of the plain values of one source, for `build_dataclass` and `check_value`."""

    source: str
    ignore_unknown: bool

    def build(self, cls: type[T], raw: Any, prefix: str) -> T:
        """Returns a dataclass, whose keys errors call by `prefix` and name."""
        if not isinstance(raw, dict):
            raise self._wrong(prefix.removesuffix(".") or "the whole", "a group of keys", raw)
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
        subject = self.source or "Config"
        values: dict[str, Any] = {}
        for name, value in raw.items():
            if name in fields:
                values[name] = self.check(f"{prefix}{name}", value, hints[name])
            elif not self.ignore_unknown:
                raise unknown_key(subject, f"{prefix}{name}", [prefix + k for k in fields])
        for name, field in fields.items():
            if name not in raw and field.default is field.default_factory is dataclasses.MISSING:
                raise UserError(f"{subject} lacks the key {prefix + name!r}; add it.")
        return cls(**values)

    def check(self, key: str, value: Any, kind: Any) -> Any:
        """Returns a value as a `kind`."""
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return value
        if origin in (types.UnionType, typing.Union):
            return self._check_union(key, value, args)
        if origin is Literal:
            if not any(value == choice and type(value) is type(choice) for choice in args):
                raise self._wrong(key, f"one of {', '.join(map(str, args))}", value)
            return value
        if dataclasses.is_dataclass(kind):
            if isinstance(value, typing.cast(type, kind)):  # of a config file, and not of JSON
                value = {f.name: getattr(value, f.name) for f in dataclasses.fields(kind)}
            return self.build(typing.cast(type, kind), value, f"{key}.")
        if origin in (list, tuple) and isinstance(value, list | tuple):
            fixed = origin is tuple and args[-1] is not ...
            if fixed and len(value) != len(args):
                raise self._wrong(key, f"a list of {len(args)}", value)
            item_kinds = args if fixed else (args[0],) * len(value)
            items = zip(value, item_kinds, strict=True)
            return origin(self.check(f"{key}[{i}]", *item) for i, item in enumerate(items))
        if origin in (dict, Mapping) and isinstance(value, Mapping):
            return {
                self.check(f"a name in {key}", name, args[0]): self.check(
                    f"{key}.{name}", item, args[1]
                )
                for name, item in value.items()
            }
        if kind is int and type(value) is int and not -(2**63) <= value < 2**63:
            raise self._wrong(key, "a whole number of 64 bits", value)
        if kind is float and type(value) is int and abs(value) < 2**1023:
            return float(value)
        if origin or type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise self._wrong(key, _name_of(origin or kind), value)
        return value

    def _check_union(self, key: str, value: Any, members: tuple[Any, ...]) -> Any:
        """Returns a value as the first member of a union that it fits."""
        if value is None and types.NoneType in members:
            return None
        kinds = [kind for kind in members if kind is not types.NoneType]
        of_value = [kind for kind in kinds if isinstance(kind, type) and isinstance(value, kind)]
        if len(kinds) == 1 or of_value:
            return self.check(key, value, (of_value or kinds)[0])
        for kind in kinds:
            try:
                return self.check(key, value, kind)
            except UserError:
                continue
        names = (_name_of(typing.get_origin(kind) or kind) for kind in kinds)
        raise self._wrong(key, " or ".join(dict.fromkeys(names)), value)

    def _wrong(self, key: str, expected: str, value: Any) -> UserError:
        where = f"{self.source}: " if self.source else ""
        return UserError(f"{where}{key} must be {expected}, not {_short(value)}.")


def _name_of(kind: Any) -> str:
    """Returns a type as errors call it."""
    return _TYPE_NAMES.get(kind) or f"a {kind.__name__}"


def _unquoted(text: str) -> str:
    """Returns a Python string literal's text, and any other text as it is."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text
        if isinstance(value, str):
            return value
    return text


def _short(value: Any) -> str:
    """Returns a value as an error shows it, in at most some eighty characters."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = shown.maxlong = 80
    return shown.repr(value)
