"""Arithmetic on learning curves: smoothing, when a quality is reached, power laws, spread.

A curve is (x, quality) in the order of x, where more quality is better; x are steps, seconds or
FLOPs. Pure functions of numbers.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

Curve = Sequence[tuple[float, float]]


def smoothed(curve: Curve) -> list[tuple[float, float]]:
    """The curve that never falls and is closest to `curve` in least squares.

    Training improves; what falls between two evaluations is noise. A curve that never falls stays
    as it is, so that nothing is blurred that need not be.
    """
    if not curve:
        return []
    x, quality = zip(*curve)
    return list(zip(x, optimize.isotonic_regression(quality).x.tolist()))


def first_x_reaching(curve: Curve, goal: float) -> float | None:
    """The first x at which a curve is as good as `goal`, on straight lines between its points.

    Its first x if it begins there, None if it never gets there.
    """
    before, worse = curve[0]
    if worse >= goal:
        return float(before)
    for x, quality in curve[1:]:
        if quality >= goal:
            return before + (x - before) * (goal - worse) / (quality - worse)
        before, worse = x, quality
    return None


class SpeedUp(NamedTuple):
    """A run against a baseline, both curves smoothed; an x is steps or seconds."""

    baseline_quality: float  # at its last evaluation, as it was measured
    quality: float  # at ours
    baseline_x: float  # the first at which the baseline was as good as at its end
    x: float | None  # the first at which we were; None: never
    at_least: bool  # we were at our first evaluation already, so maybe before it

    @property
    def ratio(self) -> float | None:
        """How many times as far the baseline went; None where we never get there."""
        return self.baseline_x / self.x if self.x else None


def speed_up(baseline: Curve, ours: Curve) -> SpeedUp | None:
    """When ours is as good as the baseline in the end (paper, section 4.3, footnote 9).

    None where one has no points.
    """
    if not (baseline and ours):
        return None
    theirs, curve = smoothed(baseline), smoothed(ours)
    goal = theirs[-1][1]
    far = first_x_reaching(theirs, goal)  # not simply its last x: it may have been as good before
    assert far is not None
    return SpeedUp(
        baseline[-1][1],
        ours[-1][1],
        far,
        first_x_reaching(curve, goal),
        at_least=curve[0][1] >= goal,
    )


def value_at(curve: Curve, x: float) -> float | None:
    """The quality of a curve, smoothed, at x; None where it does not go there."""
    if not curve or not curve[0][0] <= x <= curve[-1][0] * (1 + 1e-9):
        return None
    places, quality = zip(*smoothed(curve))
    return float(np.interp(x, places, quality))


class Spread(NamedTuple):
    """A figure over seeds."""

    mean: float | None  # of those that have one
    deviation: float | None  # sample standard deviation; None below two
    known: int  # how many have one
    of: int


def mean_spread(values: Sequence[float | None]) -> Spread:
    """Mean and standard deviation of the values that are finite numbers."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    return Spread(
        statistics.fmean(found) if found else None,
        statistics.stdev(found) if len(found) > 1 else None,
        len(found),
        len(values),
    )


class PowerLaw(NamedTuple):
    """loss = coefficient · x^exponent, with confidence intervals of both."""

    coefficient: float
    exponent: float
    coefficient_interval: tuple[float, float]
    exponent_interval: tuple[float, float]

    def __call__(self, x: Any) -> Any:
        """The loss at a number, or at an array of them."""
        return self.coefficient * x**self.exponent


def power_law(x: Sequence[float], loss: Sequence[float], confidence: float = 0.95) -> PowerLaw:
    """Fits a power law by least squares of the logarithms; all values must be above 0.

    Intervals are Student's, of independent and equally large relative errors; of runs with several
    seeds, their mean is one point. Raises `ValueError` for fewer than three x.
    """
    if len(set(x)) < 3:
        raise ValueError("a power law needs three different x")
    fit = stats.linregress(np.log(x), np.log(loss))
    times = stats.t.ppf((1 + confidence) / 2, len(x) - 2)

    def interval(middle: float, error: float) -> tuple[float, float]:
        return float(middle - times * error), float(middle + times * error)

    low, high = interval(fit.intercept, fit.intercept_stderr)
    return PowerLaw(
        math.exp(fit.intercept),
        float(fit.slope),
        (math.exp(low), math.exp(high)),
        interval(fit.slope, fit.stderr),
    )
