"""`switch-jax convert`: checkpoints from and to other programs, and sparse from dense models."""

import argparse
from collections.abc import Callable, Iterable

from switch_jax.cli.arguments import add_config, add_verbose, new_folder, path
from switch_jax.cli.startup import load_config_argument, start
from switch_jax.files import as_path, fetch

HELP = "convert checkpoints from and to other programs, or dense models to sparse ones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verbs `from-hf`, `to-hf`, `from-t5x` and `upcycle`."""
    verbs = parser.add_subparsers(dest="convert_verb", metavar="VERB", required=True)

    def verb(name: str, run: Callable, text: str, source: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("source", type=path, metavar=source, help="folder to read")
        sub.add_argument(
            "output", type=new_folder, metavar="OUT", help="folder to write; must not exist"
        )
        add_verbose(sub)
        return sub

    programs = "(T5, mT5, Switch Transformers)"
    text = f"Hugging Face folder → WORKDIR {programs}"
    from_hf = verb("from-hf", from_hugging_face, text, "DIR")
    verb("to-hf", to_hugging_face, "checkpoint → Hugging Face folder", "WORKDIR")
    from_t5x_ = verb("from-t5x", from_t5x, f"T5X checkpoint → WORKDIR {programs}", "DIR")
    text = "dense model → sparse model, as --config.moe.num_experts=8 or the like describes it"
    upcycle = verb("upcycle", from_dense, text, "DIR")
    add_config(upcycle, required=False)
    for sub in (from_hf, from_t5x_, upcycle):
        sub.add_argument(
            "--vocabulary",
            metavar="FILE",
            help="vocabulary of a checkpoint that comes without one: SentencePiece model or bytes",
        )


def from_hugging_face(args: argparse.Namespace) -> None:
    """Runs `convert from-hf`."""
    from switch_jax.checkpoint import read_hugging_face, write_workdir

    checkpoint = read_hugging_face(fetch(args.source)).with_vocabulary(args.vocabulary)
    write_workdir(checkpoint, as_path(args.output))
    _print_written(checkpoint.notes, args.output)


def from_t5x(args: argparse.Namespace) -> None:
    """Runs `convert from-t5x`."""
    from switch_jax.checkpoint import read_t5x, write_workdir

    checkpoint = read_t5x(fetch(args.source)).with_vocabulary(args.vocabulary)
    write_workdir(checkpoint, as_path(args.output))
    _print_written(checkpoint.notes, args.output)


def from_dense(args: argparse.Namespace) -> None:
    """Runs `convert upcycle`."""
    from switch_jax.checkpoint import find_pretrained, upcycle_dense_model, write_workdir
    from switch_jax.config import override_config

    start(args)
    source = find_pretrained(args.source)
    source.print_notes()
    if args.config:
        config = load_config_argument(args)
    else:
        config = override_config(source.config, args.overrides)
    checkpoint = upcycle_dense_model(source, config).with_vocabulary(args.vocabulary)
    write_workdir(checkpoint, as_path(args.output))
    _print_written(checkpoint.notes, args.output)


def to_hugging_face(args: argparse.Namespace) -> None:
    """Runs `convert to-hf`."""
    from switch_jax.checkpoint import export_hugging_face

    notes = export_hugging_face(args.source, as_path(args.output))
    print("\n".join([*notes, f"{args.output}: transformers' from_pretrained reads it"]))


def _print_written(notes: Iterable[str], output: str) -> None:
    print("\n".join([*notes, f"{output}: use it as --workdir, or as init_from"]))
