"""`switch-jax plot`: figures of the metrics of one or more runs."""

import argparse
from pathlib import Path

HELP = "plot the metrics of one or more runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `plot`."""
    parser.add_argument(
        "--workdir",
        required=True,
        nargs="+",
        metavar="DIR",
        help="runs to compare; of two, the first is the baseline of speed-ups by source",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder of the figures (default: DIR/figures of the first)"
    )


def run(args: argparse.Namespace) -> None:
    """Draws the figures, and prints their paths."""
    from switch_jax.analysis import common_sources, compare_sources, draw_run_plots, speedup_table
    from switch_jax.checkpoint import Workdir, read_metrics

    workdirs = [Workdir(path) for path in args.workdir]
    folder = Path(args.output) if args.output else workdirs[0].figures
    for path in draw_run_plots(workdirs, folder):
        print(path)
    runs = [read_metrics(workdir) for workdir in workdirs]
    if len(runs) == 2 and common_sources(*runs):
        print("", speedup_table(compare_sources(*runs), *args.workdir), sep="\n")
