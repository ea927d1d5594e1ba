"""Speed-up of a run over a baseline in steps, for every source of their mixture.

Speed-up as in the paper (Section 4.3, footnote 9): the baseline's steps to its final quality,
divided by the run's steps to the same quality. Quality is the negative log perplexity of validation
text, in nats per target token. mSwitch-Base against mT5-Base: 5× in the mean, at least 4× for 91 %
of 101 languages.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from switch_jax.analysis.learning_curves import SpeedUp, speed_up
from switch_jax.checkpoint import QUALITY
from switch_jax.errors import UserError

Lines = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl, by increasing step
SourceCurve = Sequence[tuple[int, float]]  # step, quality


class Comparison(NamedTuple):
    """Comparison of a run with a baseline."""

    baseline_steps: int  # until the baseline's last evaluation
    steps: int  # until the run's last evaluation
    mixture: SpeedUp  # of all sources together
    sources: dict[str, SpeedUp]  # by decreasing speed-up; last, sources without a speed-up


def common_sources(baseline: Lines, ours: Lines) -> list[str]:
    """Returns the names of the sources that both runs have evaluated, sorted."""
    names = [{name for line in lines for name in _sources(line)} for lines in (baseline, ours)]
    return sorted(names[0] & names[1])


def compare_sources(baseline: Lines, ours: Lines) -> Comparison:
    """Compares two runs, which must have the same vocabulary and validation text.

    Raises `UserError` if a run has no evaluation, or if the two runs share no source.
    """
    baseline_curve, curve = _curve(baseline, QUALITY), _curve(ours, QUALITY)
    named = {"The baseline": baseline_curve, "The run to compare with it": curve}
    for run, evaluations in named.items():
        if not evaluations:
            raise UserError(f"{run} has no evaluation yet; train it on (train.eval_every).")
    names = common_sources(baseline, ours)
    if not names:
        raise UserError("The runs share no source; compare runs of the same data.mixture.")
    keys = {name: f"{name}/{QUALITY}" for name in names}
    sources = {n: _speed_up(_curve(baseline, key), _curve(ours, key)) for n, key in keys.items()}
    return Comparison(
        baseline_steps=baseline_curve[-1][0],
        steps=curve[-1][0],
        mixture=_speed_up(baseline_curve, curve),
        sources=dict(sorted(sources.items(), key=lambda item: -(item[1].ratio or 0))),
    )


def comparison_to_json(comparison: Comparison) -> dict[str, Any]:
    """Returns the comparison as JSON values, with the statistics that the paper reports.

    `speed_up_mean` is over the sources that reach the baseline's quality (None if there are none),
    `share_at_least_4` over all sources.
    """

    def row_to_json(row: SpeedUp) -> dict[str, Any]:
        return {**row._asdict(), "speed_up": row.ratio}

    rows = comparison.sources
    ratios = [row.ratio for row in rows.values() if row.ratio is not None]
    return {
        "baseline_steps": comparison.baseline_steps,
        "steps": comparison.steps,
        "speed_up_mean": statistics.fmean(ratios) if ratios else None,
        "share_at_least_4": sum(ratio >= 4 for ratio in ratios) / len(rows),
        "improved": sum(row.quality > row.baseline_quality for row in rows.values()),
        "not_reached": len(rows) - len(ratios),
        "mixture": row_to_json(comparison.mixture),
        "sources": {name: row_to_json(row) for name, row in rows.items()},
    }


def speedup_table(comparison: Comparison, baseline: str, ours: str) -> str:
    """Returns the comparison as a table of aligned text.

    Args:
      baseline: name of the first run.
      ours: name of the second run.
    """
    statistics_json = comparison_to_json(comparison)
    rows = {**comparison.sources, "whole mixture": comparison.mixture}
    width = max(map(len, rows))
    lines = [
        f"{ours} ({comparison.steps:,} steps) against the baseline"
        f" {baseline} ({comparison.baseline_steps:,} steps)",
        "",
        f"{'':{width}}{'final neg. log perplexity':>28}{'steps to that of baseline':>28}",
        f"{'':{width}}" + f"{'baseline':>16}{'ours':>12}" * 2 + f"{'speed-up':>12}",
    ]
    for name, row in rows.items():
        reached = f"{'never':>12}"  # steps to the baseline's quality, and the speed-up
        if row.x is not None:
            ratio = f"{'≥ ' if row.at_least else ''}{row.ratio:.2f}×"
            reached = f"{row.x:>12,.0f}{ratio:>12}"
        qualities = f"{row.baseline_quality:>16.4f}{row.quality:>12.4f}"
        lines.append(f"{name:{width}}{qualities}{row.baseline_x:>16,.0f}{reached}")
    mean, never = statistics_json["speed_up_mean"], statistics_json["not_reached"]
    at_least_4 = statistics_json["share_at_least_4"]
    lines += [
        "",
        f"{len(comparison.sources)} sources: {statistics_json['improved']} better in the end,"
        f" {never or 'none'} never as good as the baseline's end",
        f"speed-up: {'–' if mean is None else f'{mean:.2f}×'} in the mean"
        f"{' of the others' if never else ''}, at least 4× for {at_least_4:.0%}"
        f"{' of all' if never else ''}",
    ]
    if any(row.at_least for row in rows.values()):
        lines.append("≥: as good at our first evaluation already")
    return "\n".join(lines)


def _sources(line: Mapping[str, Any]) -> list[str]:
    """Returns the names of the sources that a line evaluates."""
    if line["split"] != "eval":
        return []
    suffix = f"/{QUALITY}"  # only metrics of sources have this suffix
    names = [key for key, value in line.items() if key.endswith(suffix) and value is not None]
    return [name.removesuffix(suffix) for name in names]


def _curve(lines: Lines, key: str) -> SourceCurve:
    """Returns quality by step, without evaluations that are not finite."""
    points = [(line["step"], line.get(key)) for line in lines if line["split"] == "eval"]
    return [(step, quality) for step, quality in points if quality is not None]


def _speed_up(baseline: SourceCurve, ours: SourceCurve) -> SpeedUp:
    result = speed_up(baseline, ours)
    assert result is not None
    return result
