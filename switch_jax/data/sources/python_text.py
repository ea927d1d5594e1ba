"""`python_docs` and `python_packages`: the text of a Python installation, as sources.

`python_docs` is about 10 MB: the language reference of `pydoc` and the source files of the standard
library. `python_packages` is about 70 MB: source files of the installed packages. Both differ
between installations.
"""

import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.source import Shard, Source, Split

PYTHON_TEXTS = ("python_docs", "python_packages")
_PACKAGES_LENGTH = 70_000_000  # characters of `python_packages`
_LONGEST_FILE = 500_000  # bytes of a file of `python_packages`; longer ones are tables


class Document(NamedTuple):
    """A text and its unique path, separated by `/`."""

    path: str
    text: str


@functools.cache
def python_documents(name: str = "python_docs") -> tuple[Document, ...]:
    """Returns the documents of a source, no two with the same text, always in the same order."""
    if name == "python_docs":
        return tuple(_unique((*_topics(), *_library_sources())))
    documents, length = [], 0
    for document in _unique(_package_sources()):
        length += len(document.text)
        if length > _PACKAGES_LENGTH:
            break
        documents.append(document)
    return tuple(documents)


def is_held_out_path(path: str) -> bool:
    """Whether a document is held out for validation: a fixed 5 % by a hash of the path."""
    return _path_hash(path) % 100 < 5


class PythonTextSource(Source):
    """A source of `PYTHON_TEXTS`; its fingerprint depends on the documents themselves."""

    def __init__(self, name: str):
        self.name = name
        digest = hashlib.blake2b(digest_size=16)
        for document in python_documents(name):
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
        for document in python_documents(self.name):
            if is_held_out_path(document.path) == (split == "validation"):
                yield document.text


def _path_hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "big")


def _unique(documents: Iterable[Document]) -> Iterator[Document]:
    """Yields the documents whose text has not been seen before."""
    seen: set[bytes] = set()
    for document in documents:
        key = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            yield document


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
    for path in _python_files(root, _SKIPPED_FOLDERS):
        # _sysconfigdata holds the paths and flags of the machine that built Python.
        if not Path(path).name.startswith("_sysconfigdata"):
            yield from _read(root, path, "library")


def _package_sources() -> Iterator[Document]:
    """Yields the files of installed packages in the order of a hash: packages are mixed."""
    root = Path(sysconfig.get_path("purelib"))
    # Files outside folders hold paths of this machine; text must not depend on our own code.
    paths = [p for p in _python_files(root, {"__pycache__", "switch_jax"}) if "/" in p]
    for path in sorted(paths, key=_path_hash):
        if Path(root, path).stat().st_size < _LONGEST_FILE:
            yield from _read(root, path, "packages")


def _python_files(root: Path, skipped_folders: set[str]) -> Iterator[str]:
    """Yields the paths below `root` of its Python files, separated by `/`, in a fixed order."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in skipped_folders and not name.startswith("config-")
        )
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name).relative_to(root).as_posix()


def _read(root: Path, path: str, prefix: str) -> Iterator[Document]:
    """Yields the document of a file; nothing if it is empty or cannot be read."""
    try:
        text = Path(root, path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if text.strip():
        yield Document(f"{prefix}/{path}", text)
