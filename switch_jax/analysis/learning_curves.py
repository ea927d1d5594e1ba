"""Learning curves: smoothing, x at which a quality is reached, power laws, spread over seeds.

A curve is a sequence of (x, quality) with increasing x, where more quality is better; x are steps,
seconds or FLOPs. All functions are pure functions of numbers.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

Curve = Sequence[tuple[float, float]]


def smoothed(curve: Curve) -> list[tuple[float, float]]:
    """Returns the curve that never falls and is closest to `curve` in least squares.

    Quality improves in training, so a fall between two evaluations is noise. A curve that never
    falls is returned unchanged.
    """
    if not curve:
        return []
    x, quality = zip(*curve)
    return list(zip(x, optimize.isotonic_regression(quality).x.tolist()))


def first_x_reaching(curve: Curve, goal: float) -> float | None:
    """Returns the first x at which a curve reaches `goal`, by linear interpolation.

    The first x of the curve if its first quality is as good, None if no quality is.
    """
    last_x, last_quality = curve[0]
    if last_quality >= goal:
        return float(last_x)
    for x, quality in curve[1:]:
        if quality >= goal:
            return last_x + (x - last_x) * (goal - last_quality) / (quality - last_quality)
        last_x, last_quality = x, quality
    return None


class SpeedUp(NamedTuple):
    """Speed-up of a run over a baseline, from smoothed curves; x are steps or seconds."""

    baseline_quality: float  # of the baseline's last evaluation, not smoothed
    quality: float  # of the run's last evaluation, not smoothed
    baseline_x: float  # first x at which the baseline has its final quality
    x: float | None  # first x at which the run has the baseline's final quality; None: never
    at_least: bool  # x is the run's first evaluation, so the speed-up is a lower bound

    @property
    def ratio(self) -> float | None:
        """baseline_x / x; None if the run never reaches the baseline's final quality."""
        return self.baseline_x / self.x if self.x else None


def speed_up(baseline: Curve, ours: Curve) -> SpeedUp | None:
    """Returns the speed-up to the baseline's final quality (paper, section 4.3, footnote 9).

    None if one of the curves has no points.
    """
    if not (baseline and ours):
        return None
    smoothed_baseline, smoothed_ours = smoothed(baseline), smoothed(ours)
    goal = smoothed_baseline[-1][1]
    # May be less than the last x: a smoothed curve may end with a constant part.
    baseline_x = first_x_reaching(smoothed_baseline, goal)
    assert baseline_x is not None
    return SpeedUp(
        baseline[-1][1],
        ours[-1][1],
        baseline_x,
        first_x_reaching(smoothed_ours, goal),
        at_least=smoothed_ours[0][1] >= goal,
    )


def value_at(curve: Curve, x: float) -> float | None:
    """Returns the quality of the smoothed curve at x; None for x outside the curve."""
    if not curve or not curve[0][0] <= x <= curve[-1][0] * (1 + 1e-9):
        return None
    curve_x, quality = zip(*smoothed(curve))
    return float(np.interp(x, curve_x, quality))


class Spread(NamedTuple):
    """Mean and standard deviation of a number over seeds."""

    mean: float | None  # of the seeds that have a value; None if no seed has one
    deviation: float | None  # sample standard deviation; None for fewer than two values
    known: int  # number of seeds that have a value
    of: int  # number of seeds


def mean_spread(values: Sequence[float | None]) -> Spread:
    """Returns mean and standard deviation of the finite values."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return Spread(
        statistics.fmean(finite) if finite else None,
        statistics.stdev(finite) if len(finite) > 1 else None,
        len(finite),
        len(values),
    )


class PowerLaw(NamedTuple):
    """loss = coefficient · x^exponent, with confidence intervals of both."""

    coefficient: float
    exponent: float
    coefficient_interval: tuple[float, float]
    exponent_interval: tuple[float, float]

    def __call__(self, x: Any) -> Any:
        """Returns the loss at x, a number or an array of numbers."""
        return self.coefficient * x**self.exponent


def power_law(x: Sequence[float], loss: Sequence[float], confidence: float = 0.95) -> PowerLaw:
    """Fits a power law by least squares of the logarithms; all values must be above 0.

    The intervals are Student's, for independent and equally large relative errors. Runs that differ
    only in their seed are not independent: pass their mean as one point.

    Raises `ValueError` for fewer than three different x.
    """
    if len(set(x)) < 3:
        raise ValueError("a power law needs three different x")
    fit = stats.linregress(np.log(x), np.log(loss))
    num_errors = stats.t.ppf((1 + confidence) / 2, len(x) - 2)

    def interval(middle: float, error: float) -> tuple[float, float]:
        return float(middle - num_errors * error), float(middle + num_errors * error)

    low, high = interval(fit.intercept, fit.intercept_stderr)
    return PowerLaw(
        math.exp(fit.intercept),
        float(fit.slope),
        (math.exp(low), math.exp(high)),
        interval(fit.slope, fit.stderr),
    )
