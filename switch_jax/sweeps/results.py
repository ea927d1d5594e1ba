"""Results of a finished or diverged run, read from its WORKDIR."""

import dataclasses
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switch_jax.checkpoint import QUALITY, Workdir, read_metrics, sort_key
from switch_jax.config import Config
from switch_jax.errors import UserError
from switch_jax.model import flops_per_sequence, params_by_group

_LAST_ROUTER_LINES = 4  # lines of metrics.jsonl over which `RunResult.dropped` is a mean


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Measurements of a run; None for what the run does not log."""

    config: Config
    params: int
    flops_per_sequence: int  # forward, by the paper's convention
    step_flops: float  # of a train step, as `model.train_flops`
    evaluations: tuple[Mapping[str, Any], ...]  # lines of metrics.jsonl
    tokens_per_step: float  # target tokens
    step_seconds: float | None  # median, without compilation and evaluation
    dropped: float | None  # fraction of assignments without a slot, at the end
    devices: str | None
    diverged: bool = False  # training stopped early, because a value was not finite

    @property
    def steps(self) -> int:
        """Number of train steps."""
        return self.config.train.steps

    @property
    def sequences_per_second(self) -> float | None:
        """Training throughput, without compilation and evaluation."""
        return self.step_seconds and self.config.data.batch_size / self.step_seconds

    def quality(self, metric: str) -> float | None:
        """Returns the last value of `QUALITY`, or the best of a task's score, as in the paper.

        None if the run has diverged, also if it did so after its last evaluation.
        """
        if self.diverged or not self.evaluations:
            return None
        if metric == QUALITY:
            return self.evaluations[-1].get(metric)
        return max((y for _, y in self.curve(metric)), default=None)

    def curve(self, metric: str, x: str = "steps") -> list[tuple[float, float]]:
        """Returns (x, metric) of the evaluations whose value is finite.

        Args:
          x: `steps`, `seconds` or `flops`, from the start of training.
        """
        x_per_step = {
            "steps": 1.0,
            "seconds": self.step_seconds or 0.0,
            "flops": self.step_flops,
        }[x]
        points = ((line["step"], line.get(metric)) for line in self.evaluations)
        return [(step * x_per_step, value) for step, value in points if value is not None]


def read_result(workdir: Workdir, step_flops: float, *, diverged: bool = False) -> RunResult:
    """Reads the results of a finished or diverged run.

    Args:
      workdir: the run's folder.
      step_flops: FLOPs of a train step, a teacher's included.
      diverged: whether training stopped early, because a value was not finite.
    """
    config, lines = workdir.config(), read_metrics(workdir)
    train = [line for line in lines if line["split"] == "train"]
    seconds = [line["step_seconds"] for line in train if "step_seconds" in line]
    dropped = [m["router/dropped_fraction"] for m in train if "router/dropped_fraction" in m]
    last_dropped = [value for value in dropped[-_LAST_ROUTER_LINES:] if value is not None]
    return RunResult(
        config=config,
        params=sum(params_by_group(config).values()),
        flops_per_sequence=flops_per_sequence(config),
        step_flops=step_flops,
        evaluations=tuple(line for line in lines if line["split"] == "eval"),
        tokens_per_step=train[-1]["tokens"] / train[-1]["step"] if train else 0.0,
        step_seconds=statistics.median(seconds) if seconds else None,
        dropped=statistics.fmean(last_dropped) if last_dropped else None,
        devices=workdir.record().devices,
        diverged=diverged,
    )


def checkpoint_for_reuse(workdir: Workdir) -> Path:
    """Returns the path under which other runs read the model of a finished run.

    That is its best checkpoint if the run sets `train.keep_best`, else its WORKDIR, which stands
    for its newest checkpoint.
    """
    metric = workdir.config().train.keep_best
    if metric is None:
        return workdir.path
    kept = {folder.name for folder in workdir.checkpoints.iterdir()}
    lines = [m for m in read_metrics(workdir) if m["split"] == "eval" and str(m["step"]) in kept]
    if not lines:
        raise UserError(
            f"{workdir.path} logs no evaluation of its checkpoints, so that the best is not known;"
            " name one as init_from or distill.teacher."
        )
    best = max(lines, key=lambda m: (sort_key(metric, m), m["step"]))
    return workdir.checkpoints / str(best["step"])
