"""Sweep runner: order of jobs, locks, signals and failures; a sweep from the command line."""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from switch_jax.checkpoint.metrics_log import last_logged_step
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.cli.main import main
from switch_jax.config.load import override_config
from switch_jax.distributed.cluster import Launch
from switch_jax.errors import UserError
from switch_jax.sweeps import progress, runner
from switch_jax.sweeps.progress import SweepDisplay
from switch_jax.sweeps.runner import (
    Job,
    _lock_first,
    check_same_text,
    prepare_sweep,
    run_sweep,
)
from switch_jax.sweeps.spec import SweepRun
from tests.support import runs
from tests.support.configs import tiny
from tests.support.pages import without_images
from tests.support.paths import ROOT


@dataclasses.dataclass(frozen=True)
class FakeJob(Job):
    """A job whose training is a Python program; afterwards its last checkpoint exists."""

    program: str = ""

    def command(self):
        last = self.workdir.checkpoints / str(self.config.train.steps)
        done = f"import pathlib; pathlib.Path({str(last)!r}).mkdir(parents=True)"
        return [sys.executable, "-c", f"{self.program}\n{done}"]


def fake_jobs(folder, programs, **needs):
    """Returns jobs of seed 0; `needs`: for a job, the name of the run whose model it reads."""
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    return [
        FakeJob(
            name,
            0,
            SweepRun("c.py", {"init_from": f"{{run:{needs[name]}}}"} if name in needs else {}),
            tiny(),
            folder,
            program=program,
        )
        for name, program in programs.items()
    ]


@contextlib.contextmanager
def locked_elsewhere(path):
    """Locks a file as another process does that trains the job."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def test_a_job_that_another_process_has_just_finished_is_not_trained_again(tmp_path, monkeypatch):
    (made,) = fake_jobs(tmp_path, {"a": "raise SystemExit('twice')"})
    claimed = _lock_first

    def late(jobs):
        (made.workdir.checkpoints / "100").mkdir(parents=True)  # before we had the lock
        return claimed(jobs)

    monkeypatch.setattr(runner, "_lock_first", late)
    progress = run_sweep([made])
    assert progress.finished == 1 and not progress.failed and not made.output_file.exists()


def test_a_failure_is_reported_and_other_jobs_are_trained(tmp_path, capfd):
    made = fake_jobs(
        tmp_path,
        {"after": "", "bad": "raise SystemExit('no such thing')", "good": "", "more": ""},
        after="bad",
        more="good",
    )
    progress = run_sweep(made)
    assert (progress.finished, progress.failed, progress.blocked) == (2, ["bad-0"], ["after-0"])
    err = capfd.readouterr().err
    assert "bad-0 failed" in err and "no such thing" in err and "run 1 of 4: bad-0" in err
    assert [job.key for job in made if job.finished] == ["good-0", "more-0"]


DIVERGED = """
import pathlib, sys
folder = pathlib.Path({folder!r})
folder.mkdir(parents=True)
(folder / "metrics.jsonl").write_text('{{"step": 3, "split": "train", "loss": null}}')
print("The loss is nan at step 3.")
sys.exit(3)
"""


def test_a_diverged_job_is_no_failure_and_not_trained_again(tmp_path, capfd):
    diverging = DIVERGED.format(folder=str(tmp_path / "runs" / "bad-0"))
    made = fake_jobs(tmp_path, {"bad": diverging, "after": "", "good": ""}, after="bad")
    progress = run_sweep(made)
    assert (progress.finished, progress.blocked) == (1, ["after-0"])
    assert (progress.diverged, progress.failed) == (["bad-0"], [])
    assert "bad-0 diverged, see" in (err := capfd.readouterr().err) and "is nan at step 3" in err
    assert run_sweep(made) == progress
    assert made[0].output_file.read_text() == "The loss is nan at step 3.\n"


def test_a_finished_job_is_not_trained_again(tmp_path):
    run_sweep(fake_jobs(tmp_path, {"a": "print('once')"}))
    (made,) = fake_jobs(tmp_path, {"a": "raise SystemExit('twice')"})
    progress = run_sweep([made])
    assert progress.finished == 1 and not progress.failed
    assert made.output_file.read_text() == "once\n"


def test_a_job_of_another_process_is_waited_for_and_trained_if_that_process_ends(tmp_path, capfd):
    made = fake_jobs(tmp_path, {"a": "", "b": "", "c": "", "d": ""}, d="a")
    with contextlib.ExitStack() as others:
        for job in (made[0], made[2]):
            others.enter_context(locked_elsewhere(job.lock_file))
        thread = threading.Thread(target=lambda: found.append(run_sweep(made)))
        found = []
        thread.start()
        deadline = time.time() + 60
        while not made[1].finished:
            assert time.time() < deadline
            time.sleep(0.05)
        (made[2].workdir.checkpoints / "100").mkdir(parents=True)  # finished elsewhere
        time.sleep(0.5)
        assert thread.is_alive() and not made[0].finished
    thread.join(timeout=60)
    assert found[0].finished == 4 and not found[0].blocked
    assert (
        not made[2].output_file.exists()
        and made[0].output_file.exists()
        and made[3].output_file.exists()
    )
    err = capfd.readouterr().err
    assert err.count("b-0 finished") == err.count("waiting for") == 1


def child_of(process):
    """Returns the pid of the only child of a process."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        (child,) = map(int, file.read().split())
    return child


