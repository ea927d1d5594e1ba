"""Records of fine-tuning tasks, with the fields and types of the task's schema.

Lists and objects may be JSON in a column of text. Nested fields of a tf.train.Example are called
`idx/query`.
"""

import contextlib
import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from switch_jax.data.sources.bad_records import BadRecord, BadRecords
from switch_jax.data.sources.record_files import Fields, file_format, read_records
from switch_jax.errors import UserError

Schema = Mapping[str, Any]
LABEL = int | str  # a class by its number or by its name


def is_task_file(path: str) -> bool:
    """Whether `read_task_records` can read a file of this name."""
    return file_format(path) not in (None, "txt")


def read_task_records(path: str, schema: Schema, bad: BadRecords) -> Iterator[Fields]:
    """Yields the records of a file in order, with the fields of `schema`; adds others to `bad`.

    Args:
      schema: field → a type, several with `|`, `[type]` for a list, or a dict of fields.

    Raises `UserError` for an unknown name, for a missing package, for a field that is missing or of
    another type, and if `bad` does.
    """
    if not is_task_file(path):
        raise UserError(
            f"{path} has no known format; use .jsonl, .tsv, .csv or .tfrecord, each also with .gz"
            " or .zst, or .parquet."
        )
    is_flat = file_format(path) in ("tfrecord", "tfrecords")
    for record in read_records(path):
        if isinstance(record, BadRecord):
            bad.add(*record)
        else:
            yield _select_fields(record.fields, schema, record.place, is_flat)


def _select_fields(
    fields: Fields, schema: Schema, place: str, is_flat: bool, prefix: str = ""
) -> Fields:
    """Returns the fields of `schema`; `is_flat`: nested ones have names such as `idx/query`."""
    selected: Fields = {}
    for name, kind in schema.items():
        key = prefix + name if is_flat else name
        if isinstance(kind, dict):
            inner = fields if is_flat else _parse_json(fields.get(name), "{")
            if not isinstance(inner, dict):
                raise UserError(f"{place} lacks the field {prefix + name!r}; add it.")
            selected[name] = _select_fields(inner, kind, place, is_flat, f"{prefix}{name}/")
        elif key not in fields:
            raise UserError(f"{place} lacks the field {prefix + name!r}; add it.")
        else:
            selected[name] = _convert(fields[key], kind, f"{place}: the field {prefix + name!r}")
    return selected


def _convert(value: Any, kind: Any, description: str) -> Any:
    """Returns `value` with the type `kind`; raises `UserError` if it is of another type."""
    if isinstance(kind, list):
        values = _parse_json(value, "[")
        if not isinstance(values, (list, tuple)):
            raise UserError(
                f"{description} is {reprlib.repr(value)} and must be a list, as in JSON; correct"
                " it."
            )
        return [_convert(v, kind[0], description) for v in values]
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
        name = getattr(kind, "__name__", kind)
        raise UserError(f"{description} is {reprlib.repr(value)} and must be {name}; correct it.")
    return value


def _parse_json(value: Any, begin: str) -> Any:
    """Returns the list or object that a text is the JSON of, if it begins so; else `value`."""
    if isinstance(value, str) and value.startswith(begin):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value
