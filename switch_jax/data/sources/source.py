"""Sources of text: their splits, shards and numbers of documents.

Of a source without a validation split, a fixed 1 % of the training documents is held out, and at
least one; a source with a single document is validated on what it is trained on.
"""

import abc
import dataclasses
import functools
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Literal, NamedTuple, get_args

from etils import epath

from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.held_out import SMALL_BYTES, HeldOut, hold_out_of
from switch_jax.data.sources.text_files import USUAL_FORMAT, TextFormat, read_texts

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)
_SHARD_BYTES = 64 * 2**20  # small files are joined to shards of at most this size
_MAX_SHARDS = 10**6  # of a data set; a larger number in a name has another meaning
_NUMBERED = re.compile(r"(.*[-.])(\d+)-of-(\d+)(.*)")


class Shard(NamedTuple):
    """A part of a split, which is always read from its beginning.

    Attributes:
      paths: of its files, in order; empty for text that is not in files.
      size: bytes of the files, compressed or not.
    """

    paths: tuple[str, ...]
    size: int


class Source(abc.ABC):
    """Documents of one kind, in splits and shards.

    Attributes:
      name: of the source in metrics, token stores and messages.
      spec: the part of `data.mixture` that stands for the source.
      fingerprint: 32 hexadecimal digits, which change with the names and sizes of the files. Token
        stores keep it: they are valid as long as it is equal.
      streams: whether the texts come over a network, and their number of bytes is unknown.
      cache_key: 32 hexadecimal digits, which change with the folders and modification times of the
        files, too.
      has_targets: True if texts alternate between inputs and targets, False if they are documents
        for `data.objective`.
    """

    name: str
    spec: str
    fingerprint: str
    cache_key: str
    has_targets = False
    streams = False
    _holds_out = False  # whether validation is a part of the training documents

    @abc.abstractmethod
    def shards(self, split: Split) -> tuple[Shard, ...]:
        """Returns the shards of a split, in an order that never changes."""

    @abc.abstractmethod
    def texts(self, split: Split, shard: Shard, bad: BadRecords) -> Iterator[str]:
        """Yields the texts of a shard in order; adds bad records to `bad`."""

    def num_documents(self, split: Split) -> int | None:
        """Returns the number of documents of a split; None if it is unknown without reading."""
        return None

    def missing_files(self, split: Split) -> list[str]:
        """Returns the paths of missing files, such as number 3 among `…-00000-of-00128…`."""
        return []

    def notes(self) -> list[str]:
        """Returns sentences on what a user may not expect of the source."""
        if self._holds_out and self._held_out.is_shared:
            return [
                f"{self.name} has a single document: validation uses the text that training does."
            ]
        return []

    @functools.cached_property
    def _held_out(self) -> HeldOut:
        return HeldOut() if self.size() > SMALL_BYTES else hold_out_of(self._all_documents())

    def _all_documents(self) -> Iterator[str]:
        """Yields the texts by which training documents are held out, of a source that does so."""
        return iter(())

    def size(self) -> int:
        """Returns the bytes of all files."""
        return sum(shard.size for split in SPLITS for shard in self.shards(split))


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a source.

    The class name and the fields are part of `cache_key`.

    Attributes:
      size: bytes.
      changed: time of the last modification, in seconds since 1970.
    """

    path: str
    size: int
    changed: float = 0.0


class FileSource(Source):
    """Texts in files of any format that `read_texts` reads.

    Args:
      files: of each split, in order. Without files for validation, training documents are held out
        by a hash of their text, so that equal documents are in the same split.
      counts: number of documents of each split where it is known.
      text_format: what a document of the files is.
    """

    def __init__(
        self,
        name: str,
        files: Mapping[Split, list[File]],
        counts: Mapping[Split, int] | None,
        text_format: TextFormat = USUAL_FORMAT,
    ):
        self.name = name
        self._holds_out = not files.get("validation")
        self._files = dict(files)
        if self._holds_out:
            self._files["validation"] = files["train"]
        self._counts = counts or {}
        self._text_format = text_format
        # Token stores keep the fingerprint: what has its usual value adds nothing to it.
        changed = () if text_format == USUAL_FORMAT else tuple(text_format)
        if self._holds_out and self.size() <= SMALL_BYTES:
            changed = (*changed, "at least one is held out")
        described = repr((self._holds_out, counts, *changed))
        digest = hashlib.blake2b(described.encode(), digest_size=16)
        for split in SPLITS:
            for file in self._files[split]:
                digest.update(repr((split, os.path.basename(file.path), file.size)).encode())
        self.fingerprint = digest.hexdigest()
        self.cache_key = files_digest(self._files.values(), *changed)

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
        return sum({file.path: file.size for file in chain(*self._files.values())}.values())

    def texts(self, split: Split, shard: Shard, bad: BadRecords) -> Iterator[str]:
        if self._holds_out and split == "validation":
            bad = BadRecords("skip")  # training counts the bad records of the same files
        for path in shard.paths:
            for text in read_texts(path, bad, self._text_format):
                if not self._holds_out or self._held_out.is_in(split, text):
                    yield text

    def _all_documents(self) -> Iterator[str]:
        bad = BadRecords("skip")
        for file in self._files["train"]:
            yield from read_texts(file.path, bad, self._text_format)

    def num_documents(self, split: Split) -> int | None:
        return self._counts.get(split)

    def missing_files(self, split: Split) -> list[str]:
        if self._holds_out and split == "validation":
            return []
        return missing_numbers(file.path for file in self._files[split])


def files_digest(files: Iterable[Iterable[File]], *settings: object) -> str:
    """Returns 32 hexadecimal digits, which depend on all fields of the files, and on settings."""
    described = repr([*([*group] for group in files), *settings])
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def missing_numbers(paths: Iterable[str]) -> list[str]:
    """Returns the paths that are missing among numbered ones, `…-00003-of-00128…`.

    Files of the same numbers may have several suffixes, such as `.jsonl` and `.jsonl.gz`; a missing
    one is named with that of the first.
    """
    present: dict[tuple[str, str], dict[int, str]] = {}
    for path in paths:
        match = _NUMBERED.fullmatch(path)
        if match and int(match[3]) <= _MAX_SHARDS:
            before, number, count, suffix = match.groups()
            present.setdefault((before, count), {})[int(number)] = suffix
    return [
        f"{before}{number:0{len(count)}d}-of-{count}{next(iter(suffixes.values()))}"
        for (before, count), suffixes in present.items()
        for number in range(int(count))
        if number not in suffixes
    ]


def glob_files(pattern: str) -> list[File]:
    """Returns the files that match a pattern, on a disk or in a bucket, sorted by path.

    A file that exists, such as `/text[1].txt`, and folders that exist are no patterns.
    """
    if os.path.isfile(pattern):
        return find_files([epath.Path(pattern)])
    parts = pattern.split("/")
    fixed = 0
    while fixed < len(parts) - 1 and (
        not re.search(r"[*?[]", parts[fixed]) or os.path.isdir("/".join(parts[: fixed + 1]))
    ):
        fixed += 1
    folder = epath.Path("/".join(parts[:fixed]) or "/") if fixed else epath.Path(".")
    return files_in(folder, "/".join(parts[fixed:]))


def files_in(folder: epath.Path, pattern: str) -> list[File]:
    """Returns the files below a folder that match a pattern, sorted by path."""
    return find_files(_paths_in(folder, pattern)) if folder.is_dir() else []


def files_below(folder: epath.Path) -> list[File]:
    """Returns the files in a folder and its folders, sorted by path, without hidden ones."""
    paths, folders = [], [folder]
    while folders:
        entries = [entry for entry in folders.pop().iterdir() if not entry.name.startswith(".")]
        folders += [entry for entry in entries if entry.is_dir()]
        paths += entries
    return find_files(paths)


def newest_version(folder: epath.Path, version: str = "") -> epath.Path | None:
    """Returns the folder of a version that TFDS prepared, by default the newest; None if none."""
    if not folder.is_dir():
        return None
    versions = [path.parent for path in _paths_in(folder, "*/dataset_info.json")]
    if version:
        versions = [path for path in versions if path.name == version]
    return max(versions, default=None, key=lambda path: [*map(int, re.findall(r"\d+", path.name))])


def find_files(paths: Iterable[epath.Path]) -> list[File]:
    """Returns those of the paths that are files, sorted by path."""
    found = [path for path in sorted(paths) if path.exists() and not path.is_dir()]
    stats = [(path, path.stat()) for path in found]
    return [File(os.fspath(path), stat.length, stat.mtime) for path, stat in stats]


def _paths_in(folder: epath.Path, pattern: str) -> list[epath.Path]:
    # `epath` would read the folder's own path as a part of the pattern.
    return [*epath.Path(glob.escape(os.fspath(folder))).glob(pattern)]
