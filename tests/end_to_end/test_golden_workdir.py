"""A WORKDIR of an earlier version still loads, evaluates and continues training.

scripts/golden/make_workdir.py wrote tests/golden/workdir with an earlier version. It is not written
again, because it represents WORKDIRs on users' disks.
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
    """A copy of the WORKDIR; only the last test changes it."""
    path = tmp_path_factory.mktemp("golden") / "workdir"
    shutil.copytree(goldens.WORKDIR, path, ignore=shutil.ignore_patterns("__pycache__"))
    return path


def assert_same(metrics: dict[str, float], expected: dict[str, float]) -> None:
    """Asserts equal metrics on the machine of the golden data, and close ones on others."""
    assert metrics.keys() == expected.keys()
    if SAME_MACHINE:
        assert metrics == expected
    for key in metrics:
        np.testing.assert_allclose(metrics[key], expected[key], rtol=1e-3, atol=1e-5, err_msg=key)


def test_the_loaded_model_gives_the_same_logits(folder):
    logits = goldens.logits(folder / "run")
    if SAME_MACHINE:
        assert logits == EXPECTED["logits"]
    values, expected = goldens.numbers(logits), goldens.numbers(EXPECTED["logits"])
    assert values.std() > 0.1
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_evaluation_gives_the_same_metrics(folder):
    assert_same(goldens.evaluation(folder), EXPECTED["eval"])


def test_continued_training_gives_the_same_metrics(folder):
    workdir = folder / "run"
    _, err = runs.run("train", "--config", "tiny.py", goldens.MORE, "--workdir", "run", cwd=folder)
    assert f"continuing from step {goldens.WORKDIR_STEPS}" in err
    # Losses depend on parameters, optimizer state, random numbers and the position in the data.
    lines = goldens.later_metrics(workdir)
    assert [line["step"] for line in lines] == [line["step"] for line in EXPECTED["train"]]
    for line, expected in zip(lines, EXPECTED["train"]):
        assert line.pop("split", None) == expected.pop("split", None)
        assert_same(line, expected)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["6"]
