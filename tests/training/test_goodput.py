"""Shares of a run's wall time."""

import pytest

from switch_jax.training import goodput as module
from switch_jax.training.goodput import Goodput


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; its first element is the time."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_shares_add_up_and_what_is_not_measured_is_steps(clock):
    goodput = Goodput()
    clock[0] += 3
    goodput.add_time_so_far("starting")
    clock[0] += 2
    goodput.add_time_so_far("compiling")
    clock[0] += 10
    goodput.add("waiting_for_data", 1)
    with goodput.measure("evaluating"):
        clock[0] += 4
    with goodput.measure("saving"):
        clock[0] += 1
    shares = goodput.shares()
    assert shares == pytest.approx(
        {
            "steps": 9 / 20,
            "starting": 3 / 20,
            "compiling": 2 / 20,
            "waiting_for_data": 1 / 20,
            "evaluating": 4 / 20,
            "saving": 1 / 20,
        }
    )
    assert goodput.metrics()["goodput/steps"] == 9 / 20
    assert goodput.summary() == (
        "Wall time: 45% steps, 20% evaluating, 15% starting, 10% compiling, 5% waiting for data,"
        " 5% saving."
    )
