"""Paths: home folders, the cache of a machine, buckets, and paths with any characters."""

import os
import re
from pathlib import Path

from switch_jax.errors import UserError

_PLAIN = re.compile(r"[\w./+=,@~-]+", re.ASCII)  # paths that every library reads as they are
_BUCKETS = ("gs://", "s3://")
_DESCRIPTORS = "/proc/self/fd"  # of Linux: a link for each open descriptor
_open_folders: dict[Path, int] = {}  # descriptors by path, of `plain_path`


def cache_root() -> Path:
    """Returns `$SWITCH_JAX_CACHE`, by default `~/.cache/switch_jax`; it need not exist.

    Raises `UserError` where that begins with `~` and there is no such home folder.
    """
    path = expand_user(os.environ.get("SWITCH_JAX_CACHE") or "~/.cache/switch_jax")
    if path.parts and path.parts[0].startswith("~"):
        raise UserError(f"There is no home folder for {path}; set SWITCH_JAX_CACHE to a folder.")
    return path


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(_BUCKETS)


def absolute_path(path: Path) -> Path:
    """Returns a path without the current folder, of which one in a bucket is independent."""
    return path if is_bucket(path) else path.absolute()


def expand_user(path: str | Path) -> Path:
    """Returns a path with `~` or `~NAME` in front replaced, if there is such a home folder."""
    return Path(os.path.expanduser(path))


def plain_path(folder: Path) -> Path:
    """Returns a path to an existing folder for libraries that read more into a path than its names.

    TensorStore and Orbax decode `%20`, end a path at `#` or `?`, match `[1]` as a pattern and take
    a backslash for a slash. Where a path has other characters than letters, digits and a few signs,
    the result is that of an open descriptor, which stays valid until the process ends. A folder in
    a bucket is returned as it is.

    Raises `UserError` where the system has no such paths.
    """
    if is_bucket(folder):
        return folder
    if _PLAIN.fullmatch(str(folder)) and ".." not in folder.parts:
        return folder.absolute()
    if not os.path.isdir(_DESCRIPTORS):
        raise UserError(f"{folder} must have letters, digits and . _ - alone; rename it.")
    descriptor = _open_folders.get(folder)
    if descriptor is None or not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        _open_folders[folder] = descriptor
    return Path(_DESCRIPTORS, str(descriptor))
