"""Figures of the metrics of one or more runs; Matplotlib is imported when one is drawn."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from switch_jax.analysis.plotting import literal_text, new_figure
from switch_jax.analysis.speedup import common_sources, compare_sources, comparison_to_json
from switch_jax.checkpoint import Workdir, read_metrics
from switch_jax.errors import UserError
from switch_jax.files import is_bucket

Runs = dict[str, list[dict]]  # name → lines of metrics.jsonl

# Panels of the loss figure: metric, title, unit.
_LOSS_PANELS = (
    ("cross_entropy", "Loss", "cross-entropy (nats per target token)"),
    ("accuracy", "Accuracy", "share of target tokens predicted"),
)
# Panels of the router figure: metric, title, value of perfect balance.
_ROUTER_PANELS = (
    ("load_max", "busiest expert's load\n(1 = fair share)", 1.0),
    ("load_min", "idlest expert's load\n(1 = fair share)", 1.0),
    ("load_cv", "spread of loads\n(coefficient of variation)", 0.0),
    ("dropped_fraction", "dropped tokens", 0.0),
    ("confidence", "largest probability\nof the router", None),
    ("entropy", "entropy of the router\n(nats)", None),
)
# Values of a uniform router with E experts, their labels, and the side of the line that is free:
# no router has a smaller largest probability, or a higher entropy.
_UNIFORM_ROUTER = {
    "confidence": lambda E: (1 / E, f"uniform: 1 / {E}", "below"),
    "entropy": lambda E: (math.log(E), f"uniform: ln {E}", "above"),
}

_SOURCES_PER_PANEL = 36  # at the most
_TASKS_PER_ROW = 4  # panels


def read_runs(workdirs: Sequence[Workdir]) -> Runs:
    """Returns the metrics of runs, by the names of their folders where these differ.

    Raises `UserError` if a run has no metrics.
    """
    runs: Runs = {}
    for workdir in workdirs:
        lines = read_metrics(workdir)
        if not lines:
            raise UserError(f"{workdir.location} has no metrics.jsonl yet; train it first.")
        location = workdir.location
        name = (location if is_bucket(location) else location.resolve()).name
        runs[str(location) if name in runs else name] = lines
    return runs


def read_expert_counts(workdirs: Iterable[Workdir]) -> list[int]:
    """Returns the numbers of experts of sparse runs, each once; metrics alone have none.

    Raises `UserError` for an invalid config.json.
    """
    configs = [workdir.config() for workdir in workdirs if workdir.config_file.is_file()]
    return sorted({config.moe.num_experts for config in configs} - {0})


def draw_figures_of_run(workdir: Workdir) -> list[Path]:
    """Draws the metrics of a run that this process trains into its folder on the local disk.

    Returns and raises as `draw_run_plots`.
    """
    folder = workdir.path / workdir.figures.name
    return draw_run_plots(read_runs([workdir]), folder, read_expert_counts([workdir]))


def draw_run_plots(runs: Runs, folder: Path, expert_counts: Sequence[int] = ()) -> list[Path]:
    """Draws the metrics of runs into `folder`; returns the files written.

    `loss.png`; `router.png` if a model has experts; `tasks.png` if tasks were scored; `sources.png`
    for two runs that share several sources, with the first run as baseline.

    Args:
      expert_counts: as from `read_expert_counts`; lines show the values of uniform routers.

    Raises `UserError` if Matplotlib is not installed.
    """
    figures = {"loss.png": _draw_loss(runs)}
    if any(name.startswith("router/") for lines in runs.values() for name in lines[0]):
        figures["router.png"] = _draw_router(runs, expert_counts)
    if len(runs) == 2 and len(common_sources(*runs.values())) > 1:
        figures["sources.png"] = draw_source_losses(runs)
    if scores := score_metrics(runs):
        figures["tasks.png"] = _draw_tasks(runs, scores)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=144)
        written.append(folder / name)
    return written


def _series(lines: list[dict], split: str, name: str) -> tuple[list[float], list[float]]:
    """Returns steps and values of a metric, of the lines that have it."""
    points = [
        (m["step"], m[name]) for m in lines if m["split"] == split and m.get(name) is not None
    ]
    return [step for step, _ in points], [value for _, value in points]


def _draw_loss(runs: Runs) -> Any:
    """Draws loss and accuracy in training and validation by step."""
    figure = new_figure(1, len(_LOSS_PANELS), (5 * len(_LOSS_PANELS), 4))
    for axes, (name, title, unit) in zip(figure.axes, _LOSS_PANELS):
        for number, (run, lines) in enumerate(runs.items()):
            colour, run = f"C{number}", literal_text(run)
            training = {"alpha": 0.35, "lw": 1, "label": f"{run}, training"}
            validation = {"marker": "o", "ms": 3, "label": f"{run}, validation"}
            axes.plot(*_series(lines, "train", name), color=colour, **training)
            axes.plot(*_series(lines, "eval", name), color=colour, **validation)
        axes.set(xlabel="step", ylabel=unit, title=title)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def _draw_router(runs: Runs, expert_counts: Sequence[int]) -> Any:
    """Draws the router's metrics: every layer and the mean of one run, or the mean of each run."""
    figure = new_figure(1, len(_ROUTER_PANELS), (4 * len(_ROUTER_PANELS), 4))
    for axes, (name, label, ideal) in zip(figure.axes, _ROUTER_PANELS):
        if ideal is not None:
            axes.axhline(ideal, color="black", lw=0.8, ls=":")
        if name in _UNIFORM_ROUTER:
            for E in expert_counts:
                _draw_labelled_line(axes, *_UNIFORM_ROUTER[name](E))
        for number, (run, lines) in enumerate(runs.items()):
            several = len(runs) > 1
            if not several:
                for key in sorted(lines[0]):
                    layer = re.fullmatch(rf"router/((\w+)/\d+(/attention)?)/{name}", key)
                    if layer:
                        line_style = "-" if layer[2] == "encoder" else "--"
                        style = {"ls": line_style, "lw": 1, "alpha": 0.6}
                        axes.plot(*_series(lines, "train", key), label=layer[1], **style)
            axes.plot(
                *_series(lines, "train", f"router/{name}"),
                color=f"C{number}" if several else "black",
                lw=2,
                label=literal_text(run) if several else "mean",
            )
        axes.set(xlabel="step", title=label)
    lines, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside center right", frameon=False, fontsize=8)
    return figure


