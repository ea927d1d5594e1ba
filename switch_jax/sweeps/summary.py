"""What a sweep shows, as JSON values: every run, and its tables and figures in numbers.

Differences and speed-ups are of runs with the same seed; a spread is over the seeds that are
finished, of which some may have diverged, or never reach what others do.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from switch_jax.analysis import (
    SpeedUp,
    compare_sources,
    comparison_to_json,
    mean_spread,
    power_law,
    speed_up,
    value_at,
)
from switch_jax.checkpoint import QUALITY
from switch_jax.model import CONVENTIONS
from switch_jax.sweeps.paper_numbers import PAPER_SERIES
from switch_jax.sweeps.results import RunResult
from switch_jax.sweeps.spec import Curves, Figure, Scaling, Sources, Sweep, Table, Transfer

Outcomes = Sequence[RunResult | None]  # of a run, by seed; None: not finished
Results = Mapping[str, Outcomes]  # by name of the run
Values = list[float | None]


def summarise(made: Sweep, results: Results) -> dict[str, Any]:
    """A sweep in numbers, of the runs that are finished."""
    devices = {o.devices for outcomes in results.values() for o in outcomes if o and o.devices}
    figures = {
        place: {"title": figure.title, "claim": figure.claim, **_figure(figure, results)}
        for place, figure in made.figures.items()
    }
    return {
        "title": made.title,
        "seeds": list(made.seeds),
        "devices": sorted(devices),
        "flops_convention": CONVENTIONS["flops_per_sequence"],
        "runs": {name: _run(made.seeds, outcomes) for name, outcomes in results.items()},
        "tables": {place: _table(table, results) for place, table in made.tables.items()},
        "figures": figures,
    }


def _run(seeds: Sequence[int], outcomes: Outcomes) -> dict[str, Any]:
    """What each seed came to, and what they have in common."""
    known = {seed: outcome for seed, outcome in zip(seeds, outcomes) if outcome is not None}
    common = {}
    if known:
        one = next(iter(known.values()))
        common = {
            "params": one.params,
            "flops_per_sequence": one.flops_per_sequence,
            "train_flops": one.step_flops * one.steps,
            "steps": one.steps,
            "tokens": one.tokens_per_step * one.steps,
        }
    return common | {
        "seeds": {
            str(seed): {
                "step_seconds": outcome.step_seconds,
                "dropped": outcome.dropped,
                "evaluations": list(outcome.evaluations),
            }
            for seed, outcome in known.items()
        }
    }


def _table(table: Table, results: Results) -> dict[str, Any]:
    names = list(table.rows.values())
    first = results[names[0]]
    budgets = {o.step_flops * o.steps for name in names for o in results[name] if o is not None}
    budget = min(budgets, default=0.0)
    rows = {}
    for row, name in table.rows.items():
        outcomes = results[name]
        values: dict[str, Values] = {
            "quality": _each(lambda o: o.quality(table.metric), outcomes),
            "sequences_per_second": _each(lambda o: o.sequences_per_second, outcomes),
            "dropped": _each(lambda o: o.dropped, outcomes),
        }
        if name != names[0]:
            values["gain"] = gains(first, outcomes, table.metric)
        if name != names[0] and table.metric == QUALITY:
            values["speed_up_steps"] = speed_ups(first, outcomes, "steps")
            values["speed_up_seconds"] = speed_ups(first, outcomes, "seconds")
        if table.metric == QUALITY and max(budgets, default=0.0) > 1.05 * budget:
            values["at_equal_flops"] = _each(
                lambda o: value_at(o.curve(QUALITY, "flops"), budget), outcomes
            )
        if row in table.teachers:
            teachers = results[table.teachers[row]]
            values["share_of_gain"] = shares_of_gain(first, outcomes, teachers, table.metric)
            values["compression"] = [
                1 - ours.params / theirs.params for ours, theirs in _finished(outcomes, teachers)
            ]
        rows[row] = {
            "run": name,
            "params": next((o.params for o in outcomes if o is not None), None),
            **{key: _spread(found) for key, found in values.items()},
            "paper": table.paper.get(row),
        }
    return {"title": table.title, "claim": table.claim, "metric": table.metric, "rows": rows}


def _figure(figure: Figure, results: Results) -> dict[str, Any]:
    """The numbers that a figure shows beside its curves and points."""
    if isinstance(figure, Curves):
        baseline, *others = figure.runs
        first = results[figure.runs[baseline]]
        return {
            "x": figure.x,
            "baseline": baseline,
            "speed_up": {
                label: _spread(speed_ups(first, results[figure.runs[label]], figure.x))
                for label in others
            },
        }
    if isinstance(figure, Scaling):
        laws = {"ours": _law(mean_points(scaling_points(figure, results)))}
        if figure.published:
            series = PAPER_SERIES[figure.published]
            laws[series.source] = _law([(getattr(p, figure.x), p.loss) for p in series.points])
        return {"x": figure.x, "power_laws": laws}
    if isinstance(figure, Transfer):
        return {"metric": figure.metric, "points": transfer_points(figure, results)}
    assert isinstance(figure, Sources)
    return _sources(figure, results)


def _sources(figure: Sources, results: Results) -> dict[str, Any]:
    """What the paper tells of its languages, over seeds, and every source of every seed."""
    seeds = [
        comparison_to_json(compare_sources(a.evaluations, b.evaluations))
        for a, b in _finished(results[figure.baseline], results[figure.run])
        if a.quality(QUALITY) is not None and b.quality(QUALITY) is not None
    ]
    figures = ("speed_up_mean", "share_at_least_4", "improved", "not_reached")
    return {
        "baseline": figure.baseline,
        "run": figure.run,
        "sources": len(seeds[0]["sources"]) if seeds else 0,
        **{name: _spread([seed[name] for seed in seeds]) for name in figures},
        "seeds": seeds,
    }


def scaling_points(figure: Scaling, results: Results) -> list[tuple[float, float]]:
    """Size and final loss of every run that is finished and has not diverged."""
    found = []
    for name in figure.runs.values():
        for outcome in results[name]:
            quality = None if outcome is None else outcome.quality(QUALITY)
            if outcome is not None and quality is not None:
                sizes = {
                    "params": outcome.params,
                    "experts": max(outcome.config.moe.num_experts, 1),
                }
                found.append((float(sizes[figure.x]), -quality))
    return found


def mean_points(found: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """One point for each size: seeds of a size are not independent of its lack of fit."""
    sizes = dict.fromkeys(x for x, _ in found)
    return [(x, statistics.fmean(loss for other, loss in found if other == x)) for x in sizes]


def transfer_points(figure: Transfer, results: Results) -> dict[str, list[tuple[float, float]]]:
    """Upstream quality and downstream score of every pair and seed that has both."""
    found: dict[str, list[tuple[float, float]]] = {}
    for label, pairs in figure.pairs.items():
        found[label] = []
        for upstream, downstream in pairs:
            for one, other in zip(results[upstream], results[downstream]):
                quality = None if one is None else one.quality(QUALITY)
                score = None if other is None else other.quality(figure.metric)
                if quality is not None and score is not None:
                    found[label].append((quality, score))
    return found


def gains(baseline: Outcomes, ours: Outcomes, metric: str) -> Values:
    """How much better ours are in the end, by seed."""
    return [_difference(a, b, metric) for a, b in _finished(baseline, ours)]


def shares_of_gain(
    baseline: Outcomes, students: Outcomes, teachers: Outcomes, metric: str
) -> Values:
    """How much of its teacher's gain over the baseline a student has, by seed."""
    found: Values = []
    for a, student, teacher in _finished(baseline, students, teachers):
        ours, whole = _difference(a, student, metric), _difference(a, teacher, metric)
        found.append(None if ours is None or not whole else ours / whole)
    return found