SWEEP_THAT_IS_KILLED = """
import sys
sys.path[:0] = [{root!r}]
import tests.conftest
from pathlib import Path
from tests.sweeps.test_runner import fake_jobs
from switch_jax.sweeps.runner import run_sweep
program = "import pathlib, time; pathlib.Path({begun!r}).touch(); time.sleep(600)"
run_sweep(fake_jobs(Path({folder!r}), {{"a": program}}))
"""


def test_a_run_whose_sweep_was_killed_keeps_its_lock_as_long_as_it_lives(tmp_path):
    begun = tmp_path / "begun"
    program = SWEEP_THAT_IS_KILLED.format(root=str(ROOT), begun=str(begun), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.time() + 120
    while not begun.exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    child = child_of(process)
    process.kill()
    process.wait()
    (made,) = fake_jobs(tmp_path, {"a": ""})
    try:
        with pytest.raises(BlockingIOError), locked_elsewhere(made.lock_file):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
    assert run_sweep([made]).finished == 1


def write_finished_run(workdir, config, scores):
    """Writes a run that has an evaluation and a checkpoint at each of these steps."""
    workdir.prepare(config, None)
    lines = [{"step": n, "split": "eval", "average": score} for n, score in scores.items()]
    workdir.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in scores:
        (workdir.checkpoints / str(step)).mkdir(parents=True)


def test_commands_have_config_overrides_seeds_and_checkpoints_of_required_runs(tmp_path):
    scores = {10: 0.5, 20: 0.7, 30: None, 40: 0.6}
    write_finished_run(Workdir(tmp_path / "runs" / "up-3"), tiny(), scores)
    best = tiny(**{"train.keep_best": "average"})
    write_finished_run(Workdir(tmp_path / "runs" / "tuned-3"), best, scores)
    run = SweepRun("c.py:n=1", {"init_from": "{run:up}", "distill.teacher": "{run:tuned}"})
    command = Job("down", 3, run, tiny(), tmp_path).command()
    assert command[1:6] == ["-m", "switch_jax", "train", "--config", "c.py:n=1"]
    assert set(command[6:-2]) == {
        f"--config.init_from={tmp_path}/runs/up-3",
        f"--config.distill.teacher={tmp_path}/runs/tuned-3/checkpoints/20",
        "--config.train.seed=3",
        "--config.data.seed=3",
    }
    assert command[-2:] == ["--workdir", f"{tmp_path}/runs/down-3"]


def test_the_last_logged_step_is_of_the_last_complete_line(tmp_path):
    workdir = Workdir(tmp_path)
    assert last_logged_step(workdir) == 0
    line = json.dumps({"step": 7, "split": "train"}) + "\n"
    workdir.metrics_file.write_text(line)
    assert last_logged_step(workdir) == 7
    workdir.metrics_file.write_text(line * 20_000 + line.replace("7", "8") + '{"step": 9')
    assert last_logged_step(workdir) == 8


def test_time_left_goes_by_work(monkeypatch, capfd):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with SweepDisplay({"a": 1.0, "b": 2.0, "c": 4.0}, set()) as display:
        display.start_run("a", 0.0)
        now[0] = 10.0
        display.end_run({"a"})
        display.start_run("b", 0.5)  # half of it was done before
        now[0] = 20.0
        display.end_run({"a", "b"})
        display.start_run("c", 0.0)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "run 1 of 3: a",
        "a finished after 10 s",
        "run 2 of 3: b  about 50 s left",
        "b finished after 10 s",
        "run 3 of 3: c  about 40 s left",
    ]


