"""Shell completion: verbs, flags, choices, files, presets and config keys.

The script that `switch-jax completion` prints runs `switch-jax` at each Tab, with the command line
in environment variables of argcomplete. JAX is not imported.
"""

import argparse
from typing import Any

import argcomplete
from argcomplete.completers import BaseCompleter, DirectoriesCompleter, FilesCompleter

from switch_jax.cli.arguments import PATH_TYPES
from switch_jax.config import describe_keys, preset_names

_KEY = "--config."


def complete(parser: argparse.ArgumentParser) -> None:
    """Writes the completions of the shell's command line, and exits."""
    _Finder()(parser, exclude=("-h",), default_completer=_ValueCompleter())


class _Finder(argcomplete.CompletionFinder):
    """argcomplete's finder, and the keys of a config behind `--config.`."""

    def collect_completions(
        self, active_parsers: list[argparse.ArgumentParser], parsed_args: Any, cword_prefix: str
    ) -> list[str]:
        found = super().collect_completions(active_parsers, parsed_args, cword_prefix)
        keys = {}
        if any(action.dest == "config" for action in active_parsers[-1]._actions):
            keys = _complete_key(cword_prefix)
        self.get_display_completions().update(keys)
        return [*found, *keys]


def _complete_key(prefix: str) -> dict[str, str]:
    """Returns what of `--config.KEY=VALUE` is to be completed next, with descriptions."""
    if not prefix.startswith(_KEY):
        return {_KEY: "change a key of the config"} if prefix and _KEY.startswith(prefix) else {}
    key, equals, _ = prefix.removeprefix(_KEY).partition("=")
    if not equals:
        keys = {f"{_KEY}{name}=": key.text for name, key in describe_keys().items()}
        return {option: text for option, text in keys.items() if option.startswith(prefix)}
    described = describe_keys().get(key)
    values = described.values.split(", ") if described else []
    if values == ["bool"]:
        values = ["True", "False"]
    options = [f"{_KEY}{key}={value}" for value in values if len(values) > 1]
    return {option: "" for option in options if option.startswith(prefix)}


class _ValueCompleter(BaseCompleter):
    """Completer of arguments without choices: presets, files or folders; of others, nothing."""

    def __call__(
        self,
        *,
        prefix: str,
        action: argparse.Action,
        parser: argparse.ArgumentParser,
        parsed_args: argparse.Namespace,
    ) -> list[str]:
        """Returns the values that begin with `prefix`."""
        if action.dest == "config":
            folders = ("sweeps",) if parser.prog.endswith(" sweep") else ("", "distill")
            presets = [name for folder in folders for name in preset_names(folder)]
            return [*presets, *FilesCompleter(["py"])(prefix)]
        if action.metavar in ("DIR", "WORKDIR", "OUT"):
            return list(DirectoriesCompleter()(prefix))
        if action.metavar == "FILE" or action.type in PATH_TYPES:
            return list(FilesCompleter()(prefix))
        return []
