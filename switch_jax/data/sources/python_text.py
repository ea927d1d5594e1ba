"""`python_docs` and `python_docstrings`: text of a Python installation, as sources.

`python_docs` is about 10 MB: the language reference of `pydoc` and the source files of the standard
library. `python_docstrings` is about 30 MB of English: the docstrings of the installed packages.
Both differ between installations.
"""

import functools
import hashlib
import inspect
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.source import Shard, Source, Split

_SHORTEST_DOCSTRING = 100  # characters


class Document(NamedTuple):
    """A text, and the unique path of its file, separated by `/`, or its place in that file."""

    path: str
    text: str


@functools.cache
def python_documents(name: str = "python_docs") -> tuple[Document, ...]:
    """Returns the documents of a source, no two with the same text, always in the same order."""
    unique: dict[str, Document] = {}
    for document in _DOCUMENTS[name]():
        unique.setdefault(document.text, document)
    return tuple(unique.values())


def is_held_out_path(path: str) -> bool:
    """Whether the documents of a file are held out for validation: 5 %, by a hash of its path."""
    digest = hashlib.blake2b(path.partition(":")[0].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < 5


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


def _docs() -> Iterator[Document]:
    """Yields the language reference and the source files of the standard library."""
    yield from _topics()
    root = Path(sysconfig.get_path("stdlib"))
    for path, text in _python_files(root, _SKIPPED_FOLDERS):
        # _sysconfigdata holds the paths and flags of the machine that built Python.
        if not Path(path).name.startswith("_sysconfigdata") and text.strip():
            yield Document(f"library/{path}", text)


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a separate package in some distributions
        return
    for name in sorted(topics):
        yield Document(f"topics/{name}", topics[name])


def _docstrings() -> Iterator[Document]:
    """Yields the docstrings of installed packages; not our own, which change with every commit."""
    root = Path(sysconfig.get_path("purelib"))
    for path, text in _python_files(root, {"__pycache__", "switch_jax"}):
        for i, docstring in enumerate(find_docstrings(text)):
            yield Document(f"packages/{path}:{i}", docstring)


def find_docstrings(text: str) -> Iterator[str]:
    '''Yields the docstrings of a Python file, without indentation, that are not very short.

    They are found by their triple quotes `"""` at the beginning of a line: a syntax tree takes ten
    times as long.
    '''
    parts = text.split('"""')
    for before, docstring in zip(parts[::2], parts[1:-1:2]):
        is_alone = not before.rpartition("\n")[2].strip(" \trR")
        if is_alone and len(docstring) >= _SHORTEST_DOCSTRING:
            yield inspect.cleandoc(docstring)


def _python_files(root: Path, skipped_folders: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields the paths below `root` of Python files, separated by `/`, and their texts."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in skipped_folders and not name.startswith("config-")
        )
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix == ".py":
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                yield path.relative_to(root).as_posix(), text


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
_DOCUMENTS: dict[str, Callable[[], Iterator[Document]]] = {
    "python_docs": _docs,
    "python_docstrings": _docstrings,
}
PYTHON_TEXTS = tuple(_DOCUMENTS)
