"""Texts of one file: a field of its records, by default `text`.

A text of more than `PART_CHARACTERS` comes in parts, which are to be joined.
"""

from collections.abc import Iterator
from typing import NamedTuple

from switch_jax.data.sources.bad_records import (
    EMPTY,
    NO_TEXT,
    NOT_UTF8,
    BadRecord,
    BadRecords,
    UnusableRecord,
)
from switch_jax.data.sources.plain_text import split_text
from switch_jax.data.sources.record_files import (
    PlainDocuments,
    Record,
    describe_fields,
    file_format,
    read_records,
)
from switch_jax.errors import UserError


class TextFormat(NamedTuple):
    """Place of the documents in a file: `data.text_field` and `data.documents`.

    Attributes:
      field: of each record; plain text has none.
      documents: of plain text.
    """

    field: str = "text"
    documents: PlainDocuments = "paragraphs"


USUAL_FORMAT = TextFormat()


def is_text_file(path: str) -> bool:
    """Whether `read_texts` can read a file of this name."""
    return file_format(path) is not None


def read_texts(path: str, bad: BadRecords, text_format: TextFormat = USUAL_FORMAT) -> Iterator[str]:
    """Yields the texts of a file in order, long ones in parts; adds bad records to `bad`.

    Of a long plain text, parts in front of bytes that are not UTF-8 have been yielded already.

    Raises `UserError` for an unknown name, for a missing package, and if `bad` does.
    """
    if not is_text_file(path):
        raise UserError(
            f"{path} has no known format; use .json, .jsonl, .ndjson, .csv, .tsv, .txt or"
            " .tfrecord, each also with .gz, .bz2, .xz or .zst, or .parquet or .arrow."
        )
    is_plain = file_format(path) == "txt"  # in parts already, which may be blank
    field = "text" if is_plain else text_format.field
    for record in read_records(path, field=field, documents=text_format.documents):
        if isinstance(record, BadRecord):
            bad.add(*record)
        else:
            yield from text_of_record(record, field, bad, is_plain)


def text_of_record(
    record: Record, field: str, bad: BadRecords, may_be_blank: bool = False
) -> Iterator[str]:
    """Yields the text of a record, a long one in parts; adds a record without text to `bad`."""
    text = record.fields.get(field)
    if isinstance(text, bytes):  # of Parquet
        try:
            text = text.decode()
        except UnicodeDecodeError:
            bad.add(NOT_UTF8, record.place)
            return
    if not isinstance(text, str):
        has = "" if field in record.fields else describe_fields(record.fields)
        bad.add(*UnusableRecord(NO_TEXT, has).at(record.place))
    elif not may_be_blank and (not text or text.isspace()):
        bad.add(EMPTY, record.place)
    else:
        yield from split_text(text)
