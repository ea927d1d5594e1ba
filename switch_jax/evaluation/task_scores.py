"""How good a model's answers to fine-tuning tasks are: asked, written down, compared."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from switch_jax.data import (
    MIXTURES,
    Task,
    Vocabulary,
    get_task,
    open_vocabulary,
    read_task_examples,
)
from switch_jax.distributed import all_gather_int, fail_together
from switch_jax.errors import UserError
from switch_jax.evaluation.task_metrics import (
    MultircAnswer,
    RecordAnswer,
    WscAnswer,
    average,
    score,
)
from switch_jax.evaluation.task_predictions import Predictor
from switch_jax.files import write_atomically
from switch_jax.model import ShardedModel

Examples = Sequence[Mapping[str, Any]]  # as `read_task_examples` gives them
_FEW = 4  # examples that tell what metrics there will be


class TaskScorer:
    """The fine-tuning tasks of a mixture: answers to their validation examples, and metrics.

    Without tasks in the mixture, it does nothing.

    Attributes:
      names: of the metrics that a call gives.

    Raises `UserError` where examples cannot be read, or a metric needs what is not installed.
    """

    def __init__(self, sharded: ShardedModel):
        self._config = sharded.config
        self._examples = read_task_examples(sharded.config)
        self.names: list[str] = []
        if not self._examples:
            return
        self._vocabulary = open_vocabulary(sharded.config)
        self._predictor = Predictor(sharded, self._vocabulary)
        few = {name: _labelled(of)[:_FEW] for name, of in self._examples.items()}
        self.names = list(self._scores(few, {name: [""] * len(of) for name, of in few.items()}))
        if jax.process_index() == 0:
            for note in self._notes():
                print(note, file=sys.stderr)

    def agree(self) -> None:
        """Raises `UserError` where processes have other examples than the first; all must call."""
        digest = hashlib.blake2b(repr(self._examples).encode("utf-8", "replace"), digest_size=3)
        mine = int.from_bytes(digest.digest(), "big")
        if len(set(all_gather_int(mine))) > 1:
            raise UserError(
                "The processes have different validation examples; give all the same data.data_dir."
            )

    def __call__(self, params: Mapping[str, jax.Array], folder: Path) -> dict[str, float]:
        """Scores of all examples; predictions go to `folder/<task>.jsonl`. All must call it.

        Returns `<task>/<metric>` in per cent, `<task>/score` as the paper reports it, and
        `average`, the mixture's number. Raises `UserError` where `folder` cannot be written.
        """
        if not self._examples:
            return {}
        first_process = jax.process_index() == 0
        with fail_together():
            if first_process:
                _make(folder)
        predictions = {}
        for name, examples in self._examples.items():
            predictions[name] = self._answered(params, get_task(name), examples)
            if first_process:
                _write(folder / f"{name}.jsonl", examples, predictions[name])
        return self._scores(self._examples, predictions)

    def _answered(self, params: Any, task: Task, examples: Examples) -> list[str]:
        inputs = [example["inputs"] for example in examples]
        classes = _classes(task)
        if self._config.eval.method == "rank" and classes:
            return self._predictor.rank(params, inputs, classes)
        return self._predictor.write(params, inputs)

    def _scores(
        self, examples: Mapping[str, Examples], predictions: Mapping[str, Sequence[str]]
    ) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, of in examples.items():
            scores = _scored(get_task(name), of, predictions[name], self._vocabulary)
            values |= {f"{name}/{metric}": value for metric, value in scores.items()}
        groups = {", ".join(group): group for group in self._groups()}
        tasks = {task for group in groups.values() for task in group}
        scored = {t: {"score": values[f"{t}/score"]} for t in tasks if f"{t}/score" in values}
        if tasks and len(scored) == len(tasks):
            values["average"] = average(scored, groups)
        return values

    def _groups(self) -> Sequence[Sequence[str]]:
        """Tasks whose means are averaged: of a mixture of the paper's as there, else each alone."""
        mixture = MIXTURES.get(self._config.data.mixture)
        if mixture is not None:
            return mixture.average_groups
        return [[name] for name, examples in self._examples.items() if _labelled(examples)]

    def _notes(self) -> list[str]:
        """What of the examples a model cannot see, write, or be measured by."""
        data, notes = self._config.data, []
        for name, examples in self._examples.items():
            for side, limit in (("inputs", data.inputs_length), ("targets", data.targets_length)):
                long = sum(len(self._vocabulary.encode(e[side])) >= limit for e in examples)
                if long:
                    notes.append(
                        f"{name}: {long} of {len(examples)} validation {side} are longer than"
                        f" data.{side}_length={limit}, and are cut."
                    )
        if "average" not in self.names and self._groups():
            tasks = (task for group in self._groups() for task in group)
            missing = [task for task in tasks if f"{task}/score" not in self.names]
            notes.append(f"There is no average: {', '.join(missing)} has no labelled examples.")
        return notes