def speed_ups(baseline: Outcomes, ours: Outcomes, x: str) -> Values:
    """How many times as fast ours reach the baseline's final quality, by seed.

    Seconds are compared only where both were trained on the same devices.
    """
    return [
        _ratio(speed_up(a.curve(QUALITY, x), b.curve(QUALITY, x)))
        for a, b in _finished(baseline, ours)
        if x != "seconds" or a.devices == b.devices
    ]


def _ratio(found: SpeedUp | None) -> float | None:
    return None if found is None else found.ratio


def _difference(one: RunResult, other: RunResult, metric: str) -> float | None:
    """How much better the other is; None where one of them has diverged."""
    a, b = one.quality(metric), other.quality(metric)
    return None if a is None or b is None else b - a


def _finished(*runs: Outcomes) -> list[tuple[RunResult, ...]]:
    """The outcomes of those seeds that are finished in all runs."""
    return [seed for seed in zip(*runs) if None not in seed]  # type: ignore[misc]


def _each(value: Callable[[RunResult], float | None], outcomes: Outcomes) -> Values:
    return [value(outcome) for (outcome,) in _finished(outcomes)]


def _spread(values: Values) -> dict[str, Any]:
    return mean_spread(values)._asdict() | {"values": values}


def _law(found: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """The power law through points, None where they are too few."""
    try:
        return power_law([x for x, _ in found], [loss for _, loss in found])._asdict()
    except ValueError:
        return None
