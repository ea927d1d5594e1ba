"""Format of a token store, and reading it: tokenised text in memory-mapped files.

A store is a folder with a vocabulary and, for each source and split, shards of documents:

    manifest.json                  contents, and identity of the text; written last
    vocabulary.model
    c4/train/00000.tokens          tokens of the documents, one after the other, uint16 or uint32
    c4/train/00000.offsets.npy     [documents + 1] int64 begin and end of each document
    c4/train/00001.tokens …
    c4/validation/…
    glue/cola/train/…              tasks: documents are inputs and targets in turn
    glue/cola/validation/examples.jsonl    their text, and the answers for the metrics

A store contains plain documents. Concatenating, cutting, span corruption and packing into rows are
functions of the row number (`dataset`), so one store serves all lengths, seeds and mixtures.
Reading it needs no TensorFlow.
"""

import functools
import json
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from switch_jax.data.sources.source import Split
from switch_jax.errors import UserError
from switch_jax.files import folder_size, path_within

MANIFEST = "manifest.json"
FORMAT = 4


def is_store(directory: str | Path) -> bool:
    """Whether a folder is a complete store."""
    return Path(directory, MANIFEST).is_file()


class TokenStore:
    """A complete store, opened for reading.

    Attributes:
      manifest: the JSON object of `manifest.json`.
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
        try:
            self.manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
            if self.manifest["format"] != FORMAT:
                raise ValueError
            self.vocabulary_fingerprint: str = self.manifest["vocabulary"]
            self._sources: Mapping[str, Any] = self.manifest["sources"]
        except (OSError, ValueError, KeyError, TypeError):
            raise _damaged(directory) from None

    def num_documents(self, split: Split = "train") -> dict[str, int]:
        """Returns the number of documents of each source, or of pairs of inputs and targets."""
        return {name: source[split]["documents"] for name, source in self._sources.items()}

    def specs(self) -> dict[str, str]:
        """Returns the part of `data.mixture` that each source was found by, by source."""
        return {name: source["spec"] for name, source in self._sources.items()}

    def has_targets(self, name: str) -> bool:
        """Whether a source's documents are inputs and targets in turn."""
        return self._sources[name]["pairs"]

    def examples(self, name: str) -> list[dict[str, Any]]:
        """Returns the validation examples of pairs, with `inputs`, `targets` and `answer`."""
        path = examples_path(path_within(self._directory, f"{name}/validation"))
        return [json.loads(line) for line in path.open(encoding="utf-8")] if path.exists() else []

    def fingerprint(self, name: str, split: Split) -> str:
        """Returns a hash of the tokens of a split and of the vocabulary."""
        return self._sources[name][split]["fingerprint"]

    def tokens(self, name: str, split: Split) -> "SplitTokens":
        """Returns the tokens of a source's split; raises `UserError` if files are damaged."""
        sizes = self._sources[name][split]["shards"]
        return SplitTokens(
            path_within(self._directory, f"{name}/{split}"), self.manifest["dtype"], sizes
        )


class SplitTokens:
    """The tokens of a split as one long array, across its shards.

    Args:
      sizes: numbers of documents and tokens of every shard.

    Raises `UserError` if a shard is missing or has another size.
    """

    def __init__(self, directory: Path, dtype: str, sizes: list[tuple[int, int]]):
        self._directory = directory
        self._dtype = np.dtype(dtype)
        tokens = [tokens for _, tokens in sizes]
        self._ends = np.cumsum(tokens, dtype=np.int64)
        for shard, count in enumerate(tokens):
            path = tokens_path(directory, shard)
            if not path.is_file() or path.stat().st_size != count * self._dtype.itemsize:
                raise _damaged(path)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """[documents + 1] int64: begins and ends of the documents."""
        parts = [np.zeros(1, np.int64)]
        for shard, end in enumerate(self._ends):
            try:
                # Mapped, because memory for what a damaged header says may be far too much.
                offsets = np.load(offsets_path(self._directory, shard), mmap_mode="r")
                if offsets.ndim != 1 or offsets.dtype != np.int64:
                    raise ValueError
            except (OSError, ValueError, EOFError):
                raise _damaged(offsets_path(self._directory, shard)) from None
            parts.append(offsets[1:] + (end - offsets[-1]))
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
                begins = starts[rows] - self._begin(shard)
                taken[rows] = self._shard(shard)[begins[:, None] + np.arange(length)]
        for row in np.flatnonzero(first != last):
            parts = [
                self._shard(s)[
                    max(0, starts[row] - self._begin(s)) : starts[row] + length - self._begin(s)
                ]
                for s in range(first[row], last[row] + 1)
            ]
            taken[row] = np.concatenate(parts)
        return taken

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


def _damaged(path: Path) -> UserError:
    return UserError(f"Packed text in {str(path)!r} is damaged; delete the folder and pack again.")
