"""Records of JSON, plain text, tables, TFRecords, Parquet and Arrow, on a disk or in a bucket.

| name                                      | a record                                             |
|-------------------------------------------|------------------------------------------------------|
| `….json`, `….jsonl`, `….ndjson`           | a line: an object; of a `.json` that is an array,    |
|                                           | an item: an object                                   |
| `….txt`                                   | a paragraph, up to a blank line, or a line: `text`   |
| `….tsv`, `….csv`                          | a line; the first one has the names of the fields    |
| `….tfrecord`, `….tfrecord-00000-of-00004` | a tf.train.Example: lists of texts or numbers        |
| `….parquet`, `….arrow`                    | a row                                                |

All but the last two may be compressed: `.gz`, `.bz2`, `.xz` or `.zst` behind the name. Files
stream: memory is bounded by `MAX_RECORD_BYTES`, however long a file or a record is.
"""

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from etils import epath

from switch_jax.data.sources.arrow_files import read_arrow, read_parquet
from switch_jax.data.sources.bad_records import (
    DAMAGED,
    MISSING,
    NOT_EXAMPLE,
    NOT_JSON,
    NOT_UTF8,
    TOO_LONG,
    UNEVEN,
    BadRecord,
)
from switch_jax.data.sources.compression import DamagedFile, open_stream
from switch_jax.data.sources.json_items import ARRAY_ITEMS, is_json_array, read_json_items
from switch_jax.data.sources.plain_text import is_utf8, read_lines, read_paragraphs
from switch_jax.data.sources.tfrecord import MAX_RECORD_BYTES, parse_example, read_tfrecords
from switch_jax.errors import UserError

Fields = dict[str, Any]
PlainDocuments = Literal["paragraphs", "lines"]

# (file, its path, the field to read or None: all) -> number of each record from 1, with its
# fields, or the kind of a bad record, or None: nothing, as a blank line.
RecordReader = Callable[[Any, str, str | None], Iterator[tuple[int, Fields | str | None]]]

