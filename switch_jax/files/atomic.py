"""Atomic writes of files and folders.

Content is first written to a hidden sibling of its path, which is renamed when it is complete. So a
reader sees either the whole content or none of it, even if the writer is killed. What a killed
writer left is removed by the next writer of the same path.
"""

import atexit
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from switch_jax.errors import UserError
from switch_jax.files.os_errors import ADVICE, explain_os_error
from switch_jax.files.paths import is_bucket


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file, or replaces it; removes what a killed process left of the same file."""
    if is_bucket(path):  # there a file appears when it is complete
        path.write_bytes(content)
        return
    with _renamed_when_complete(_unique_sibling(path), path) as partial:
        partial.touch()
        with _marked_as_used(partial):
            _remove_leftovers(path)
            partial.write_bytes(content)


@contextmanager
def create_folder_atomically(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; it becomes `path` at the end, or is removed on an exception.

    What a killed process left of the same folder is removed. Raises `UserError` if `path` exists
    or cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} exists; name a folder that does not, or remove it.")
    partial = _unique_sibling(path.absolute())
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be made ({error.strerror}); name another folder."
        ) from error
    try:
        with _marked_as_used(partial), _renamed_when_complete(partial, path):
            _remove_leftovers(path.absolute())
            yield partial
    except Exception as error:
        is_user_error = isinstance(error, UserError)
        sentence = str(error) if is_user_error else explain_os_error(error)
        if sentence is None or (is_user_error and str(partial) not in sentence):
            raise
        raise UserError(sentence.replace(str(partial), str(path))) from error


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Builds a file or folder unless it exists; returns `path`.

    `build` writes to the path that it is given, which becomes `path` when it is complete. Other
    processes that call `build_once` with the same path meanwhile wait and use the same result; if
    the build fails, the next process builds.

    Raises `UserError` if the folder cannot be written or the disk is full.
    """
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The lock file is never removed: a process may be waiting on it, and a later process would
        # then lock a new file of the same name.
        with open(path.with_name(f".{path.name}.lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                # A fixed name, so that the remains of a killed build are found and removed.
                partial = path.with_name(f".{path.name}.partial")
                _remove(partial)
                with _renamed_when_complete(partial, path):
                    build(partial)
    except OSError as error:
        if error.errno not in ADVICE:
            raise
        raise UserError(
            f"Cannot write {path}: {os.strerror(error.errno)}; {ADVICE[error.errno]}"
            " (the cache's is $SWITCH_JAX_CACHE)."
        ) from error
    return path


def scratch_folder(parent: Path) -> Path:
    """Creates a folder in `parent` that is removed when the process ends.

    A later call removes the folder of a process that was killed.
    """
    path = _unique_sibling(parent / "scratch")
    path.mkdir(parents=True)
    until_end = ExitStack()
    until_end.enter_context(_marked_as_used(path))
    until_end.callback(_remove, path)
    atexit.register(until_end.close)
    _remove_leftovers(parent / "scratch")
    return path


@contextmanager
def _marked_as_used(path: Path) -> Iterator[None]:
    """Locks a file or folder, as far as its file system has locks, until the process ends."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Removes the partial files and folders of `path` that are not marked as used."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.partial")
    for sibling in [path for path in path.parent.iterdir() if pattern.fullmatch(path.name)]:
        with suppress(OSError):  # in use, or another user's
            descriptor = os.open(sibling, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(sibling)
            finally:
                os.close(descriptor)


@contextmanager
def _renamed_when_complete(partial: Path, path: Path) -> Iterator[Path]:
    """Yields `partial`; renames it to `path` at the end, or removes it on an exception."""
    try:
        yield partial
        partial.replace(path)
    finally:
        _remove(partial)


def _unique_sibling(path: Path) -> Path:
    """Returns a path beside `path` that no other process uses, on this host or another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
