"""Sources of fine-tuning tasks, whose texts alternate between inputs and targets."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping

from etils import epath

from switch_jax.data.finetuning.prompts import Example
from switch_jax.data.finetuning.task_records import is_task_file, read_task_records
from switch_jax.data.finetuning.tasks import Task
from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.record_files import file_format
from switch_jax.data.sources.source import (
    SPLITS,
    File,
    Shard,
    Source,
    Split,
    files_digest,
    files_in,
    is_held_out,
    newest_version,
)
from switch_jax.errors import UserError


class TaskSource(Source):
    """Source of a task. Its texts are inputs, targets, inputs, … of the examples with an answer.

    Args:
      files: of the data set's splits. If the files for validation are missing, a fixed 1 % of the
        training examples is held out.
    """

    has_targets = True

    def __init__(self, task: Task, files: Mapping[str, list[File]] | Mapping[Split, list[File]]):
        self.name = task.name
        self._task = task
        self._files = {str(split): list(of_split) for split, of_split in files.items()}
        validation = task.splits.get("validation")
        self._holds_out = validation is not None and validation.split not in files
        if validation is not None and self._holds_out:
            self._files[validation.split] = files["train"]
        sizes = [(os.path.basename(f.path), f.size) for split in files.values() for f in split]
        digest = hashlib.blake2b(repr((sizes, task.splits)).encode(), digest_size=16)
        self.fingerprint = digest.hexdigest()
        self.cache_key = files_digest(files.values())

    def shards(self, split: Split) -> tuple[Shard, ...]:
        rows = self._task.splits.get(split)
        files = self._files.get(rows.split, []) if rows else []
        if not files:
            return ()
        return (Shard(tuple(file.path for file in files), sum(file.size for file in files)),)

    def texts(self, split: Split, shard: Shard, bad: BadRecords) -> Iterator[str]:
        if self._holds_out and split == "validation":
            bad = BadRecords("skip")  # training counts the bad records of the same files
        for example in self.examples(split, bad):
            if example.answer is not None:
                yield example.inputs
                yield example.targets

    def num_documents(self, split: Split) -> int | None:
        """Returns `Task.num_examples` for training, None for validation."""
        if split != "train":
            return None
        return self._task.num_examples if "train" in self._task.splits else 0

    def examples(self, split: Split, bad: BadRecords) -> Iterator[Example]:
        """Yields the examples of a split in order; adds bad records to `bad`."""
        rows = self._task.splits.get(split)
        if rows is None:
            return
        records = (
            record
            for file in self._files[rows.split]
            for record in read_task_records(file.path, self._task.schema, bad)
        )
        for record in itertools.islice(records, rows.begin, rows.end):
            for example in self._task.format(record, split == "train"):
                if not self._holds_out or is_held_out(example.inputs) == (split == "validation"):
                    yield example


def examples_to_json(examples: Iterable[Example]) -> Iterator[str]:
    """Yields the JSON of each example, with `inputs`, `targets` and `answer`."""
    return (json.dumps(example._asdict()) for example in examples)


def find_task_source(root: epath.Path, task: Task) -> TaskSource:
    """Returns the source of a task whose files are below `root`.

    They are prepared by TFDS, or named after the splits:

        glue/cola/2.0.0/glue-train.tfrecord-00000-of-00001
        glue/cola/train.jsonl, validation.tsv, train-00000-of-00002.parquet

    Raises `UserError` if a split is missing, or is there in two formats.
    """
    folder = root / task.dataset
    version = newest_version(folder)
    files: dict[str, list[File]] = {}
    for rows in (task.splits[part] for part in SPLITS if part in task.splits):
        if version is not None:
            prefix = task.dataset.partition("/")[0]
            of_split = files_in(version, f"{prefix}-{rows.split}.tfrecord*")
        else:
            of_split = files_in(folder, f"{rows.split}*")
            name = re.compile(rf"{rows.split}(-\d+-of-\d+)?(\.\w+)+(-\d+-of-\d+)?(\.\w+)?")
            of_split = [f for f in of_split if name.fullmatch(os.path.basename(f.path))]
            of_split = [f for f in of_split if is_task_file(f.path)]
        if not of_split:
            raise UserError(
                f"The {rows.split} split of {task.name} is not in {os.fspath(folder)!r}; prepare it"
                f" with `tfds build {task.dataset}`, put {rows.split}.jsonl, .tsv or .parquet with"
                f" the fields {', '.join(task.schema)} there, or set data.data_dir to where it is."
            )
        formats = sorted({str(file_format(file.path)) for file in of_split})
        if len(formats) > 1:
            raise UserError(
                f"The {rows.split} split of {task.name} is in {os.fspath(folder)!r} as"
                f" {' and as '.join(formats)}; keep one of them."
            )
        files[rows.split] = of_split
    return TaskSource(task, files)
