"""Mixtures of fine-tuning tasks: the rate of each task, and the average of their metrics."""

import dataclasses
from collections.abc import Mapping

from switch_jax.data.finetuning.tasks import TASKS
from switch_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TaskMixture:
    """Tasks that are trained on together.

    Attributes:
      rates: share of the training examples of each task, not normalized; 0: evaluation only.
      average_groups: tasks in groups. The metric of the mixture is the mean over groups of the mean
        over the tasks of a group.
    """

    name: str
    rates: Mapping[str, int]
    average_groups: tuple[tuple[str, ...], ...]


def find_task_or_mixture(name: str) -> TaskMixture:
    """Returns the mixture `name`, or a mixture of the task `name` only.

    Raises `UserError` if there is neither.
    """
    if name in MIXTURES:
        return MIXTURES[name]
    if name not in TASKS:
        known = ", ".join([*MIXTURES, *TASKS])
        raise UserError(f"There is no fine-tuning task {name!r}; use one of {known}.")
    return TaskMixture(name, {name: TASKS[name].num_examples or 0}, ((name,),))


def _mixture(name: str, tasks: str, average: str, benchmark: str | None = None) -> TaskMixture:
    """Returns a mixture whose rates are the tasks' numbers of examples.

    Args:
      tasks: names without the benchmark, separated by blanks.
      average: groups separated by blanks, their tasks by `+`.
      benchmark: by default `name`.
    """
    prefix = f"{benchmark or name}."
    rates = {prefix + task: TASKS[prefix + task].num_examples or 0 for task in tasks.split()}
    groups = (group.split("+") for group in average.split())
    return TaskMixture(name, rates, tuple(tuple(prefix + task for task in g) for g in groups))


_MNLI = "mnli mnli_matched mnli_mismatched"
_MIXTURES = (
    # Without WNLI, as in T5: super_glue.wsc has the same sentences.
    _mixture(
        "glue",
        f"cola sst2 mrpc qqp stsb {_MNLI} qnli rte ax",
        "cola sst2 mrpc qqp stsb mnli_matched+mnli_mismatched qnli rte",
    ),
    _mixture("mnli", _MNLI, "mnli_matched+mnli_mismatched", "glue"),
    _mixture(
        "super_glue",
        "dpr wsc boolq cb copa multirc record rte wic axb axg",
        "boolq cb copa multirc record rte wic wsc",
    ),
    _mixture("anli", "r1 r2 r3", "r3"),  # the paper reports the third round
    # The paper reports each task of these.
    _mixture("arc", "easy challenge", "easy challenge"),
    _mixture("closed_book", *["natural_questions web_questions trivia_qa"] * 2),
)
MIXTURES: Mapping[str, TaskMixture] = {mixture.name: mixture for mixture in _MIXTURES}
"""Mixtures of fine-tuning tasks, by name."""
