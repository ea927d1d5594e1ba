"""Losses of short runs equal the golden losses to the bit.

scripts/golden/make_losses.py writes the golden losses. On another kind of machine the losses must
be close.
"""

import json

import numpy as np
import pytest

from tests.support import goldens


def test_every_run_has_a_file_of_golden_losses():
    assert {path.stem for path in goldens.LOSSES.glob("*.json")} == set(goldens.RUNS)


_FAST = "one_switch"


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == _FAST else pytest.mark.slow) for name in goldens.RUNS],
)
def test_losses_equal_the_golden_losses(name):
    golden = json.loads((goldens.LOSSES / f"{name}.json").read_text())
    machine, trace = golden.pop("machine"), goldens.trace(name)
    assert trace.keys() == golden.keys()
    assert len(trace["loss"]) == goldens.STEPS
    if machine == goldens.machine():
        assert trace == golden
    early, late = (5e-3, 5e-2) if "bfloat16" in name else (1e-4, 1e-2)
    for key in trace:
        values, expected = goldens.numbers(trace[key]), goldens.numbers(golden[key])
        np.testing.assert_allclose(values, expected, rtol=late, err_msg=key)
        if values.ndim:
            np.testing.assert_allclose(values[:5], expected[:5], rtol=early, err_msg=key)
