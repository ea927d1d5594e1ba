"""File locks, which the system releases when a process ends."""

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from switch_jax.errors import UserError


@contextmanager
def hold_lock(path: Path, task: str) -> Iterator[None]:
    """Holds a file lock while the caller does a task that only one process may do at a time.

    The system releases the lock when the process ends, however it ends; the file stays. Where the
    file system has no locks, a line on stderr says so.

    Args:
      path: the lock file, in an existing folder; it names the host and the process that hold it.
      task: what the holder does, for the message: "trains in runs/1".

    Raises `UserError` where another process, or another caller in this one, holds the lock.
    """
    with open(path, "a+", errors="replace") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read(300).strip() or "another process"
            raise UserError(
                f"{holder} {task}; wait until it ends, or stop it, or choose another folder."
            ) from None
        except OSError as error:
            print(
                f"{path} cannot be locked ({error.strerror}): make sure that no other process"
                f" {task}.",
                file=sys.stderr,
            )
        lock.truncate(0)
        lock.write(f"Process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield
