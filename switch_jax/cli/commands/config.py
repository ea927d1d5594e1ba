"""`switch-jax config`: the values of a config, and what each key means."""

import argparse
import json

from switch_jax.cli.arguments import add_json
from switch_jax.cli.startup import load_config_argument

HELP = "the merged config, what differs from the defaults, and what each key means"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `config`."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="config file or preset, with its arguments; --config.KEY=VALUE changes a key",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Prints the keys by group, with a star before those that differ from their defaults."""
    from switch_jax.config import config_to_dict, describe_groups, describe_keys, flatten_config

    config = load_config_argument(args)
    keys, values = describe_keys(), flatten_config(config)
    changed = [key for key, one in keys.items() if values[key] != one.default]
    if args.json:
        descriptions = {key: one._asdict() for key, one in keys.items()}
        merged = config_to_dict(config)
        print(json.dumps({"config": merged, "changed": changed, "keys": descriptions}))
        return
    print(f"* differs from the default ({len(changed)} of {len(keys)} keys)")
    width = max(len(key.rpartition(".")[2]) for key in keys)
    group = None
    for key, one in keys.items():
        owner, _, name = key.rpartition(".")
        if owner != group:
            group = owner
            print(f"\n{owner}: {describe_groups()[owner]}" if owner else "\nthe run:")
        star, value = "*" if key in changed else " ", str(values[key])
        if key in changed:
            value += f" (default {one.default})"
        print(f"{star} {name:{width}}  {value:24}  {one.text}")
