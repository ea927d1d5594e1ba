"""Folders that others made, such as downloaded ones: what leads out of them is refused."""

import os
from pathlib import Path

from switch_jax.errors import UserError
from switch_jax.files.paths import is_bucket

# Zeros, the most regular data that a checkpoint has, become a thousand times shorter with gzip.
_MAX_EXPANSION = 1000
_ALWAYS_ALLOWED_BYTES = 2**30


def path_within(folder: Path, name: str) -> Path:
    """Returns the path of a file or folder in a folder that others made; it need not exist.

    In a snapshot in Hugging Face's cache, files are links to `../../blobs`.

    Raises `UserError` where the name, or a symbolic link, leads out of the folder.
    """
    if is_bucket(folder):  # which has no links
        return folder / name
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
