"""Figures of a sweep, as PNG and as SVG; Matplotlib is imported when one is drawn."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from switch_jax.analysis import (
    PowerLaw,
    draw_source_losses,
    import_matplotlib,
    literal_text,
    mean_spread,
    new_figure,
)
from switch_jax.checkpoint import QUALITY
from switch_jax.sweeps.spec import (
    Advantage,
    Curves,
    Figure,
    Scaling,
    Sources,
    Sweep,
    Table,
    Transfer,
)
from switch_jax.sweeps.summary import Points, Results, scaling_points, transfer_points

# Okabe and Ito's palette, which is safe for colour-blind readers. Series beyond its length repeat
# the colours with another marker.
COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#8c8c8c")
_MARKERS = "osD^vP*X"
_HOUR = 3600.0  # seconds
_QUALITY_LABEL = "neg. log perplexity (nats)"
_X_LABELS = {
    "steps": "training step",
    "seconds": "seconds of train steps",
    "params": "parameters",
    "experts": "experts",
}


def draw_figures(
    sweep: Sweep, results: Results, summary: Mapping[str, Any], folder: Path
) -> list[Path]:
    """Draws every table and figure of a sweep that has data, into `folder`.

    Args:
      summary: from `summarise_sweep`, of the same results.

    Returns the files written. Raises `UserError` if Matplotlib is not installed.
    """
    drawings = {}
    for name, figure in sweep.figures.items():
        if (drawing := _draw(figure, results, summary["figures"][name])) is not None:
            drawings[name] = drawing
    for name, table in sweep.tables.items():
        if name not in drawings and (drawing := _draw_table(table, results)) is not None:
            drawings[name] = drawing
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # SVG files keep text as text, and equal figures give equal files.
    with import_matplotlib().rc_context({"svg.fonttype": "none", "svg.hashsalt": "switch_jax"}):
        for name, drawing in drawings.items():
            for suffix, settings in (("png", {"dpi": 144}), ("svg", {"metadata": {"Date": None}})):
                written.append(folder / f"{name}.{suffix}")
                drawing.savefig(written[-1], bbox_inches="tight", **settings)
    return written


def _draw(figure: Figure, results: Results, summary: Mapping[str, Any]) -> Any:
    """Returns a Matplotlib figure, None if no run has data for it."""
    if isinstance(figure, Curves):
        return _draw_curves(figure, results)
    if isinstance(figure, Scaling):
        return _draw_scaling(figure, results, summary["power_laws"])
    if isinstance(figure, Advantage):
        return _draw_advantage(summary["advantage"])
    if isinstance(figure, Transfer):
        return _draw_transfer(figure, results)
    assert isinstance(figure, Sources)
    return _draw_sources(figure, results)


def _series_style(index: int) -> dict[str, Any]:
    marker = _MARKERS[index // len(COLOURS) % len(_MARKERS)]
    return {"color": COLOURS[index % len(COLOURS)], "marker": marker}


def _draw_seeds(axes: Any, curves: list[Points], label: str, index: int) -> np.ndarray:
    """Draws one run: the curves of its seeds (thin) and their mean (thick).

    Returns x and y of the mean, [2, points].
    """
    style = _series_style(index)
    for curve in curves:
        axes.plot(*zip(*curve), color=style["color"], lw=0.8, alpha=0.35)
    length = max(map(len, curves))  # curves of seeds that diverged are shorter
    mean = np.mean([curve for curve in curves if len(curve) == length], axis=0).T
    axes.plot(*mean, lw=1.8, ms=3, label=literal_text(label), **style)
    return mean


def _draw_curves(figure: Curves, results: Results) -> Any:
    """Draws seeds (thin), means of runs (thick) and the first run's final quality (horizontal)."""
    drawing = new_figure(1, 1, (6.4, 4.4))
    axes = drawing.axes[0]
    goals, late_qualities, largest_x = [], [], 0.0
    for index, (label, name) in enumerate(figure.runs.items()):
        curves = [r.curve(QUALITY, figure.x) for r in results[name] if r is not None]
        curves = [curve for curve in curves if curve]
        if not curves:
            continue
        x, quality = _draw_seeds(axes, curves, label, index)
        largest_x = max(largest_x, x[-1])
        late_qualities += [y for curve in curves for _, y in curve[len(curve) // 4 :]]
        if index == 0:
            goals = [quality[-1]]
    if not late_qualities:
        return None
    for goal in goals:
        axes.axhline(goal, color="0.5", lw=0.8, ls=":")
    low, high = min(late_qualities), max(late_qualities)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)  # cuts off the first quarter of the curves
    axes.set(xlabel=_X_LABELS[figure.x], ylabel=_QUALITY_LABEL)
    if figure.x == "steps":
        tokens = max(r.tokens_per_step for name in figure.runs.values() for r in results[name] if r)
        scale = (lambda steps: steps * tokens, lambda targets: targets / tokens)
        top_axis = axes.secondary_xaxis("top", functions=scale)
        top_axis.set_xlabel("target tokens")
        top_axis.xaxis.set_major_formatter(import_matplotlib().ticker.EngFormatter(sep=""))
    if figure.x == "seconds" and largest_x > 2 * _HOUR:
        axes.set_xlabel("hours of train steps")
        ticks = import_matplotlib().ticker.MultipleLocator(_tick_distance(largest_x))
        axes.xaxis.set_major_locator(ticks)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / _HOUR:g}")
    axes.legend(frameon=False, fontsize=8)
    return drawing


