"""Sources of fine-tuning tasks, whose texts alternate between inputs and targets."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from switch_jax.data.finetuning.prompts import Example
from switch_jax.data.finetuning.published_layouts import hub_configuration, layouts_of_task
from switch_jax.data.finetuning.task import Rows, Task
from switch_jax.data.finetuning.task_records import select_fields
from switch_jax.data.sources.bad_records import BadRecord, BadRecords, UnusableRecord
from switch_jax.data.sources.held_out import SMALL_BYTES
from switch_jax.data.sources.hub import HUB, hub_files
from switch_jax.data.sources.record_files import Record, file_format, read_records
from switch_jax.data.sources.source import (
    SPLITS,
    File,
    Shard,
    Source,
    Split,
    files_digest,
    missing_numbers,
)
from switch_jax.errors import UserError


class TaskSource(Source):
    """Source of a task. Its texts are inputs, targets, inputs, … of the examples with an answer.

    Args:
      files: of the data set's splits. If the files for validation are missing, a fixed 1 % of the
        training examples is held out.
      read: yields the records of a file, with the fields of the task.
    """

    has_targets = True

    def __init__(
        self,
        task: Task,
        files: Mapping[str, list[File]] | Mapping[Split, list[File]],
        read: Callable[[str], Iterator[Record | BadRecord]] = read_records,
    ):
        self.name = task.name
        self._task = task
        self._read = read
        self._files = {str(split): list(of_split) for split, of_split in files.items()}
        validation = task.splits.get("validation")
        self._holds_out = validation is not None and validation.split not in files
        if validation is not None and self._holds_out:
            self._files[validation.split] = files["train"]
        sizes = [(os.path.basename(f.path), f.size) for split in files.values() for f in split]
        described: tuple[Any, ...] = (sizes, task.splits)
        if self._holds_out and self.size() <= SMALL_BYTES:
            described = (*described, "at least one is held out")
        digest = hashlib.blake2b(repr(described).encode(), digest_size=16)
        self.fingerprint = digest.hexdigest()
        self.cache_key = files_digest(files.values())

    def shards(self, split: Split) -> tuple[Shard, ...]:
        rows = self._task.splits.get(split)
        files = self._files.get(rows.split, []) if rows else []
        if not files:
            return ()
        return (Shard(tuple(file.path for file in files), sum(file.size for file in files)),)

    def texts(self, split: Split, shard: Shard, bad: BadRecords) -> Iterator[str]:
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
        if split == "validation" and self._files[rows.split] == self._training_files():
            bad = BadRecords("skip")  # training counts the bad records of the same files
        for example in self._all_examples(rows, bad, split == "train"):
            if not self._holds_out or self._held_out.is_in(split, example.inputs):
                yield example

    def _all_documents(self) -> Iterator[str]:
        rows = self._task.splits["train"]
        return (example.inputs for example in self._all_examples(rows, BadRecords("skip"), True))

    def _all_examples(self, rows: Rows, bad: BadRecords, training: bool) -> Iterator[Example]:
        """Yields the examples of all rows, those that are held out included."""
        for place, record in itertools.islice(self._records(rows.split, bad), rows.begin, rows.end):
            try:
                examples = self._task.format(record, training)
            except UnusableRecord as error:
                bad.add(*error.at(place))
            else:
                yield from examples

    def missing_files(self, split: Split) -> list[str]:
        rows = self._task.splits.get(split)
        files = self._files[rows.split] if rows else []
        if split == "validation" and files == self._training_files():
            return []
        return missing_numbers(file.path for file in files)

    def _training_files(self) -> list[File]:
        rows = self._task.splits.get("train")
        return self._files[rows.split] if rows else []

    def _records(self, split: str, bad: BadRecords) -> Iterator[Record]:
        """Yields the records of a split of the data set, with the fields of the task's schema."""
        for file in self._files[split]:
            is_flat = file_format(file.path) in ("tfrecord", "tfrecords")
            for record in self._read(file.path):
                if isinstance(record, BadRecord):
                    bad.add(*record)
                    continue
                try:
                    fields = select_fields(record.fields, self._task.schema, is_flat)
                except UnusableRecord as error:
                    bad.add(*error.at(record.place))
                else:
                    yield Record(record.place, fields)


def examples_to_json(examples: Iterable[Example]) -> Iterator[str]:
    """Yields the JSON of each example, with `inputs`, `targets` and `answer`."""
    return (json.dumps(example._asdict()) for example in examples)


class MissingTask(Exception):
    """A task has no files; the text says what to do."""

    def __init__(self, task: Task, remedy: str):
        super().__init__(remedy)
        self.task = task.name


def find_task_source(root: epath.Path, task: Task) -> TaskSource:
    """Returns the source of a task whose files are below `root`.

    The files are in one of `layouts_of_task(task)`, the first of which any is found.

    Raises `MissingTask` if there are none, and `UserError` if a split is missing, or is there in
    two formats.
    """
    splits = [task.splits[part].split for part in SPLITS if part in task.splits]
    for layout in layouts_of_task(task):
        files = {split: layout.find(root, split) for split in splits}
        if not any(files.values()):
            continue
        for split, of_split in files.items():
            if not of_split:
                raise UserError(
                    f"The {split} split of {task.name} is missing: there is no"
                    f" {layout.example(split)!r} in {os.fspath(root)!r}, which has"
                    f" {_first_path(files)!r}; add it."
                )
            formats = sorted({str(file_format(file.path)) for file in of_split})
            if len(formats) > 1:
                raise UserError(
                    f"The {split} split of {task.name} is in"
                    f" {os.path.dirname(of_split[0].path)!r} as {' and as '.join(formats)}; keep"
                    " one of them."
                )
        return TaskSource(task, files, layout.read)
    paths = [f"{layout.example(splits[0])} ({layout.name})" for layout in layouts_of_task(task)]
    raise MissingTask(task, f"put {' or '.join(paths)} there")


def find_task_in_hub(task: Task) -> TaskSource:
    """Returns the source of a task in the hub's data set.

    Raises `MissingTask` if the data set cannot be loaded, and `UserError` if it lacks a split.
    """
    spec, layout = hub_configuration(task)
    try:
        found = hub_files(f"{HUB}{spec}")
    except UserError as error:
        raise MissingTask(task, str(error).rstrip(".")) from error
    splits = [task.splits[part].split for part in SPLITS if part in task.splits]
    lacking = [layout.stem(split) for split in splits if layout.stem(split) not in found]
    if lacking:
        raise UserError(
            f"{HUB}{spec}, for {task.name}, has the splits {', '.join(found)}, and no"
            f" {', '.join(lacking)}; set data.data_dir to a folder that has the task."
        )
    return TaskSource(task, {split: found[layout.stem(split)] for split in splits}, layout.read)


def _first_path(files: Mapping[str, list[File]]) -> str:
    return next(of_split[0].path for of_split in files.values() if of_split)
