"""`python_docs`: about 10 MB of text that comes with Python, as a source.

The documents are the language reference of `pydoc` and the source files of the standard library.
They differ between builds of Python.
"""

import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.source import Shard, Source, Split


class Document(NamedTuple):
    """A text and its unique path, separated by `/`."""

    path: str
    text: str


@functools.cache
def python_documents() -> tuple[Document, ...]:
    """Returns all documents, no two with the same text, in an order that never changes."""
    unique: dict[str, Document] = {}
    for document in (*_topics(), *_library_sources()):
        unique.setdefault(document.text, document)
    return tuple(unique.values())


def is_held_out_path(path: str) -> bool:
    """Whether a document is held out for validation: a fixed 5 % by a hash of the path."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < 5


class PythonDocsSource(Source):
    """The source `python_docs`; its fingerprint depends on the documents themselves."""

    def __init__(self):
        self.name = "python_docs"
        digest = hashlib.blake2b(digest_size=16)
        for document in python_documents():
            for part in document:
                data = part.encode()
                digest.update(len(data).to_bytes(8, "little") + data)
        self.fingerprint = self.cache_key = digest.hexdigest()

    def shards(self, split: Split) -> tuple[Shard, ...]:
        return (Shard((), sum(len(text) for text in self._texts(split))),)

    def texts(self, split: Split, shard: Shard, bad: BadRecords) -> Iterator[str]:
        return self._texts(split)

    def num_documents(self, split: Split) -> int | None:
        return sum(1 for _ in self._texts(split))

    def _texts(self, split: Split) -> Iterator[str]:
        for document in python_documents():
            if is_held_out_path(document.path) == (split == "validation"):
                yield document.text


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a separate package in some distributions
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
