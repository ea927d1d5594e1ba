"""metrics.jsonl: lines per step and split, and their removal where a run is continued."""

import json

import pytest

from switch_jax.checkpoint.metrics_log import MetricsWriter, last_logged_step, read_metrics
from switch_jax.checkpoint.workdir import Workdir


@pytest.fixture
def workdir(tmp_path) -> Workdir:
    return Workdir(tmp_path)


def write(workdir: Workdir, first_step: int, *steps: int) -> None:
    with MetricsWriter(workdir, first_step) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": 1.0 / step})


def test_lines_have_step_split_time_and_metrics(workdir):
    with MetricsWriter(workdir, 0) as writer:
        writer.write(5, "eval", {"cross_entropy": 2.5, "accuracy": float("nan")})
    (line,) = read_metrics(workdir)
    assert isinstance(line.pop("time"), float)
    assert line == {"step": 5, "split": "eval", "cross_entropy": 2.5, "accuracy": None}
    assert "NaN" not in workdir.metrics_file.read_text()
    assert list(workdir.tensorboard.iterdir())


def test_a_continued_run_removes_later_and_incomplete_lines(workdir):
    write(workdir, 0, 1, 2, 3)
    with workdir.metrics_file.open("a") as file:
        file.write('{"step": 4, "spl')
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3]
    assert last_logged_step(workdir) == 3
    write(workdir, 2, 3, 4)
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3, 4]
    assert [json.loads(line)["step"] for line in workdir.metrics_file.open()] == [1, 2, 3, 4]


def test_an_inactive_writer_writes_nothing(workdir):
    with MetricsWriter(workdir, 0, active=False) as writer:
        writer.write(1, "train", {"loss": 1.0})
    assert not list(workdir.path.iterdir())
    assert read_metrics(workdir) == [] and last_logged_step(workdir) == 0
