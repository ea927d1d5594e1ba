"""Mixtures of text: what they are called, their documents, and which are held out.

`python_docs` is on every machine that has Python: the language reference that comes with
`pydoc`, and the sources of the standard library with their docstrings and comments, about
10 MB. It differs between builds of Python, so whatever is made of a mixture is recorded
with its `fingerprint`.
"""

import functools
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from switch_jax.errors import UserError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)


class Document(NamedTuple):
    """A text and its path within the mixture, `/`-separated and unique."""

    path: str
    text: str


def documents(mixture: str, split: Split) -> Iterable[Document]:
    """A mixture's documents, in the same order every time.

    Raises `UserError` for an unknown mixture.
    """
    if mixture not in MIXTURES:
        raise UserError(
            f"data.mixture={mixture!r} is not known; use one of {', '.join(sorted(MIXTURES))}."
        )
    return MIXTURES[mixture](split)


def fingerprint(mixture: str) -> str:
    """32 hexadecimal digits that change with any path or text of any split."""
    digest = hashlib.blake2b(digest_size=16)
    for split in SPLITS:
        for document in documents(mixture, split):
            for part in (split, *document):
                data = part.encode()
                digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def held_out(path: str) -> bool:
    """Whether a document belongs to the validation split: a fixed 5 % by its path alone."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < 5


def _python_docs(split: Split) -> list[Document]:
    return [d for d in _python_documents() if held_out(d.path) == (split == "validation")]


@functools.cache
def _python_documents() -> list[Document]:
    unique: dict[str, Document] = {}
    for document in (*_topics(), *_library_sources()):
        unique.setdefault(document.text, document)
    return list(unique.values())


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


MIXTURES: dict[str, Callable[[Split], Iterable[Document]]] = {"python_docs": _python_docs}
