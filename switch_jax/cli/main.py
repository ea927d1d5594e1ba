"""Entry point of the command line: parses the arguments, runs the verb, reports errors."""

import argparse
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from switch_jax import __version__
from switch_jax.cli.arguments import Parser, add_verbose
from switch_jax.cli.commands import (
    bench,
    compile,
    completion,
    config,
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
from switch_jax.errors import UserError, printable
from switch_jax.files import explain_bucket_error, explain_os_error

# In the order of `--help`.
_COMMANDS: tuple[Any, ...] = (
    *(train, eval, experts, generate, export, config, inspect, compile),
    *(bench, plot, sweep, data, convert, completion),
)
_WRONG_SETTING = re.compile(
    "^Unable to initialize backend|for environment 'JAX_|for JAX flag jax_"  # JAX's texts
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit code; a failure is reported on stderr.

    The code of a failure is `UserError.exit_code`, or 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of characters that it cannot write
    try:
        return _run(arguments)
    except BaseException as error:
        code = _report_failure(error, verbose="--verbose" in arguments)
        several = _is_one_of_several()
        if code is None and not several:
            raise
        if code is None:
            traceback.print_exc()
            code = 1
    if code and several:
        from switch_jax.distributed import exit_after_failure

        exit_after_failure(code)
    return code


def _is_one_of_several() -> bool:
    """Whether JAX has connected this process with others."""
    jax = sys.modules.get("jax")  # not imported here: a wrong flag is reported at once
    return jax is not None and jax.distributed.is_initialized()


def _run(arguments: list[str]) -> int:
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for the completions of its command line
        from switch_jax.cli.completion import complete

        complete(parser)
    overrides, rest = _split_overrides(arguments)
    args = parser.parse_args(rest)
    args.overrides = overrides
    if overrides and not hasattr(args, "config"):
        raise UserError(
            f"`{args.verb}` takes no --config; leave --config.{next(iter(overrides))} out."
        )
    return args.run(args) or 0


def _report_failure(error: BaseException, *, verbose: bool) -> int | None:
    """Prints the sentence of a failure, or its traceback if `verbose`; returns the exit code.

    Returns None, and prints nothing, for an exception that is a bug.
    """
    if isinstance(error, BrokenPipeError):  # the reader of the output, such as `head`, closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, KeyboardInterrupt):
        code, sentence = 128 + signal.SIGINT, "Interrupted."
    elif isinstance(error, UserError):
        code, sentence = error.exit_code, str(error)
    elif explained := (
        explain_os_error(error)
        or explain_bucket_error(error)
        or _explain_setting(error)
        or _explain_memory(error)
    ):
        code, sentence = UserError.exit_code, explained
    else:
        return None
    if verbose:
        traceback.print_exception(error)
    else:
        print(f"switch-jax: {printable(sentence)}", file=sys.stderr)
    return code


def _explain_setting(error: BaseException) -> str | None:
    """Returns a sentence for an environment variable that JAX cannot use; None for other errors."""
    first_line = str(error).split("\n")[0].rstrip(".")
    if isinstance(error, RuntimeError | ValueError) and _WRONG_SETTING.search(first_line):
        return f"JAX cannot start: {first_line}; correct or unset that environment variable."
    return None


def _explain_memory(error: BaseException) -> str | None:
    """Returns a sentence for memory that does not suffice, of NumPy or JAX; None for others."""
    first_line = str(error).split("\n")[0].strip().rstrip(".")
    if isinstance(error, MemoryError) or first_line.startswith("RESOURCE_EXHAUSTED"):
        return (
            f"The memory does not suffice ({first_line or 'no more is available'}); make the model,"
            " the batch or the lengths smaller, or use more devices."
        )
    return None


def _split_overrides(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Separates `--config.KEY=VALUE` and `--config.KEY VALUE` from the other arguments.

    Of several values of a key the last one counts, so that a script's arguments can be followed by
    the user's; a line on stderr says so.
    """
    overrides: dict[str, str] = {}
    rest = []
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
        if overrides.get(key, value) != value:
            print(
                printable(f"--config.{key} is given twice; its last value {value} is used."),
                file=sys.stderr,
            )
        overrides[key] = value
    return overrides, rest


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all verbs."""
    parser = Parser(
        prog="switch-jax",
        description="Pretrain, fine-tune, distil and analyse Switch Transformers.",
    )
    parser.add_argument("--version", action="version", version=f"switch-jax {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for command in _COMMANDS:
        name = command.__name__.rpartition(".")[2]
        sub = subparsers.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(sub)
        if hasattr(command, "run"):  # `data` and `convert` have verbs of their own
            sub.set_defaults(run=command.run)
            add_verbose(sub)
    return parser
