"""`switch-jax compile`: the train step, compiled ahead of time for a described machine."""

import argparse
import json
from pathlib import Path

from switch_jax.cli.arguments import add_config, add_json, output_file, whole_number
from switch_jax.cli.startup import load_config_argument
from switch_jax.errors import UserError

HELP = "compile the train step for a machine that need not be attached"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `compile`."""
    add_config(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v5p:8x16x16 (TPU and shape of a slice), h100:8 or h100:4x8 (GPUs, or hosts × GPUs),"
        " cpu:8 (emulated devices) or gpu (attached)",
    )
    parser.add_argument(
        "--slices", type=whole_number(1), default=1, metavar="N", help="number of TPU slices (1)"
    )
    parser.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help="picture of what each device holds, a .png file",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Compiles, and prints memory, FLOPs, communication and the predicted step time."""
    config = load_config_argument(args)
    from switch_jax.analysis import import_matplotlib
    from switch_jax.performance import (
        CompileTarget,
        compile_step,
        compile_table,
        draw_placement,
        remedy,
    )

    if args.output:
        if Path(args.output).suffix != ".png":
            raise UserError(f"--output {args.output} must be a .png file; name one.")
        import_matplotlib()  # reports a missing Matplotlib before minutes of compilation
    target = CompileTarget(args.topology, args.slices)
    result = compile_step(config, target)
    if args.output:
        draw_placement(result, Path(args.output))
    print(json.dumps(result) if args.json else compile_table(result), flush=True)
    if not result["fits"]:
        raise UserError(remedy(config, target, result))
