"""`switch-jax train` under a real Open MPI, by itself and inside a job of a real Slurm."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import runs, slurm

pytestmark = pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="needs Open MPI: apt-get install openmpi-bin"
)

needs_slurm = pytest.mark.skipif(not slurm.IS_INSTALLED, reason=slurm.WHY_SKIPPED)

# As root, and with more processes than cores.
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe"]
TRAIN = [sys.executable, "-m", "switch_jax", "train"]


@pytest.fixture(scope="module")
def command(arguments):
    """Returns words that train in two processes, each with half of the experts."""

    def command(workdir):
        train = [*TRAIN, *arguments, "--config.mesh.expert=2", f"--workdir={workdir}"]
        return [*MPIRUN, "-n", "2", *train]

    return command


def start(command):
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": runs.xla_flags(1)},
    )


def finish(mpirun, code=0, seconds=300):
    """Waits for mpirun, which must exit with a code; returns stdout and stderr."""
    out, err = mpirun.communicate(timeout=seconds)
    assert mpirun.returncode == code, err
    return out, err


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    """WORKDIR of a run of two processes that trained to its end, all at once."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    finish(start(command(workdir)))
    assert max(runs.losses(workdir)) == 60
    return workdir


def process_of(mpirun, rank):
    """Returns a process that mpirun has started, by its rank."""
    children = Path(f"/proc/{mpirun.pid}/task/{mpirun.pid}/children").read_text().split()
    variable = f"OMPI_COMM_WORLD_RANK={rank}"
    [pid] = [
        int(pid)
        for pid in children
        if variable in Path(f"/proc/{pid}/environ").read_text().split("\0")
    ]
    return pid


def test_a_killed_process_ends_the_run_and_the_same_command_continues(
    command, uninterrupted, tmp_path
):
    (tmp_path / "slow").touch()
    mpirun = start(command(tmp_path))
    runs.wait_for_step(mpirun, tmp_path, 22)
    os.kill(process_of(mpirun, 1), signal.SIGKILL)
    _, err = finish(mpirun, code=128 + signal.SIGKILL, seconds=60)
    assert "process rank 1" in err and "exited on signal 9" in err
    (tmp_path / "slow").unlink()
    _, err = finish(start(command(tmp_path)))
    assert "continuing from step 20" in err
    assert runs.losses(tmp_path) == runs.losses(uninterrupted)
    ends = [runs.checkpoint_parameters(folder, 60) for folder in (tmp_path, uninterrupted)]
    assert runs.same_parameters(*ends)


def test_a_signal_to_one_process_stops_both_with_a_checkpoint(command, tmp_path):
    (tmp_path / "slow").touch()
    mpirun = start(command(tmp_path))
    runs.wait_for_step(mpirun, tmp_path, 3)
    os.kill(process_of(mpirun, 1), signal.SIGTERM)
    out, _ = finish(mpirun, code=128 + signal.SIGTERM)
    step = max(runs.losses(tmp_path))
    assert f"Stopped at step {step};" in out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(step)]


def test_processes_with_different_configs_end_with_a_sentence(arguments, tmp_path):
    train = [*TRAIN, *arguments, f"--workdir={tmp_path}/run"]
    other = [*train, "--config.optimizer.warmup_steps=7"]
    _, err = finish(start([*MPIRUN, "-n", "1", *train, ":", "-n", "1", *other]), code=2)
    assert "has optimizer.warmup_steps = 7 and process 0 has 10; start all processes alike" in err
    assert "Traceback" not in err and not (tmp_path / "run").exists()


def run_in_slurm(cluster, command, state, folder):
    """Runs a command in a job of one node and three tasks, up to a state; returns its log."""
    command = ["env", f"XLA_FLAGS={runs.xla_flags(1)}", *command]
    options = ["--parsable", "--nodes=1", "--ntasks=3", f"--output={folder}/log"]
    job = int(cluster.command("sbatch", *options, f"--wrap={shlex.join(command)}"))
    cluster.wait_for_job(job, state)
    return (folder / "log").read_text()


@needs_slurm
def test_in_a_slurm_job_the_processes_of_mpirun_count(cluster, command, uninterrupted, tmp_path):
    """Not the tasks of Slurm: mpirun starts one on the node, which starts both processes."""
    run_in_slurm(cluster, command(tmp_path / "run"), "COMPLETED", tmp_path)
    assert runs.losses(tmp_path / "run") == runs.losses(uninterrupted)


@needs_slurm
def test_processes_of_mpirun_that_look_like_tasks_of_slurm_are_refused(cluster, command, tmp_path):
    """Open MPI 5 does not set the variable by which JAX knows its processes."""
    program = command(tmp_path / "run")
    first = program.index(sys.executable)
    program[first:first] = ["env", "--unset=OMPI_MCA_orte_hnp_uri"]
    log = run_in_slurm(cluster, program, "FAILED", tmp_path)
    assert (
        "switch-jax: The launchers' variables contradict each other: OMPI_COMM_WORLD_SIZE is 2"
        in log
    )
    assert not (tmp_path / "run").exists()
