"""Arguments that several verbs share."""

import argparse

CONFIG_HELP = (
    "a preset or a file, with arguments: NAME, NAME:key=value,… or path/to/file.py:key=value,…;"
    " change keys with --config.KEY=VALUE"
)


def add_config(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """Adds `--config`."""
    parser.add_argument("--config", required=required, metavar="FILE", help=CONFIG_HELP)


def add_workdir(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds `--workdir`."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help=text)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds `--workdir` for a verb that reads a checkpoint."""
    add_workdir(parser, "a WORKDIR (its newest checkpoint), or a checkpoint folder")


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


def positive_int(text: str) -> int:
    """Returns the integer; argparse reports one below 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
