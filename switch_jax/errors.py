"""Exceptions that the command line reports as one sentence, and texts of strangers in them."""

from typing import ClassVar


class UserError(Exception):
    """Wrong input that the user can correct; the message is one sentence that says how.

    The command line prints the message on stderr and exits with `exit_code`. Every other exception
    is a bug in this package and keeps its traceback.
    """

    exit_code: ClassVar[int] = 2


class NotFiniteError(UserError):
    """A loss, a gradient or parameters that are not finite; the same command would fail again."""

    exit_code: ClassVar[int] = 3


def printable(text: str) -> str:
    """Returns a text of unknown origin for a message: on one line, control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
