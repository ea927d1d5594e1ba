"""The texts of one file: JSON lines, plain text, TFRecords or Parquet, on a disk or in a bucket.

| name                                       | a record                               |
|--------------------------------------------|----------------------------------------|
| `….json`, `….jsonl`, `….ndjson`            | a line: an object with a string `text` |
| `….txt`                                    | lines, up to a blank one               |
| `….tfrecord`, `….tfrecord-00000-of-00004`  | a tf.train.Example with a bytes `text` |
| `….parquet`                                | a row with a string `text`             |

All but Parquet may be compressed, with `.gz` or `.zst` behind the name. Files stream: memory is
bounded by `MAX_RECORD`, however long a file, a line or a document is.
"""

import codecs
import io
import itertools
import json
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from switch_jax.data.sources.bad_records import (
    DAMAGED,
    EMPTY,
    MISSING,
    NO_TEXT,
    NOT_JSON,
    NOT_UTF8,
    TOO_LONG,
    BadRecords,
)
from switch_jax.data.sources.compression import DamagedFile, import_package, open_stream
from switch_jax.data.sources.tfrecord import tfrecord_texts, verified_records
from switch_jax.errors import UserError

PART_BYTES = 2**20  # characters
MAX_RECORD_BYTES = 2**28  # bytes of a line of JSON
_NAME = re.compile(
    r"\.(json|jsonl|ndjson|txt|tfrecords?|parquet(?!.*\.))(?:-\d+-of-\d+)?(\.gz|\.zst)?$"
)
_BLOCK = 2**16  # bytes read at once
_ROWS = 64  # of Parquet, decoded at once


def is_text_file(name: str) -> bool:
    """Whether `texts` can read a file of this name."""
    return _NAME.search(name) is not None


def read_texts(path: str, bad: BadRecords) -> Iterator[str]:
    """A file's texts in order; one of more than `PART` characters in parts, to be joined.

    Parts end in whitespace where there is some. Line ends of plain text become "\\n", and the
    last one is left out. Blank lines among lines of JSON are nothing.

    What cannot be read is added to `bad`, and reading goes on behind it where it can. Some is
    noticed late: of a damaged compressed file, texts before the place may be wrong already; of
    a long plain text, parts before bytes that are not UTF-8 are out already.

    Raises `UserError` for a name that is not known, for a package that is missing, and where
    `bad` does.
    """
    name = _NAME.search(path)
    if name is None:
        raise UserError(
            f"{path} has no known format; use .json, .jsonl, .ndjson, .txt or .tfrecord, each"
            " also with .gz or .zst, or .parquet."
        )
    read, unit = _READERS[name[1]]
    place = _Place(path, unit, bad)
    try:
        with epath.Path(path).open("rb") as file:
            if read is not _parquet:
                file = open_stream(file, name[2], path)
            yield from read(file, place)
    except DamagedFile:
        place.number += 1
        place.add(DAMAGED)
    except OSError:
        bad.add(MISSING, path)
    except ImportError as error:  # of what opens such a bucket
        raise UserError(f"{path} needs a package that is missing: {error}.") from error


class _Bad(Exception):
    """A record is bad."""

    def __init__(self, kind: str):
        self.kind = kind


class _Place:
    """How many records of a file have been read."""

    def __init__(self, path: str, unit: str, bad: BadRecords):
        self.path = path
        self.number = 0
        self._unit = unit
        self._bad = bad

    def add(self, kind: str) -> None:
        """Counts the record read last as bad."""
        self._bad.add(kind, f"{self.path}, {self._unit} {self.number}")

    def parts(self, text_of: Callable[[Any], str], record: Any) -> Iterator[str]:
        """A record's text in parts; nothing where it is bad."""
        try:
            text = text_of(record)
            if not text or text.isspace():
                raise _Bad(EMPTY)
        except _Bad as bad:
            self.add(bad.kind)
        else:
            yield from _parts(text)


def _parts(text: str) -> Iterator[str]:
    begin = 0
    while len(text) - begin > PART_BYTES:
        part = text[begin : begin + PART_BYTES]
        if not part[-1].isspace():
            last_word = part.rsplit(None, 1)[-1]
            part = part.removesuffix(last_word) or part
        yield part
        begin += len(part)
    yield text[begin:]


def _json_lines(file: io.BufferedReader, place: _Place) -> Iterator[str]:
    while line := file.readline(MAX_RECORD_BYTES + 1):
        place.number += 1
        if place.number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MAX_RECORD_BYTES:
            place.add(TOO_LONG)
            while line and not line.endswith(b"\n"):
                line = file.readline(_BLOCK)
        elif line and not line.isspace():
            yield from place.parts(_json_text, line)


