"""UserError, the exception for wrong input."""


class UserError(Exception):
    """Wrong input that the user can correct; the message is one sentence that says how.

    The command line prints the message on stderr and exits with code 2. Every other exception is
    a bug in this package and keeps its traceback.
    """
