"""Metrics of a run, in metrics.jsonl and TensorBoard: writing them, and reading metrics.jsonl."""

import json
import math
import os
import time
from collections.abc import Mapping

from tensorboardX import SummaryWriter

from switch_jax.checkpoint.workdir import Workdir

QUALITY = "neg_log_perplexity"  # metric that runs are compared by, in nats per target token
_TAIL_BYTES = 2**18  # read at the end of metrics.jsonl; a line of metrics is much shorter


class MetricsWriter:
    """Appends metrics to metrics.jsonl and TensorBoard, one line per step and split.

    Args:
      workdir: the run's folder.
      first_step: number of steps done before; lines of later steps are removed.
      active: False in all processes but one, which then write nothing.
    """

    def __init__(self, workdir: Workdir, first_step: int, *, active: bool = True):
        self._active = active
        if not active:
            return
        self._path = workdir.metrics_file
        if self._path.exists():
            lines = [line for line in read_metrics(workdir) if line["step"] <= first_step]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
            partial.replace(self._path)
        self._file = self._path.open("a")
        self._tensorboard = SummaryWriter(str(workdir.tensorboard), purge_step=first_step + 1)

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step.

        For a value that is not finite, metrics.jsonl has null and TensorBoard has none.
        """
        if not self._active:
            return
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        line = {"step": step, "split": split, "time": time.time(), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            if value is not None:
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._active:
            self._file.close()
            self._tensorboard.close()


def read_metrics(workdir: Workdir) -> list[dict]:
    """Returns all lines of metrics.jsonl, without a last line that is not complete."""
    if not workdir.metrics_file.exists():
        return []
    *lines, _ = workdir.metrics_file.read_text().split("\n")
    return [json.loads(line) for line in lines]


def last_logged_step(workdir: Workdir) -> int:
    """Returns the last step in metrics.jsonl, 0 where there is none; reads only the file's end."""
    try:
        with workdir.metrics_file.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    # lines[-1] is empty or a line that is not complete.
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0
