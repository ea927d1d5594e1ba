"""The manifest of a token store: its contents and the identity of its text, checked when read."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any, Literal

from switch_jax.config import build_dataclass, read_json
from switch_jax.data.sources.source import SPLITS, Split
from switch_jax.errors import UserError
from switch_jax.files import as_path, write_atomically

MANIFEST = "manifest.json"
FORMAT = 5
UNCHECKED_FORMAT = 4  # without checksums; still read


@dataclasses.dataclass(frozen=True)
class SplitContents:
    """Contents of a split.

    Attributes:
      documents: number of documents, or of pairs.
      tokens: number of tokens.
      fingerprint: hash of the tokens, of where documents begin, and of the vocabulary.
      left_out: number of bad records by kind.
      shards: numbers of documents and tokens of every shard.
      unknown: number of tokens that stand for characters unknown to the vocabulary.
      examples: CRC-32 of the file of examples, where there is one.
    """

    documents: int
    tokens: int
    fingerprint: str
    left_out: dict[str, int]
    shards: list[tuple[int, int]]
    unknown: int = 0
    examples: int | None = None


@dataclasses.dataclass(frozen=True)
class SourceContents:
    """Contents of a source: its part of `data.mixture`, and its splits."""

    spec: str
    pairs: bool
    train: SplitContents
    validation: SplitContents

    def split(self, split: Split) -> SplitContents:
        """Returns the contents of a split."""
        return {"train": self.train, "validation": self.validation}[split]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of a store; the keys of `manifest.json`."""

    format: int
    vocabulary: str
    text: str
    vocabulary_size: int
    dtype: Literal["uint16", "uint32"]
    left_out: dict[str, int]
    first_left_out: dict[str, str]
    sources: dict[str, SourceContents]
    checksum: int = 0


def is_store(directory: str | Path) -> bool:
    """Whether a folder is a complete store."""
    return (as_path(directory) / MANIFEST).is_file()


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest, with a checksum of its other keys."""
    checked = manifest | {"checksum": _checksum(manifest)}
    write_atomically(directory / MANIFEST, (json.dumps(checked, indent=1) + "\n").encode())


def read_manifest(directory: Path) -> Manifest:
    """Reads the manifest of a store; raises `UserError` if it is damaged or of another format."""
    path = directory / MANIFEST
    try:
        raw = read_json(path)
        found = raw.get("format") if isinstance(raw, dict) else None
        if type(found) is int and found not in (FORMAT, UNCHECKED_FORMAT):
            raise UserError(
                f"{path} is of format {found}, and this version reads {FORMAT} and"
                f" {UNCHECKED_FORMAT}"
            )
        manifest = build_dataclass(Manifest, raw, str(path))
    except UserError as error:
        raise damaged(directory, str(error)) from error
    if manifest.format == FORMAT and manifest.checksum != _checksum(raw):
        raise damaged(directory, f"{path} is not as it was written")
    for name, source in manifest.sources.items():
        for split in SPLITS:
            contents = source.split(split)
            sums = [sum(counts) for counts in zip((0, 0), *contents.shards)]
            if sums != [contents.documents, contents.tokens] or min(sums) < 0:
                raise damaged(directory, f"{path} contradicts itself on {name}")
    return manifest


def damaged(path: Path, reason: str = "") -> UserError:
    """Returns the error for a damaged file or folder of a store."""
    detail = f" ({reason.partition(';')[0].rstrip('.')})" if reason else ""
    return UserError(
        f"Packed text in {str(path)!r} is damaged{detail}; delete the folder and pack again."
    )


def _checksum(manifest: dict[str, Any]) -> int:
    others = {key: value for key, value in manifest.items() if key != "checksum"}
    return zlib.crc32(json.dumps(others, sort_keys=True).encode())
