"""`switch-jax train`: pretraining, fine-tuning and distillation."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from switch_jax.cli.arguments import add_config, add_processes, add_workdir
from switch_jax.cli.startup import choose_attached_mesh, load_config_argument, start

if TYPE_CHECKING:
    from switch_jax.checkpoint import Workdir

HELP = "train a model, or continue from the newest good checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `train`."""
    add_config(parser)
    add_workdir(parser, "folder of the run; created if it does not exist")
    add_processes(parser)


def run(args: argparse.Namespace) -> int:
    """Trains; returns 128 plus the number of the signal that ended the run early."""
    config = load_config_argument(args)
    start(args, config)
    from switch_jax.checkpoint import Workdir
    from switch_jax.training import train

    mesh = choose_attached_mesh(config).mesh
    stopped_by = train(config, Workdir(args.workdir), mesh, _draw_figures)
    return 0 if stopped_by is None else 128 + stopped_by


def _draw_figures(workdir: "Workdir") -> list[Path]:
    # Not before: the start of a run needs none of it, and most runs have no tracker for figures.
    from switch_jax.analysis import draw_figures_of_run

    return draw_figures_of_run(workdir)
