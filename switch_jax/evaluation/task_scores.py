"""Task scores: predicts the validation examples of fine-tuning tasks, and computes metrics."""

import functools
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
from switch_jax.evaluation.own_metrics import compute_own_metrics
from switch_jax.evaluation.task_metrics import (
    MultircAnswer,
    RecordAnswer,
    WscAnswer,
    benchmark_average,
    compute_metrics,
)
from switch_jax.evaluation.task_predictions import Predictor
from switch_jax.files import write_atomically
from switch_jax.model import ShardedModel

Examples = Sequence[Mapping[str, Any]]  # from `read_task_examples`
_SHOWN_CHARACTERS = 60  # of a text in a message
_NUM_PROBED = 4  # examples that are scored in advance, to list the metrics
# Keys of a task's scores that are not metrics of its answers.
_NOT_METRICS = ("score", "invalid", "cross_entropy", "neg_log_perplexity")


class TaskScorer:
    """Scorer of the fine-tuning tasks in the config's mixture, on their validation examples.

    It does nothing if the mixture has no such tasks.

    Attributes:
      metric_names: names of the metrics that a call returns.

    Raises `UserError` where examples cannot be read, or a metric needs a package that is not
    installed.
    """

    def __init__(self, sharded: ShardedModel):
        self._config = sharded.config
        self._examples = read_task_examples(sharded.config)
        self.metric_names: list[str] = []
        if not self._examples:
            return
        self._vocabulary = open_vocabulary(sharded.config)
        self._predictor = Predictor(sharded, self._vocabulary)
        probed = {
            task: _labelled(examples)[:_NUM_PROBED] for task, examples in self._examples.items()
        }
        empty_predictions = {task: [""] * len(examples) for task, examples in probed.items()}
        self.metric_names = list(self._scores(probed, empty_predictions))
        if jax.process_index() == 0:
            for note in self._notes():
                print(note, file=sys.stderr)

    def check_examples_agree(self) -> None:
        """Raises `UserError` if processes have different examples; all processes must call it."""
        hashed = hashlib.blake2b(repr(self._examples).encode("utf-8", "replace"), digest_size=3)
        digest = int.from_bytes(hashed.digest(), "big")
        if len(set(all_gather_int(digest))) > 1:
            raise UserError(
                "The processes have different validation examples; give all the same data.data_dir."
            )

    def __call__(self, params: Mapping[str, jax.Array], folder: Path) -> dict[str, float]:
        """Predicts and scores all examples; all processes must call it.

        Args:
          params: parameters by path.
          folder: the first process writes predictions to `folder/<task>.jsonl`.

        Returns `<task>/<metric>` in per cent, `<task>/score` as the paper reports it, and
        `average`, the score of the mixture. Raises `UserError` where `folder` cannot be written.
        """
        if not self._examples:
            return {}
        is_first_process = jax.process_index() == 0
        with fail_together():
            if is_first_process:
                _create_folder(folder)
        predictions = {}
        for name, examples in self._examples.items():
            predictions[name] = self._predict(params, get_task(name), examples)
            if is_first_process:
                _write_predictions(folder / f"{name}.jsonl", examples, predictions[name])
        return self._scores(self._examples, predictions)

    def _predict(self, params: Any, task: Task, examples: Examples) -> list[str]:
        inputs = [example["inputs"] for example in examples]
        classes = _output_classes(task)
        if self._config.eval.method == "rank" and classes:
            return self._predictor.most_probable_class(params, inputs, classes)
        return self._predictor.generate(params, inputs)

    def _scores(
        self, examples: Mapping[str, Examples], predictions: Mapping[str, Sequence[str]]
    ) -> dict[str, float]:
        """Returns the metrics of all tasks, and `average` if every task has a score."""
        metrics: dict[str, float] = {}
        for name, task_examples in examples.items():
            scores = _score_task(
                get_task(name),
                task_examples,
                predictions[name],
                self._vocabulary,
                self._config.eval.metrics,
            )
            metrics |= {f"{name}/{metric}": value for metric, value in scores.items()}
        members = {", ".join(group): group for group in self._average_groups()}
        tasks = {task for group in members.values() for task in group}
        scored = {t: {"score": metrics[f"{t}/score"]} for t in tasks if f"{t}/score" in metrics}
        if tasks and len(scored) == len(tasks):
            metrics["average"] = benchmark_average(scored, members)
        return metrics

    def _average_groups(self) -> Sequence[Sequence[str]]:
        """Returns the groups of tasks over whose means `average` is taken.

        They are those of the paper for its mixtures; in other mixtures, each task is a group.
        """
        mixture = MIXTURES.get(self._config.data.mixture)
        if mixture is not None:
            return mixture.average_groups
        return [[name] for name, examples in self._examples.items() if _labelled(examples)]

    def _notes(self) -> list[str]:
        """Returns warnings about examples that are cut or unwritable, and a missing average."""
        data, notes = self._config.data, []
        for name, examples in self._examples.items():
            for side, limit in (("inputs", data.inputs_length), ("targets", data.targets_length)):
                long = sum(len(self._vocabulary.encode(e[side])) >= limit for e in examples)
                if long:
                    notes.append(
                        f"{name}: {long} of {len(examples)} validation {side} are longer than"
                        f" data.{side}_length={limit}, and are cut."
                    )
            texts = [example["targets"] for example in _labelled(examples)]
            written = [self._vocabulary.decode(self._vocabulary.encode(text)) for text in texts]
            lost = [pair for pair in zip(texts, written) if pair[0].split() != pair[1].split()]
            if lost:
                first, becomes = (text[:_SHOWN_CHARACTERS] for text in lost[0])
                notes.append(
                    f"{name}: {len(lost)} of {len(texts)} validation targets have characters that"
                    " the vocabulary cannot write, so that no prediction equals them; the first is"
                    f" {first!r} and becomes {becomes!r}."
                )
        if "average" not in self.metric_names and self._average_groups():
            tasks = (task for group in self._average_groups() for task in group)
            missing = [task for task in tasks if f"{task}/score" not in self.metric_names]
            notes.append(f"There is no average: {', '.join(missing)} has no labelled examples.")
        return notes


