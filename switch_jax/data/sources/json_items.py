"""Items of a JSON document, such as an array of objects; read as a stream."""

import io
from collections.abc import Iterator
from typing import Any

import ijson

from switch_jax.data.sources.bad_records import NOT_JSON, NOT_UTF8
from switch_jax.data.sources.compression import DamagedFile
from switch_jax.data.sources.plain_text import is_utf8

ARRAY_ITEMS = "item"  # the items of a document that is an array


def read_json_items(
    file: io.BufferedReader, path: str, field: str | None, items: str
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields the number of each item from 1, with its fields or the kind of a bad record.

    `path` and `field` are those of `record_files.RecordReader`, and not used.

    Args:
      items: where they are, as ijson writes it: `item` in an array, `data.item` in the array
        `data` of an object.

    Raises `DamagedFile` where the document ends early or is not JSON.
    """
    try:
        for number, item in enumerate(ijson.items(file, items, use_float=True), start=1):
            if not isinstance(item, dict):
                yield number, NOT_JSON
            else:
                yield number, item if is_utf8(str(item)) else NOT_UTF8
    except (ijson.JSONError, UnicodeDecodeError):
        raise DamagedFile from None


def is_json_array(file: io.BufferedReader) -> bool:
    """Whether a document begins as an array does; leaves the file where it is."""
    return file.peek(64)[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
