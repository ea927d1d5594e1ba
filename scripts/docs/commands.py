"""Writes docs/commands.md, the page of all commands, from the parser of the command line."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from switch_jax.cli.main import make_parser

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
_HEAD = """# Commands

`switch-jax VERB --help` prints what stands here. A verb with `--config FILE` also takes
`--config.KEY=VALUE` for every [key of the config](config.md), and `--verbose` shows the traceback
of an error. Exit codes are those of [launch.md](launch.md#exit-codes).

This page is made from the parser by `python scripts/docs/commands.py`.
"""
_LEFT_OUT = {"help", "verbose"}  # arguments of every verb


def command_page() -> str:
    """Returns the page in Markdown: a section for each verb, with a table of its arguments."""
    return "\n".join([_HEAD, *_sections(make_parser(), level=2)])


def _sections(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    """Yields the sections of the verbs of a parser, and of their own verbs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield _section(verb, level)
                yield from _sections(verb, level + 1)


def _section(verb: argparse.ArgumentParser, level: int) -> str:
    title = f"{'#' * level} {verb.prog.removeprefix('switch-jax ')}"
    lines = [title, "", _sentence(verb.description), ""]
    rows = [
        f"| `{_name(argument)}` | {_help(argument, group)} |"
        for group in verb._action_groups
        for argument in group._group_actions
        if argument.dest not in _LEFT_OUT and argument.metavar != "VERB"
    ]
    if rows:
        lines += ["```text", _usage(verb), "```", "", "| argument | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _usage(verb: argparse.ArgumentParser) -> str:
    """Returns the verb with the arguments that it needs."""
    parts = [verb.prog, *(_name(argument) for argument in verb._actions if argument.required)]
    parts += [
        f"({' | '.join(_name(argument) for argument in group._group_actions)})"
        for group in verb._mutually_exclusive_groups
        if group.required
    ]
    return " ".join([*parts, "[options]"])


def _sentence(text: str | None) -> str:
    assert text, "a verb has a description"
    return f"{text[0].upper()}{text[1:]}."


def _name(argument: argparse.Action) -> str:
    """Returns an argument as it is written: `--config FILE`, `--json`, `CONFIG`."""
    if argument.nargs == 0:
        return argument.option_strings[-1]
    choices = f"{{{','.join(map(str, argument.choices or ()))}}}"
    value = choices if argument.choices else argument.metavar or argument.dest.upper()
    more = f" [{value} …]" if argument.nargs == "+" else ""
    return " ".join([*argument.option_strings[-1:], f"{value}{more}"])


def _help(argument: argparse.Action, group: argparse._ArgumentGroup) -> str:
    text = (argument.help or "").replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")
    own_group = group.title not in ("options", "positional arguments")
    return f"{text} ({group.title})" if own_group else text


if __name__ == "__main__":
    PAGE.write_text(command_page())
