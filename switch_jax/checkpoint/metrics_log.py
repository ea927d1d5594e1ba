"""What a run tells while it goes on: metrics.jsonl, TensorBoard, and the progress display."""

import json
import math
import os
import time
from collections.abc import Mapping

from tensorboardX import SummaryWriter

from switch_jax.checkpoint.workdir import Workdir

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


def read_metrics(workdir: Workdir) -> list[dict]:
    """All lines of metrics.jsonl; a last line cut short by a kill is left out."""
    if not workdir.metrics_file.exists():
        return []
    *lines, _ = workdir.metrics_file.read_text().split("\n")
    return [json.loads(line) for line in lines]


def last_logged_step(workdir: Workdir) -> int:
    """The last step that metrics.jsonl tells of, 0 where there is none; reads its end alone."""
    try:
        with workdir.metrics_file.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _LAST_LINES, 0))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    # What stands after the last end of line is not complete.
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0
