"""Files of answers: JSON lines, written window by window, and continued after an interruption."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import jax

from switch_jax.distributed import all_gather_int, fail_together
from switch_jax.errors import UserError
from switch_jax.files import append_lines
from switch_jax.inference.answers import WINDOW, Answer, answer_texts
from switch_jax.inference.decoding import SamplingOptions
from switch_jax.inference.prompt_file import PromptRecord
from switch_jax.inference.prompts import PromptCodec
from switch_jax.model import SwitchTransformer

_ANSWERS = "answers"  # field of the answers
_DECIMALS = 6  # of scores


def write_answers(
    path: Path,
    records: Sequence[PromptRecord],
    codec: PromptCodec,
    options: SamplingOptions,
    checkpoint: Mapping[str, Any],
    load_model: Callable[[], SwitchTransformer],
) -> Iterator[int]:
    """Writes the answers to all prompts, one JSON object per line, in order.

    An object has the fields of the prompt's record, and `answers`. Process 0 writes. A file that
    the same call left incomplete is continued, and ends as without the interruption.

    Args:
      path: the file, in an existing folder.
      records: the prompts, with their fields.
      codec: of the model.
      options: of decoding.
      checkpoint: JSON values that identify the model.
      load_model: called once the file is found to be writable.

    Yields the number of prompts that are answered: before the first ones, then after each window.
    Raises `UserError` where the file exists, or was begun with other arguments.
    """
    for record in records:
        if _ANSWERS in record.fields:
            raise UserError(
                f"{record.prompt.place} has a field {_ANSWERS!r}, which the output has for the"
                " model's answers; rename it."
            )
    decoding = dataclasses.asdict(options)
    made_with = {
        **checkpoint,
        "vocabulary": codec.vocabulary.fingerprint,
        "texts": _digest(records),
        "max_length": codec.max_length,
        "fill_blanks": codec.fill_blanks,
        "num_answers": decoding.pop("num_return"),  # as the command line calls it
        **decoding,
    }
    with _append_in_first_process(path, made_with) as (done, file):
        yield done
        model = load_model()
        rest = records[done:]
        answers = answer_texts(model, codec, (r.prompt for r in rest), options, done)
        pairs = zip(rest, answers)
        while window := list(islice(pairs, WINDOW)):
            if file is not None:
                file.write(b"".join(_to_line(*pair) for pair in window))
                file.flush()
            done += len(window)
            yield done


@contextmanager
def _append_in_first_process(
    path: Path, made_with: Mapping[str, Any]
) -> Iterator[tuple[int, BinaryIO | None]]:
    """Yields the number of lines written before and, in process 0, the file to append to."""
    with ExitStack() as stack:
        count, file = 0, None
        with fail_together():
            if jax.process_index() == 0:
                count, file = stack.enter_context(append_lines(path, made_with, WINDOW))
        yield all_gather_int(count)[0], file


def _digest(records: Sequence[PromptRecord]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for prompt, fields in records:
        digest.update(json.dumps([prompt.text, prompt.prefix, fields]).encode())
    return digest.hexdigest()


def _to_line(record: PromptRecord, answers: Sequence[Answer]) -> bytes:
    listed = [_to_fields(answer) for answer in answers]
    return json.dumps({**record.fields, _ANSWERS: listed}, ensure_ascii=False).encode() + b"\n"


def _to_fields(answer: Answer) -> dict[str, Any]:
    fields = answer._asdict()
    for name in ("score", "normalized_score"):
        if fields[name] is None:
            del fields[name]
        else:
            fields[name] = round(fields[name], _DECIMALS)
    return fields
