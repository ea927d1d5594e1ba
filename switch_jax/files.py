"""The cache: things made once on a machine and used by every run after that."""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from switch_jax.errors import UserError

_USER_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.ENOLCK,
}


def cache_root() -> Path:
    """`$SWITCH_JAX_CACHE`, by default `~/.cache/switch_jax`; need not exist."""
    return Path(os.environ.get("SWITCH_JAX_CACHE") or "~/.cache/switch_jax").expanduser()


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Makes a file or folder unless it exists; returns `path`.

    `build` writes to the path it is given, a hidden sibling that becomes `path` only when
    it is complete. Processes that ask for the same path at the same time wait for the
    first of them and share its result; if that one fails, the next takes over.

    Raises `UserError` where the folder cannot be written or the disk is full.
    """
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The lock file stays: a process may already be waiting on it, and one that came
        # after its removal would lock another file of the same name.
        with open(path.with_name(f".{path.name}.lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _make(path, build)
    except OSError as error:
        if error.errno not in _USER_ERRORS:
            raise
        raise UserError(
            f"Cannot write {path}: {os.strerror(error.errno)}; make room for it, or choose"
            " another folder (the cache's is $SWITCH_JAX_CACHE)."
        ) from error
    return path


def _make(path: Path, build: Callable[[Path], None]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)  # what a killed process left
    try:
        build(partial)
        partial.rename(path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to a sibling first, which takes the place of `path` when it is complete."""
    partial = _partial(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """A sibling that no other process uses, on this host or on another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")


@contextmanager
def create_folder_atomically(path: Path) -> Iterator[Path]:
    """A sibling to fill, which becomes `path` when all went well and otherwise is gone.

    Raises `UserError` where `path` exists or its place cannot be written to.
    """
    if path.exists():
        raise UserError(f"{path} exists; name a folder that does not, or remove it.")
    partial = _partial(path.absolute())
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be made ({error.strerror}); name another folder."
        ) from error
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
