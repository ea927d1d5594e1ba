"""`switch-jax experts`: expert specialisation report of a checkpoint."""

import argparse
import json

from switch_jax.cli.arguments import (
    add_checkpoint,
    add_config,
    add_json,
    add_processes,
    output_folder,
    path,
)
from switch_jax.cli.startup import load_checkpoint_argument
from switch_jax.files import as_path, fetch, staged_folder

HELP = "report which tokens each expert of a checkpoint specialises in"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `experts`."""
    add_config(parser, required=False)
    add_checkpoint(parser)
    parser.add_argument(
        "--input", type=path, metavar="FILE", help="a text (default: validation batches)"
    )
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="DIR",
        help="folder of the report (default: DIR/experts)",
    )
    add_processes(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Analyses the experts, and writes the report."""
    import jax

    from switch_jax.analysis import (
        analyse_experts,
        expert_table,
        import_matplotlib,
        write_expert_report,
    )

    import_matplotlib()  # reports a missing Matplotlib before anything is computed
    workdir, folder, config = load_checkpoint_argument(args)
    text = None if args.input is None else fetch(args.input)
    analysis = analyse_experts(workdir, folder, config, text)
    if jax.process_index():
        return
    output = as_path(args.output) if args.output else workdir.experts
    with staged_folder(output) as report:
        written = [
            output / file.relative_to(report) for file in write_expert_report(analysis, report)
        ]
    if args.json:
        print(json.dumps(analysis))
    else:
        print("\n".join([*map(str, written), "", expert_table(analysis)]))
