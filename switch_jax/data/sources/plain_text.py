"""Plain text: documents are paragraphs or lines; long ones come in parts."""

import io
from collections.abc import Iterator
from typing import Any

from switch_jax.data.sources.bad_records import DAMAGED, NOT_UTF8
from switch_jax.data.sources.compression import DamagedFile

PART_CHARACTERS = 2**20  # a longer document is split


def split_text(text: str) -> Iterator[str]:
    """Yields parts of at most `PART_CHARACTERS`, which end in whitespace if they contain any."""
    begin = 0
    while len(text) - begin > PART_CHARACTERS:
        part = text[begin : begin + PART_CHARACTERS]
        if not part[-1].isspace():
            last_word = part.rsplit(None, 1)[-1]
            part = part.removesuffix(last_word) or part
        yield part
        begin += len(part)
    yield text[begin:]


def read_paragraphs(
    file: io.BufferedReader, path: str, field: str | None
) -> Iterator[tuple[int, dict[str, Any] | str | None]]:
    """Reads paragraphs, or their parts, as the field `text`; see `record_files.RecordReader`.

    Blank lines separate paragraphs. Line ends become "\\n"; the last one of a document is left out.
    Bytes that are not UTF-8 end a document, whose earlier parts have been yielded by then.
    """
    # Bytes that are not UTF-8 become lone surrogates.
    lines = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape")
    number = 0
    pending: list[str] = []  # of the current document, not yielded yet
    size = 0  # characters
    is_good = begins_line = True
    try:
        while line := lines.readline(PART_CHARACTERS):  # or a part of a line
            number += begins_line
            is_whole = line.endswith("\n") or len(line) < PART_CHARACTERS
            if begins_line and is_whole and line.isspace():
                yield number, _last_part(pending)
                pending, size, is_good = [], 0, True
            elif is_good and not is_utf8(line):
                yield number, NOT_UTF8
                pending, size, is_good = [], 0, False
            elif is_good:
                pending.append(line)
                size += len(line)
                if size > PART_CHARACTERS:
                    *parts, rest = split_text("".join(pending))
                    for part in parts:
                        yield number, {"text": part}
                    pending, size = [rest], len(rest)
            begins_line = line.endswith("\n")
        yield number, _last_part(pending)
    except DamagedFile:
        yield number + 1, DAMAGED


def read_lines(
    file: io.BufferedReader, path: str, field: str | None
) -> Iterator[tuple[int, dict[str, Any] | str | None]]:
    """Reads lines that are not blank, or their parts, as the field `text`."""
    lines = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape")
    number = 0
    is_good = begins_line = True
    try:
        while line := lines.readline(PART_CHARACTERS):  # or a part of a line
            number += begins_line
            is_good |= begins_line
            begins_line = line.endswith("\n")
            if is_good and not is_utf8(line):
                is_good = False
                yield number, NOT_UTF8
            elif is_good:
                yield number, None if line.isspace() else {"text": line.removesuffix("\n")}
    except DamagedFile:
        yield number + 1, DAMAGED


def is_utf8(text: str) -> bool:
    """Whether `text` can be encoded: lone surrogates cannot, such as "\\ud800" in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _last_part(pending: list[str]) -> dict[str, Any] | None:
    text = "".join(pending).removesuffix("\n")
    return {"text": text} if text else None