def scores_table(metrics: Mapping[str, float]) -> str:
    """Returns the metrics of a `TaskScorer` as lines of a table; empty if there are no tasks."""
    by_task: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        task, _, metric = key.rpartition("/")
        by_task.setdefault(task, {})[metric] = value
    scores_by_task = {task: scores for task, scores in by_task.items() if "score" in scores}
    if not scores_by_task:
        return ""
    lines = [f"{'task':30} {'score':>7}\n"]
    for task, scores in scores_by_task.items():
        details = [f"{name} {scores[name]:.2f}" for name in scores if name not in _NOT_METRICS]
        if scores.get("invalid"):
            details.append(f"{scores['invalid']:.0f} answers invalid")
        lines.append(f"{task:30} {scores['score']:7.2f}  {', '.join(details)}\n")
    if len(scores_by_task) > 1 and "average" in metrics:
        lines.append(f"{'average':30} {metrics['average']:7.2f}\n")
    return "".join(lines)


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Predictions cannot be written to {folder} ({error.strerror}); make room for them, or"
            " copy the WORKDIR to where you may write."
        ) from error


def _write_predictions(path: Path, examples: Examples, predictions: Sequence[str]) -> None:
    lines = [
        json.dumps({**example, "prediction": prediction}, ensure_ascii=False) + "\n"
        for example, prediction in zip(examples, predictions)
    ]
    write_atomically(path, "".join(lines).encode("utf-8", "replace"))


def _labelled(examples: Examples) -> Examples:
    """Returns the examples that have an answer."""
    return [example for example in examples if example["answer"] is not None]


def _output_classes(task: Task) -> tuple[str, ...]:
    """Returns the texts to choose outputs from; none for WSC, whose outputs are nouns."""
    return () if task.metrics == ("wsc",) else task.classes


# Builds the answer that a metric takes, from an example's `answer` in JSON.
_ANSWER_TYPES: dict[str, Callable[[Any], Any]] = {
    "multirc": lambda x: MultircAnswer(x["value"], tuple(x["group"])),
    "record": lambda x: RecordAnswer(x["value"], tuple(x["group"])),
    "wsc": lambda x: WscAnswer(x["referent"], x["value"] == "True"),
}


def _as_list(answer: str | list[str]) -> list[str]:
    return [answer] if isinstance(answer, str) else answer


def _written_answer(vocabulary: Vocabulary, answer: str) -> str:
    """Returns an answer with the blanks that predictions have, since a vocabulary normalises them.

    An answer with other characters that the vocabulary cannot write stays as it is.
    """
    written = vocabulary.decode(vocabulary.encode(answer))
    return written if written.split() == answer.split() else answer


def _score_task(
    task: Task,
    examples: Examples,
    predictions: Sequence[str],
    vocabulary: Vocabulary,
    own_metrics: str,
) -> dict[str, float]:
    """Returns the metrics of a task and its `score`; empty if no example has an answer.

    Args:
      own_metrics: `eval.metrics`.
    """
    labelled = [i for i, example in enumerate(examples) if example["answer"] is not None]
    if not task.metrics or not labelled:
        return {}
    answers = [examples[i]["answer"] for i in labelled]
    predicted = [predictions[i] for i in labelled]
    if task.is_own:
        references = [
            [_written_answer(vocabulary, text) for text in _as_list(answer)] for answer in answers
        ]
        metrics = compute_own_metrics(own_metrics, references, predicted)
        return {**metrics, "score": next(iter(metrics.values()))}
    build_answer = _ANSWER_TYPES.get(task.metrics[0], lambda x: x)
    if task.metrics == ("accuracy",) and not task.classes:
        build_answer = functools.partial(_written_answer, vocabulary)
    answers = [build_answer(answer) for answer in answers]
    metrics = compute_metrics(task.metrics, answers, predicted, _output_classes(task))
    averaged = (
        [metrics[task.reported_metric]]
        if task.reported_metric
        else [value for name, value in metrics.items() if name != "invalid"]
    )
    return {**metrics, "score": float(np.mean(averaged))}
