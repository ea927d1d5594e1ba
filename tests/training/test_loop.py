"""Training loop: starts that are refused or that change a run; schedules that do not fit."""

import dataclasses

import pytest

from switch_jax.checkpoint.workdir import Workdir
from switch_jax.errors import UserError
from switch_jax.training import start
from switch_jax.training.loop import train
from switch_jax.training.optimizer import schedule_warnings
from tests.support.configs import tiny

CONFIG = tiny(**{"data.reader": "synthetic", "mesh.data": 1, "moe.num_experts": 0})


def contents(folder):
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def refuse(*arguments):
    raise UserError("It does not fit; change it.")


@pytest.mark.parametrize("refusing", ["make_initial_state", "teacher_parameters"])
def test_a_refused_start_of_a_new_run_makes_no_folder(monkeypatch, tmp_path, refusing):
    monkeypatch.setattr(start, "make_initial_state", lambda program: program.init())
    monkeypatch.setattr(start, refusing, refuse)
    with pytest.raises(UserError, match="It does not fit"):
        train(CONFIG, Workdir(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_refused_start_of_a_run_that_has_begun_changes_nothing(tmp_path):
    workdir = Workdir(tmp_path / "run")
    workdir.prepare(CONFIG, None)
    (workdir.checkpoints / "7").mkdir(parents=True)
    workdir.lock_file.touch()
    before = contents(workdir.path)
    more = dataclasses.replace(CONFIG.train, steps=200)
    with pytest.raises(UserError, match="heckpoint"):
        train(dataclasses.replace(CONFIG, train=more), workdir)
    after = contents(workdir.path)
    assert after.pop(workdir.lock_file.relative_to(workdir.path)) is not None
    assert {path: before[path] for path in after} == after


def test_a_new_run_needs_the_model_that_its_config_leaves_to_a_checkpoint(tmp_path):
    config = dataclasses.replace(CONFIG, init_model="checkpoint")
    with pytest.raises(UserError, match="set init_from, or set init_model=config"):
        train(config, Workdir(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_values_that_changed_since_the_last_start_are_told(tmp_path, capsys):
    def told(rate: float, **settings) -> str:
        config = dataclasses.replace(
            CONFIG,
            optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=rate),
            train=dataclasses.replace(CONFIG.train, **settings),
        )
        assert train(config, Workdir(tmp_path / "run")) is None
        lines = capsys.readouterr().err.splitlines()
        return "".join(line for line in lines if "was started with" in line)

    assert not told(0.5, steps=1)
    assert not told(0.5, steps=1, log_every=7)
    changed = "optimizer.learning_rate is 0.5 there and 0.25 here; train.steps is 1 there and 2"
    assert told(0.25, steps=2).endswith(f"run was started with other values: {changed} here.")
    assert told(0.5, steps=2).endswith("here. This run is finished; they have no effect.")


def test_a_schedule_that_does_not_fit_into_the_run_is_told():
    schedule = {
        "optimizer.schedule": "constant",
        "optimizer.learning_rate": 1.0,
        "optimizer.warmup_steps": 50,
        "optimizer.cooldown_steps": 50,
    }
    assert not schedule_warnings(tiny(**schedule, **{"train.steps": 100}))
    (warning,) = schedule_warnings(tiny(**schedule, **{"train.steps": 20}))
    assert "optimizer.warmup_steps=50" in warning and "train.steps=20" in warning
    # (step + 1) / 50 · (20 - step) / 50 is highest in the middle.
    assert warning.endswith("the learning rate is at most 0.0441")
