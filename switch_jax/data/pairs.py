"""Fine-tuning tasks as sources: their records become inputs and targets, in turn."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping

from etils import epath

from switch_jax.data import records
from switch_jax.data.bad_records import BadRecords
from switch_jax.data.downstream import Task
from switch_jax.data.prompts import Example
from switch_jax.data.sources import (
    SPLITS,
    File,
    Shard,
    Source,
    Split,
    glob,
    held_out,
    newest,
    stamp,
)
from switch_jax.errors import UserError


class Pairs(Source):
    """A task, whose texts are inputs, targets, inputs, targets, …

    Args:
      files: those of the data set's splits that the task's parts are taken from. Where there are
        none for validation though the task has it, a fixed 1 % of training is held out.
    """

    pairs = True

    def __init__(self, task: Task, files: Mapping[str, list[File]] | Mapping[Split, list[File]]):
        self.name = task.name
        self._task = task
        self._files = {str(split): list(found) for split, found in files.items()}
        valid = task.splits.get("validation")
        self._held_out = valid is not None and valid.split not in files
        if valid is not None and self._held_out:
            self._files[valid.split] = files["train"]
        named = [(os.path.basename(f.path), f.size) for split in files.values() for f in split]
        digest = hashlib.blake2b(repr((named, task.splits)).encode(), digest_size=16)
        self.fingerprint = digest.hexdigest()
        self.stamp = stamp(files.values())

    def shards(self, split: Split) -> tuple[Shard, ...]:
        rows = self._task.splits.get(split)
        files = self._files.get(rows.split, []) if rows else []
        if not files:
            return ()
        return (Shard(tuple(file.path for file in files), sum(file.size for file in files)),)

    def texts(self, split: Split, shard: Shard, bad: BadRecords) -> Iterator[str]:
        for example in self.examples(split, bad):
            yield example.inputs
            yield example.targets

    def documents(self, split: Split) -> int | None:
        """In training, pairs as the task counts them; None where it does not."""
        if split != "train":
            return None
        return self._task.num_examples if "train" in self._task.splits else 0

    def examples(self, split: Split, bad: BadRecords) -> Iterator[Example]:
        """A split's examples in order; what cannot be read goes to `bad`."""
        rows = self._task.splits.get(split)
        if rows is None:
            return
        found = (
            record
            for file in self._files[rows.split]
            for record in records.records(file.path, self._task.schema, bad)
        )
        for record in itertools.islice(found, rows.begin, rows.end):
            for example in self._task.format(record, split == "train"):
                if not self._held_out or held_out(example.inputs) == (split == "validation"):
                    yield example


def as_json(examples: Iterable[Example]) -> Iterator[str]:
    """A line each, with `inputs`, `targets` and `answer`."""
    return (json.dumps(example._asdict()) for example in examples)


def find_task(root: epath.Path, task: Task) -> Pairs:
    """A task's data below `root`: as TFDS prepared it, or in files called after its splits.

        glue/cola/2.0.0/glue-train.tfrecord-00000-of-00001
        glue/cola/train.jsonl, validation.tsv, train-00000-of-00002.parquet

    Raises `UserError` where one of its splits is not there.
    """
    folder = root / task.dataset
    version = newest(folder)
    files: dict[str, list[File]] = {}
    for rows in (task.splits[part] for part in SPLITS if part in task.splits):
        if version is not None:
            stem = task.dataset.partition("/")[0]
            found = glob(os.fspath(version / f"{stem}-{rows.split}.tfrecord*"))
        else:
            found = glob(os.fspath(folder / f"{rows.split}[-.]*"))
            found = [file for file in found if records.is_known(file.path)]
        if not found:
            raise UserError(
                f"The {rows.split} split of {task.name} is not in {os.fspath(folder)!r}; prepare it"
                f" with `tfds build {task.dataset}`, put {rows.split}.jsonl, .tsv or .parquet with"
                f" the fields {', '.join(task.schema)} there, or set data.data_dir to where it is."
            )
        files[rows.split] = found
    return Pairs(task, files)