def scores_table(values: Mapping[str, float]) -> str:
    """A table of what a `Scorer` gave, in lines; empty where there were no tasks."""
    of_tasks: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        task, _, metric = key.rpartition("/")
        of_tasks.setdefault(task, {})[metric] = value
    scored = {task: of for task, of in of_tasks.items() if "score" in of}
    if not scored:
        return ""
    lines = [f"{'task':30} {'score':>7}\n"]
    for task, of in scored.items():
        detail = [f"{name} {of[name]:.2f}" for name in of if name not in _BESIDE]
        if of.get("invalid"):
            detail.append(f"{of['invalid']:.0f} answers invalid")
        lines.append(f"{task:30} {of['score']:7.2f}  {', '.join(detail)}\n")
    if len(scored) > 1 and "average" in values:
        lines.append(f"{'average':30} {values['average']:7.2f}\n")
    return "".join(lines)


# What is no metric of a task's answers.
_BESIDE = ("score", "invalid", "cross_entropy", "neg_log_perplexity")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Predictions cannot be written to {folder} ({error.strerror}); make room for them, or"
            " copy the WORKDIR to where you may write."
        ) from error


def _write(path: Path, examples: Examples, predictions: Sequence[str]) -> None:
    lines = [
        json.dumps({**example, "prediction": prediction}, ensure_ascii=False) + "\n"
        for example, prediction in zip(examples, predictions)
    ]
    write_atomically(path, "".join(lines).encode("utf-8", "replace"))


def _labelled(examples: Examples) -> Examples:
    return [example for example in examples if example["answer"] is not None]


def _classes(task: Task) -> tuple[str, ...]:
    """What answers are to be chosen from; WSC's are nouns, though its labels are classes."""
    return () if task.metrics == ("wsc",) else task.classes


# What metrics compare with, from `Example.answer` as JSON has it.
_ANSWERS: dict[str, Callable[[Any], Any]] = {
    "multirc": lambda x: MultircAnswer(x["value"], tuple(x["group"])),
    "record": lambda x: RecordAnswer(x["value"], tuple(x["group"])),
    "wsc": lambda x: WscAnswer(x["referent"], x["value"] == "True"),
}


def _scored(
    task: Task, examples: Examples, predictions: Sequence[str], vocabulary: Vocabulary
) -> dict[str, float]:
    """A task's metrics, and `score`; nothing where no answer is known."""
    known = [i for i, example in enumerate(examples) if example["answer"] is not None]
    if not task.metrics or not known:
        return {}
    read = _ANSWERS.get(task.metrics[0], lambda x: x)
    if task.metrics == ("accuracy",) and not task.classes:
        # As the vocabulary has it: one that folds blanks can write no other.
        read = lambda x: vocabulary.decode(vocabulary.encode(x))  # noqa: E731
    answers = [read(examples[i]["answer"]) for i in known]
    said = [predictions[i] for i in known]
    values = score(task.metrics, answers, said, _classes(task))
    counted = (
        [values[task.reported_metric]]
        if task.reported_metric
        else [value for key, value in values.items() if key != "invalid"]
    )
    return {**values, "score": float(np.mean(counted))}
