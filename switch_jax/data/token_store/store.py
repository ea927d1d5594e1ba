"""Packed records: tokenised text in files that need no TensorFlow, memory-mapped.

A store is a folder with a vocabulary and, for each source and split, shards of documents:

    manifest.json                  what is in it and what it was made from; written last
    vocabulary.model
    c4/train/00000.tokens          documents' tokens, one after the other, uint16 or uint32
    c4/train/00000.offsets.npy     [documents + 1] int64, where each begins and ends
    c4/train/00001.tokens …
    c4/validation/…
    glue/cola/train/…              the same, where documents are inputs and targets in turn
    glue/cola/validation/examples.jsonl    their text, and what metrics compare with

Tokens are stored as they are: joining, cutting, span corruption and packing into rows are
functions of the row's number (`rows`), so that one store serves any lengths, seeds and mixture.
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

MANIFEST = "manifest.json"
FORMAT = 4


def is_store(directory: str | Path) -> bool:
    """Whether a folder holds a complete store."""
    return Path(directory, MANIFEST).is_file()


class TokenStore:
    """A store that is complete, for reading.

    Attributes:
      manifest: the JSON object of `manifest.json`.
      vocabulary: fingerprint of the vocabulary.

    Raises `UserError` for a folder that is missing, incomplete or damaged.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        if not is_store(directory):
            raise UserError(
                f"There is no packed text in {str(directory)!r}; set data.data_dir to a folder that"
                " `switch-jax data pack` wrote, or to None for the cache."
            )
        try:
            self.manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
            if self.manifest["format"] != FORMAT:
                raise ValueError
            self.vocabulary: str = self.manifest["vocabulary"]
            self._sources: Mapping[str, Any] = self.manifest["sources"]
        except (OSError, ValueError, KeyError, TypeError):
            raise _damaged(directory) from None

    def documents(self, split: Split = "train") -> dict[str, int]:
        """Documents of each source, or its pairs of inputs and targets."""
        return {name: source[split]["documents"] for name, source in self._sources.items()}

    def specs(self) -> dict[str, str]:
        """What part of a mixture each source was found by."""
        return {name: source["spec"] for name, source in self._sources.items()}

    def pairs(self, name: str) -> bool:
        """Whether a source's documents are inputs and targets in turn."""
        return self._sources[name]["pairs"]

    def examples(self, name: str) -> list[dict[str, Any]]:
        """Validation examples of pairs: `inputs`, `targets`, and `answer`."""
        path = examples_path(self._directory / name / "validation")
        return [json.loads(line) for line in path.open()] if path.exists() else []

    def fingerprint(self, name: str, split: Split) -> str:
        """Identifies the tokens of a split."""
        return self._sources[name][split]["fingerprint"]

    def tokens(self, name: str, split: Split) -> "Tokens":
        """The tokens of a source's split; raises `UserError` where files are damaged."""
        sizes = self._sources[name][split]["shards"]
        return Tokens(self._directory / name / split, self.manifest["dtype"], sizes)


class Tokens:
    """A split as one long row of tokens, whichever shards they lie in.

    Args:
      sizes: documents and tokens of every shard.

    Raises `UserError` where a shard is missing or of another size.
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
        """[documents + 1] int64: where documents begin and end."""
        parts = [np.zeros(1, np.int64)]
        for shard, end in enumerate(self._ends):
            try:
                offsets = np.load(offsets_path(self._directory, shard))
            except (OSError, ValueError, EOFError):
                raise _damaged(offsets_path(self._directory, shard)) from None
            parts.append(offsets[1:] + (end - offsets[-1]))
        return np.concatenate(parts)

    def take(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Stretches of `length` tokens that begin at `starts` [N]; returns [N, length]."""
        taken = np.empty((len(starts), length), self._dtype)
        if not length:
            return taken
        shards = np.searchsorted(self._ends, starts, side="right")
        last = np.searchsorted(self._ends, starts + (length - 1), side="right")
        for shard in np.unique(shards):
            here = np.flatnonzero((shards == shard) & (last == shard))
            if len(here):
                begins = starts[here] - self._begin(shard)
                taken[here] = self._shard(shard)[begins[:, None] + np.arange(length)]
        for row in np.flatnonzero(shards != last):
            parts = [
                self._shard(s)[
                    max(0, starts[row] - self._begin(s)) : starts[row] + length - self._begin(s)
                ]
                for s in range(shards[row], last[row] + 1)
            ]
            taken[row] = np.concatenate(parts)
        return taken

    def _begin(self, shard: int) -> int:
        return int(self._ends[shard - 1]) if shard else 0

    def _shard(self, shard: int) -> np.ndarray:
        return _mapped(tokens_path(self._directory, shard), self._dtype)


def tokens_path(directory: Path, shard: int) -> Path:
    """Where the tokens of a shard lie."""
    return directory / f"{shard:05d}.tokens"


def examples_path(directory: Path) -> Path:
    """Where the text of a split's pairs lies, with the answers that metrics compare with."""
    return directory / "examples.jsonl"


def offsets_path(directory: Path, shard: int) -> Path:
    """Where the offsets of a shard's documents lie."""
    return directory / f"{shard:05d}.offsets.npy"


@functools.lru_cache(maxsize=resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)  # files open
def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _damaged(path: Path) -> UserError:
    return UserError(f"Packed text in {str(path)!r} is damaged; delete the folder and pack again.")
