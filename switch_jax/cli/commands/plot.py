"""`switch-jax plot`: figures of the metrics of one or more runs."""

import argparse

from switch_jax.cli.arguments import output_folder, path
from switch_jax.files import as_path, staged_folder

HELP = "plot the metrics of one or more runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `plot`."""
    parser.add_argument(
        "--workdir",
        required=True,
        nargs="+",
        type=path,
        metavar="DIR",
        help="runs to compare; of two, the first is the baseline of speed-ups by source",
    )
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="DIR",
        help="folder of the figures (default: DIR/figures of the first)",
    )


def run(args: argparse.Namespace) -> None:
    """Draws the figures, and prints their paths."""
    from switch_jax.analysis import (
        common_sources,
        compare_sources,
        draw_run_plots,
        read_expert_counts,
        read_runs,
        speedup_table,
    )
    from switch_jax.checkpoint import Workdir

    workdirs = [Workdir(path) for path in args.workdir]
    runs = read_runs(workdirs)
    output = as_path(args.output) if args.output else workdirs[0].figures
    with staged_folder(output) as folder:
        figures = draw_run_plots(runs, folder, read_expert_counts(workdirs))
    for figure in figures:
        print(output / figure.relative_to(folder))
    if len(runs) == 2 and common_sources(*runs.values()):
        print("", speedup_table(compare_sources(*runs.values()), *args.workdir), sep="\n")
