"""Descriptions of the configuration's keys: types, defaults, and the comments of the schema."""

import ast
import dataclasses
import functools
import inspect
import io
import tokenize
import typing
from typing import Any, Literal, NamedTuple

from switch_jax.config import schema
from switch_jax.config.schema import Config


class KeyDescription(NamedTuple):
    """Values, default and meaning of a key, such as `moe.router`.

    Attributes:
      values: type, or the values to choose from, separated by commas.
      default: default value.
      text: its comment in the schema.
    """

    values: str
    default: Any
    text: str


@functools.cache
def describe_keys() -> dict[str, KeyDescription]:
    """Returns the description of every dotted key, in the order of the schema."""
    comments = _comments()
    described = {}
    for one in dataclasses.fields(Config):
        group = getattr(Config(), one.name)
        is_group = dataclasses.is_dataclass(group)
        owner, prefix = (type(group), f"{one.name}.") if is_group else (Config, "")
        types = typing.get_type_hints(owner)
        for key in dataclasses.fields(owner) if is_group else [one]:
            default = getattr(group, key.name) if is_group else group
            text = comments[owner.__name__, key.name]
            described[prefix + key.name] = KeyDescription(_values(types[key.name]), default, text)
    return described


@functools.cache
def describe_groups() -> dict[str, str]:
    """Returns the first sentence about every group of keys, by its name."""
    groups = {one.name: type(getattr(Config(), one.name)) for one in dataclasses.fields(Config)}
    return {
        name: (inspect.getdoc(group) or "").partition("\n")[0]
        for name, group in groups.items()
        if dataclasses.is_dataclass(group)
    }


def _values(annotation: Any) -> str:
    """Returns the text of a type: values of a `Literal`, other types by name."""
    if typing.get_origin(annotation) is Literal:
        return ", ".join(typing.get_args(annotation))
    parts = typing.get_args(annotation) or (annotation,)
    return " or ".join("None" if part is type(None) else part.__name__ for part in parts)


def _comments() -> dict[tuple[str, str], str]:
    """Returns the comment of every field of the schema's classes, by class and field.

    It is the comment behind the field or, without one, that in the lines above it.
    """
    source = inspect.getsource(schema)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.split("\n")
    found = {}
    for owner in ast.parse(source).body:
        fields = owner.body if isinstance(owner, ast.ClassDef) else []
        for node in fields:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno
                while lines[first - 2].lstrip().startswith("#"):
                    first -= 1
                above = [comments[line] for line in range(first, node.lineno)]
                behind = comments.get(node.end_lineno or node.lineno)
                text = behind or " ".join(above)
                assert isinstance(owner, ast.ClassDef)
                found[owner.name, node.target.id] = text
    return found
