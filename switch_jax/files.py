"""Files and folders that are written whole or not at all."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from switch_jax.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
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
def new_folder(path: Path) -> Iterator[Path]:
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
