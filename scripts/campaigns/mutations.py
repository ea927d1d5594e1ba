"""Mutations of JSON documents: values of other types and sizes, and files that are no such JSON."""

import copy
import json
from collections.abc import Iterator
from typing import Any

_DEPTH = 100_000
_WRONG: dict[str, Any] = {
    "list": [],
    "object": {},
    "text": "seventeen",
    "huge": 10**30,
    "negative": -7,
    "boolean": True,
}
# Files that no document can be read from.
WRONG_FILES: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"model_type: t5\n",
    "cut": b'{"a": [1, 2',
    "list": b"[]",
    "text": b'"text"',
    "null": b"null",
    "number": b"7",
    "empty object": b"{}",
    "deep list": b"[" * _DEPTH + b"]" * _DEPTH,
    "deep object": b'{"a":' * _DEPTH + b"1" + b"}" * _DEPTH,
    "Latin-1": '{"größe": 1}'.encode("latin-1"),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NUL bytes": b"\0" * 100,
}


def wrong_values(document: Any) -> Iterator[tuple[str, bytes, bool]]:
    """Yields copies of a document in which one value is another.

    Yields what is changed, the content, and whether the value has another type.
    """
    for path, value in _leaves(document):
        for name, wrong in _WRONG.items():
            other_type = type(wrong) is not type(value) and not (
                _is_number(wrong) and _is_number(value)
            )
            changed = copy.deepcopy(document)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = wrong
            label = f"{'.'.join(map(str, path))} is {name}"
            yield label, json.dumps(changed).encode(), other_type


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _leaves(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields path and value of every item in a document, folders of values included."""
    items: Any = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document)
    for key, value in items:
        yield (*path, key), value
        yield from _leaves(value, (*path, key))
