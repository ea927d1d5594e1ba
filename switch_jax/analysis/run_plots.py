"""Figures from the metrics of one or more runs; Matplotlib is imported when one is drawn."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from switch_jax.analysis.plotting import new_figure
from switch_jax.analysis.speedup import common_sources, compare_sources, comparison_to_json
from switch_jax.checkpoint import Workdir, read_metrics
from switch_jax.errors import UserError

# What the router figure shows, with the value that perfect balance would give.
_ROUTER = (
    ("load_max", "busiest expert's load\n(1 = fair share)", 1.0),
    ("load_min", "idlest expert's load\n(1 = fair share)", 1.0),
    ("load_cv", "spread of loads\n(coefficient of variation)", 0.0),
    ("dropped_fraction", "dropped tokens", 0.0),
    ("entropy", "entropy of the router (nats)", None),
)

# How many sources stand below one another in a figure, at the most.
_SOURCES_BELOW = 36

# How many panels of tasks stand beside one another.
_TASKS_BESIDE = 4


def draw_run_plots(workdirs: Sequence[Workdir], folder: Path) -> list[Path]:
    """Draws `loss.png`, `router.png` where there are experts, and `tasks.png` where tasks were
    scored, into `folder`.

    Of two runs, the first is the baseline of `sources.png` where they share several sources.
    Returns the files written. Raises `UserError` where a run has no metrics, or Matplotlib
    is not installed.
    """
    runs = {}
    for workdir in workdirs:
        lines = read_metrics(workdir)
        if not lines:
            raise UserError(f"{workdir.path} has no metrics.jsonl yet; train it first.")
        name = workdir.path.resolve().name
        runs[str(workdir.path) if name in runs else name] = lines
    figures = {"loss.png": _loss(runs)}
    if any(name.startswith("router/") for lines in runs.values() for name in lines[0]):
        figures["router.png"] = _router(runs)
    if len(runs) == 2 and len(common_sources(*runs.values())) > 1:
        figures["sources.png"] = draw_source_losses(runs)
    if scores := _scores(runs):
        figures["tasks.png"] = _tasks(runs, scores)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=144)
        written.append(folder / name)
    return written


def _series(lines: list[dict], split: str, name: str) -> tuple[list[int], list[float]]:
    points = [
        (m["step"], m[name]) for m in lines if m["split"] == split and m.get(name) is not None
    ]
    return [step for step, _ in points], [value for _, value in points]


def _loss(runs: dict[str, list[dict]]) -> Any:
    figure = new_figure(1, 2, (10, 4))
    by_step, by_tokens = figure.axes
    for number, (run, lines) in enumerate(runs.items()):
        steps, loss = _series(lines, "train", "cross_entropy")
        colour = f"C{number}"
        by_step.plot(steps, loss, color=colour, alpha=0.35, lw=1, label=f"{run}, training")
        steps, loss = _series(lines, "eval", "cross_entropy")
        by_step.plot(steps, loss, color=colour, marker="o", ms=3, label=f"{run}, validation")
        by_tokens.plot(
            _series(lines, "train", "tokens")[1],
            _series(lines, "train", "accuracy")[1],
            color=colour,
            lw=1,
            label=run,
        )
    by_step.set(xlabel="step", ylabel="cross-entropy (nats per target token)", title="Loss")
    by_tokens.set(xlabel="target tokens", ylabel="share of targets predicted", title="Accuracy")
    for axes in figure.axes:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _router(runs: dict[str, list[dict]]) -> Any:
    figure = new_figure(1, len(_ROUTER), (4 * len(_ROUTER), 4))
    for axes, (name, label, ideal) in zip(figure.axes, _ROUTER):
        if ideal is not None:
            axes.axhline(ideal, color="black", lw=0.8, ls=":")
        for number, (run, lines) in enumerate(runs.items()):
            several = len(runs) > 1
            if not several:
                for key in sorted(lines[0]):
                    place = re.fullmatch(rf"router/((\w+)/\d+(/attention)?)/{name}", key)
                    if place:
                        style = {
                            "ls": "-" if place[2] == "encoder" else "--",
                            "lw": 1,
                            "alpha": 0.6,
                        }
                        axes.plot(*_series(lines, "train", key), label=place[1], **style)
            axes.plot(
                *_series(lines, "train", f"router/{name}"),
                color=f"C{number}" if several else "black",
                lw=2,
                label=run if several else "mean",
            )
        axes.set(xlabel="step", title=label)
    figure.axes[-1].legend(frameon=False, fontsize=8)
    return figure


def _scores(runs: dict[str, list[dict]]) -> list[str]:
    """The metrics that are numbers of tasks and, of several, that of their mixture."""
    names = {name for lines in runs.values() for metrics in lines for name in metrics}
    of_tasks = sorted(name for name in names if name.endswith("/score"))
    return (["average"] if "average" in names and len(of_tasks) > 1 else []) + of_tasks


def _tasks(runs: dict[str, list[dict]], scores: list[str]) -> Any:
    """What tasks were scored with, a panel each; the best of every run is marked."""
    columns = min(len(scores), _TASKS_BESIDE)
    rows = -(-len(scores) // columns)
    figure = new_figure(rows, columns, (3.6 * columns + 1.2, 3.2 * rows))
    for axes, score in zip(figure.axes, scores):
        for number, (run, lines) in enumerate(runs.items()):
            steps, values = _series(lines, "eval", score)
            axes.plot(steps, values, color=f"C{number}", marker="o", ms=3, label=run)
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
        axes.set(xlabel="step", title=score.removesuffix("/score"))
    for axes in figure.axes[len(scores) :]:
        axes.remove()
    figure.axes[0].set_ylabel("score")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def draw_source_losses(runs: dict[str, list[dict]]) -> Any:
    """Quality of two runs by source, and the second's speed-ups (as paper, Figs 7 and 8).

    `runs` are their lines of metrics.jsonl by name, the baseline first.
    """
    comparison = compare_sources(*runs.values())
    rows = comparison.sources
    ordered = sorted(rows, key=lambda name: rows[name].baseline_quality, reverse=True)
    panels = -(-len(ordered) // _SOURCES_BELOW)
    height = -(-len(ordered) // panels)
    widths = [3.0 if panels > 1 else 4.5] * panels + [4.0]
    size = (sum(widths), max(3.6, 0.16 * height + 1.4))
    figure = new_figure(1, panels + 1, size, width_ratios=widths)
    *left, right = figure.axes
    for number, axes in enumerate(left):
        axes.sharex(left[0])
        names = ordered[number * height : (number + 1) * height]
        qualities = [[rows[n].baseline_quality for n in names], [rows[n].quality for n in names]]
        places = range(len(names))
        axes.hlines(places, *qualities, color="0.8", lw=2, zorder=2)
        for run, role, quality in zip(runs, (" (baseline)", ""), qualities):
            axes.plot(quality, places, "o", ms=4, label=run + role)
        axes.set_yticks(places, names, fontsize=7 if panels > 1 else 9)
        axes.tick_params("y", length=0)
        # The last panel is as high, though it may have fewer sources.
        axes.set(xlabel="neg. log perplexity (nats)", ylim=(height - 0.4, -0.6))
    left[0].set_title("Quality at the end", loc="left")
    figure.legend(handles=left[0].lines, loc="outside upper left", ncols=2, frameon=False)
    ratios = [row.ratio for row in rows.values() if row.ratio is not None]
    if ratios:
        right.hist(ratios, bins="sqrt", color="C1", edgecolor="white", zorder=2)
        mean = comparison_to_json(comparison)["speed_up_mean"]
        line = right.axvline(mean, color="black", ls="--", label=f"mean {mean:.1f}×")
        figure.legend(handles=[line], loc="outside upper right", frameon=False)
    right.set_title(f"Speed-up ({len(ratios)} of {len(rows)} get there)", loc="left")
    right.set(xlabel="baseline's steps / ours, to its final quality", ylabel="sources")
    right.yaxis.get_major_locator().set_params(integer=True)
    return figure
