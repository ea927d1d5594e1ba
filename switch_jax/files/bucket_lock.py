"""Locks of what is in a bucket, which has none: a file that its holder writes again and again."""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from switch_jax.errors import UserError
from switch_jax.files.buckets import explain_bucket_error, read_text

_BEAT_SECONDS = 10.0  # between two writes of the file
_SILENCE_SECONDS = 2 * _BEAT_SECONDS  # after which the holder counts as killed
_POLL_SECONDS = 1.0


@contextmanager
def hold_bucket_lock(file: Path, task: str) -> Iterator[None]:
    """Holds a lock in a bucket while the caller does a task that one process may do at a time.

    Where the file stays the same for 20 seconds, its holder was killed, and another process takes
    the lock. So this waits for up to 20 seconds where the file exists.

    Args:
      file: which is removed at the end; it names the host and the process that hold the lock.
      task: what the holder does, for the message: "trains in gs://bucket/run".

    Raises `UserError` where another process holds the lock.
    """
    holder = f"Process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex}"

    def beat() -> None:
        file.write_text(f"{holder} at {time.time():.0f}\n")

    _wait_for_silence(file, task)
    beat()
    time.sleep(_POLL_SECONDS)  # another process may have taken it at the same moment
    if holder not in read_text(file):
        raise UserError(f"Another process {task}; choose another folder.")
    try:
        with repeating(_BEAT_SECONDS, lambda: _try(beat), "lock"):
            yield
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def repeating(seconds: float, call: Callable[[], None], name: str) -> Iterator[None]:
    """Calls a function every few seconds in a thread; at the end waits for a call that runs."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(seconds):
            call()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _wait_for_silence(file: Path, task: str) -> None:
    """Waits until the holder of a lock has been silent; raises `UserError` when it is not."""
    before = read_text(file)
    silent_since = time.monotonic()
    if before:
        print(f"Waiting for the lock {file} …", file=sys.stderr, flush=True)
    while before and time.monotonic() - silent_since < _SILENCE_SECONDS:
        time.sleep(_POLL_SECONDS)
        now = read_text(file)
        if now and now != before:
            raise UserError(
                f"{now.partition(', ')[0]} {task}; wait until it ends, or stop it, or choose"
                " another folder."
            )
        before = now


def _try(beat: Callable[[], None]) -> None:
    """Writes the file, or leaves it to the next time if the bucket cannot be reached."""
    try:
        beat()
    except Exception as error:
        if explain_bucket_error(error) is None and not isinstance(error, OSError):
            raise
