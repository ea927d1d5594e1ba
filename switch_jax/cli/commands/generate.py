"""`switch-jax generate`: text from a checkpoint."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from switch_jax.cli.arguments import add_checkpoint, number, path, whole_number
from switch_jax.cli.startup import print_result, start
from switch_jax.errors import UserError

if TYPE_CHECKING:
    from switch_jax.checkpoint import Workdir
    from switch_jax.data import Vocabulary

HELP = "fill the blanks (___) of a text, or answer it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `generate`."""
    add_checkpoint(parser)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="a text, with or without blanks (___ or <extra_id_0> …)")
    text.add_argument(
        "--input", type=path, metavar="FILE", help="a file with one such text per line"
    )
    parser.add_argument(
        "--max_length",
        type=whole_number(1),
        default=128,
        metavar="N",
        help="maximum number of generated tokens (128)",
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
    """Generates, and prints one result per text."""
    from switch_jax.checkpoint import find_checkpoint_together, load
    from switch_jax.data import read_text_file
    from switch_jax.inference import SamplingOptions, complete_texts

    options = SamplingOptions(
        beam_size=args.beam_size,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    if args.input is None:
        try:
            args.text.encode()
        except UnicodeEncodeError as error:  # bytes of the shell that Python could not decode
            raise UserError("--text is not UTF-8; convert it, or set a UTF-8 locale.") from error
        texts = [args.text]
    else:  # only a line feed ends a text; other line separators belong to it
        texts = read_text_file(Path(args.input)).removesuffix("\n").split("\n")
    start(args)
    workdir, folder = find_checkpoint_together(args.workdir)
    vocabulary = _model_vocabulary(workdir, args.vocabulary)
    model = load(folder)
    for text in complete_texts(
        model,
        vocabulary,
        texts,
        max_length=args.max_length,
        options=options,
        fill_blanks=args.fill_blanks,
    ):
        print_result(text)


def _model_vocabulary(workdir: "Workdir", file: str | None) -> "Vocabulary":
    """Returns the vocabulary of a WORKDIR, or that in a file for a WORKDIR without one.

    Raises `UserError` where there is none, or two that differ.
    """
    from switch_jax.data import read_vocabulary

    if file is None and not workdir.vocabulary.exists():
        raise UserError(
            f"{workdir.path} has no vocabulary; set --vocabulary to the one that the model was"
            " trained with."
        )
    vocabulary = read_vocabulary(file or workdir.vocabulary, workdir.config().model)
    if workdir.vocabulary.exists() and vocabulary.content != workdir.vocabulary.read_bytes():
        raise UserError(
            f"{workdir.path} has a vocabulary of its own, other than {file}; leave --vocabulary"
            " out."
        )
    return vocabulary