def _draw_labelled_line(axes: Any, value: float, label: str, side: str) -> None:
    """Draws a horizontal reference line, with a label `above` or `below` its right end."""
    axes.axhline(value, color="black", lw=0.8, ls=":")
    axes.annotate(
        label,
        (1, value),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        xytext=(0, {"above": 2, "below": -2}[side]),
        ha="right",
        va={"above": "bottom", "below": "top"}[side],
        fontsize=8,
    )


def score_metrics(runs: Runs) -> list[str]:
    """Returns the metrics that are scores of tasks; first, for several tasks, their average."""
    names = {name for lines in runs.values() for metrics in lines for name in metrics}
    task_scores = sorted(name for name in names if name.endswith("/score"))
    return (["average"] if "average" in names and len(task_scores) > 1 else []) + task_scores


def _draw_tasks(runs: Runs, scores: list[str]) -> Any:
    """Draws a panel for each score, with the best evaluation of every run marked."""
    columns = min(len(scores), _TASKS_PER_ROW)
    rows = -(-len(scores) // columns)
    figure = new_figure(rows, columns, (3.6 * columns + 1.2, 3.2 * rows))
    for axes, score in zip(figure.axes, scores):
        for number, (run, lines) in enumerate(runs.items()):
            steps, values = _series(lines, "eval", score)
            axes.plot(steps, values, color=f"C{number}", marker="o", ms=3, label=literal_text(run))
            if values:
                best = int(np.argmax(values))
                axes.plot(steps[best], values[best], "*", color=f"C{number}", ms=11)
                axes.annotate(
                    f"{values[best]:.1f}",
                    (steps[best], values[best]),
                    textcoords="offset points",
                    xytext=(0, 7),
                    ha="center",
                    fontsize=8,
                )
        axes.margins(y=0.15)
        axes.set(xlabel="step", title=literal_text(score.removesuffix("/score")))
    for axes in figure.axes[len(scores) :]:
        axes.remove()
    figure.axes[0].set_ylabel("score")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def draw_source_losses(runs: Runs) -> Any:
    """Draws the quality of two runs by source, and the speed-ups of the second run.

    As in the paper's Figures 7 and 8. The first run is the baseline.
    """
    comparison = compare_sources(*runs.values())
    rows = comparison.sources
    ordered = sorted(rows, key=lambda name: rows[name].baseline_quality, reverse=True)
    panels = -(-len(ordered) // _SOURCES_PER_PANEL)
    height = -(-len(ordered) // panels)
    widths = [3.0 if panels > 1 else 4.5] * panels + [4.0]
    size = (sum(widths), max(3.6, 0.16 * height + 1.4))
    figure = new_figure(1, panels + 1, size, width_ratios=widths)
    *quality_axes, speed_up_axes = figure.axes
    for number, axes in enumerate(quality_axes):
        axes.sharex(quality_axes[0])
        names = ordered[number * height : (number + 1) * height]
        qualities = [[rows[n].baseline_quality for n in names], [rows[n].quality for n in names]]
        y = range(len(names))
        axes.hlines(y, *qualities, color="0.8", lw=2, zorder=2)
        for run, role, quality in zip(runs, (" (baseline)", ""), qualities):
            axes.plot(quality, y, "o", ms=4, label=literal_text(run) + role)
        axes.set_yticks(y, map(literal_text, names), fontsize=7 if panels > 1 else 9)
        axes.tick_params("y", length=0)
        # The last panel may have fewer sources; it has the same height.
        axes.set(xlabel="neg. log perplexity (nats)", ylim=(height - 0.4, -0.6))
    quality_axes[0].set_title("Quality at the end", loc="left")
    figure.legend(handles=quality_axes[0].lines, loc="outside upper left", ncols=2, frameon=False)
    ratios = [row.ratio for row in rows.values() if row.ratio is not None]
    if ratios:
        speed_up_axes.hist(ratios, bins="sqrt", color="C1", edgecolor="white", zorder=2)
        mean = comparison_to_json(comparison)["speed_up_mean"]
        line = speed_up_axes.axvline(mean, color="black", ls="--", label=f"mean {mean:.1f}×")
        figure.legend(handles=[line], loc="outside upper right", frameon=False)
    speed_up_axes.set_title(f"Speed-up ({len(ratios)} of {len(rows)} get there)", loc="left")
    speed_up_axes.set(xlabel="baseline's steps / ours, to its final quality", ylabel="sources")
    speed_up_axes.yaxis.get_major_locator().set_params(integer=True)
    return figure
