"""Summary of a sweep as JSON values: numbers of every run, table and figure.

Differences and speed-ups compare runs with the same seed. A spread is over the finished seeds; a
seed has no value if its run diverged or never reaches the quality of the baseline.
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
from switch_jax.sweeps.results import RunResult
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

SeedResults = Sequence[RunResult | None]  # of one run, by seed; None: not trained to its end
Results = Mapping[str, SeedResults]  # by name of the run
Values = list[float | None]  # by seed
Points = list[tuple[float, float]]


def summarise_sweep(sweep: Sweep, results: Results) -> dict[str, Any]:
    """Returns the numbers of a sweep, from its finished runs."""
    devices = {r.devices for seeds in results.values() for r in seeds if r and r.devices}
    figures = {
        name: {"title": figure.title, "claim": figure.claim, **_figure_summary(figure, results)}
        for name, figure in sweep.figures.items()
    }
    return {
        "title": sweep.title,
        "seeds": list(sweep.seeds),
        "devices": sorted(devices),
        "flops_convention": CONVENTIONS["flops_per_sequence"],
        "runs": {name: _run_summary(sweep.seeds, seeds) for name, seeds in results.items()},
        "tables": {name: _table_summary(table, results) for name, table in sweep.tables.items()},
        "figures": figures,
    }


def _run_summary(seeds: Sequence[int], results: SeedResults) -> dict[str, Any]:
    """Returns the results of every seed of a run, and the numbers that are equal for all seeds."""
    finished = {seed: result for seed, result in zip(seeds, results) if result is not None}
    common = {}
    if finished:
        first = next(iter(finished.values()))
        common = {
            "params": first.params,
            "flops_per_sequence": first.flops_per_sequence,
            "train_flops": first.step_flops * first.steps,
            "steps": first.steps,
            "tokens": first.tokens_per_step * first.steps,
        }
    return common | {
        "seeds": {
            str(seed): {
                "diverged": result.diverged,
                "step_seconds": result.step_seconds,
                "dropped": result.dropped,
                "evaluations": list(result.evaluations),
            }
            for seed, result in finished.items()
        }
    }


def _table_summary(table: Table, results: Results) -> dict[str, Any]:
    names = list(table.rows.values())
    baseline = results[names[0]]
    train_flops = {r.step_flops * r.steps for n in names for r in results[n] if r is not None}
    fewest_flops = min(train_flops, default=0.0)
    rows = {}
    for label, name in table.rows.items():
        ours = results[name]
        columns: dict[str, Values] = {
            "quality": _values(lambda r: r.quality(table.metric), ours),
            "sequences_per_second": _values(lambda r: r.sequences_per_second, ours),
            "dropped": _values(lambda r: r.dropped, ours),
        }
        if name != names[0]:
            columns["gain"] = quality_gains(baseline, ours, table.metric)
        if name != names[0] and table.metric == QUALITY:
            columns["speed_up_steps"] = speed_up_ratios(baseline, ours, "steps")
            columns["speed_up_seconds"] = speed_up_ratios(baseline, ours, "seconds")
        if table.metric == QUALITY and max(train_flops, default=0.0) > 1.05 * fewest_flops:
            columns["at_equal_flops"] = _values(
                lambda r: None if r.diverged else value_at(r.curve(QUALITY, "flops"), fewest_flops),
                ours,
            )
        if label in table.teachers:
            teachers = results[table.teachers[label]]
            columns["share_of_gain"] = shares_of_gain(baseline, ours, teachers, table.metric)
            columns["compression"] = [
                1 - student.params / teacher.params
                for student, teacher in _finished_in_all(ours, teachers)
            ]
        rows[label] = {
            "run": name,
            "params": next((r.params for r in ours if r is not None), None),
            **{column: _spread_to_json(values) for column, values in columns.items()},
            "paper": table.paper.get(label),
        }
    return {"title": table.title, "claim": table.claim, "metric": table.metric, "rows": rows}


def _figure_summary(figure: Figure, results: Results) -> dict[str, Any]:
    """Returns the numbers that belong to a figure, beside its curves and points."""
    if isinstance(figure, Curves):
        baseline, *rest = figure.runs
        baseline_results = results[figure.runs[baseline]]
        ratios = {
            label: speed_up_ratios(baseline_results, results[figure.runs[label]], figure.x)
            for label in rest
        }
        return {
            "x": figure.x,
            "baseline": baseline,
            "speed_up": {label: _spread_to_json(values) for label, values in ratios.items()},
        }
    if isinstance(figure, Scaling):
        laws = {"ours": _power_law_to_json(mean_loss_by_size(scaling_points(figure, results)))}
        if series := figure.published:
            points = [(getattr(point, figure.x), point.loss) for point in series.points]
            laws[series.source] = _power_law_to_json(points)
        return {"x": figure.x, "power_laws": laws}
    if isinstance(figure, Advantage):
        return {"advantage": advantage_curves(figure, results)}
    if isinstance(figure, Transfer):
        return {"metric": figure.metric, "points": transfer_points(figure, results)}
    assert isinstance(figure, Sources)
    return _sources_summary(figure, results)


def _sources_summary(figure: Sources, results: Results) -> dict[str, Any]:
    """Returns the numbers that the paper reports of its languages, over seeds; all by seed."""
    comparisons = [
        comparison_to_json(compare_sources(a.evaluations, b.evaluations))
        for a, b in _finished_in_all(results[figure.baseline], results[figure.run])
        if a.quality(QUALITY) is not None and b.quality(QUALITY) is not None
    ]
    keys = ("speed_up_mean", "share_at_least_4", "improved", "not_reached")
    return {
        "baseline": figure.baseline,
        "run": figure.run,
        "sources": len(comparisons[0]["sources"]) if comparisons else 0,
        **{key: _spread_to_json([c[key] for c in comparisons]) for key in keys},
        "seeds": comparisons,
    }


def scaling_points(figure: Scaling, results: Results) -> Points:
    """Returns (size, final loss) of every seed that is finished and has not diverged."""
    points = []
    for name in figure.runs.values():
        for result in results[name]:
            quality = None if result is None else result.quality(QUALITY)
            if result is not None and quality is not None:
                sizes = {
                    "params": result.params,
                    "experts": max(result.config.moe.num_experts, 1),
                }
                points.append((float(sizes[figure.x]), -quality))
    return points


def mean_loss_by_size(points: Points) -> Points:
    """Returns one point for each size, as a fit needs: errors of seeds of a size are dependent."""
    sizes = dict.fromkeys(size for size, _ in points)
    return [(size, statistics.fmean(loss for x, loss in points if x == size)) for size in sizes]


def advantage_curves(figure: Advantage, results: Results) -> dict[str, list[Points]]:
    """Returns (tokens per expert, gain over the first run) of every evaluation, by label and seed.

    The tokens are those of the encoder up to the evaluation, each counted once for every expert
    that a token has, divided by the number of experts; padding is counted.
    """
    baseline, *rest = figure.runs
    curves: dict[str, list[Points]] = {}
    for label in rest:
        curves[label] = []
        for base, ours in _finished_in_all(*(results[figure.runs[n]] for n in (baseline, label))):
            data, moe = ours.config.data, ours.config.moe
            share = moe.num_selected / moe.num_experts if moe.num_experts else 1.0
            tokens_per_step = data.batch_size * data.inputs_length * share
            of_baseline = dict(base.curve(QUALITY))
            points = [
                (step * tokens_per_step, quality - of_baseline[step])
                for step, quality in ours.curve(QUALITY)
                if step in of_baseline
            ]
            curves[label].append(points)
    return curves


def transfer_points(figure: Transfer, results: Results) -> dict[str, Points]:
    """Returns (upstream quality, downstream score) of every pair and seed that has both."""
    points: dict[str, Points] = {}
    for label, pairs in figure.pairs.items():
        points[label] = []
        for upstream, downstream in pairs:
            for before, after in zip(results[upstream], results[downstream]):
                quality = None if before is None else before.quality(QUALITY)
                score = None if after is None else after.quality(figure.metric)
                if quality is not None and score is not None:
                    points[label].append((quality, score))
    return points


def quality_gains(baseline: SeedResults, ours: SeedResults, metric: str) -> Values:
    """Returns our final quality minus the baseline's, by seed."""
    return [_quality_gain(a, b, metric) for a, b in _finished_in_all(baseline, ours)]


