"""Records of fine-tuning tasks, with the fields and types of the task's schema.

Lists and objects may be JSON in a column of text. Nested fields of a tf.train.Example are called
`idx/query`.
"""

import contextlib
import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from switch_jax.data.sources.bad_records import UnusableRecord
from switch_jax.data.sources.record_files import Fields, describe_fields

Schema = Mapping[str, Any]
LABEL = int | str  # a class by its number or by its name
_TYPE_NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    LABEL: "class's name or number",
    str | list: "text, nor a list",
}


def select_fields(fields: Fields, schema: Schema, is_flat: bool = False) -> Fields:
    """Returns the fields of `schema`, with its types.

    Args:
      schema: field → a type, several with `|`, `[type]` for a list, or a dict of fields.
      is_flat: whether nested fields have names such as `idx/query`.

    Raises `UnusableRecord` if a field is missing or of another type.
    """
    return _select_fields(fields, schema, is_flat, "")


def _select_fields(fields: Fields, schema: Schema, is_flat: bool, prefix: str) -> Fields:
    selected: Fields = {}
    for name, kind in schema.items():
        path = prefix + name
        key = path if is_flat else name
        if isinstance(kind, dict):
            inner = fields if is_flat else _parse_json(fields.get(name), "{")
            if not isinstance(inner, dict):
                raise UnusableRecord(f"without the field {path!r}", describe_fields(fields))
            selected[name] = _select_fields(inner, kind, is_flat, f"{path}/")
        elif key not in fields:
            raise UnusableRecord(f"without the field {path!r}", describe_fields(fields))
        else:
            selected[name] = _convert(fields[key], kind, path)
    return selected


def _convert(value: Any, kind: Any, name: str) -> Any:
    """Returns `value` with the type `kind`; raises `UnusableRecord` if it is of another type."""
    if isinstance(kind, list):
        values = _parse_json(value, "[")
        if not isinstance(values, (list, tuple)):
            raise _wrong_type(name, value, "list, as in JSON")
        return [_convert(v, kind[0], name) for v in values]
    if isinstance(value, list) and len(value) == 1:  # as in a tf.train.Example
        value = value[0]
    if kind == LABEL:
        value = -1 if value is None or value == "" else value
    if isinstance(value, str) and not isinstance("", kind):  # as in a table
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, float) and isinstance(0, kind) and value.is_integer():
        value = int(value)  # as in a column of integers with gaps
    if kind is float and isinstance(value, int):
        value = float(value) if abs(value) < 2**1023 else math.inf
    if not isinstance(value, kind) or (isinstance(value, bool) and kind != LABEL):
        raise _wrong_type(name, value, _TYPE_NAMES[kind])
    return value


def _wrong_type(name: str, value: Any, kind: str) -> UnusableRecord:
    return UnusableRecord(f"with a {name!r} that is no {kind}", f"it is {reprlib.repr(value)}")


def _parse_json(value: Any, begin: str) -> Any:
    """Returns the list or object that a text is the JSON of, if it begins so; else `value`."""
    if isinstance(value, str) and value.startswith(begin):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value
