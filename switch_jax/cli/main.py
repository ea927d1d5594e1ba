"""Entry point of the command line: parses the arguments, runs the verb, reports errors."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from switch_jax import __version__
from switch_jax.cli.arguments import add_verbose
from switch_jax.cli.commands import (
    bench,
    compile,
    convert,
    data,
    eval,
    experts,
    export,
    generate,
    inspect,
    plot,
    sweep,
    train,
)
from switch_jax.errors import UserError
from switch_jax.files import explain_os_error

# In the order of `--help`.
_COMMANDS: tuple[Any, ...] = (
    *(train, eval, experts, generate, export, inspect, compile),
    *(bench, plot, sweep, data, convert),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit code: 0, or 2 for wrong input, reported on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
    except BaseException:
        if not _is_one_of_several():
            raise
        traceback.print_exc()
        code = 1
    if code in (1, 2) and _is_one_of_several():
        from switch_jax.distributed import exit_after_failure

        exit_after_failure(code)
    return code


def _is_one_of_several() -> bool:
    """Whether JAX has connected this process with others."""
    jax = sys.modules.get("jax")  # not imported here: a wrong flag is reported at once
    return jax is not None and jax.distributed.is_initialized()


def _run(arguments: list[str]) -> int:
    verbose = "--verbose" in arguments
    try:
        overrides, rest = _split_overrides(arguments)
        args = _parser().parse_args(rest)
        args.overrides = overrides
        if overrides and not hasattr(args, "config"):
            raise UserError(
                f"`{args.verb}` takes no --config; leave --config.{next(iter(overrides))} out."
            )
        return args.run(args) or 0
    except UserError as error:
        if verbose:
            raise
        print(f"switch-jax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        sentence = explain_os_error(error)
        if verbose or sentence is None:
            raise
        print(f"switch-jax: {sentence}", file=sys.stderr)
        return 2


def _split_overrides(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Separates `--config.KEY=VALUE` and `--config.KEY VALUE` from the other arguments."""
    overrides, rest = {}, []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise UserError(f"--config.{key} needs a value: write --config.{key}=VALUE.")
        overrides[key] = value
    return overrides, rest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="switch-jax",
        description="Pretrain, fine-tune, distil and analyse Switch Transformers.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"switch-jax {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for command in _COMMANDS:
        name = command.__name__.rpartition(".")[2]
        sub = subparsers.add_parser(
            name, help=command.HELP, description=command.HELP, allow_abbrev=False
        )
        command.add_arguments(sub)
        if hasattr(command, "run"):  # `data` and `convert` have verbs of their own
            sub.set_defaults(run=command.run)
            add_verbose(sub)
    return parser
