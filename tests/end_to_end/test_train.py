"""Interrupted, finished, damaged and refused training runs."""

import shutil
import signal

import pytest

from switch_jax.checkpoint import Workdir
from switch_jax.cli import main
from switch_jax.errors import UserError
from tests.support import runs


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return runs.write_config(folder, runs.make_store(folder))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """WORKDIR of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    runs.run("train", "--config", config, "--workdir", workdir)
    return workdir


def metrics(workdir):
    """Returns the lines of metrics.jsonl without measured times."""
    return runs.untimed_metrics((workdir / "metrics.jsonl").read_text())


def test_an_interrupted_run_equals_an_uninterrupted_one_to_the_bit(config, finished, tmp_path):
    workdir = tmp_path / "killed"
    command = ("train", "--config", config, "--workdir", workdir)

    stopped = runs.start(*command)
    runs.wait_for_step(stopped, workdir, 20)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(timeout=120) == 128 + signal.SIGTERM
    assert "same command continues" in stopped.stdout.read()

    killed = runs.start(*command)
    runs.wait_for_step(killed, workdir, 50)
    with pytest.raises(UserError, match=f"Process {killed.pid} on .* trains in"):
        Workdir(workdir).lock().__enter__()  # as a second run does before it writes anything
    killed.kill()
    killed.wait()

    _, err = runs.run(*command)
    assert "continuing from step" in err
    assert runs.same_parameters(
        runs.checkpoint_parameters(workdir, 90), runs.checkpoint_parameters(finished, 90)
    )
    assert metrics(workdir) == metrics(finished)


def test_a_finished_run_is_reported_and_not_changed(config, finished):
    before = (finished / "metrics.jsonl").read_bytes()
    out, _ = runs.run("train", "--config", config, "--workdir", finished)
    assert "finished: step 90 of 90" in out
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"60", "75", "90"}


def test_a_damaged_checkpoint_is_renamed_and_the_one_before_is_used(config, finished, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(finished, workdir)
    for file in (workdir / "checkpoints" / "90" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    _, err = runs.run("train", "--config", config, "--workdir", workdir)
    assert "Checkpoint 90 cannot be read" in err and "continuing from step 75" in err
    assert runs.same_parameters(
        runs.checkpoint_parameters(workdir, 90), runs.checkpoint_parameters(finished, 90)
    )
    assert (workdir / "checkpoints" / "corrupt-90").exists()


@pytest.mark.parametrize(
    "change", ["model.d_ff=48", "moe.num_experts=2", "optimizer.name=adamw", "data.reader=seqio"]
)
def test_a_workdir_of_another_model_is_refused(config, finished, change):
    before = (finished / "config.json").read_bytes()
    key, value = change.split("=")
    _, err = runs.run(
        "train", "--config", config, f"--config.{change}", "--workdir", finished, code=2
    )
    assert key in err and value in err and "--workdir" in err and err.count("\n") == 1
    assert (finished / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "objective, reader, router",
    [
        ("iid_denoising", "store", {"router": "switch"}),
        ("prefix_lm", "store", {"router": "hash", "jitter": 0}),
        ("ul2", "store", {"router": "top_k", "top_k": 2}),
        ("ul2", "seqio", {"router": "switch"}),
    ],
)
def test_a_run_of_any_objective_learns_and_continues(config, tmp_path, objective, reader, router):
    command = ["train", "--config", str(config), "--workdir", str(tmp_path / "run")]
    command += ["--config.data.objective", objective, "--config.data.targets_length=36"]
    command += [f"--config.moe.{key}={value}" for key, value in router.items()]
    command += ["--config.data.pack=True"]
    command += ["--config.model.dropout_rate=0.0", "--config.train.eval_every=20"]
    if reader == "seqio":
        text = config.parent / "text-{split}.jsonl"
        command += ["--config.data.reader=seqio", f"--config.data.mixture={text}"]
        command += ["--config.data.data_dir=None"]
        command += [f"--config.data.vocabulary={config.parent / 'tiny.model'}"]
    assert main([*command, "--config.train.steps=15"]) == 0
    assert main([*command, "--config.train.steps=60"]) == 0
    lines = metrics(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 60
    assert sum(losses[-10:]) < sum(losses[:10]) - 5
    assert any(key.endswith("neg_log_perplexity") for line in lines for key in line)
