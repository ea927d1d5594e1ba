"""Format of a token store, and reading it: tokenised text in memory-mapped files.

A store is a folder with a vocabulary and, for each source and split, shards of documents:

    manifest.json                  contents, and identity of the text; written last
    vocabulary.model
    c4/train/00000.tokens          tokens of the documents, one after the other, uint16 or uint32
    c4/train/00000.offsets.npy     [documents + 1] int64 begin and end of each document
    c4/train/00000.checksums       of the offsets, and of each block of tokens
    c4/train/00001.tokens …
    c4/validation/…
    glue/cola/train/…              tasks: documents are inputs and targets in turn
    glue/cola/validation/examples.jsonl    their text, and the answers for the metrics

A store contains plain documents. Concatenating, cutting, noise and packing into rows are
functions of the row number (`dataset`), so one store serves all lengths, seeds and mixtures.
Reading it needs no TensorFlow.
"""

import functools
import resource
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from switch_jax.config import parse_json
from switch_jax.data.sources.source import Split
from switch_jax.data.token_store.checksums import ShardChecksums, checksums_path
from switch_jax.data.token_store.manifest import (
    FORMAT,
    Manifest,
    damaged,
    is_store,
    read_manifest,
)
from switch_jax.errors import UserError
from switch_jax.files import folder_size, path_within


class TokenStore:
    """A complete store, opened for reading.

    Attributes:
      vocabulary_fingerprint: fingerprint of the vocabulary that the text was tokenised with.

    Raises `UserError` for a folder that is missing, incomplete or damaged, or whose names or links
    lead out of it.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        if not is_store(directory):
            raise UserError(
                f"There is no packed text in {str(directory)!r}; set data.data_dir to a folder that"
                " `switch-jax data pack` wrote, or to None for the cache."
            )
        folder_size(directory)  # for its links
        self._manifest = read_manifest(directory)
        self._sources = self._manifest.sources
        self.vocabulary_fingerprint = self._manifest.vocabulary

    def num_documents(self, split: Split = "train") -> dict[str, int]:
        """Returns the number of documents of each source, or of pairs of inputs and targets."""
        return {name: source.split(split).documents for name, source in self._sources.items()}

    def specs(self) -> dict[str, str]:
        """Returns the part of `data.mixture` that each source was found by, by source."""
        return {name: source.spec for name, source in self._sources.items()}

    def has_targets(self, name: str) -> bool:
        """Whether a source's documents are inputs and targets in turn."""
        return self._sources[name].pairs

    def examples(self, name: str) -> list[dict[str, Any]]:
        """Returns the validation examples of pairs, with `inputs`, `targets` and `answer`.

        Raises `UserError` if their file is damaged.
        """
        path = examples_path(path_within(self._directory, f"{name}/validation"))
        expected = self._sources[name].validation.examples
        if not path.is_file():
            if expected is not None:
                raise damaged(path)
            return []
        content = path.read_bytes()
        if expected not in (None, zlib.crc32(content)):
            raise damaged(path)
        return [parse_json(line, str(path)) for line in content.splitlines()]

    def fingerprint(self, name: str, split: Split) -> str:
        """Returns a hash of the tokens of a split and of the vocabulary."""
        return self._sources[name].split(split).fingerprint

    def unknown_share(self, name: str) -> float:
        """Returns the share of a source's training tokens that are unknown to the vocabulary."""
        train = self._sources[name].train
        return train.unknown / max(1, train.tokens)

    def tokens(self, name: str, split: Split) -> "SplitTokens":
        """Returns the tokens of a source's split; raises `UserError` if files are damaged."""
        return SplitTokens(
            path_within(self._directory, f"{name}/{split}"),
            self._manifest,
            self._sources[name].split(split).shards,
            2 if self._sources[name].pairs else 1,
        )


