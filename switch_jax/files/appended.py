"""Files of lines that take long to write: an interrupted writer is continued by the next one.

Until it is complete, the file is in a folder beside its path, `NAME.partial`, with what it is made
with and the lock of its writer.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from switch_jax.errors import UserError
from switch_jax.files.atomic import write_atomically
from switch_jax.files.lock import hold_lock

_LOCK, _MADE_WITH = ".lock", "made_with.json"


@contextmanager
def append_lines(
    path: Path, made_with: Mapping[str, Any], multiple: int = 1
) -> Iterator[tuple[int, BinaryIO]]:
    """Yields the number of lines that are written, and a file to append the others to.

    At the end, the file becomes `path`. If the caller raises or is killed, the next call with the
    same arguments continues behind the complete lines.

    Args:
      path: a file that does not exist, in an existing folder.
      made_with: JSON values, by name, on which the lines depend.
      multiple: lines are kept in groups of this size; those of an incomplete group are removed.

    Raises `UserError` where `path` exists, is being written, or was begun with other values.
    """
    _check_is_new(path)
    folder = path.with_name(f"{path.name}.partial")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; move it, or choose another name than {path.name}.")
    folder.mkdir(exist_ok=True)
    with hold_lock(folder / _LOCK, f"writes {path}"):
        lines = folder / path.name
        count, size = _complete_lines(lines, multiple)
        if count:
            _check_made_with(folder, path, made_with)
        else:
            write_atomically(folder / _MADE_WITH, json.dumps(made_with, indent=2).encode())
        try:
            with lines.open("ab") as file:
                file.truncate(size)
                yield count, file
            _check_is_new(path)
            lines.replace(path)
        finally:
            if not lines.exists() or not lines.stat().st_size:
                shutil.rmtree(folder, ignore_errors=True)  # NFS keeps the open lock


def _check_is_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists; name a file that does not, or remove it.")


def _complete_lines(path: Path, multiple: int) -> tuple[int, int]:
    """Returns number and bytes of the lines of a file, up to the last multiple of lines."""
    count = size = kept = 0
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                count, size = count + 1, size + len(line)
                if count % multiple == 0:
                    kept = size
    return count - count % multiple, kept


def _check_made_with(folder: Path, path: Path, made_with: Mapping[str, Any]) -> None:
    try:
        before = json.loads((folder / _MADE_WITH).read_bytes())
        different = [name for name, value in made_with.items() if before[name] != value]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is damaged; delete it.") from None
    if different:
        raise UserError(
            f"{folder} was made with another value of {', '.join(different)}; repeat that command,"
            f" delete the folder, or choose another name than {path.name}."
        )
