"""Shards of a token store: each is made from one shard of text, in any process on any machine.

Their folder is on a disk that all these processes share, or in a bucket. Files appear in it when
they are complete, and last of a shard its summary, by which a build knows that it is finished.
"""

import dataclasses
import functools
import hashlib
import json
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from switch_jax.data.finetuning.task_source import TaskSource, examples_to_json
from switch_jax.data.sources.bad_records import BadRecordAction, BadRecords
from switch_jax.data.sources.source import Shard, Source, Split
from switch_jax.data.token_store.checksums import checksums_path, write_checksums
from switch_jax.data.token_store.store import examples_path, offsets_path, tokens_path
from switch_jax.data.vocabulary import VOCABULARY_FILE, Vocabulary, read_vocabulary
from switch_jax.files import adding_files, download, fetch, file_names, is_bucket, write_atomically


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """A shard of text, to become shard `number` of its split in the store."""

    source: Source
    split: Split
    number: int
    shard: Shard
    store: Path
    vocabulary_size: int

    @property
    def folder(self) -> Path:
        """Folder of the shard's files."""
        return self.store / self.source.name / self.split

    @property
    def summary_name(self) -> str:
        """Path below the store of the file with documents, tokens and fingerprint."""
        return f"{self.source.name}/{self.split}/{self.number:05d}.json"


def split_by_finished(tasks: list[ShardTask]) -> tuple[list[ShardTask], list[ShardTask]]:
    """Returns the tasks of a store that are finished, and the others."""
    names = file_names(tasks[0].store) if tasks else set()
    finished = [task for task in tasks if task.summary_name in names]
    return finished, [task for task in tasks if task.summary_name not in names]


def read_summaries(tasks: list[ShardTask]) -> list[dict[str, Any]]:
    """Returns what `write_shard` wrote about each of a store's finished shards."""
    names = [task.summary_name for task in tasks]
    store = tasks[0].store if tasks else Path()
    if not is_bucket(store):
        return _read_json_files(store, names)
    with TemporaryDirectory(prefix="switch_jax-") as folder:  # so that they come at once
        download(store, Path(folder), names)
        return _read_json_files(Path(folder), names)


def _read_json_files(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    return [json.loads((folder / name).read_text()) for name in names]


def write_shard(task: ShardTask, action: BadRecordAction) -> int:
    """Writes a shard of tokens and its summary; returns the number of tokens."""
    vocabulary, bad_records = _vocabulary(task.store, task.vocabulary_size), BadRecords(action)
    dtype = token_dtype(vocabulary)
    digest = hashlib.blake2b(digest_size=16)
    offsets, unknown, examples_checksum = [0], 0, None
    with adding_files(task.folder) as folder:
        if isinstance(task.source, TaskSource) and task.split != "train":
            examples = task.source.examples(task.split, bad_records)
            content = "".join(line + "\n" for line in examples_to_json(examples)).encode()
            examples_path(folder).write_bytes(content)
            examples_checksum = zlib.crc32(content)
            bad_records = BadRecords(action)  # the same records are counted again below
        with tokens_path(folder, task.number).open("wb") as file:
            for text in task.source.texts(task.split, task.shard, bad_records):
                tokens = np.array(vocabulary.encode(text), dtype)
                unknown += int(np.count_nonzero(tokens == vocabulary.unk))
                file.write(tokens.tobytes())
                digest.update(tokens.tobytes())
                offsets.append(offsets[-1] + len(tokens))
        offsets_array = np.array(offsets, np.int64)
        digest.update(offsets_array.tobytes())
        np.save(offsets_path(folder, task.number), offsets_array)
        tokens = np.fromfile(tokens_path(folder, task.number), dtype)
        write_checksums(checksums_path(folder, task.number), offsets_array, tokens)
    summary = {
        "documents": (len(offsets) - 1) // (2 if task.source.has_targets else 1),
        "tokens": offsets[-1],
        "fingerprint": digest.hexdigest(),
        "unknown": unknown,
        "examples": examples_checksum,
        "left_out": bad_records.counts,
        "first": bad_records.first,
    }
    write_atomically(task.store / task.summary_name, json.dumps(summary).encode())
    return offsets[-1]


@functools.cache
def _vocabulary(store: Path, size: int) -> Vocabulary:
    return read_vocabulary(fetch(store / VOCABULARY_FILE), max_size=size)


def token_dtype(vocabulary: Vocabulary) -> np.dtype:
    """Returns the integers that a store has for the ids of a vocabulary."""
    return np.dtype(np.uint16 if vocabulary.size <= 2**16 else np.uint32)
