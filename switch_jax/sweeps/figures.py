"""The figures of a sweep, as PNG and as SVG; Matplotlib is imported when one is drawn."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from switch_jax.analysis import (
    PowerLaw,
    draw_source_losses,
    import_matplotlib,
    mean_spread,
    new_figure,
)
from switch_jax.checkpoint import QUALITY
from switch_jax.sweeps.paper_numbers import PAPER_SERIES
from switch_jax.sweeps.spec import Curves, Figure, Scaling, Sources, Sweep, Table, Transfer
from switch_jax.sweeps.summary import Results, scaling_points, transfer_points

# Okabe and Ito's colours, which colour-blind people tell apart; beyond them markers differ too.
COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#8c8c8c")
_MARKERS = "osD^vP*X"
_HOUR = 3600.0
_QUALITY_LABEL = "neg. log perplexity (nats)"
_AXES = {
    "steps": "training step",
    "seconds": "seconds of train steps",
    "params": "parameters",
    "experts": "experts",
}


def draw_figures(
    made: Sweep, results: Results, numbers: Mapping[str, Any], folder: Path
) -> list[Path]:
    """Draws every table and figure of a sweep that has something to show.

    Args:
      numbers: what `summary.summarise` made of the same.

    Returns the files written. Raises `UserError` where Matplotlib is not installed.
    """
    figures = {}
    for place, figure in made.figures.items():
        if (drawn := _draw(figure, results, numbers["figures"][place])) is not None:
            figures[place] = drawn
    for place, table in made.tables.items():
        if place not in figures and (drawn := _dots(table, results)) is not None:
            figures[place] = drawn
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # Text stays text, and equal figures are equal files.
    with import_matplotlib().rc_context({"svg.fonttype": "none", "svg.hashsalt": "switch_jax"}):
        for place, drawn in figures.items():
            for suffix, settings in (("png", {"dpi": 144}), ("svg", {"metadata": {"Date": None}})):
                written.append(folder / f"{place}.{suffix}")
                drawn.savefig(written[-1], bbox_inches="tight", **settings)
    return written


def _draw(figure: Figure, results: Results, numbers: Mapping[str, Any]) -> Any:
    """A Matplotlib figure, None where no run has anything to show."""
    if isinstance(figure, Curves):
        return _curves(figure, results)
    if isinstance(figure, Scaling):
        return _scaling(figure, results, numbers["power_laws"])
    if isinstance(figure, Transfer):
        return _transfer(figure, results)
    assert isinstance(figure, Sources)
    return _sources(figure, results)


def _style(number: int) -> dict[str, Any]:
    marker = _MARKERS[number // len(COLOURS) % len(_MARKERS)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker}


def _curves(figure: Curves, results: Results) -> Any:
    """Every seed thin, their mean thick, and the end of the first run as a line."""
    drawn = new_figure(1, 1, (6.4, 4.4))
    axes = drawn.axes[0]
    goals, ends, longest = [], [], 0.0
    for number, (label, name) in enumerate(figure.runs.items()):
        found = [o.curve(QUALITY, figure.x) for o in results[name] if o is not None]
        found = [curve for curve in found if curve]
        if not found:
            continue
        colour = COLOURS[number % len(COLOURS)]
        for curve in found:
            axes.plot(*zip(*curve), color=colour, lw=0.8, alpha=0.35)
        most = max(map(len, found))  # of those that did not diverge
        x, quality = np.mean([curve for curve in found if len(curve) == most], axis=0).T
        axes.plot(x, quality, lw=1.8, ms=3, label=label, **_style(number))
        longest = max(longest, x[-1])
        ends += [y for curve in found for _, y in curve[len(curve) // 4 :]]
        if number == 0:
            goals = [quality[-1]]
    if not ends:
        return None
    for goal in goals:
        axes.axhline(goal, color="0.5", lw=0.8, ls=":")
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)  # the first quarter falls off the page
    axes.set(xlabel=_AXES[figure.x], ylabel=_QUALITY_LABEL)
    if figure.x == "steps":
        tokens = max(o.tokens_per_step for name in figure.runs.values() for o in results[name] if o)
        scale = (lambda steps: steps * tokens, lambda seen: seen / tokens)
        above = axes.secondary_xaxis("top", functions=scale)
        above.set_xlabel("target tokens")
        above.xaxis.set_major_formatter(import_matplotlib().ticker.EngFormatter(sep=""))
    if figure.x == "seconds" and longest > 2 * _HOUR:
        axes.set_xlabel("hours of train steps")
        axes.xaxis.set_major_locator(import_matplotlib().ticker.MultipleLocator(_hours(longest)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / _HOUR:g}")
    axes.legend(frameon=False, fontsize=8)
    return drawn


def _hours(longest: float) -> float:
    """Seconds between ticks, a round number of hours, for about six of them."""
    steps = [n * 10**power for power in range(6) for n in (1, 2, 5)]
    return _HOUR * next(n for n in steps if 6 * n * _HOUR >= longest)


def _scaling(figure: Scaling, results: Results, laws: Mapping[str, Any]) -> Any:
    """Ours alone and, where the paper has points, beside those on the same axes."""
    found = scaling_points(figure, results)
    if not found:
        return None
    series = {"ours": found}
    if figure.published:
        published = PAPER_SERIES[figure.published]
        series[published.source] = [(getattr(p, figure.x), p.loss) for p in published.points]
    drawn = new_figure(1, len(series), (5.4 * len(series), 4.2))
    for last, axes in enumerate(drawn.axes):
        for number, (label, of) in enumerate(list(series.items())[: last + 1]):
            x, loss = np.array(of).T
            colour = COLOURS[(5, 4)[number]]
            axes.plot(x, loss, "os"[number], ms=5, color=colour, label=label)
            if laws[label] is not None:
                law = PowerLaw(**laws[label])
                line = np.geomspace(x.min(), x.max())
                low, high = law.exponent_interval
                text = f"$\\propto x^{{{law.exponent:.3f}}}$ (95 %: {low:.3f} … {high:.3f})"
                axes.plot(line, law(line), color=colour, lw=1, label=text)
        axes.set(xscale="log", yscale="log", xlabel=_AXES[figure.x], ylabel="loss (nats)")
        axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.legend(frameon=False, fontsize=8)
    return drawn


def _transfer(figure: Transfer, results: Results) -> Any:
    found = transfer_points(figure, results)
    if not any(found.values()):
        return None
    drawn = new_figure(1, 1, (6.4, 4.4))
    axes = drawn.axes[0]
    for number, (label, of) in enumerate(found.items()):
        if of:
            axes.plot(*zip(*sorted(of)), lw=1, ms=5, label=label, **_style(number))
    axes.set(xlabel=f"upstream: {_QUALITY_LABEL}", ylabel=f"downstream: {figure.metric}")
    axes.legend(frameon=False, fontsize=8)
    return drawn


def _sources(figure: Sources, results: Results) -> Any:
    """The first seed that both have; the others are in the summary."""
    pairs = zip(results[figure.baseline], results[figure.run])
    both = next(((a, b) for a, b in pairs if a is not None and b is not None), None)
    if both is None:
        return None
    lines = (list(map(dict, outcome.evaluations)) for outcome in both)
    return draw_source_losses(dict(zip((figure.baseline, figure.run), lines)))


def _dots(table: Table, results: Results) -> Any:
    """Every seed of every row as a dot, the mean as a bar."""
    drawn = new_figure(1, 1, (6.4, 0.35 * len(table.rows) + 1.3))
    axes = drawn.axes[0]
    shown = False
    for number, name in enumerate(table.rows.values()):
        values = [None if o is None else o.quality(table.metric) for o in results[name]]
        spread = mean_spread(values)
        if spread.mean is not None:
            shown = True
            finite = [value for value in values if value is not None and math.isfinite(value)]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(finite, [number] * len(finite), "o", ms=4, color=colour)
            axes.plot([spread.mean], [number], "|", ms=14, color=colour)
    axes.set_yticks(range(len(table.rows)), table.rows)
    axes.set_ylim(len(table.rows) - 0.5, -0.5)
    axes.set_xlabel(_QUALITY_LABEL if table.metric == QUALITY else table.metric)
    return drawn if shown else None