class SplitTokens:
    """The tokens of a split as one long array, across its shards.

    Tokens and offsets are checked as they are read: their checksums, and that every id is in the
    vocabulary.

    Args:
      sizes: numbers of documents and tokens of every shard.
      texts_per_document: 2 for pairs, which have offsets for inputs and for targets.

    Raises `UserError` if a shard is missing or has another size; the methods, if it is damaged.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        sizes: list[tuple[int, int]],
        texts_per_document: int,
    ):
        self._directory = directory
        self._dtype = np.dtype(manifest.dtype)
        self._vocabulary_size = manifest.vocabulary_size
        self._has_checksums = manifest.format == FORMAT
        self._checksums: dict[int, ShardChecksums] = {}
        self._texts = [texts_per_document * documents for documents, _ in sizes]
        tokens = [tokens for _, tokens in sizes]
        self._ends = np.cumsum(tokens, dtype=np.int64)
        for shard, count in enumerate(tokens):
            path = tokens_path(directory, shard)
            if not path.is_file() or path.stat().st_size != count * self._dtype.itemsize:
                raise damaged(path)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """[documents + 1] int64: begins and ends of the documents."""
        parts = [np.zeros(1, np.int64)]
        for shard in range(len(self._ends)):
            parts.append(self._begin(shard) + self._shard_offsets(shard)[1:])
        return np.concatenate(parts)

    def take(self, starts: np.ndarray, length: int) -> np.ndarray:
        """[N, length] uint16 or uint32: the tokens from each of `starts` [N] on."""
        taken = np.empty((len(starts), length), self._dtype)
        if not length:
            return taken
        first = np.searchsorted(self._ends, starts, side="right")
        last = np.searchsorted(self._ends, starts + (length - 1), side="right")
        for shard in np.unique(first):
            rows = np.flatnonzero((first == shard) & (last == shard))
            if len(rows):
                taken[rows] = self._take(shard, starts[rows] - self._begin(shard), length)
        for row in np.flatnonzero(first != last):
            parts = []
            for shard in range(first[row], last[row] + 1):
                begin = max(0, starts[row] - self._begin(shard))
                end = min(starts[row] + length, self._ends[shard]) - self._begin(shard)
                parts.append(self._take(shard, np.array([begin]), int(end - begin))[0])
            taken[row] = np.concatenate(parts)
        if taken.size and taken.max() >= self._vocabulary_size:
            raise damaged(self._directory, f"it has the id {taken.max()}, past its vocabulary")
        return taken

    def _take(self, shard: int, begins: np.ndarray, length: int) -> np.ndarray:
        """[N, length]: tokens of one shard, checked."""
        if not length:
            return np.empty((len(begins), 0), self._dtype)
        if self._has_checksums:
            self._shard_checksums(shard).check(begins, length)
        return self._shard(shard)[begins[:, None] + np.arange(length)]

    def _shard_offsets(self, shard: int) -> np.ndarray:
        """[documents + 1] int64: begins and ends of a shard's documents, checked."""
        path = offsets_path(self._directory, shard)
        try:
            # Mapped, because memory for what a damaged header says may be far too much.
            offsets = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            raise damaged(path) from None
        if offsets.dtype != np.int64 or offsets.shape != (self._texts[shard] + 1,):
            raise damaged(path)
        if self._has_checksums:
            self._shard_checksums(shard).check_offsets(offsets, path)
        if (
            offsets[0] != 0
            or offsets[-1] != len(self._shard(shard))
            or (np.diff(offsets) < 0).any()
        ):
            raise damaged(path)
        return offsets

    def _shard_checksums(self, shard: int) -> ShardChecksums:
        if shard not in self._checksums:
            self._checksums[shard] = ShardChecksums(
                checksums_path(self._directory, shard),
                self._shard(shard),
                tokens_path(self._directory, shard),
            )
        return self._checksums[shard]

    def _begin(self, shard: int) -> int:
        return int(self._ends[shard - 1]) if shard else 0

    def _shard(self, shard: int) -> np.ndarray:
        return _memory_map(tokens_path(self._directory, shard), self._dtype)


def tokens_path(directory: Path, shard: int) -> Path:
    """Returns the file of a shard's tokens."""
    return directory / f"{shard:05d}.tokens"


def examples_path(directory: Path) -> Path:
    """Returns the file of a split's examples: text and answers of pairs."""
    return directory / "examples.jsonl"


def offsets_path(directory: Path, shard: int) -> Path:
    """Returns the file of the offsets of a shard's documents."""
    return directory / f"{shard:05d}.offsets.npy"


# At most half of the files that the process may open.
@functools.lru_cache(maxsize=resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
def _memory_map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
