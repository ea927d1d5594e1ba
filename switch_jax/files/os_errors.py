"""Errors of the operating system as sentences, whichever library raises them."""

import errno
import os
import re

_NEEDS_ROOM = "make room for it, or choose another folder"
_NEEDS_PERMISSION = "allow it, or choose another path"
_NEEDS_A_DISK = "check the disk, or choose another folder"

# Errors of the operating system that the user can correct, and how.
ADVICE = {
    errno.ENOSPC: _NEEDS_ROOM,
    errno.EDQUOT: _NEEDS_ROOM,
    errno.EFBIG: _NEEDS_ROOM,
    errno.EACCES: _NEEDS_PERMISSION,
    errno.EPERM: _NEEDS_PERMISSION,
    errno.EROFS: _NEEDS_PERMISSION,
    errno.EEXIST: "choose another path",
    errno.ENOTDIR: "choose another path",
    errno.EISDIR: "choose another path",
    errno.ELOOP: "choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "close other programs, or raise the limit of open files",
    errno.ENOLCK: _NEEDS_A_DISK,
    errno.EIO: _NEEDS_A_DISK,
    errno.ESTALE: _NEEDS_A_DISK,
}
_QUOTED_PATH = re.compile(r"""["'`](/[^"'`]+)["'`]""")


def explain_os_error(error: BaseException | None) -> str | None:
    """Returns a sentence for an error of the operating system that the user can correct.

    Such errors are a full disk, a folder that is read-only, a path that is too long. The error may
    come from any library: where it is no `OSError`, as TensorStore's and safetensors', the system's
    text in its message counts, and so do the errors that led to it. Returns None for other errors.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        code, path = _os_error(error)
        if code in ADVICE:
            where = f"{path}: " if path else ""
            return f"{where}{os.strerror(code)}; {ADVICE[code]}."
        error = error.__cause__
    return None


def _os_error(error: BaseException) -> tuple[int, str | None]:
    """Returns the number of an operating system's error, 0 for another one, and its path."""
    if isinstance(error, OSError) and error.errno:
        return error.errno, None if error.filename is None else os.fsdecode(error.filename)
    text = str(error)
    for code in ADVICE:
        if code != errno.EEXIST and os.strerror(code) in text:
            quoted = _QUOTED_PATH.search(text)
            return code, quoted and quoted[1]
    return 0, None
