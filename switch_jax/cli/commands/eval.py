"""`switch-jax eval`: validation loss and task scores of a checkpoint."""

import argparse
import json

from switch_jax.cli.arguments import add_checkpoint, add_config, add_json, add_processes
from switch_jax.cli.startup import load_checkpoint_argument, print_result

HELP = "evaluate a checkpoint on the validation set of its config"

_SHOWN = ("cross_entropy", "neg_log_perplexity", "accuracy", "unigram_entropy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `eval`."""
    add_config(parser, required=False)
    add_checkpoint(parser)
    add_processes(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluates, and prints the metrics."""
    from switch_jax.evaluation import evaluate_checkpoint, scores_table

    workdir, folder, config = load_checkpoint_argument(args)
    metrics = evaluate_checkpoint(workdir, folder, config)
    if args.json:
        print_result(json.dumps(metrics))
        return
    lines = [f"{'checkpoint':20} {workdir.checkpoint_location(int(folder.name))}"]
    lines += [f"{name:20} {metrics[name]:.4f}" for name in _SHOWN]
    for name, value in metrics.items():
        if name.endswith("/cross_entropy"):  # of one source among several
            source = name.removesuffix("/cross_entropy")
            lines.append(f"  of {source:15} {value:.4f}")
    print_result("\n".join([*lines, "", scores_table(metrics)]).rstrip())