# configs/sweeps/experts_mini.py with one seed and smaller models, and a run that cannot be.
SWEEP = """
import dataclasses
from switch_jax.sweeps import load_sweep

def get_sweep(arg=""):
    made = load_sweep("configs/sweeps/experts_mini.py").but({small!r})
    bad = made.runs["dense"].but({{"data.data_dir": "/nowhere"}})
    return dataclasses.replace(made, runs={{**made.runs, "bad": bad}}, seeds=(0,))
"""
SMALL = {
    "model.vocab_size": 900,
    "model.d_model": 16,
    "model.d_ff": 32,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "moe.group_size": 32,
    "data.mixture": "text",
    "data.inputs_length": 32,
    "data.targets_length": 11,
    "data.batch_size": 4,
    "optimizer.warmup_steps": 10,
    "optimizer.cooldown_steps": 10,
    "train.steps": 90,
    "train.log_every": 1,
    "train.eval_every": 30,
    "train.eval_batches": 2,
    "train.checkpoint_every": 15,
    "mesh.data": 1,
}


@pytest.fixture(scope="module")
def tiny_sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    store = str(runs.make_store(folder))
    path = folder / "sweep.py"
    path.write_text(SWEEP.format(small=SMALL | {"data.data_dir": store}))
    return path


@pytest.fixture(scope="module")
def stopped_and_finished(tiny_sweep, tmp_path_factory):
    """A sweep that was stopped in its first run, and continued: its folder and its output."""
    folder = tmp_path_factory.mktemp("sweeps") / "sweep"
    command = ("sweep", "--config", tiny_sweep, "--workdir", folder)
    process = runs.start(*command, cwd=ROOT)
    runs.wait_for_step(process, folder / "runs" / "dense-0", 20)
    # As systemd and schedulers do, send the signal to the sweep and to the run.
    child = child_of(process)
    for pid in (process.pid, child):
        os.kill(pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    code = process.returncode
    before = last_logged_step(Workdir(folder / "runs" / "dense-0"))
    return folder, command, (code, out, before), runs.run(*command, code=2, cwd=ROOT)


@pytest.mark.slow
def test_a_stopped_sweep_reports_that_and_continues(stopped_and_finished):
    folder, _, (code, out, before), (_, err) = stopped_and_finished
    assert code == 128 + signal.SIGTERM
    assert "Stopped with 0 of 7 runs finished; the same command continues" in out
    printed = (folder / "jobs" / "dense-0.txt").read_text()
    (continued,) = re.findall(r"continuing from step (\d+)", printed)
    assert 20 <= int(continued) == before < 90
    names = ["dense", *(f"experts_{n}" for n in (2, 4, 8, 16, 64))]
    assert re.findall(r"(\w+)-0 finished", err) == names


@pytest.mark.slow
def test_a_failed_run_is_reported_in_one_sentence_at_the_end(stopped_and_finished):
    *_, (out, err) = stopped_and_finished
    *_, sentence = err.splitlines()
    assert sentence.startswith("switch-jax: 1 of 7 runs failed (bad-0;")
    assert "'/nowhere' does not exist" in err and "summary.md" in out


@pytest.mark.slow
def test_the_report_of_a_finished_sweep_is_complete(stopped_and_finished):
    folder, *_ = stopped_and_finished
    numbers = json.loads((folder / "summary.json").read_text())
    assert [len(run["seeds"]) for run in numbers["runs"].values()] == [1, 1, 1, 1, 1, 1, 0]
    rows = numbers["tables"]["experts"]["rows"]
    dense, sparse = rows["dense"], rows["64 experts"]
    gain = sparse["quality"]["mean"] - dense["quality"]["mean"]
    assert sparse["gain"]["mean"] == pytest.approx(gain) and gain != 0
    assert sparse["params"] > 2 * dense["params"]
    assert numbers["devices"][0].endswith("cpu")
    for name in ("experts", "steps", "seconds"):
        for ending in ("svg", "png"):
            assert (folder / "figures" / f"{name}.{ending}").stat().st_size > 1000
    page = without_images((folder / "index.html").read_text())
    assert "data:image/png;base64" in page and "http" not in page


@pytest.mark.slow
def test_finished_runs_are_not_trained_again_with_another_mesh(stopped_and_finished):
    folder, command, *_ = stopped_and_finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("jobs/[de]*.txt")}
    assert len(before) == 6
    # The mesh and the interval of logging may change.
    _, err = runs.run(
        *command, "--config.mesh.data=2", "--config.train.log_every=2", code=2, cwd=ROOT
    )
    assert "bad-0" in err and "dense-0" not in err and "experts" not in err
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_commands_are_of_the_unfinished_runs(stopped_and_finished, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder, command, *_ = stopped_and_finished
    assert main([*map(str, command), "--commands"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "switch_jax train --config switch_tiny:num_experts=0" in line
    assert line.endswith(f"--workdir {folder}/runs/bad-0")


@pytest.mark.slow
def test_a_sweep_in_one_of_several_processes_is_refused(stopped_and_finished, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("switch_jax.distributed.detect_launch", lambda seconds: Launch("x:1", 2, 0))
    assert main([*map(str, stopped_and_finished[1])]) == 2
    assert "--commands" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--config.train.steps=70", "--config.moe.z_loss_weight=0.1"])
@pytest.mark.slow
def test_a_folder_of_another_sweep_is_refused(stopped_and_finished, flag, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, command, *_ = stopped_and_finished
    assert main([*map(str, command), flag]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "another sweep" in err and flag[9:].split("=")[0] in err


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        prepare_sweep([Job("a", 0, SweepRun("c.py"), tiny(), tmp_path)], tmp_path)


def test_runs_may_be_added_and_removed_and_changed_until_they_begin(tmp_path):
    one, two, three = (Job(name, 0, SweepRun("c.py"), tiny(), tmp_path) for name in "abc")
    changed = dataclasses.replace(one, config=tiny(**{"moe.every": 1}))
    prepare_sweep([one, two], tmp_path)
    prepare_sweep([changed], tmp_path)
    one.workdir.prepare(one.config, None)
    prepare_sweep([one, three], tmp_path)
    with pytest.raises(
        UserError, match=r"another sweep \(moe\.every is 2 there and 1 here in a-0\)"
    ):
        prepare_sweep([changed, three], tmp_path)
    with pytest.raises(UserError, match=r"another sweep \(of a-0\)"):
        prepare_sweep([two, three], tmp_path)


def test_a_reference_may_be_a_path_in_a_run_that_has_begun(tmp_path):
    (down,) = fake_jobs(tmp_path, {"down": ""}, down="up")
    down = dataclasses.replace(down, config=tiny())
    config = override_config(tiny(), {"init_from": "/runs/up-0/checkpoints/100"})
    down.workdir.prepare(config, None)
    unresolved = dataclasses.replace(
        down, config=override_config(tiny(), {"init_from": "{run:up}"})
    )
    prepare_sweep([unresolved], tmp_path)
    with pytest.raises(UserError, match="init_from is '/runs/up-0/checkpoints/100' there"):
        prepare_sweep([down], tmp_path)


def test_runs_on_different_text_are_not_compared(tmp_path):
    jobs = fake_jobs(tmp_path, {"dense": "", "sparse": "", "larger": "", "other": ""})
    for number, key in ((2, "model.vocab_size"), (3, "data.seed")):
        jobs[number] = dataclasses.replace(jobs[number], config=tiny(**{key: 2048}))
    for job, source in zip(jobs, ("first", "first", "with a larger vocabulary", "second")):
        position = job.workdir.checkpoints / str(job.config.train.steps) / "data"
        position.mkdir(parents=True)
        (position / "position.json").write_text(json.dumps({"next_row": 8, "source": source}))
    check_same_text(jobs)  # `other` has another seed, and therefore another identity
    (position.parents[3] / "sparse-0").rename(tmp_path / "elsewhere")
    check_same_text(jobs)  # a run that is not finished
    (tmp_path / "elsewhere").rename(position.parents[3] / "sparse-0")
    changed = jobs[1].workdir.checkpoints / str(jobs[1].config.train.steps) / "data"
    (changed / "position.json").write_text(json.dumps({"next_row": 8, "source": "third"}))
    with pytest.raises(UserError, match=r"sparse-0 and dense-0 in .* trained on different text"):
        check_same_text(jobs)
