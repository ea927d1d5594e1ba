"""Metrics of one's own tasks (`pairs:…`): by name, or by a function in a Python file.

| in `eval.metrics`  | values                            | of a prediction and its references    |
|--------------------|-----------------------------------|---------------------------------------|
| `accuracy`         | `accuracy`                        | equal to one of them                  |
| `token_f1`         | `exact_match`, `f1`               | words as in SQuAD's program, the best |
| `rouge`            | `rouge1`, `rouge2`, `rougeLsum`   | F of rouge-score, the best            |
| `bleu`             | `bleu`                            | sacrebleu's, of all examples          |
| `classes`          | `accuracy`, `macro_f1`, `invalid` | the classes are all first references  |
| `correlation`      | `pearson`, `spearman`, `invalid`  | of the numbers that they are          |
| `FILE.py:FUNCTION` | FUNCTION's, or its own name       | FUNCTION(references, predictions)     |

Values are in per cent, those of a function as it returns them.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from switch_jax.config import is_own_code, load_own_code
from switch_jax.errors import UserError
from switch_jax.evaluation import task_metrics
from switch_jax.evaluation.task_metrics import Scores

References = Sequence[Sequence[str]]  # accepted texts of each of N examples, at least one


def compute_own_metrics(metrics: str, references: References, predictions: Sequence[str]) -> Scores:
    """Computes the metrics of N examples; the first value is the task's score.

    Args:
      metrics: `eval.metrics`: names of the table above, separated by commas.

    Raises `UserError` for an unknown name, for a function that is not found, that fails or that
    returns anything but numbers, for a missing package, and for references that a metric cannot
    read.
    """
    scores: Scores = {}
    for name in filter(None, map(str.strip, metrics.split(","))):
        compute = _own_function(name) if is_own_code(name) else _METRICS.get(name)
        if compute is None:
            raise UserError(
                f"eval.metrics={metrics!r}: there is no metric {name!r}; use"
                f" {', '.join(_METRICS)} or FILE.py:FUNCTION."
            )
        scores |= compute(references, predictions)
    if not scores:
        raise UserError(f"eval.metrics={metrics!r} names no metric; use accuracy.")
    return scores


def _accuracy(references: References, predictions: Sequence[str]) -> Scores:
    hits = [prediction in accepted for accepted, prediction in zip(references, predictions)]
    return {"accuracy": 100 * float(np.mean(hits))}


def _rouge(references: References, predictions: Sequence[str]) -> Scores:
    scorer = task_metrics.rouge_scorer()
    scored = [scorer.score_multi(list(texts), p) for texts, p in zip(references, predictions)]
    return {
        kind: 100 * float(np.mean([s[kind].fmeasure for s in scored]))
        for kind in task_metrics.ROUGE
    }


def _bleu(references: References, predictions: Sequence[str]) -> Scores:
    return {"bleu": task_metrics.corpus_bleu(references, predictions, tokenize="13a")}


def _classes(references: References, predictions: Sequence[str]) -> Scores:
    answers = [accepted[0] for accepted in references]
    classes = sorted(set(answers))
    return task_metrics.accuracy(answers, predictions, classes) | task_metrics.macro_f1(
        answers, predictions, classes
    )


def _correlation(references: References, predictions: Sequence[str]) -> Scores:
    numbers = [_number(accepted[0]) for accepted in references]
    return task_metrics.pearson(numbers, predictions) | task_metrics.spearman(numbers, predictions)


def _number(text: str) -> float:
    number = task_metrics.parse_number(text)
    if not math.isfinite(number):
        raise UserError(
            f"eval.metrics=correlation needs targets that are numbers, and one is {text[:60]!r};"
            " use another metric."
        )
    return number


def _own_function(name: str) -> Callable[[References, Sequence[str]], Scores]:
    """Returns the function of FILE.py:FUNCTION, whose value is checked."""
    function = load_own_code("eval.metrics", name)
    function_name = name.rpartition(":")[2]

    def compute(references: References, predictions: Sequence[str]) -> Scores:
        try:
            result = function([list(texts) for texts in references], list(predictions))
            named = result if isinstance(result, Mapping) else {function_name: result}
            return {str(key): float(value) for key, value in named.items()}
        except Exception as error:
            raise UserError(
                f"eval.metrics: {name} fails ({error!r}); it must return a number, or numbers by"
                " name."
            ) from error

    return compute


_METRICS: dict[str, Callable[[References, Sequence[str]], Scores]] = {
    "accuracy": _accuracy,
    "token_f1": task_metrics.squad,
    "rouge": _rouge,
    "bleu": _bleu,
    "classes": _classes,
    "correlation": _correlation,
}
