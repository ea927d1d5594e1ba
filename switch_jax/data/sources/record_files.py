"""Records of fine-tuning tasks, from the files in which people hold them.

| name                            | a record                                                |
|---------------------------------|---------------------------------------------------------|
| `….json`, `….jsonl`, `….ndjson` | a line: an object                                       |
| `….tsv`, `….csv`                | a line; the first one has the names of the fields       |
| `….parquet`                     | a row                                                   |
| `….tfrecord-00000-of-00001`     | a tf.train.Example; nested fields are called `idx/query` |

All but Parquet may be compressed, with `.gz` or `.zst` behind the name.
"""

import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from switch_jax.data.sources.bad_records import DAMAGED, MISSING, NOT_JSON, TOO_LONG, BadRecords
from switch_jax.data.sources.compression import DamagedFile, import_package, open_stream
from switch_jax.data.sources.tfrecord import tfrecord_fields, verified_records
from switch_jax.errors import UserError

Record = dict[str, Any]
Schema = Mapping[str, Any]
LABEL = int | str  # a class by its number or by its name


csv.field_size_limit(2**28)  # a text may be longer than the module's own 128 KiB


_NAME = re.compile(
    r"\.(json|jsonl|ndjson|tsv|csv|parquet|tfrecords?)(?:-\d+-of-\d+)?(\.gz|\.zst)?$"
)


def is_record_file(path: str) -> bool:
    """Whether a file has a name of the table above."""
    return _NAME.search(path) is not None


def record_format(path: str) -> str:
    """Which of the table's formats a file's name says; it must be one."""
    match = _NAME.search(path)
    assert match is not None
    return match[1]


def read_records(path: str, schema: Schema, bad: BadRecords) -> Iterator[Record]:
    """A file's records in order, with the fields of a schema; what cannot be read goes to `bad`.

    Args:
      schema: field → a type, several with `|`, `[type]` for a list, or a dict of fields.

    Raises `UserError` for a name that is not known, a package that is missing, a field that is
    missing or of another type, and where `bad` does.
    """
    name = _NAME.search(path)
    if name is None:
        raise UserError(
            f"{path} has no known format; use .jsonl, .tsv, .csv or .tfrecord, each also with .gz"
            " or .zst, or .parquet."
        )
    number = 0
    try:
        with epath.Path(path).open("rb") as file:
            read = _READERS[name[1]]
            opened = file if read is _parquet else open_stream(file, name[2], path)
            for number, record in enumerate(read(opened, path, bad), start=1):
                yield _fields(record, schema, f"{path}, record {number}", flat=read is _examples)
    except (DamagedFile, csv.Error, UnicodeDecodeError):
        bad.add(DAMAGED, f"{path}, record {number + 1}")
    except OSError:
        bad.add(MISSING, path)


def _fields(record: Record, schema: Schema, where: str, flat: bool, prefix: str = "") -> Record:
    """What a schema names of a record."""
    found: Record = {}
    for name, kind in schema.items():
        key = prefix + name if flat else name
        if isinstance(kind, dict):
            inner = record if flat else _parsed(record.get(name), "{")
            if not isinstance(inner, dict):
                raise UserError(f"{where} lacks the field {prefix + name!r}; add it.")
            found[name] = _fields(inner, kind, where, flat, f"{prefix}{name}/")
        elif key not in record:
            raise UserError(f"{where} lacks the field {prefix + name!r}; add it.")
        else:
            found[name] = _value(record[key], kind, f"{where}: the field {prefix + name!r}")
    return found


def _value(value: Any, kind: Any, what: str) -> Any:
    if isinstance(kind, list):
        values = _parsed(value, "[")
        if not isinstance(values, (list, tuple)):
            raise UserError(f"{what} is {value!r} and must be a list, as in JSON; correct it.")
        return [_value(v, kind[0], what) for v in values]
    if isinstance(value, list) and len(value) == 1:  # as a tf.train.Example has it
        value = value[0]
    if kind == LABEL:
        value = -1 if value is None or value == "" else value
    if isinstance(value, str) and not isinstance("", kind):  # as a line of text has it
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, float) and isinstance(0, kind) and value.is_integer():
        value = int(value)  # as a table with gaps has it
    if kind is float and isinstance(value, int):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind != LABEL):
        named = getattr(kind, "__name__", kind)
        raise UserError(f"{what} is {value!r} and must be {named}; correct it.")
    return value


def _parsed(value: Any, begins: str) -> Any:
    """`value`, or where it is the JSON of a list or an object, as a column has it, that."""
    if isinstance(value, str) and value.startswith(begins):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _lines(file: io.BufferedReader, path: str, bad: BadRecords) -> Iterator[Record]:
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
            if b"\\ud" in line.lower():
                json.dumps(record, ensure_ascii=False).encode()  # half of a pair is no text
        except ValueError:  # UnicodeDecodeError and UnicodeEncodeError are such
            record = None
        if isinstance(record, dict):
            yield record
        else:
            bad.add(NOT_JSON, f"{path}, line {number}")


def _table(file: io.BufferedReader, path: str, bad: BadRecords) -> Iterator[Record]:
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    if re.search(r"\.csv(\.|$)", path):
        yield from csv.DictReader(text)
    else:  # GLUE's have quotation marks that mean nothing
        yield from csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE)


def _parquet(file: Any, path: str, bad: BadRecords) -> Iterator[Record]:
    pyarrow = import_package("pyarrow", path)
    try:
        for batch in import_package("pyarrow.parquet", path).ParquetFile(file).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError):
        raise DamagedFile from None


def _examples(file: io.BufferedReader, path: str, bad: BadRecords) -> Iterator[Record]:
    def damaged(number: int, too_long: bool) -> None:
        bad.add(TOO_LONG if too_long else DAMAGED, f"{path}, record {number}")

    for number, example in verified_records(file, path, damaged):
        try:
            record = tfrecord_fields(example)
        except ValueError:
            damaged(number, False)
        else:
            yield record


_READERS: dict[str, Callable[[Any, str, BadRecords], Iterator[Record]]] = {
    **dict.fromkeys(("json", "jsonl", "ndjson"), _lines),
    **dict.fromkeys(("tsv", "csv"), _table),
    "parquet": _parquet,
    **dict.fromkeys(("tfrecord", "tfrecords"), _examples),
}
