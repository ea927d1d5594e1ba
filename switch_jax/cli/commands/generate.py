"""`switch-jax generate`: text from a checkpoint."""

import argparse
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from switch_jax.cli.arguments import add_checkpoint, new_file, number, path, whole_number
from switch_jax.cli.startup import print_result, start
from switch_jax.errors import UserError
from switch_jax.files import as_path, fetch, staged_file

if TYPE_CHECKING:
    from switch_jax.checkpoint import Workdir
    from switch_jax.data import Vocabulary
    from switch_jax.inference import PromptRecord

HELP = "fill the blanks (___) of texts, or answer them"

_LOG_SECONDS = 30.0  # between lines of progress where stderr is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `generate`."""
    add_checkpoint(parser)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="a text, with or without blanks (___ or <extra_id_0> …)")
    text.add_argument(
        "--input",
        type=path,
        metavar="FILE",
        help="a file with one such text per line, or JSON lines (.jsonl) with text or inputs",
    )
    parser.add_argument(
        "--output",
        type=new_file,
        metavar="FILE",
        help="JSON lines to write, with scores; the same command continues them if interrupted",
    )
    parser.add_argument(
        "--prefix", default="", metavar="TEXT", help="forced beginning of all answers"
    )
    parser.add_argument(
        "--num_answers",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="answers to each text: the best beams, or samples (1)",
    )
    parser.add_argument(
        "--max_length",
        type=whole_number(1),
        default=128,
        metavar="N",
        help="maximum number of tokens of an answer (128)",
    )
    parser.add_argument(
        "--beam_size", type=whole_number(1), default=1, metavar="N", help="beam size (1: greedy)"
    )
    parser.add_argument(
        "--fill_blanks",
        action=argparse.BooleanOptionalAction,
        help="whether ___ is a blank to fill (yes for a run on text, no for one on tasks only)",
    )
    parser.add_argument(
        "--vocabulary", metavar="FILE", help="the model's vocabulary, for a WORKDIR without one"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature",
        type=number,
        default=0.0,
        metavar="T",
        help="sampling temperature (0: greedy)",
    )
    sampling.add_argument(
        "--top_k",
        type=whole_number(0),
        default=0,
        metavar="K",
        help="sample from the K most probable tokens (0: from all)",
    )
    sampling.add_argument(
        "--top_p",
        type=number,
        default=1.0,
        metavar="P",
        help="nucleus sampling: smallest set of tokens with total probability P (1: off)",
    )
    sampling.add_argument("--seed", type=int, default=0, metavar="S", help="random seed (0)")


def run(args: argparse.Namespace) -> None:
    """Generates; prints the answers, or writes them to a file."""
    import jax

    from switch_jax.checkpoint import checkpoint_identity, find_checkpoint_together, load
    from switch_jax.inference import PromptCodec, SamplingOptions, answer_texts, write_answers

    options = SamplingOptions(
        beam_size=args.beam_size,
        num_return=args.num_answers,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    records = _read_records(args)
    start(args)
    workdir, folder = find_checkpoint_together(args.workdir)
    vocabulary = _model_vocabulary(workdir, args.vocabulary)
    codec = PromptCodec(workdir.config(), vocabulary, args.max_length, args.fill_blanks)
    for record in records:  # a wrong one must not end the work of hours
        codec.encode(record.prompt)
    if args.output is None:
        prompts = (record.prompt for record in records)
        for answers in answer_texts(load(folder), codec, prompts, options):
            for answer in answers:
                print_result(answer.text)
        return
    output, load_model = as_path(args.output), partial(load, folder)
    identity = checkpoint_identity(folder)
    is_writer = jax.process_index() == 0
    with staged_file(output, resume=True) if is_writer else nullcontext(output) as file:
        _show_progress(
            write_answers(file, records, codec, options, identity, load_model), len(records)
        )
    print_result(f"{output}: {len(records):,} answered")


def _read_records(args: argparse.Namespace) -> "list[PromptRecord]":
    """Returns the prompts of `--text` or `--input`; raises `UserError`."""
    from switch_jax.inference import Prompt, PromptRecord, read_prompts

    for name, text in (("--text", args.text or ""), ("--prefix", args.prefix)):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of the shell that Python could not decode
            raise UserError(f"{name} is not UTF-8; convert it, or set a UTF-8 locale.") from error
    if args.input is not None:
        return read_prompts(fetch(args.input), args.prefix)
    return [PromptRecord(Prompt(args.text, args.prefix, "--text"), {"text": args.text})]


def _show_progress(done_by_window: Iterator[int], total: int) -> None:
    """Shows the number of texts that are answered, on stderr in process 0, until all are."""
    import jax

    from switch_jax.training import ProgressDisplay

    done, next_line = next(done_by_window), time.monotonic() + _LOG_SECONDS
    with ProgressDisplay(
        total, done, status=f"{done:,} of {total:,} texts", active=jax.process_index() == 0
    ) as display:
        if done:
            display.print_line(f"Continued behind {done:,} of {total:,} texts.")
        for done in done_by_window:
            is_due = time.monotonic() >= next_line
            if is_due:
                next_line = time.monotonic() + _LOG_SECONDS
            display.update(done, "generating", f"{done:,} of {total:,} texts", line=is_due)


def _model_vocabulary(workdir: "Workdir", file: str | None) -> "Vocabulary":
    """Returns the vocabulary of a WORKDIR, or that in a file for a WORKDIR without one.

    Raises `UserError` where there is none, or two that differ.
    """
    from switch_jax.data import read_vocabulary

    if file is None and not workdir.vocabulary.exists():
        raise UserError(
            f"{workdir.location} has no vocabulary; set --vocabulary to the one that the model was"
            " trained with."
        )
    vocabulary = read_vocabulary(file or workdir.vocabulary, workdir.config().model)
    if workdir.vocabulary.exists() and vocabulary.content != workdir.vocabulary.read_bytes():
        raise UserError(
            f"{workdir.location} has a vocabulary of its own, other than {file}; leave --vocabulary"
            " out."
        )
    return vocabulary
