"""Runs that diverge: they stop or skip the update, and keep only finite checkpoints."""

import json

import numpy as np
import pytest

from switch_jax.checkpoint.workdir import Workdir
from switch_jax.data.batch import SyntheticIterator
from switch_jax.errors import NotFiniteError
from switch_jax.training import start
from switch_jax.training.finite_guard import MAX_SKIPPED_IN_A_ROW, FiniteGuard
from switch_jax.training.loop import train
from tests.support import runs
from tests.support.configs import tiny

SETTINGS = {
    "data.reader": "synthetic",
    "mesh.data": 1,
    "model.num_encoder_layers": 1,
    "model.num_decoder_layers": 1,
    "moe.num_experts": 0,
    "optimizer.name": "lion",
    "optimizer.warmup_steps": 1,
    "train.steps": 6,
    "train.log_every": 2,
    "train.eval_every": 6,
    "train.eval_batches": 1,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 2,
}


def metrics(step, **values):
    good = {"loss": 1.0, "grad_norm": 1.0, "param_norm": 1.0} | values
    return good | {"finite": all(np.isfinite(value) for value in good.values())}


def test_a_run_stops_at_the_first_step_that_is_not_finite():
    guard = FiniteGuard("stop")
    assert guard.check(1, metrics(1), wait=False) is None
    bad = metrics(2, grad_norm=np.inf)
    assert guard.check(2, bad, wait=False) is None  # the device may still compute it
    divergence = guard.check(3, metrics(3, loss=np.nan), wait=False)
    assert divergence.step == 2 and divergence.metrics is bad
    assert str(divergence.error).startswith("The norm of the gradients is inf at step 2; ")

    for values, words in [
        ({"loss": np.nan}, "The loss is nan"),
        ({"param_norm": np.inf}, "Step 7"),
    ]:
        divergence = FiniteGuard("stop").check(7, metrics(7, **values), wait=True)
        assert words in str(divergence.error)


def test_skipped_updates_are_counted_and_too_many_in_a_row_stop():
    guard, bad = FiniteGuard("skip"), {"loss": np.nan}
    for step in range(1, MAX_SKIPPED_IN_A_ROW):
        assert guard.check(step, metrics(step, **bad), wait=True) is None
    assert guard.check(10, metrics(10), wait=True) is None
    assert guard.skipped_steps == MAX_SKIPPED_IN_A_ROW - 1
    for step in range(11, 10 + MAX_SKIPPED_IN_A_ROW):
        assert guard.check(step, metrics(step, **bad), wait=True) is None
    last = 10 + MAX_SKIPPED_IN_A_ROW
    divergence = guard.check(last, metrics(last, **bad), wait=True)
    assert divergence.step == last and "9 steps before were skipped" in str(divergence.error)


def train_with_bad_batches(monkeypatch, config, workdir, *bad_steps):
    """Trains; the loss weights of the batches of `bad_steps` are infinite."""

    class Batches(SyntheticIterator):
        def make_rows(self, numbers):
            batch = super().make_rows(numbers)
            if numbers[0] // config.data.batch_size + 1 in bad_steps:
                batch["decoder_loss_weights"] *= np.inf
            return batch

    monkeypatch.setattr(start, "open_batches", lambda config, split, rows: Batches(config, rows))
    return train(config, workdir)


def logged(workdir, split="train"):
    lines = map(json.loads, workdir.metrics_file.read_text().splitlines())
    return [line for line in lines if line["split"] == split]


def test_a_diverged_run_keeps_its_finite_checkpoints(monkeypatch, tmp_path):
    config, workdir = tiny(**SETTINGS), Workdir(tmp_path / "run")
    with pytest.raises(NotFiniteError, match=r"The loss is nan at step 4; .* train\.on_nonfinite"):
        train_with_bad_batches(monkeypatch, config, workdir, 4)
    assert {path.name for path in workdir.checkpoints.iterdir()} == {"2", "3"}
    for step in (2, 3):
        params = runs.checkpoint_parameters(workdir.path, step)
        assert all(np.isfinite(value).all() for value in params.values())
    assert [(line["step"], line["loss"] is None) for line in logged(workdir)] == [
        (2, False),
        (4, True),
    ]


def test_a_skipped_update_changes_no_parameter_and_no_optimizer_state(monkeypatch, tmp_path):
    config = tiny(**SETTINGS | {"train.on_nonfinite": "skip", "train.keep_checkpoints": 6})
    workdir = Workdir(tmp_path / "run")
    assert train_with_bad_batches(monkeypatch, config, workdir, 3, 4, 5) is None
    lines = logged(workdir)
    # The checkpoint of step 3 follows a skipped step, so that its count is logged before.
    assert [(line["step"], line["skipped_steps"]) for line in lines] == [
        (2, 0),
        (3, 1),
        (4, 1),
        (5, 1),
        (6, 0),
    ]
    params = {step: runs.checkpoint_parameters(workdir.path, step) for step in (2, 5, 6)}
    assert runs.same_parameters(params[2], params[5])
    assert not any((params[5][name] == params[6][name]).all() for name in params[5])
    assert all(np.isfinite(value).all() for value in params[6].values())
    assert lines[-1]["learning_rate"] == pytest.approx(0.1 / np.sqrt(5))
