"""Arguments that several verbs share, and the types of arguments.

A type returns the value of a text; argparse reports what it refuses, before any work begins.
"""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from switch_jax.errors import UserError
from switch_jax.files import as_path, is_bucket

_MAX_WHOLE = 2**31 - 1  # of an array's sizes and of step numbers

CONFIG_HELP = (
    "a preset or a file, with arguments: NAME, NAME:key=value,… or path/to/file.py:key=value,…;"
    " change keys with --config.KEY=VALUE"
)


def add_config(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """Adds `--config`."""
    parser.add_argument("--config", required=required, type=path, metavar="FILE", help=CONFIG_HELP)


def add_workdir(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds `--workdir` for a verb that writes there."""
    parser.add_argument("--workdir", required=True, type=output_folder, metavar="DIR", help=text)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds `--workdir` for a verb that reads a checkpoint."""
    text = "a WORKDIR (its newest checkpoint), or a checkpoint folder"
    parser.add_argument("--workdir", required=True, type=path, metavar="DIR", help=text)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds `--coordinator`, `--num_processes` and `--process_id`."""
    group = parser.add_argument_group("several processes, where no launcher is detected")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num_processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process_id", type=int, metavar="I", help="index of this one, 0 to N-1")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Adds `--verbose`."""
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")


class Parser(argparse.ArgumentParser):
    """Argument parser that takes an option once and unabbreviated; its error is one sentence."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self.register("action", None, _StoreOnce)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[0].upper()}{message[1:]}; see `{self.prog} --help`.")


class _StoreOnce(argparse.Action):
    """Stores a value as argparse does by default, and refuses a second one."""

    is_stored = False

    def __call__(self, parser, namespace, values, option_string=None):
        if self.is_stored:
            raise argparse.ArgumentError(self, "it is given twice; leave one out")
        self.is_stored = True
        setattr(namespace, self.dest, values)


def whole_number(minimum: int) -> Callable[[str], int]:
    """Returns the type of a whole number that is at least `minimum`."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
        if not minimum <= number <= _MAX_WHOLE:
            raise argparse.ArgumentTypeError(
                f"{text[:40]} is not at least {minimum} and at most {_MAX_WHOLE}"
            )
        return number

    return convert


def number(text: str) -> float:
    """Type of a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number")
    return value


def path(text: str) -> str:
    """Type of a path to read; an empty one would stand for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("a path is empty; name a file or a folder")
    return text


def output_folder(text: str) -> str:
    """Type of a folder to write, which need not exist."""
    if os.path.isfile(path(text)):
        raise argparse.ArgumentTypeError(f"{text} is a file; name a folder")
    _check_can_be_made(text)
    return text


def new_folder(text: str) -> str:
    """Type of a folder to write, which must not exist."""
    if os.path.lexists(path(text)):
        raise argparse.ArgumentTypeError(
            f"{text} exists; name a folder that does not, or remove it"
        )
    _check_can_be_made(text)
    return text


def output_file(text: str) -> str:
    """Type of a file to write, whose folder need not exist."""
    if os.path.isdir(path(text)):
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    _check_can_be_made(text)
    return text


def new_file(text: str) -> str:
    """Type of a file to write, which must not exist, in a folder that does."""
    exists = as_path(text).exists() if is_bucket(path(text)) else os.path.lexists(text)
    if exists:
        raise argparse.ArgumentTypeError(f"{text} exists; name a file that does not, or remove it")
    if not is_bucket(text) and not os.path.isdir(Path(text).absolute().parent):
        raise argparse.ArgumentTypeError(f"the folder of {text} does not exist; make it")
    _check_can_be_made(text)
    return text


PATH_TYPES = (path, output_folder, new_folder, output_file, new_file)


def _check_can_be_made(text: str) -> None:
    """Refuses a path that is in a file, or in a folder where nothing may be written."""
    if is_bucket(text):  # of one that cannot be written, the upload tells
        as_path(text)
        return
    target = Path(text).expanduser().absolute()
    existing = next(parent for parent in (target, *target.parents) if os.path.lexists(parent))
    if existing != target and not existing.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is in {existing}, which is no folder")
    if not os.access(existing, os.W_OK):
        raise argparse.ArgumentTypeError(f"{existing} cannot be written; allow it, or name another")
