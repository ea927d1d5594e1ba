"""Files of prompts: lines of text, or JSON lines with further fields."""

from pathlib import Path
from typing import Any, NamedTuple

from switch_jax.config import parse_json
from switch_jax.data import read_text_file
from switch_jax.errors import UserError
from switch_jax.inference.prompts import Prompt

_TEXT_FIELDS = ("text", "inputs")  # the latter as in files of pairs


class PromptRecord(NamedTuple):
    """A prompt, and the fields of its line."""

    prompt: Prompt
    fields: dict[str, Any]


def read_prompts(path: Path, prefix: str = "") -> list[PromptRecord]:
    """Returns the prompts of a file in UTF-8, in order.

    A line of a `.jsonl` is an object with the input as `text` or `inputs` and, if its answer has a
    forced beginning, `prefix`; blank lines are left out. A line of any other file is an input.

    Args:
      path: the file.
      prefix: the forced beginning of all answers.

    Raises `UserError`, which names the line, for what is no such file.
    """
    # Only a line feed ends a text; other line separators belong to it.
    lines = read_text_file(path).removesuffix("\n").split("\n")
    if path.suffix != ".jsonl":
        return [
            PromptRecord(Prompt(line, prefix, f"{path}, line {number}"), {"text": line})
            for number, line in enumerate(lines, start=1)
        ]
    records = [
        _read_object(line, f"{path}, line {number}", prefix)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not records:
        raise UserError(f"{path} has no JSON objects; name a file with texts.")
    return records


def _read_object(line: str, place: str, prefix: str) -> PromptRecord:
    fields = parse_json(line, place)
    if not isinstance(fields, dict):
        raise UserError(f'{place} is no JSON object; write {{"text": …}}.')
    names = [name for name in _TEXT_FIELDS if name in fields]
    if len(names) != 1:
        found = "both `text` and `inputs`" if names else "neither `text` nor `inputs`"
        raise UserError(f"{place} has {found}; give it one of them.")
    for name in (*names, "prefix"):
        if not isinstance(fields.get(name, ""), str):
            raise UserError(f"{place}: {name} is no text; put it in quotation marks.")
    if prefix and "prefix" in fields:
        raise UserError(f"{place} has a prefix of its own; leave out that, or --prefix.")
    return PromptRecord(Prompt(fields[names[0]], fields.get("prefix", prefix), place), fields)
