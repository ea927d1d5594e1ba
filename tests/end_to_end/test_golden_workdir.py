"""A WORKDIR that was written before this program still loads, evaluates and trains on.

tests/golden/workdir was made by scripts/golden/make_workdir.py, with the command line of its day,
and is not made anew: it stands for what users have on their disks.
"""

import json
import shutil

import numpy as np
import pytest

from tests.support import goldens, runs

EXPECTED = json.loads((goldens.WORKDIR / "expected.json").read_text())
SAME_MACHINE = EXPECTED["machine"] == goldens.machine()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy; of the tests here, the last one changes it."""
    path = tmp_path_factory.mktemp("golden") / "workdir"
    shutil.copytree(goldens.WORKDIR, path, ignore=shutil.ignore_patterns("__pycache__"))
    return path


def same(found: dict[str, float], expected: dict[str, float]) -> None:
    """Equal on the machine of the golden data, close on others."""
    assert found.keys() == expected.keys()
    if SAME_MACHINE:
        assert found == expected
    for key in found:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-3, atol=1e-5, err_msg=key)


def test_loads(folder):
    found = goldens.logits(folder / "run")
    if SAME_MACHINE:
        assert found == EXPECTED["logits"]
    one, other = goldens.numbers(found), goldens.numbers(EXPECTED["logits"])
    assert one.std() > 0.1
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_evaluates(folder):
    same(goldens.evaluation(folder), EXPECTED["eval"])


def test_trains_on_as_if_nothing_had_happened(folder):
    workdir = folder / "run"
    _, err = runs.run("train", "--config", "tiny.py", goldens.MORE, "--workdir", "run", cwd=folder)
    assert f"continuing from step {goldens.WORKDIR_STEPS}" in err
    # Parameters, optimizer, random numbers and data: of each, another state gives other losses.
    found = goldens.later_metrics(workdir)
    assert [line["step"] for line in found] == [line["step"] for line in EXPECTED["train"]]
    for one, other in zip(found, EXPECTED["train"]):
        assert one.pop("split", None) == other.pop("split", None)
        same(one, other)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["6"]
