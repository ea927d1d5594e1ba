"""Short runs give the losses that they gave before, to the bit.

scripts/golden/make_losses.py writes them anew; on a machine of another kind they must be close.
"""

import json

import numpy as np
import pytest

from tests.support import goldens


def test_every_run_has_its_file():
    assert {path.stem for path in goldens.LOSSES.glob("*.json")} == set(goldens.RUNS)


@pytest.mark.parametrize("name", goldens.RUNS)
def test_losses_are_what_they_were(name):
    golden = json.loads((goldens.LOSSES / f"{name}.json").read_text())
    made_on, found = golden.pop("machine"), goldens.trace(name)
    assert found.keys() == golden.keys()
    assert len(found["loss"]) == goldens.STEPS
    if made_on == goldens.machine():
        assert found == golden
    early, late = (5e-3, 5e-2) if "bfloat16" in name else (1e-4, 1e-2)
    for key in found:
        one, other = goldens.numbers(found[key]), goldens.numbers(golden[key])
        np.testing.assert_allclose(one, other, rtol=late, err_msg=key)
        if one.ndim:
            np.testing.assert_allclose(one[:5], other[:5], rtol=early, err_msg=key)