_NAME = re.compile(
    r"\.(json|jsonl|ndjson|txt|tsv|csv|tfrecords?|(?:parquet|arrow)(?!.*\.))(?:-\d+-of-\d+)?(\.gz|\.bz2|\.xz|\.zst)?$"
)
_DESCRIPTIONS = (
    *("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "features.json"),
    "state.json",
)
_BLOCK_BYTES = 2**16  # read at once
_SHOWN_FIELDS = 8  # of a record, in a message

csv.field_size_limit(MAX_RECORD_BYTES)  # csv's default is 128 KiB


class Record(NamedTuple):
    """A record that was read.

    Attributes:
      place: such as "/data/a.json.gz, line 17".
      fields: values by name.
    """

    place: str
    fields: Fields


def file_format(path: str) -> str | None:
    """Returns the format of a file by its name, such as "jsonl"; None for any other name.

    Files in which TFDS and `datasets` describe their data are no files of data.
    """
    match = _NAME.search(path)
    return None if match is None or os.path.basename(path) in _DESCRIPTIONS else match[1]


def describe_fields(fields: Fields) -> str:
    """Returns which fields a record has, for the message that one is missing; "" without any."""
    names = ", ".join(map(repr, list(fields)[:_SHOWN_FIELDS]))
    more = ", …" if len(fields) > _SHOWN_FIELDS else ""
    return f"it has {names}{more}" if names else ""


def read_records(
    path: str,
    field: str | None = None,
    columns: Sequence[str] | None = None,
    items: str | None = None,
    documents: PlainDocuments = "paragraphs",
) -> Iterator[Record | BadRecord]:
    """Yields the records of a file in order, and a `BadRecord` for each that cannot be read.

    Behind a bad record, reading continues if it can. Some damage is noticed late: records in front
    of the damage in a compressed file may be wrong already.

    Args:
      path: has one of the names in the table above.
      field: only this field is read, and of TFRecords its only value; other fields may be bad.
      columns: names of the columns of a table whose first line has none.
      items: where the records of a JSON document are; see `read_json_items`.
      documents: what a record of plain text is.

    Raises `UserError` if a package is missing.
    """
    match = _NAME.search(path)
    assert match is not None
    unit, read = _READERS[match[1]]
    if match[1] == "txt" and documents == "lines":
        read = read_lines
    if columns is not None:
        read = partial(_read_table, columns=columns)
    number = 0
    try:
        with epath.Path(path).open("rb") as file:
            stream = (
                file if read in (read_parquet, read_arrow) else open_stream(file, match[2], path)
            )
            if match[1] == "json" and (items or is_json_array(stream)):
                unit, read = "item", partial(read_json_items, items=items or ARRAY_ITEMS)
            for number, record in read(stream, path, field):
                if isinstance(record, str):
                    yield BadRecord(record, f"{path}, {unit} {number}")
                elif record is not None:
                    yield Record(f"{path}, {unit} {number}", record)
    except DamagedFile:
        yield BadRecord(DAMAGED, f"{path}, {unit} {number + 1}")
    except OSError:
        yield BadRecord(MISSING, path)
    except ImportError as error:  # of the library that opens such a bucket
        raise UserError(f"{path} needs a package that is missing: {error}.") from error


def _read_json_lines(
    file: io.BufferedReader, path: str, field: str | None
) -> Iterator[tuple[int, Fields | str | None]]:
    number = 0
    while line := file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MAX_RECORD_BYTES:
            yield number, TOO_LONG
            while line and not line.endswith(b"\n"):
                line = file.readline(_BLOCK_BYTES)
        else:
            yield number, None if not line or line.isspace() else _parse_json(line, field)


def _parse_json(line: bytes, field: str | None) -> Fields | str:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return NOT_UTF8
    except (ValueError, RecursionError):
        return NOT_JSON
    if not isinstance(record, dict):
        return NOT_JSON
    used = record if field is None else record.get(field)
    if not is_utf8(used if isinstance(used, str) else json.dumps(used, ensure_ascii=False)):
        return NOT_UTF8  # half of a surrogate pair
    return record


def _read_table(
    file: io.BufferedReader,
    path: str,
    field: str | None,
    columns: Sequence[str] | None = None,
) -> Iterator[tuple[int, Fields | str | None]]:
    lines = _RowLines(io.TextIOWrapper(file, "utf-8-sig", newline=""))
    if file_format(path) == "csv":
        rows = csv.DictReader(lines, columns)
    else:  # quotation marks mean nothing in GLUE's tables
        rows = csv.DictReader(lines, columns, delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        for number, row in enumerate(rows, start=1):
            lines.size = 0
            # DictReader keeps surplus values under the name None, and fills missing ones with None.
            yield number, UNEVEN if None in row or None in row.values() else row
    except (csv.Error, UnicodeDecodeError):
        raise DamagedFile from None


class _RowLines:
    """The lines of a table; raises `DamagedFile` where a row has more than `MAX_RECORD_BYTES`.

    size: characters of the current row so far; whoever has read a row sets it to 0.
    """

    def __init__(self, text: io.TextIOWrapper):
        self._text = text
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_RECORD_BYTES - self.size + 1)
        self.size += len(line)
        if self.size > MAX_RECORD_BYTES:
            raise DamagedFile
        if not line:
            raise StopIteration
        return line


def _read_examples(
    file: io.BufferedReader, path: str, field: str | None
) -> Iterator[tuple[int, Fields | str | None]]:
    for number, record in enumerate(read_tfrecords(file, path), start=1):
        yield number, record if isinstance(record, str) else _parse_features(record, field)


def _parse_features(example: bytes, field: str | None) -> Fields | str:
    try:
        features = parse_example(example, field)
    except UnicodeDecodeError:
        return NOT_UTF8
    except ValueError:
        return NOT_EXAMPLE
    if field is None:
        return features
    return {name: values[0] for name, values in features.items() if len(values) == 1}


# Format → the unit of its records, and their reader.
_READERS: dict[str, tuple[str, RecordReader]] = {
    **dict.fromkeys(("json", "jsonl", "ndjson"), ("line", _read_json_lines)),
    "txt": ("line", read_paragraphs),
    **dict.fromkeys(("tsv", "csv"), ("record", _read_table)),
    **dict.fromkeys(("tfrecord", "tfrecords"), ("record", _read_examples)),
    "parquet": ("row", read_parquet),
    "arrow": ("row", read_arrow),
}