def shares_of_gain(
    baseline: SeedResults, students: SeedResults, teachers: SeedResults, metric: str
) -> Values:
    """Returns a student's gain over the baseline, divided by its teacher's gain, by seed."""
    shares: Values = []
    for base, student, teacher in _finished_in_all(baseline, students, teachers):
        gain = _quality_gain(base, student, metric)
        teacher_gain = _quality_gain(base, teacher, metric)
        shares.append(None if gain is None or not teacher_gain else gain / teacher_gain)
    return shares


def speed_up_ratios(baseline: SeedResults, ours: SeedResults, x: str) -> Values:
    """Returns the speed-up to the baseline's final quality, by seed.

    Seeds whose two runs were trained on different devices are left out if `x` is "seconds".
    """
    return [
        None
        if a.diverged or b.diverged
        else _ratio(speed_up(a.curve(QUALITY, x), b.curve(QUALITY, x)))
        for a, b in _finished_in_all(baseline, ours)
        if x != "seconds" or a.devices == b.devices
    ]


def _ratio(result: SpeedUp | None) -> float | None:
    return None if result is None else result.ratio


def _quality_gain(baseline: RunResult, ours: RunResult, metric: str) -> float | None:
    """Returns the difference of qualities; None if one of the runs has diverged."""
    a, b = baseline.quality(metric), ours.quality(metric)
    return None if a is None or b is None else b - a


def _finished_in_all(*runs: SeedResults) -> list[tuple[RunResult, ...]]:
    """Returns the results of the runs, seed by seed, for the seeds that all runs have finished."""
    return [seed for seed in zip(*runs) if None not in seed]  # type: ignore[misc]


def _values(value: Callable[[RunResult], float | None], results: SeedResults) -> Values:
    return [value(result) for (result,) in _finished_in_all(results)]


def _spread_to_json(values: Values) -> dict[str, Any]:
    return mean_spread(values)._asdict() | {"values": values}


def _power_law_to_json(points: Points) -> dict[str, Any] | None:
    """Returns the power law through points, None for too few points."""
    try:
        return power_law([x for x, _ in points], [loss for _, loss in points])._asdict()
    except ValueError:
        return None
