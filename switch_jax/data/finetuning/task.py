"""Task: a fine-tuning task, with its data set, its text and its metrics."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from switch_jax.data.finetuning.prompts import Format, format_pair

TaskPart = Literal["train", "validation", "test"]


class Rows(NamedTuple):
    """Rows `begin` to `end` of a split of a data set; None is the end of the split.

    The class name and the fields are part of `Source.fingerprint`.
    """

    split: str
    begin: int = 0
    end: int | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A fine-tuning task: its data set, text and metrics.

    Attributes:
      name: such as "glue.cola": the benchmark and the task.
      dataset: name in TFDS, with its config.
      version: of the data set.
      splits: rows of each part of the task; not every task has all three parts.
      num_examples: for training, and the rate in a mixture; of ReCoRD one for every answer. None
        if only the files determine it.
      schema: the fields that `format` reads, with their names and types in TFDS: a type, `[type]`
        for a list, or a dict of fields. A record may have more fields.
      format: turns a record into examples; see `prompts`.
      classes: names in the order of their labels; empty if records list them, or if answers are
        texts or numbers.
      metrics: names in `task_metrics.METRICS`; none if no part has labels.
      reported_metric: the one that the paper reports; None: the mean of all.
      inputs_length, targets_length: maximum in tokens, with the EOS.
    """

    name: str
    dataset: str
    version: str
    splits: Mapping[TaskPart, Rows]
    num_examples: int | None
    schema: Mapping[str, Any]
    format: Format
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    reported_metric: str | None
    inputs_length: int
    targets_length: int

    @property
    def is_own(self) -> bool:
        """Whether the task is custom files of inputs and targets."""
        return not self.dataset


ALL_PARTS: dict[TaskPart, Rows] = {part: Rows(part) for part in get_args(TaskPart)}


def custom_task(name: str) -> Task:
    """Returns a task whose records are inputs and targets already; `eval.metrics` scores it."""
    return Task(
        name=name,
        dataset="",
        version="",
        splits=ALL_PARTS,
        num_examples=None,
        schema={"inputs": str, "targets": str | list},
        format=format_pair,
        classes=(),
        metrics=("accuracy",),
        reported_metric=None,
        inputs_length=512,
        targets_length=114,
    )
