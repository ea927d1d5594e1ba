"""The one exception that means «the user can put this right»."""


class UserError(Exception):
    """Wrong input; the message is one sentence that says what to change.

    The command line prints the message on stderr and exits with code 2. Everything
    else that is raised is a bug of ours and keeps its traceback.
    """
