"""Names of evaluation metrics, and which of two values of a metric is better."""

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from switch_jax.errors import UserError

SOURCE_METRICS = ("cross_entropy", "neg_log_perplexity")
TOKEN_METRICS = (*SOURCE_METRICS, "accuracy")  # of tokens; a task's own is of answers


def check_metric(metric: str, sources: Collection[str], scores: Sequence[str]) -> None:
    """Raises `UserError` where no evaluation metric has that name.

    Args:
      metric: value of `train.keep_best`.
      sources: names of the validation sources.
      scores: names of the task metrics.
    """
    compared = sources if len(sources) > 1 else ()
    of_sources = (f"{source}/{name}" for source in compared for name in SOURCE_METRICS)
    known = [*TOKEN_METRICS, *of_sources, *scores]
    if metric not in known:
        close = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}."
        raise UserError(f"There is no metric {metric!r} for train.keep_best; {hint}")


def sort_key(metric: str, metrics: Mapping[str, Any]) -> float:
    """Returns a number that is higher for a better value of `metric`; -inf where it is missing."""
    value = metrics.get(metric)
    if value is None or not math.isfinite(value):
        return -math.inf
    return -value if metric.endswith(("cross_entropy", "invalid")) else value