def _json_text(line: bytes) -> str:
    try:
        record = json.loads(_decoded(line))
    except (ValueError, RecursionError):
        raise _Bad(NOT_JSON) from None
    if not isinstance(record, dict):
        raise _Bad(NOT_JSON)
    text = record.get("text")
    if not isinstance(text, str):
        raise _Bad(NO_TEXT)
    if not _is_utf8(text):
        raise _Bad(NOT_UTF8)
    return text


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _Bad(NOT_UTF8) from None


def _is_utf8(text: str) -> bool:
    """Whether it can be encoded: lone surrogates cannot, such as "\\ud800" in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain_text(file: io.BufferedReader, place: _Place) -> Iterator[str]:
    # Bytes that are not UTF-8 become lone surrogates.
    reader = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape")
    document: list[str] = []  # what of it is not out yet
    size = 0
    good = begins = True
    while line := reader.readline(PART_BYTES):  # or a part of one
        place.number += begins
        blank = begins and line.isspace() and (line.endswith("\n") or len(line) < PART_BYTES)
        begins = line.endswith("\n")
        if blank:
            yield from _last_part(document)
            document, size, good = [], 0, True
        elif good and not _is_utf8(line):
            place.add(NOT_UTF8)
            document, size, good = [], 0, False
        elif good:
            document.append(line)
            size += len(line)
            if size > PART_BYTES:
                *parts, rest = _parts("".join(document))
                yield from parts
                document, size = [rest], len(rest)
    yield from _last_part(document)


def _last_part(document: list[str]) -> Iterator[str]:
    if text := "".join(document).removesuffix("\n"):
        yield text


def _tfrecords(file: io.BufferedReader, place: _Place) -> Iterator[str]:
    def damaged(number: int, too_long: bool) -> None:
        place.number = number
        place.add(TOO_LONG if too_long else DAMAGED)

    for number, example in verified_records(file, place.path, damaged):
        place.number = number
        yield from place.parts(_example_text, example)


def _example_text(example: bytes) -> str:
    try:
        values = tfrecord_texts(example, "text")
    except ValueError:
        values = None
    if values is None or len(values) != 1:
        raise _Bad(NO_TEXT)
    return _decoded(values[0])


def _parquet(file: Any, place: _Place) -> Iterator[str]:
    pyarrow = import_package("pyarrow", place.path)
    damage = (pyarrow.ArrowException, OSError, ValueError)
    # TensorFlow's files for buckets lack `closed`.
    handle = types.SimpleNamespace(
        read=file.read, seek=file.seek, tell=file.tell, close=lambda: None, closed=False
    )
    try:
        # Without a buffer it would hold a column of a row group, which may be the whole file's.
        opened = import_package("pyarrow.parquet", place.path).ParquetFile(
            handle, buffer_size=_BLOCK, pre_buffer=False, page_checksum_verification=True
        )
    except damage:
        raise DamagedFile from None

    def rows(group: int, at_once: int) -> Iterator[bytes | None]:
        for batch in opened.iter_batches(at_once, [group], ["text"]):
            try:
                column = batch.column("text").cast(pyarrow.large_binary())
            except (KeyError, pyarrow.ArrowNotImplementedError):  # none, or one without text
                yield from [None] * batch.num_rows
            else:
                yield from column.to_pylist()

    for group in range(opened.num_row_groups):
        begin = place.number
        for at_once in (_ROWS, 1):  # in front of damage one by one, or others went with it
            try:
                for data in itertools.islice(rows(group, at_once), place.number - begin, None):
                    place.number += 1
                    yield from place.parts(_row_text, data)
                break
            except damage:
                pass
        else:
            place.number += 1
            place.add(DAMAGED)
        place.number = begin + opened.metadata.row_group(group).num_rows


def _row_text(data: bytes | None) -> str:
    if data is None:
        raise _Bad(NO_TEXT)
    return _decoded(data)


_READERS: dict[str, tuple[Callable[[Any, _Place], Iterator[str]], str]] = {
    **dict.fromkeys(("json", "jsonl", "ndjson"), (_json_lines, "line")),
    "txt": (_plain_text, "line"),
    **dict.fromkeys(("tfrecord", "tfrecords"), (_tfrecords, "record")),
    "parquet": (_parquet, "row"),
}
