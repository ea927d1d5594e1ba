"""Sources of text: their splits, the shards these are read in, and how many documents there are.

Where a source comes without a validation split, a fixed 1 % of its documents is held out.
"""

import abc
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, get_args

from etils import epath

from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.text_files import read_texts

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)
_SHARD_BYTES = 64 * 2**20  # small files are read together until they are this large
_NUMBERED = re.compile(r"(.*[-.])(\d+)-of-(\d+)(.*)")


class Shard(NamedTuple):
    """A part of a split that is read from beginning to end."""

    paths: tuple[str, ...]
    size: int  # bytes, as stored


class Source(abc.ABC):
    """Documents of one kind, in splits and shards.

    Attributes:
      name: what metrics, packed records and messages call it.
      fingerprint: 32 hexadecimal digits that change with where the text lies and how large it is.
      spec: what the part of a mixture says that it was found by.
      stamp: as the fingerprint, and changes with the place and the age of files too.
      pairs: whether texts are inputs and targets in turn, and not text to be corrupted.
    """

    name: str
    spec: str
    fingerprint: str
    cache_key: str
    has_targets = False

    @abc.abstractmethod
    def shards(self, split: Split) -> tuple[Shard, ...]:
        """Always the same, in the same order."""

    @abc.abstractmethod
    def texts(self, split: Split, shard: Shard, bad: BadRecords) -> Iterator[str]:
        """The texts of a shard, in order; what cannot be read goes to `bad`."""

    def num_documents(self, split: Split) -> int | None:
        """How many documents a split has, where that is known without reading them."""
        return None

    def missing_files(self, split: Split) -> list[str]:
        """Files that the names of others promise and that are not there."""
        return []

    def size(self) -> int:
        """Bytes of all splits, as stored."""
        return sum(shard.size for split in SPLITS for shard in self.shards(split))


@dataclasses.dataclass(frozen=True)
class File:
    """A file and its size in bytes."""

    path: str
    size: int
    changed: float = 0.0  # seconds since 1970


class FileSource(Source):
    """Text in files, of any format that `formats` knows.

    Args:
      files: of each split, in order. Where there are none for validation, documents of the
        training files are held out, chosen by their text, so that equal ones stay together.
      counts: documents of the splits, where they are known.
    """

    def __init__(
        self, name: str, files: Mapping[Split, list[File]], counts: Mapping[Split, int] | None
    ):
        self.name = name
        self._held_out = not files.get("validation")
        self._files = dict(files)
        if self._held_out:
            self._files["validation"] = files["train"]
        self._counts = counts or {}
        digest = hashlib.blake2b(repr((self._held_out, counts)).encode(), digest_size=16)
        for split in SPLITS:
            for file in self._files[split]:
                digest.update(repr((split, os.path.basename(file.path), file.size)).encode())
        self.fingerprint = digest.hexdigest()
        self.cache_key = files_digest(self._files.values())

    def shards(self, split: Split) -> tuple[Shard, ...]:
        shards: list[Shard] = []
        for file in self._files[split]:
            if shards and shards[-1].size + file.size <= _SHARD_BYTES:
                paths, size = shards.pop()
                shards.append(Shard((*paths, file.path), size + file.size))
            else:
                shards.append(Shard((file.path,), file.size))
        return tuple(shards)

    def size(self) -> int:
        return sum({file.path: file.size for of in self._files.values() for file in of}.values())

    def texts(self, split: Split, shard: Shard, bad: BadRecords) -> Iterator[str]:
        if self._held_out and split == "validation":
            bad = BadRecords("skip")  # the same files: they are told of in training
        for path in shard.paths:
            for text in read_texts(path, bad):
                if not self._held_out or is_held_out(text) == (split == "validation"):
                    yield text

    def num_documents(self, split: Split) -> int | None:
        return self._counts.get(split)

    def missing_files(self, split: Split) -> list[str]:
        if self._held_out and split == "validation":
            return []
        return _missing(file.path for file in self._files[split])


def files_digest(files: Iterable[Iterable[File]]) -> str:
    """32 hexadecimal digits of the places, sizes and ages of files."""
    return hashlib.blake2b(repr([list(of) for of in files]).encode(), digest_size=16).hexdigest()


def is_held_out(text: str) -> bool:
    """A fixed 1 % of all texts."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 == 0


def _missing(paths: Iterable[str]) -> list[str]:
    """Those that are not among `…-00003-of-00128…` though their neighbours say there are 128."""
    present: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        match = _NUMBERED.fullmatch(path)
        if match:
            before, number, count, after = match.groups()
            present.setdefault((before, count, after), set()).add(int(number))
    return [
        f"{before}{number:0{len(count)}d}-of-{count}{after}"
        for (before, count, after), numbers in present.items()
        for number in sorted(set(range(int(count))) - numbers)
    ]


def glob_files(pattern: str) -> list[File]:
    """The files that match, in order of their paths."""
    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts) - 1)
    folder, rest = epath.Path("/".join(parts[:fixed]) or "/"), "/".join(parts[fixed:])
    if fixed == 0:
        folder = epath.Path(".")
    if not folder.is_dir():
        return []
    found = [path for path in folder.glob(rest) if not path.is_dir()]
    stats = [(path, path.stat()) for path in sorted(found) if path.exists()]
    return [File(os.fspath(path), stat.length, stat.mtime) for path, stat in stats]


def newest_version(folder: epath.Path, version: str = "") -> epath.Path | None:
    """Where TFDS prepared a data set: its newest version, unless one is named."""
    if not folder.is_dir():
        return None
    versions = [path.parent for path in folder.glob("*/dataset_info.json")]
    if version:
        versions = [path for path in versions if path.name == version]
    return max(versions, default=None, key=lambda path: [*map(int, re.findall(r"\d+", path.name))])
