"""metrics.jsonl: lines per step and split, and their removal where a run is continued."""

import json

import pytest

from switch_jax.checkpoint.metrics_log import MetricsWriter, last_logged_step, read_metrics
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.errors import UserError


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


def test_a_listener_gets_finite_values_with_their_split(workdir):
    heard = []
    with MetricsWriter(workdir, 0, listener=lambda *given: heard.append(given)) as writer:
        writer.write(5, "eval", {"loss": 2.5, "accuracy": float("nan")}, [workdir.path / "a"])
    assert heard == [(5, {"eval/loss": 2.5}, [workdir.path / "a"])]


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


# What may happen to the line of step 3, of five: it is left out and reported.
DAMAGE = {
    "binary": b"\x00\xff\x80",
    "cut": b'{"step": 3, "split": "tr',
    "no object": b"[3]",
    "no step": b'{"split": "train", "loss": 1.0}',
    "step of another type": b'{"step": "3", "split": "train"}',
    "true": b'{"step": true, "split": "train"}',
    "value of another type": b'{"step": 3, "split": "train", "loss": "low"}',
    "unknown split": b'{"step": 3, "split": "tra\\n"}',
    "not finite": b'{"step": 3, "split": "train", "loss": NaN}',
    "deep": b"[" * 100_000,
    "digits": b'{"step": 3, "split": "train", "loss": ' + b"9" * 5000 + b"}",
    "later step": b'{"step": 35, "split": "train", "loss": 1.0}',
    "earlier step": b'{"step": 0, "split": "train", "loss": 1.0}',
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_left_out_reported_and_removed_by_the_next_start(workdir, capsys, damage):
    write(workdir, 0, 1, 2, 3, 4, 5)
    lines = workdir.metrics_file.read_bytes().splitlines(keepends=True)
    content = b"".join([*lines[:2], DAMAGE[damage] + b"\n", *lines[3:]])
    workdir.metrics_file.write_bytes(content)
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 4, 5]
    assert "metrics.jsonl: line 3 is damaged and left out.\n" in capsys.readouterr().err

    write(workdir, 5, 6)
    assert "line 3 is damaged and removed; metrics.damaged.jsonl" in capsys.readouterr().err
    assert (workdir.path / "metrics.damaged.jsonl").read_bytes() == content
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 4, 5, 6]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("end", [b"", b"\n\n", b"\r\n", b'\n{"step": 3, "spl'])
def test_a_file_may_end_without_a_line_end(workdir, capsys, end):
    write(workdir, 0, 1, 2)
    workdir.metrics_file.write_bytes(workdir.metrics_file.read_bytes()[:-1] + end)
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2]
    assert last_logged_step(workdir) == 2
    write(workdir, 2, 3)
    assert [json.loads(line)["step"] for line in workdir.metrics_file.open()] == [1, 2, 3]
    assert not capsys.readouterr().err


def test_the_last_step_is_found_before_damaged_lines(workdir):
    write(workdir, 0, 1, 2)
    with workdir.metrics_file.open("ab") as file:
        file.write(b"\xff" * 1000 + b"\n[1]\n{}\n")
    assert last_logged_step(workdir) == 2


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is not JSON"),
        (b"\x00\xff" * 100, "is not UTF-8"),
        (b"[1]", "has no `config`"),
        (b'{"config": 7}', "has no `config`"),
        (b'{"config": {"model": []}}', "model"),
        (b'{"config": {"train": {"steps": "many"}}}', "train.steps"),
        (b'{"config": ' * 50_000, "deep"),
        (b'{"config": {"train": {"steps": 1' + b"0" * 30 + b"}}}", "train.steps"),
    ],
)
def test_a_damaged_config_is_one_sentence_that_names_the_file(workdir, content, words):
    workdir.config_file.write_bytes(content)
    with pytest.raises(UserError) as error:
        workdir.config()
    assert words in str(error.value) and str(error.value).count(str(workdir.config_file)) == 1
    assert "\n" not in str(error.value)
