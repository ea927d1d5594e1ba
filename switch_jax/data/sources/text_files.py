"""Texts of one file: the field `text` of its records.

A text of more than `PART_CHARACTERS` comes in parts, which are to be joined.
"""

from collections.abc import Iterator

from switch_jax.data.sources.bad_records import EMPTY, NO_TEXT, NOT_UTF8, BadRecord, BadRecords
from switch_jax.data.sources.plain_text import split_text
from switch_jax.data.sources.record_files import Record, file_format, read_records
from switch_jax.errors import UserError


def is_text_file(path: str) -> bool:
    """Whether `read_texts` can read a file of this name."""
    return file_format(path) not in (None, "tsv", "csv")


def read_texts(path: str, bad: BadRecords) -> Iterator[str]:
    """Yields the texts of a file in order, long ones in parts; adds bad records to `bad`.

    Of a long plain text, parts in front of bytes that are not UTF-8 have been yielded already.

    Raises `UserError` for an unknown name, for a missing package, and if `bad` does.
    """
    if not is_text_file(path):
        raise UserError(
            f"{path} has no known format; use .json, .jsonl, .ndjson, .txt or .tfrecord, each"
            " also with .gz or .zst, or .parquet."
        )
    is_plain = file_format(path) == "txt"  # in parts already, which may be blank
    for record in read_records(path, field="text"):
        text = record if isinstance(record, BadRecord) else _text_of(record, is_plain)
        if isinstance(text, BadRecord):
            bad.add(*text)
        else:
            yield from split_text(text)


def _text_of(record: Record, may_be_blank: bool) -> str | BadRecord:
    text = record.fields.get("text")
    if isinstance(text, bytes):  # of Parquet
        try:
            text = text.decode()
        except UnicodeDecodeError:
            return BadRecord(NOT_UTF8, record.place)
    if not isinstance(text, str):
        return BadRecord(NO_TEXT, record.place)
    if not may_be_blank and (not text or text.isspace()):
        return BadRecord(EMPTY, record.place)
    return text
