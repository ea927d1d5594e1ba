"""Atomic writes of files and folders, the cache of a machine, and folders that others made.

Content is first written to a hidden sibling of its path, which is renamed when it is complete. So a
reader sees either the whole content or none of it, even if the writer is killed.

A folder that others made, such as a downloaded one, is read through `path_within` and
`folder_size`, which refuse what leads out of it.
"""

import errno
import fcntl
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from switch_jax.errors import UserError

_NEEDS_ROOM = "make room for it, or choose another folder"
_NEEDS_PERMISSION = "allow it, or choose another path"
_NEEDS_A_DISK = "check the disk, or choose another folder"

# Errors of the operating system that the user can correct, and how.
_ADVICE = {
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
_PLAIN = re.compile(r"[\w./+=,@~-]+", re.ASCII)  # paths that every library reads as they are
_DESCRIPTORS = "/proc/self/fd"  # of Linux: a link for each open descriptor
_open_folders: dict[Path, int] = {}  # descriptors by path, of `plain_path`
# Zeros, the most regular data that a checkpoint has, become a thousand times shorter with gzip.
_MAX_EXPANSION = 1000
_ALWAYS_ALLOWED_BYTES = 2**30
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
        if code in _ADVICE:
            where = f"{path}: " if path else ""
            return f"{where}{os.strerror(code)}; {_ADVICE[code]}."
        error = error.__cause__
    return None


def _os_error(error: BaseException) -> tuple[int, str | None]:
    """Returns the number of an operating system's error, 0 for another one, and its path."""
    if isinstance(error, OSError) and error.errno:
        return error.errno, None if error.filename is None else os.fsdecode(error.filename)
    text = str(error)
    for code in _ADVICE:
        if code != errno.EEXIST and os.strerror(code) in text:
            quoted = _QUOTED_PATH.search(text)
            return code, quoted and quoted[1]
    return 0, None


def cache_root() -> Path:
    """Returns `$SWITCH_JAX_CACHE`, by default `~/.cache/switch_jax`; it need not exist.

    Raises `UserError` where that begins with `~` and there is no such home folder.
    """
    path = expand_user(os.environ.get("SWITCH_JAX_CACHE") or "~/.cache/switch_jax")
    if path.parts and path.parts[0].startswith("~"):
        raise UserError(f"There is no home folder for {path}; set SWITCH_JAX_CACHE to a folder.")
    return path


def expand_user(path: str | Path) -> Path:
    """Returns a path with `~` or `~NAME` in front replaced, if there is such a home folder."""
    return Path(os.path.expanduser(path))


def path_within(folder: Path, name: str) -> Path:
    """Returns the path of a file or folder in a folder that others made; it need not exist.

    In a snapshot in Hugging Face's cache, files are links to `../../blobs`.

    Raises `UserError` where the name, or a symbolic link, leads out of the folder.
    """
    real_folder = Path(os.path.realpath(folder))
    roots = [real_folder]
    roots += [p.parent / "blobs" for p in real_folder.parents if p.name == "snapshots"]
    try:
        target = Path(os.path.realpath(folder / name))
    except ValueError:  # a null character
        target = Path(os.sep)
    if not any(target.is_relative_to(root) for root in roots):
        raise UserError(
            f"{folder} has or names {name!r}, which leads to {target}, outside of it; do not use"
            " it, or copy the file into it."
        )
    return folder / name


def folder_size(folder: Path) -> int:
    """Returns the bytes of all files in a folder that others made.

    Raises `UserError` for a symbolic link in it that leads out of it.
    """
    size = 0
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                path_within(folder, str(path.relative_to(folder)))
        size += sum(os.stat(Path(parent, name)).st_size for name in files)
    return size


def check_expansion(what: str, size: int, stored: int) -> None:
    """Raises `UserError` where data takes absurdly more bytes than the files that hold it."""
    if size > _MAX_EXPANSION * stored + _ALWAYS_ALLOWED_BYTES:
        raise UserError(
            f"{what} expands to {size:,} bytes, and its files have {stored:,}; do not use it."
        )


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file, or replaces it."""
    with _renamed_when_complete(_unique_sibling(path), path) as partial:
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


@contextmanager
def _marked_as_used(folder: Path) -> Iterator[None]:
    """Locks a folder, as far as its file system has locks, until the process ends at the latest."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Removes the partial folders of `path` that are not marked as used."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.partial")
    for sibling in [path for path in path.parent.iterdir() if pattern.fullmatch(path.name)]:
        with suppress(OSError):  # in use, or another user's
            descriptor = os.open(sibling, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(sibling)
            finally:
                os.close(descriptor)


def plain_path(folder: Path) -> Path:
    """Returns a path to an existing folder for libraries that read more into a path than its names.

    TensorStore and Orbax decode `%20`, end a path at `#` or `?`, match `[1]` as a pattern and take
    a backslash for a slash. Where a path has other characters than letters, digits and a few signs,
    the result is that of an open descriptor, which stays valid until the process ends.

    Raises `UserError` where the system has no such paths.
    """
    if _PLAIN.fullmatch(str(folder)) and ".." not in folder.parts:
        return folder.absolute()
    if not os.path.isdir(_DESCRIPTORS):
        raise UserError(f"{folder} must have letters, digits and . _ - alone; rename it.")
    descriptor = _open_folders.get(folder)
    if descriptor is None or not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        _open_folders[folder] = descriptor
    return Path(_DESCRIPTORS, str(descriptor))


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
        if error.errno not in _ADVICE:
            raise
        raise UserError(
            f"Cannot write {path}: {os.strerror(error.errno)}; {_ADVICE[error.errno]}"
            " (the cache's is $SWITCH_JAX_CACHE)."
        ) from error
    return path


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