def _tick_distance(seconds: float) -> float:
    """Returns the seconds between ticks of a time axis: round hours, for about six ticks."""
    hours = [n * 10**power for power in range(6) for n in (1, 2, 5)]
    return _HOUR * next(n for n in hours if 6 * n * _HOUR >= seconds)


def _draw_scaling(figure: Scaling, results: Results, power_laws: Mapping[str, Any]) -> Any:
    """Draws our points alone and, if the paper has points, a second panel with both."""
    points = scaling_points(figure, results)
    if not points:
        return None
    series = {"ours": points}
    if figure.published:
        published = figure.published.points
        series[figure.published.source] = [(getattr(p, figure.x), p.loss) for p in published]
    drawing = new_figure(1, len(series), (5.4 * len(series), 4.2))
    for panel, axes in enumerate(drawing.axes):
        for index, (label, series_points) in enumerate(list(series.items())[: panel + 1]):
            x, loss = np.array(series_points).T
            colour = COLOURS[(5, 4)[index]]
            axes.plot(x, loss, "os"[index], ms=5, color=colour, label=literal_text(label))
            if power_laws[label] is not None:
                law = PowerLaw(**power_laws[label])
                line_x = np.geomspace(x.min(), x.max())
                low, high = law.exponent_interval
                text = f"$\\propto x^{{{law.exponent:.3f}}}$ (95 %: {low:.3f} … {high:.3f})"
                axes.plot(line_x, law(line_x), color=colour, lw=1, label=text)
        axes.set(xscale="log", yscale="log", xlabel=_X_LABELS[figure.x], ylabel="loss (nats)")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.legend(frameon=False, fontsize=8)
    return drawing


def _draw_advantage(curves_by_label: Mapping[str, list[Points]]) -> Any:
    """Draws seeds (thin), means of runs (thick), and the baseline as zero (horizontal)."""
    drawing = new_figure(1, 1, (6.4, 4.4))
    axes = drawing.axes[0]
    has_data = False
    for index, (label, curves) in enumerate(curves_by_label.items(), start=1):
        curves = [curve for curve in curves if curve]
        if not curves:
            continue
        has_data = True
        _draw_seeds(axes, curves, label, index)
    if not has_data:
        return None
    axes.axhline(0, color="0.5", lw=0.8, ls=":")
    axes.set(
        xscale="log", xlabel="tokens of the encoder per expert", ylabel=f"gain in {_QUALITY_LABEL}"
    )
    axes.legend(frameon=False, fontsize=8)
    return drawing


def _draw_transfer(figure: Transfer, results: Results) -> Any:
    """Draws a line for each series: downstream score against upstream quality."""
    series = transfer_points(figure, results)
    if not any(series.values()):
        return None
    drawing = new_figure(1, 1, (6.4, 4.4))
    axes = drawing.axes[0]
    for index, (label, points) in enumerate(series.items()):
        if points:
            axes.plot(
                *zip(*sorted(points)), lw=1, ms=5, label=literal_text(label), **_series_style(index)
            )
    axes.set(
        xlabel=f"upstream: {_QUALITY_LABEL}", ylabel=f"downstream: {literal_text(figure.metric)}"
    )
    axes.legend(frameon=False, fontsize=8)
    return drawing


def _draw_sources(figure: Sources, results: Results) -> Any:
    """Draws the first seed that has results of both runs; the summary has every seed."""
    seeds = zip(results[figure.baseline], results[figure.run])
    pair = next(((a, b) for a, b in seeds if a and b and a.evaluations and b.evaluations), None)
    if pair is None:
        return None
    lines = (list(map(dict, result.evaluations)) for result in pair)
    return draw_source_losses(dict(zip((figure.baseline, figure.run), lines)))


def _draw_table(table: Table, results: Results) -> Any:
    """Draws a table as a dot for every seed of every row, and a bar at the mean of the row."""
    drawing = new_figure(1, 1, (6.4, 0.35 * len(table.rows) + 1.3))
    axes = drawing.axes[0]
    has_data = False
    for index, name in enumerate(table.rows.values()):
        values = [None if r is None else r.quality(table.metric) for r in results[name]]
        spread = mean_spread(values)
        if spread.mean is not None:
            has_data = True
            finite = [value for value in values if value is not None and math.isfinite(value)]
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(finite, [index] * len(finite), "o", ms=4, color=colour)
            axes.plot([spread.mean], [index], "|", ms=14, color=colour)
    axes.set_yticks(range(len(table.rows)), map(literal_text, table.rows))
    axes.set_ylim(len(table.rows) - 0.5, -0.5)
    axes.set_xlabel(_QUALITY_LABEL if table.metric == QUALITY else literal_text(table.metric))
    return drawing if has_data else None
