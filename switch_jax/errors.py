"""UserError, the exception for wrong input, and texts of strangers in its message."""


class UserError(Exception):
    """Wrong input that the user can correct; the message is one sentence that says how.

    The command line prints the message on stderr and exits with code 2. Every other exception is
    a bug in this package and keeps its traceback.
    """


def printable(text: str) -> str:
    """Returns a text of unknown origin for a message: on one line, control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
