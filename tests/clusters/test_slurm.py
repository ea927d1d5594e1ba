"""scripts/launch/slurm_gpu.sh under a real Slurm: jobs train, are stopped, killed and continued."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from switch_jax.distributed.cluster import expand_hostlist
from tests.support import runs, slurm
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(not slurm.IS_INSTALLED, reason=slurm.WHY_SKIPPED)

TEN_STEPS_MORE = "--config.train.steps=30"  # on another mesh, differences by rounding grow later
TWO_NODES = ["--nodes=2", "--gpus_per_node=0", "--config.mesh.expert=2"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files that the launcher needs, with a `.venv` that is installed already."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copy(ROOT / "setup.cfg", folder)
    commands = folder / ".venv" / "bin"
    commands.mkdir(parents=True)
    (commands / "python").symlink_to(sys.executable)
    (commands / "switch-jax").write_text(f'#!/bin/sh\nexec {sys.executable} -m switch_jax "$@"\n')
    (commands / "switch-jax").chmod(0o755)
    for stamp in (".installed", ".installed-cuda"):
        (folder / ".venv" / stamp).touch()
    return folder


@pytest.fixture(scope="module")
def launch(cluster, checkout, arguments):
    """Runs the launcher with some options for a tiny model."""
    environment = os.environ | cluster.environment | {"XLA_FLAGS": runs.xla_flags(1)}

    def launch(workdir, *options):
        words = ["bash", checkout / "scripts/launch/slurm_gpu.sh", *arguments, "--workdir", workdir]
        return subprocess.run(
            [*words, *options], env=environment, capture_output=True, text=True, timeout=60
        )

    return launch


@pytest.fixture(scope="module")
def submit(launch):
    """Submits a job with the launcher; returns its number."""

    def submit(workdir, *options):
        done = launch(workdir, *options)
        assert done.returncode == 0, done.stderr
        return int(re.search(r"^Submitted batch job (\d+)$", done.stdout, re.M)[1])

    return submit


@pytest.fixture(scope="module")
def uninterrupted(cluster, submit, tmp_path_factory):
    """WORKDIR of a job that trained on two nodes to its end, all at once."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "a b%j"
    job = submit(workdir, *TWO_NODES)
    cluster.wait_for_job(job, "COMPLETED")
    assert (workdir / f"slurm-{job}.log").exists()
    return workdir


