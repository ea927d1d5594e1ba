"""How many times fewer steps a run needs than a baseline, for every source of their mixture.

Speed-up as in the paper (Section 4.3, footnote 9): the baseline's steps to its final quality over
our steps to the same. Quality is the negative log perplexity of validation text, in nats a target
token. mSwitch-Base against mT5-Base: 5× in the mean, at least 4× for 91 % of 101 languages.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from switch_jax.analysis.learning_curves import SpeedUp, speed_up
from switch_jax.checkpoint import QUALITY
from switch_jax.errors import UserError

Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl, in the order of their steps
SourceCurve = Sequence[tuple[int, float]]  # step, quality


class Comparison(NamedTuple):
    """What `compare` found."""

    baseline_steps: int  # until its last evaluation
    steps: int  # until ours
    mixture: SpeedUp
    sources: dict[str, SpeedUp]  # fastest first, at the end those that never get there


def common_sources(baseline: Lines, ours: Lines) -> list[str]:
    """Sources that both runs have evaluated, by name."""
    names = [{name for line in lines for name in _sources(line)} for lines in (baseline, ours)]
    return sorted(names[0] & names[1])


def compare_sources(baseline: Lines, ours: Lines) -> Comparison:
    """Compares two runs; it means something only with the same vocabulary and validation text.

    Raises `UserError` where a run has no evaluation, or the two share no source.
    """
    theirs, curve = _curve(baseline, QUALITY), _curve(ours, QUALITY)
    for run, evaluations in (("The baseline", theirs), ("The run to compare with it", curve)):
        if not evaluations:
            raise UserError(f"{run} has no evaluation yet; train it on (train.eval_every).")
    names = common_sources(baseline, ours)
    if not names:
        raise UserError("The runs share no source; compare runs of the same data.mixture.")
    keys = {name: f"{name}/{QUALITY}" for name in names}
    found = {n: _speed_up(_curve(baseline, key), _curve(ours, key)) for n, key in keys.items()}
    fastest_first = sorted(found.items(), key=lambda item: -(item[1].ratio or 0))
    return Comparison(theirs[-1][0], curve[-1][0], _speed_up(theirs, curve), dict(fastest_first))


def comparison_to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison with what the paper tells of it.

    The mean is of the sources that get there (None: none does), the share of all.
    """

    def row(one: SpeedUp) -> dict[str, Any]:
        return {**one._asdict(), "speed_up": one.ratio}

    rows = comparison.sources
    ratios = [one.ratio for one in rows.values() if one.ratio is not None]
    return {
        "baseline_steps": comparison.baseline_steps,
        "steps": comparison.steps,
        "speed_up_mean": statistics.fmean(ratios) if ratios else None,
        "share_at_least_4": sum(ratio >= 4 for ratio in ratios) / len(rows),
        "improved": sum(one.quality > one.baseline_quality for one in rows.values()),
        "not_reached": len(rows) - len(ratios),
        "mixture": row(comparison.mixture),
        "sources": {name: row(one) for name, one in rows.items()},
    }


def speedup_table(comparison: Comparison, baseline: str, ours: str) -> str:
    """The comparison of two runs so called, as a table for people."""
    result, rows = (
        comparison_to_json(comparison),
        {**comparison.sources, "whole mixture": comparison.mixture},
    )
    width = max(map(len, rows))
    lines = [
        f"{ours} ({comparison.steps:,} steps) against the baseline"
        f" {baseline} ({comparison.baseline_steps:,} steps)",
        "",
        f"{'':{width}}{'final neg. log perplexity':>28}{'steps to that of baseline':>28}",
        f"{'':{width}}" + f"{'baseline':>16}{'ours':>12}" * 2 + f"{'speed-up':>12}",
    ]
    for name, row in rows.items():
        reached = f"{'never':>12}"
        if row.x is not None:
            speed_up = f"{'≥ ' if row.at_least else ''}{row.ratio:.2f}×"
            reached = f"{row.x:>12,.0f}{speed_up:>12}"
        qualities = f"{row.baseline_quality:>16.4f}{row.quality:>12.4f}"
        lines.append(f"{name:{width}}{qualities}{row.baseline_x:>16,.0f}{reached}")
    mean, never = result["speed_up_mean"], result["not_reached"]
    lines += [
        "",
        f"{len(comparison.sources)} sources: {result['improved']} better in the end,"
        f" {never or 'none'} never as good as the baseline's end",
        f"speed-up: {'–' if mean is None else f'{mean:.2f}×'} in the mean"
        f"{' of the others' if never else ''}, at least 4× for {result['share_at_least_4']:.0%}"
        f"{' of all' if never else ''}",
    ]
    if any(row.at_least for row in rows.values()):
        lines.append("≥: as good at our first evaluation already")
    return "\n".join(lines)


def _sources(line: Mapping[str, Any]) -> list[str]:
    if line["split"] != "eval":
        return []
    suffix = f"/{QUALITY}"  # no metric of a router ends so
    names = [key for key, value in line.items() if key.endswith(suffix) and value is not None]
    return [name.removesuffix(suffix) for name in names]


def _curve(lines: Lines, key: str) -> SourceCurve:
    """Quality by step, without evaluations that were not finite."""
    points = [(line["step"], line.get(key)) for line in lines if line["split"] == "eval"]
    return [(step, quality) for step, quality in points if quality is not None]


def _speed_up(baseline: SourceCurve, ours: SourceCurve) -> SpeedUp:
    found = speed_up(baseline, ours)
    assert found is not None
    return found
