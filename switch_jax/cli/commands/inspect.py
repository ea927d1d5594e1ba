"""`switch-jax inspect`: parameters, FLOPs, memory and meshes of a config, by arithmetic."""

import argparse
import json

from switch_jax.cli.arguments import add_config, add_json, path, whole_number
from switch_jax.cli.startup import load_config_argument

HELP = "parameters, FLOPs and memory of a config; needs no accelerator and no data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `inspect`."""
    source = parser.add_mutually_exclusive_group(required=True)
    add_config(source, required=False)
    source.add_argument(
        "--workdir", type=path, metavar="DIR", help="a WORKDIR, whose config is inspected"
    )
    parser.add_argument(
        "--topology", metavar="NAME", help="suggest meshes for v5p:8x16x16, h100:64 or the like"
    )
    parser.add_argument(
        "--slices", type=whole_number(1), default=1, metavar="N", help="number of TPU slices (1)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the summary."""
    from switch_jax.checkpoint import Workdir
    from switch_jax.config import override_config
    from switch_jax.distributed import chip_of_topology
    from switch_jax.performance import (
        cost_summary,
        cost_table,
        suggest_meshes,
        suggestion_to_json,
        suggestions_table,
    )
    from switch_jax.training import initial_state_report, teacher_config

    if args.workdir:
        config = override_config(Workdir(args.workdir).config(), args.overrides)
    else:
        config = load_config_argument(args)
    teacher = teacher_config(config)
    summary, suggestions = cost_summary(config, teacher), []
    if args.topology is not None:
        chip, devices = chip_of_topology(args.topology, args.slices)
        suggestions = suggest_meshes(config, chip, devices, args.slices, teacher)
        summary["meshes"] = [suggestion_to_json(suggestion) for suggestion in suggestions]
    if args.json:
        print(json.dumps(summary))
        return
    print(cost_table(summary))
    if config.init_from is not None:
        print("", f"From {config.init_from}:", initial_state_report(config), sep="\n")
    if suggestions:
        print("", suggestions_table(suggestions), sep="\n")