@pytest.fixture
def workdir(cluster, uninterrupted, tmp_path):
    """WORKDIR of the same run at step 20, for jobs that are slow as long as `slow` is there."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    for step in (40, 60):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    (workdir / "metrics.jsonl").unlink()
    (workdir / "slow").touch()
    yield workdir
    cluster.command("scancel", "--user", str(os.getuid()))
    cluster.wait_until(lambda: not cluster.command("squeue", "--noheader"), "no jobs are left")


def wait_for_step(cluster, job, workdir, step):
    cluster.wait_for_job(job, "RUNNING")
    cluster.wait_until(
        lambda: step in runs.losses(workdir), f"step {step}", 300, lambda: log_of(workdir, job)
    )


def log_of(workdir, job):
    return (workdir / f"slurm-{job}.log").read_text()


def newest_checkpoint(workdir):
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir())


def same_run(workdir, uninterrupted):
    """Whether a continued run has the losses and last parameters of the other one, to the bit."""
    expected = runs.losses(uninterrupted)
    losses = runs.losses(workdir)
    assert max(losses) == 60 and losses == {step: expected[step] for step in losses}
    ends = [runs.checkpoint_parameters(folder, 60) for folder in (workdir, uninterrupted)]
    return runs.same_parameters(*ends)


def test_two_tasks_on_each_of_two_nodes_have_the_losses_of_one_task_on_each(
    cluster, submit, workdir, uninterrupted
):
    (workdir / "slow").unlink()
    mesh = ["--config.mesh.expert=2", "--config.mesh.data=2"]
    job = submit(workdir, "--nodes=2", "--gpus_per_node=2", *mesh, TEN_STEPS_MORE)
    nodes = cluster.wait_for_job(job, "COMPLETED")["NodeList"]
    assert expand_hostlist(nodes) == [*slurm.NODES]
    assert "continuing from step 20" in log_of(workdir, job)
    losses = runs.losses(workdir)
    assert max(losses) == 30 and runs.same_losses(losses, runs.losses(uninterrupted))


@pytest.mark.parametrize(
    ("command", "state"),
    [(["scancel"], "CANCELLED"), (["scancel", "--signal=TERM"], "FAILED")],
    ids=["scancel", "scancel --signal=TERM"],
)
def test_a_cancelled_job_saves_and_is_not_queued_again(command, state, cluster, submit, workdir):
    job = submit(workdir, *TWO_NODES)
    wait_for_step(cluster, job, workdir, 22)
    cluster.command(*command, str(job))
    ended = cluster.wait_for_job(job, state)
    assert ended["Restarts"] == "0"
    if state == "FAILED":
        assert ended["ExitCode"] == "143:0"
    cluster.wait_until(lambda: not cluster.processes(SLURM_JOB_ID=str(job)), "all have ended")
    steps = max(runs.losses(workdir))
    assert 22 <= steps < 60 and newest_checkpoint(workdir) == steps


def approach_the_time_limit(cluster, job):
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=10")


def requeue(cluster, job):
    cluster.command("scontrol", "requeue", str(job))


def preempt(cluster, job):
    options = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    cluster.command("sbatch", *options, "--wrap=true")


@pytest.mark.parametrize("interrupt", [approach_the_time_limit, requeue, preempt])
def test_a_job_that_slurm_ends_saves_and_continues_by_itself(
    interrupt, cluster, submit, workdir, uninterrupted
):
    job = submit(workdir, *TWO_NODES)
    wait_for_step(cluster, job, workdir, 22)
    interrupt(cluster, job)
    cluster.wait_for_job(job, "PENDING")
    steps = max(runs.losses(workdir))
    assert steps < 60 and newest_checkpoint(workdir) == steps
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    (workdir / "slow").unlink()
    assert cluster.wait_for_job(job, "COMPLETED")["Restarts"] == "1"
    assert f"continuing from step {steps}" in log_of(workdir, job)
    assert same_run(workdir, uninterrupted)


def test_a_killed_task_ends_the_job_and_the_same_command_continues(
    cluster, submit, workdir, uninterrupted
):
    job = submit(workdir, *TWO_NODES)
    wait_for_step(cluster, job, workdir, 22)
    [killed] = cluster.processes(SLURM_JOB_ID=str(job), SLURM_PROCID="0", SLURM_STEP_ID="0")
    os.kill(killed, signal.SIGKILL)
    cluster.wait_for_job(job, "FAILED", seconds=60)
    assert newest_checkpoint(workdir) == 20
    (workdir / "slow").unlink()
    cluster.wait_for_job(submit(workdir, *TWO_NODES), "COMPLETED")
    assert same_run(workdir, uninterrupted)


def test_a_run_continues_on_the_node_that_is_left(cluster, submit, workdir, uninterrupted):
    job = submit(workdir, *TWO_NODES)
    wait_for_step(cluster, job, workdir, 22)
    cluster.kill_node(slurm.NODES[1])
    try:
        cluster.wait_for_job(job, "PENDING", seconds=120)  # for the missing node
        cluster.command("scancel", str(job))
        (workdir / "slow").unlink()
        one_node = ["--nodes=1", "--gpus_per_node=0", "--config.mesh.expert=1"]
        job = submit(workdir, *one_node, TEN_STEPS_MORE)
        assert cluster.wait_for_job(job, "COMPLETED")["NodeList"] == slurm.NODES[0]
        assert "continuing from step 20" in log_of(workdir, job)
        losses = runs.losses(workdir)
        assert max(losses) == 30 and runs.same_losses(losses, runs.losses(uninterrupted))
    finally:
        cluster.start_node(slurm.NODES[1])


@pytest.mark.parametrize(
    "options", [["--nodes=3", "--gpus_per_node=0"], ["--nodes=2", "--gpus_per_node=5"]]
)
def test_a_job_that_no_nodes_can_run_is_refused(options, cluster, launch, tmp_path):
    done = launch(tmp_path / "run", *options)
    assert done.returncode == 2
    assert "Slurm has no such nodes for this job" in done.stderr.splitlines()[-1]
    assert not cluster.command("squeue", "--noheader") and not (tmp_path / "run").exists()
