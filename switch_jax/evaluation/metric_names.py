"""Names of evaluation metrics."""

import difflib
from collections.abc import Collection, Sequence

from switch_jax.errors import UserError

SOURCE_METRICS = ("cross_entropy", "neg_log_perplexity")
TOKEN_METRICS = (*SOURCE_METRICS, "accuracy")  # accuracy of tokens; that of a task is of answers


def check_metric(metric: str, sources: Collection[str], task_metrics: Sequence[str]) -> None:
    """Raises `UserError` if `metric` is not the name of an evaluation metric.

    Args:
      metric: value of `train.keep_best`.
      sources: names of the validation sources.
      task_metrics: names of the task metrics, `<task>/<metric>`.
    """
    compared = sources if len(sources) > 1 else ()
    source_metrics = (f"{source}/{name}" for source in compared for name in SOURCE_METRICS)
    known = [*TOKEN_METRICS, *source_metrics, *task_metrics]
    if metric not in known:
        close = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}."
        raise UserError(f"There is no metric {metric!r} for train.keep_best; {hint}")
