"""scripts/campaigns/: faults are recognised as such, and cases are the same for the same seed."""

import json

import pytest

from scripts.campaigns import damage, inputs, kills, run
from scripts.campaigns.outcomes import Outcome, failure, failure_in, table, write_faults
from scripts.campaigns.processes import Ended, Process
from scripts.campaigns.results import digests, first_difference, same_text
from scripts.campaigns.world import COMMANDS

TRACEBACK = 'Traceback (most recent call last):\n  File "x"\nValueError: no\n'
SENTENCE = "switch-jax: run does not exist; name a WORKDIR.\n"


@pytest.mark.parametrize(
    "code, err, kind",
    [
        (2, SENTENCE, "told"),
        (3, f"step 1\n{SENTENCE}", "told"),
        (2, "usage: switch-jax train\nswitch-jax train: error: no --config\n", "told"),
        (2, SENTENCE + SENTENCE, "unclear"),
        (2, f"{SENTENCE}and more\n", "unclear"),
        (2, "", "unclear"),
        (1, SENTENCE, "unclear"),
        (-9, "", "unclear"),
        (1, TRACEBACK, "traceback"),
        (2, TRACEBACK + SENTENCE, "traceback"),
        (None, SENTENCE, "hang"),
    ],
)
def test_a_failure_is_told_or_a_fault(code, err, kind):
    assert failure(Ended(code, "", err, 1.0))[0] == kind


def test_a_process_that_does_not_end_in_time_is_a_hang(tmp_path):
    process = Process(("--help",), tmp_path, warm=False)
    assert failure(process.wait(timeout=0))[0] == "hang"
    assert process.end_descendants(grace=0) == 0


def test_a_refusal_that_leaves_partial_files_is_a_fault(tmp_path):
    ended = Ended(2, "", SENTENCE, 1.0)
    assert failure_in(tmp_path, ended)[0] == "told"
    (tmp_path / ".new.0123.partial").mkdir()
    assert failure_in(tmp_path, ended)[0] == "left over"


@pytest.mark.parametrize(
    "expected, results, kind",
    [
        ("same", {"new/a": "1"}, "right"),
        ("same", {"new/a": "2"}, "silent"),
        ("same", {}, "silent"),
        ("told", {"new/a": "1"}, "silent"),
        ("any", {"new/a": "2"}, "right"),
    ],
)
def test_another_result_is_a_silent_fault(expected, results, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "run", lambda *args, **settings: Ended(0, "", "", 1.0, results))
    case = inputs.BadInput("kind", "label", COMMANDS["plot"], expected)
    undisturbed = Ended(0, "", "", 1.0, {"new/a": "1"}) if case.reference else None
    assert case.check(tmp_path, undisturbed).kind == kind


def test_results_are_compared_without_times(tmp_path):
    for name, seconds, loss in (("a", 1.0, 2.0), ("b", 9.0, 2.0), ("c", 1.0, 3.0)):
        (tmp_path / name).mkdir()
        content = {"time": seconds, "loss": loss}
        (tmp_path / name / "x.json").write_text(json.dumps(content))
    a, b, c = (digests(tmp_path / name, ["x.json"]) for name in "abc")
    assert first_difference(a, b) is None and first_difference(a, c) == "x.json"
    assert same_text("loss 2, 10 tokens/s", "loss 2, 99 tokens/s")
    assert not same_text("loss 2", "loss 3")


def test_every_verb_is_killed_and_every_damage_changes_the_file(tmp_path):
    cases = list(kills.cases(tmp_path, seed=0))
    assert len(cases) >= 100 and {case.verb for case in cases} >= COMMANDS.keys()
    assert cases == list(kills.cases(tmp_path, seed=0))
    content = bytes(range(256))
    case = damage.Damage("checkpoint", 0, "flipped", "train")
    for how in damage.DAMAGES.values():
        assert how is None or how(content, damage.random.Random(case.name)) != content


def test_faults_are_counted_listed_and_written_into_the_page(tmp_path):
    outcomes = [Outcome("a", "train", "right"), Outcome("b", "train", "hang", "x", ("train",))]
    assert "| train | 2 | 1 | 1 |" in table(outcomes)
    write_faults(outcomes, tmp_path / "faults.jsonl")
    [fault] = map(json.loads, (tmp_path / "faults.jsonl").read_text().splitlines())
    assert fault["case"] == "b" and fault["command"] == "switch-jax train"
    page = tmp_path / "page.md"
    page.write_text(f"before {run.MARKS[0]} old {run.MARKS[1]} after")
    run.write_counts(page, "new")
    assert page.read_text() == f"before {run.MARKS[0]}\nnew\n{run.MARKS[1]} after"
