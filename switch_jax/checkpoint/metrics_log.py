"""Metrics of a run in metrics.jsonl: writing, reading and comparing them.

A line of metrics.jsonl is a JSON object: `step`, `split`, `time`, and metrics that are numbers or
null. A line that is anything else is damaged: it is left out and reported. So is a line whose step
does not lie between its neighbours' steps. A last line without its end was being written.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from switch_jax.checkpoint.workdir import Workdir
from switch_jax.files import write_atomically

QUALITY = "neg_log_perplexity"
"""Metric that runs are compared by, in nats per target token."""
_SPLITS = ("train", "eval")
_TAIL_BYTES = 2**18  # read at the end of metrics.jsonl; a line of metrics is much shorter


# Receives the step, finite values by name such as `train/loss`, and files of the step.
Listener = Callable[[int, Mapping[str, float], Sequence[Path]], None]


class MetricsWriter:
    """Appends metrics to metrics.jsonl, one line per step and split.

    Args:
      workdir: the run's folder.
      first_step: number of steps done before; lines of later steps are removed. A file with
        damaged lines is kept as metrics.damaged.jsonl.
      active: False in all processes but one, which then write nothing.
      listener: is called after each line.
    """

    def __init__(
        self,
        workdir: Workdir,
        first_step: int,
        *,
        active: bool = True,
        listener: Listener | None = None,
    ):
        self._active, self._listener = active, listener
        if not active:
            return
        self._path = workdir.metrics_file
        if self._path.exists():
            lines, damaged = _read_lines(workdir)
            if damaged:
                aside = self._path.with_name("metrics.damaged.jsonl")
                _report_damage(workdir, damaged, f"removed; {aside.name} has the file as it was")
                self._path.replace(aside)
            kept = [line for line in lines if line["step"] <= first_step]
            content = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(self._path, content.encode())
        self._file = self._path.open("a")

    def write(
        self, step: int, split: str, metrics: Mapping[str, float], files: Sequence[Path] = ()
    ) -> None:
        """Writes the metrics of a step.

        For a value that is not finite, metrics.jsonl has null and the listener gets none.
        """
        if not self._active:
            return
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        line = {"step": step, "split": split, "time": time.time(), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._listener is not None:
            finite = {f"{split}/{name}": v for name, v in values.items() if v is not None}
            self._listener(step, finite, files)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._active:
            self._file.close()


def read_metrics(workdir: Workdir) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl; reports damaged ones on stderr and leaves them out."""
    if not workdir.metrics_file.exists():
        return []
    lines, damaged = _read_lines(workdir)
    if damaged:
        _report_damage(workdir, damaged, "left out")
    return lines


def last_logged_step(workdir: Workdir) -> int:
    """Returns the last step in metrics.jsonl, 0 where there is none; reads only the file's end."""
    line = last_metrics(workdir)
    return 0 if line is None else line["step"]


def last_metrics(workdir: Workdir) -> dict[str, Any] | None:
    """Returns the last line of metrics.jsonl that is not damaged; reads only the file's end."""
    try:
        with workdir.metrics_file.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    return next((line for line in map(_parse_line, reversed(lines)) if line is not None), None)


def has_diverged(workdir: Workdir) -> bool:
    """Whether the run stopped because a loss, gradient or parameter was not finite.

    The next start of the run removes the line that says so.
    """
    line = last_metrics(workdir)
    if line is None or line["split"] != "train" or "skipped_steps" in line:
        return False
    return any(line.get(name, 0.0) is None for name in ("loss", "grad_norm", "param_norm"))


def sort_key(metric: str, metrics: Mapping[str, Any]) -> float:
    """Returns a number that is higher for a better value of `metric`; -inf where it is missing."""
    value = metrics.get(metric)
    if value is None or not math.isfinite(value):
        return -math.inf
    return -value if metric.endswith(("cross_entropy", "invalid")) else value


def _read_lines(workdir: Workdir) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the lines that are not damaged, and the numbers of the damaged ones, from 1."""
    texts = workdir.metrics_file.read_bytes().split(b"\n")
    parsed = {number: _parse_line(text) for number, text in enumerate(texts, 1) if text.strip()}
    if parsed.get(len(texts), {}) is None:
        del parsed[len(texts)]  # it was being written
    damaged = [number for number, line in parsed.items() if line is None]
    lines = {number: line for number, line in parsed.items() if line is not None}
    steps = [0, *(line["step"] for line in lines.values()), 2**31]
    for number, before, step, after in zip(lines, steps, steps[1:], steps[2:]):
        if before <= after and not before <= step <= after:
            damaged.append(number)
    left_out = set(damaged)
    return [line for number, line in lines.items() if number not in left_out], sorted(damaged)


def _parse_line(text: bytes) -> dict[str, Any] | None:
    """Returns a line of metrics; None for a damaged one."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or line.get("split") not in _SPLITS:
        return None
    step = line.get("step")
    if type(step) is not int or not 0 <= step < 2**31:
        return None
    values = (value for key, value in line.items() if key != "split")
    return line if all(value is None or _is_number(value) for value in values) else None


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 2**64) or (
        type(value) is float and math.isfinite(value)
    )


def _report_damage(workdir: Workdir, damaged: list[int], fate: str) -> None:
    count, first = len(damaged), damaged[0]
    which = f"line {first} is" if count == 1 else f"{count} lines (first: line {first}) are"
    print(f"{workdir.metrics_file}: {which} damaged and {fate}.", file=sys.stderr)
