"""Learning curves: smoothing, speed-ups and power laws of curves with known results."""

import itertools
import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from switch_jax.analysis.learning_curves import (
    Spread,
    first_x_reaching,
    mean_spread,
    power_law,
    smoothed,
    speed_up,
    value_at,
)

RISING = [(100, -4.0), (200, -3.0), (300, -2.5), (400, -2.4)]


def test_smoothing_changes_only_falling_parts():
    assert smoothed(RISING) == RISING
    found = smoothed([(1, -4.0), (2, -2.0), (3, -3.0), (4, -1.0)])
    assert found == [(1, -4.0), (2, -2.5), (3, -2.5), (4, -1.0)]
    assert smoothed([]) == []


@hypothesis.given(st.lists(st.floats(-10, 0), min_size=1, max_size=30))
def test_a_smoothed_curve_never_falls_and_keeps_its_mean(values):
    found = [y for _, y in smoothed(list(enumerate(values)))]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(found))
    assert np.mean(found) == pytest.approx(np.mean(values), abs=1e-9)


def test_the_first_x_is_interpolated_between_points():
    assert first_x_reaching(RISING, -3.5) == 150
    assert first_x_reaching(RISING, -4.5) == 100
    assert first_x_reaching(RISING, -2.4) == 400
    assert first_x_reaching(RISING, -2.3) is None


def ratio(baseline, ours):
    return speed_up(baseline, ours).ratio


def test_a_curve_twice_as_fast_has_a_speed_up_of_two():
    fast = [(x / 2, y) for x, y in RISING]
    assert ratio(RISING, fast) == 2
    assert ratio(fast, RISING) == 0.5
    assert ratio(RISING, RISING) == 1
    assert ratio(RISING, [(100, -4.0), (400, -2.5)]) is None
    assert speed_up(RISING, []) is None and speed_up([], RISING) is None


def test_a_speed_up_reached_at_the_first_evaluation_is_a_lower_bound():
    assert speed_up(RISING, [(50, -2.0), (100, -1.0)]) == (-2.4, -1.0, 400, 50, True)
    assert not speed_up(RISING, RISING).at_least


def test_one_lucky_evaluation_is_no_speed_up():
    lucky = [(100, -4.0), (200, -2.4), (300, -3.0), (400, -2.4)]  # at step 200 by chance
    assert first_x_reaching(lucky, -2.4) == 200
    assert ratio(RISING, lucky) == 1


def test_the_value_at_x_is_interpolated_and_never_extrapolated():
    assert value_at(RISING, 250) == pytest.approx(-2.75)
    assert value_at(RISING, 400) == pytest.approx(-2.4)
    assert value_at(RISING, 401) is None and value_at([], 1) is None
    assert value_at(RISING, 100) == -4.0 and value_at(RISING, 99) is None


def test_spread_counts_values_that_are_not_finite():
    found = mean_spread([1.0, None, 3.0, math.inf])
    assert found == Spread(2.0, math.sqrt(2), 2, 4)
    assert mean_spread([5.0]) == Spread(5.0, None, 1, 1)
    assert mean_spread([None]) == Spread(None, None, 0, 1)


def test_an_exact_power_law_is_found():
    x = [1, 4, 16, 64]
    law = power_law(x, [3.0 * n**-0.07 for n in x])
    assert law.coefficient == pytest.approx(3) and law.exponent == pytest.approx(-0.07)
    assert law.exponent_interval == pytest.approx((-0.07, -0.07), abs=1e-6)
    assert law(256) == pytest.approx(3.0 * 256**-0.07)


def test_intervals_have_their_confidence():
    rng, x, inside = np.random.default_rng(0), np.array([1.0, 2, 4, 8, 16, 32]), 0
    for _ in range(2000):
        law = power_law(x, 2 * x**-0.1 * np.exp(rng.normal(0, 0.02, 6)), confidence=0.8)
        inside += law.exponent_interval[0] < -0.1 < law.exponent_interval[1]
        assert law.coefficient_interval[0] < law.coefficient < law.coefficient_interval[1]
    low, high = stats.binom.interval(0.9999, 2000, 0.8)
    assert low <= inside <= high


@pytest.mark.parametrize("x", [[1, 2], [], [3, 3, 3], [1, 1, 2, 2]])
def test_too_few_points_are_no_power_law(x):
    with pytest.raises(ValueError, match="three different x"):
        power_law(x, [1.0] * len(x))
