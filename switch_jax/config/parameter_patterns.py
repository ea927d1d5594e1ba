"""Patterns of parameters: the regular expressions in config keys, and the rules of `init_rules`."""

import re
from typing import NamedTuple

from switch_jax.errors import UserError


class InitRule(NamedTuple):
    """A rule of `init_rules`: a pattern of parameters, and the template of a name in the source."""

    pattern: re.Pattern[str]
    template: str  # "": the parameter is initialised


def compile_pattern(key: str, text: str) -> re.Pattern[str]:
    """Returns the regular expression of a config key; raises `UserError`."""
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"{key}={text!r} is no regular expression ({error}); correct it."
        ) from error


def parse_init_rules(text: str) -> list[InitRule]:
    """Returns the rules of `init_rules`, `PATTERN -> NAME; …`; raises `UserError`."""
    rules = []
    for rule in filter(None, map(str.strip, text.split(";"))):
        pattern, arrow, template = map(str.strip, rule.partition("->"))
        try:
            if not arrow:
                raise re.error("there is no ->")
            compiled = re.compile(pattern)
            # Does the template refer to groups that the pattern has?
            if empty := re.compile(f"{pattern}|").match(""):
                empty.expand(template)
        except (re.error, OverflowError, RecursionError, IndexError) as error:
            raise UserError(
                f"init_rules has {rule!r}, which cannot be read ({error}); write PATTERN -> NAME,"
                " with a semicolon between two rules."
            ) from error
        rules.append(InitRule(compiled, template))
    return rules
