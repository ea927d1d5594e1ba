"""What a finished run came to, read from its WORKDIR."""

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switch_jax.checkpoint import QUALITY, Workdir, read_metrics
from switch_jax.config import Config
from switch_jax.evaluation import sort_key
from switch_jax.model import flops_per_sequence, params_by_group

_ROUTER_READINGS = 4  # the last ones, whose mean is what a run drops in the end
Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A run, measured; what it does not have is None."""

    config: Config
    params: int
    flops_per_sequence: int  # forward, by the paper's convention
    step_flops: float  # as `accounting.train_flops`
    evaluations: tuple[Mapping[str, Any], ...]  # lines of metrics.jsonl
    tokens_per_step: float  # target tokens
    step_seconds: float | None  # median, without compilation and evaluation
    dropped: float | None  # share of assignments without a slot, in the end
    devices: str | None

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def sequences_per_second(self) -> float | None:
        return self.step_seconds and self.config.data.batch_size / self.step_seconds

    def quality(self, metric: str) -> float | None:
        """The last evaluation's or, of a task's score, the best, as the paper reports them.

        None where it is not finite: the run has diverged.
        """
        if metric == QUALITY:
            return self.evaluations[-1][metric]
        return max((y for _, y in self.curve(metric)), default=None)

    def curve(self, metric: str, x: str = "steps") -> Points:
        """A metric of the finite evaluations by `steps`, `seconds` or `flops`."""
        unit = {
            "steps": 1.0,
            "seconds": self.step_seconds or 0.0,
            "flops": self.step_flops,
        }[x]
        points = ((line["step"], line.get(metric)) for line in self.evaluations)
        return [(step * unit, value) for step, value in points if value is not None]


def read_result(workdir: Workdir, step_flops: float) -> RunResult:
    """Reads a run that is finished, whose train steps take so many FLOPs."""
    config, lines = workdir.config(), read_metrics(workdir)
    steps = [line for line in lines if line["split"] == "train"]
    seconds = [line["step_seconds"] for line in steps if "step_seconds" in line]
    dropped = [m["router/dropped_fraction"] for m in steps if "router/dropped_fraction" in m]
    finite = [value for value in dropped[-_ROUTER_READINGS:] if value is not None]
    return RunResult(
        config=config,
        params=sum(params_by_group(config).values()),
        flops_per_sequence=flops_per_sequence(config),
        step_flops=step_flops,
        evaluations=tuple(line for line in lines if line["split"] == "eval"),
        tokens_per_step=steps[-1]["tokens"] / steps[-1]["step"],
        step_seconds=statistics.median(seconds) if seconds else None,
        dropped=statistics.fmean(finite) if finite else None,
        devices=json.loads(workdir.config_file.read_text())["devices"],
    )


def checkpoint_for_reuse(workdir: Workdir) -> Path:
    """What other runs take of a finished one: its best checkpoint, where it keeps that.

    Elsewhere its WORKDIR, which stands for the newest.
    """
    metric = workdir.config().train.keep_best
    if metric is None:
        return workdir.path
    kept = {folder.name for folder in workdir.checkpoints.iterdir()}
    lines = [m for m in read_metrics(workdir) if m["split"] == "eval" and str(m["step"]) in kept]
    best = max(lines, key=lambda m: (sort_key(metric, m), m["step"]))
    return workdir.checkpoints / str(best["step"])
