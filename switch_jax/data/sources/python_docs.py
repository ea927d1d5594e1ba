"""Text that is on every machine that has Python, about 10 MB of it.

It is the language reference that comes with `pydoc`, and the sources of the standard library
with their docstrings and comments. It differs between builds of Python.
"""

import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Document(NamedTuple):
    """A text and its path, `/`-separated and unique."""

    path: str
    text: str


@functools.cache
def python_documents() -> tuple[Document, ...]:
    """All documents, no two with the same text, in the same order every time."""
    unique: dict[str, Document] = {}
    for document in (*_topics(), *_library_sources()):
        unique.setdefault(document.text, document)
    return tuple(unique.values())


def is_held_out_path(path: str) -> bool:
    """Whether a document belongs to the validation split: a fixed 5 % by its path alone."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < 5


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it apart
        return
    for name in sorted(topics):
        yield Document(f"topics/{name}", topics[name])


# Tests are missing from many distributions; installed packages differ everywhere.
_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


def _library_sources() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and not name.startswith("config-")
        )
        for name in sorted(files):
            # _sysconfigdata holds the paths and flags of the machine that built Python.
            if not name.endswith(".py") or name.startswith("_sysconfigdata"):
                continue
            path = Path(folder, name)
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip():
                yield Document(f"library/{path.relative_to(root).as_posix()}", text)
