"""What a run tells while it goes on: metrics.jsonl, TensorBoard, and the progress display."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from switch_jax.workdir import Workdir

QUALITY = "neg_log_perplexity"  # the metric that runs are compared by: nats a target token
_LAST_LINES = 2**18  # bytes, many times those of a line of metrics


class MetricsWriter:
    """Appends metrics to a WORKDIR, one line per step and split."""

    def __init__(self, workdir: Workdir, first_step: int, *, active: bool = True):
        """Continues after `first_step` steps: what was written past them is dropped.

        Of several processes one is `active`; the others write nothing.
        """
        self._active = active
        if not active:
            return
        self._path = workdir.metrics_file
        if self._path.exists():
            kept = [m for m in read_metrics(workdir) if m["step"] <= first_step]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(m) + "\n" for m in kept))
            partial.replace(self._path)
        self._file = self._path.open("a")
        self._tensorboard = SummaryWriter(str(workdir.tensorboard), purge_step=first_step + 1)

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step; a metric that is not finite becomes null in JSON."""
        if not self._active:
            return
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        line = {"step": step, "split": split, "time": time.time(), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._active:
            self._file.close()
            self._tensorboard.close()


class Meter:
    """Speed between two readings, from the metrics of a train step."""

    def __init__(self, mfu: Callable[[float], float | None]):
        """`mfu`: share of the devices' peak from seconds a step, None where it is not known."""
        self._mfu = mfu

    def restart(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Begins to measure after `step`; waits for it first."""
        self._step, self._tokens = step, _tokens(metrics)
        self._wait, self._began = 0.0, time.perf_counter()

    @contextmanager
    def waiting(self, metrics: Mapping[str, Any]) -> Iterator[None]:
        """Around drawing a batch: counts the time if the step was done before the batch was
        there, so that the device may have had nothing to do.
        """
        began = time.perf_counter()
        yield
        if metrics["loss"].is_ready():
            self._wait += time.perf_counter() - began

    def read(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The metrics as numbers, with the speed since the last reading; restarts."""
        values = {name: float(value) for name, value in metrics.items() if name != "tokens"}
        values["tokens"] = _tokens(metrics)
        seconds, steps = time.perf_counter() - self._began, step - self._step
        if steps:
            values |= {
                "tokens_per_second": (values["tokens"] - self._tokens) / seconds,
                "step_seconds": seconds / steps,
                "data_wait_fraction": self._wait / seconds,
            }
            share = self._mfu(seconds / steps)
            if share is not None:
                values["mfu"] = share
        self.restart(step, metrics)
        return values


def _tokens(metrics: Mapping[str, Any]) -> int:
    low, high = (int(word) for word in metrics["tokens"])
    return low + (high << 32)


def read_metrics(workdir: Workdir) -> list[dict]:
    """All lines of metrics.jsonl; a last line cut short by a kill is left out."""
    if not workdir.metrics_file.exists():
        return []
    *lines, _ = workdir.metrics_file.read_text().split("\n")
    return [json.loads(line) for line in lines]


def last_step(workdir: Workdir) -> int:
    """The last step that metrics.jsonl tells of, 0 where there is none; reads its end alone."""
    try:
        with workdir.metrics_file.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _LAST_LINES, 0))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    # What stands after the last end of line is not complete.
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


class ProgressDisplay:
    """A live bar on a terminal; elsewhere, a plain line whenever there is something new."""

    def __init__(self, total_steps: int, first_step: int, *, active: bool = True):
        """Of several processes one is `active`; the others show nothing."""
        self._console = Console(stderr=True, quiet=not active)
        self._total = total_steps
        self._start = (first_step, time.time())
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            "train", total=total_steps, completed=first_step, status="compiling …"
        )

    def __enter__(self) -> "ProgressDisplay":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def step(self, step: int) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=step)

    def status(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows loss and speed."""
        speed = metrics.get("tokens_per_second", 0)
        text = f"loss {metrics['loss']:.3f}  {speed:,.0f} target tokens/s"
        self._progress.update(self._task, completed=step, status=text)
        if not self._console.is_terminal:
            first, began = self._start
            left = (time.time() - began) / max(step - first, 1) * (self._total - step)
            self.say(f"step {step}/{self._total}  {text}  {left:,.0f} s left")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the loss of an evaluation and, where tasks were scored, what is their number."""
        text = f"step {step}  validation cross-entropy {metrics['cross_entropy']:.4f}"
        scores = [name for name in metrics if name.endswith("/score")]
        for name in ["average"] if "average" in metrics else scores:
            text += f"  {name.removesuffix('/score')} {metrics[name]:.2f}"
        self.say(text)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)
