"""`switch-jax export`: serving programs from a checkpoint."""

import argparse

from switch_jax.cli.arguments import add_checkpoint, new_folder, whole_number
from switch_jax.cli.startup import start
from switch_jax.files import as_path

HELP = "export a checkpoint as programs for serving, by jax.export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `export`."""
    add_checkpoint(parser)
    parser.add_argument(
        "--output", required=True, type=new_folder, metavar="DIR", help="folder to create"
    )
    parser.add_argument(
        "--inputs_length",
        type=whole_number(1),
        metavar="N",
        help="number of input tokens (default: as in training)",
    )
    parser.add_argument(
        "--max_length",
        type=whole_number(1),
        metavar="N",
        help="maximum number of generated tokens (default: as in training)",
    )


def run(args: argparse.Namespace) -> None:
    """Exports the model."""
    from switch_jax.checkpoint import find_pretrained, load
    from switch_jax.data import parse_vocabulary
    from switch_jax.inference import export_model

    start(args)
    source = find_pretrained(args.workdir)
    data = source.config.data
    if source.vocabulary is not None:  # it is not written beside a model that it does not fit
        parse_vocabulary(f"of {args.workdir}", source.vocabulary, source.config.model)
    export_model(
        load(args.workdir),
        as_path(args.output),
        inputs_length=args.inputs_length or data.inputs_length,
        max_length=args.max_length or data.targets_length,
        vocabulary=source.vocabulary,
    )
    print(f"{args.output}: greedy.py in it shows how to call the programs.")
