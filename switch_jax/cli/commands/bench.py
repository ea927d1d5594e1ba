"""`switch-jax bench`: step time of a config and of its FLOP-matched dense model."""

import argparse
import json

from switch_jax.cli.arguments import add_config, add_json, add_processes, whole_number
from switch_jax.cli.startup import (
    choose_attached_mesh,
    load_config_argument,
    print_result,
    start,
)

HELP = "time a config against its FLOP-matched dense model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `bench`."""
    add_config(parser)
    parser.add_argument(
        "--repeats", type=whole_number(1), default=10, metavar="N", help="timed runs of each (10)"
    )
    add_processes(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Times both models, and prints the figures."""
    config = load_config_argument(args)
    start(args, config)
    from switch_jax.performance import benchmark_table, run_benchmark

    result = run_benchmark(choose_attached_mesh(config), args.repeats)
    print_result(json.dumps(result) if args.json else benchmark_table(result))
