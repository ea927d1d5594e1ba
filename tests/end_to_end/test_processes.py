"""Multi-process runs: equal losses, stops, dead processes and continuation."""

import itertools
import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from switch_jax.checkpoint.checkpointer import Checkpointer
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.config.load import override_config
from switch_jax.data import open_batches
from switch_jax.distributed.mesh import make_mesh
from switch_jax.training.state import restore_state
from switch_jax.training.step import TrainProgram
from tests.support import goldens, runs
from tests.support import tasks as miniature
from tests.support.paths import ODD_NAME
from tests.support.ports import free_port

# `switch-jax` where process 1 cannot read checkpoint `step` and the other processes can.
UNREADABLE = """
import sys
import jax
from switch_jax.checkpoint import Checkpointer
from switch_jax.cli import main

def restore(self, step, *rest, real=Checkpointer._restore_step):
    if step == {step} and jax.process_index() == 1:
        raise OSError("damaged for this test")
    return real(self, step, *rest)

Checkpointer._restore_step = restore
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return runs.write_config(folder, runs.make_store(folder))


def launches_by_flags(count):
    """Returns flags and environment variables of each process."""
    address = f"localhost:{free_port()}"
    return [
        ([f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}"], {})
        for i in range(count)
    ]


def launches_by_slurm(count):
    """Returns flags and environment variables of each process; the port follows from the job id."""
    port = free_port(range(61440, 65536))
    common = {
        "SLURM_JOB_ID": str(port - 61440),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_TASKS": str(count),
    }
    return [([], common | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(count)]


def start(launches, command, script=None):
    """Starts a process with one device for each of `launches`."""
    program = ["-m", "switch_jax"] if script is None else ["-c", script]
    return [
        runs.start(*command, *flags, program=program, XLA_FLAGS=runs.xla_flags(1), **environment)
        for flags, environment in launches
    ]


def wait_for_exit(processes, seconds=300):
    """Returns exit code, stdout and stderr of each process; kills them after `seconds`."""
    deadline = time.time() + seconds
    try:
        outputs = [p.communicate(timeout=max(1, deadline - time.time())) for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs)]


def restores_on_any_mesh(workdir, step):
    """Restores a checkpoint on several meshes, and compares states and next batches to the bit."""
    trained_config = Workdir(workdir).config()
    rows = next(itertools.islice(open_batches(trained_config, "train"), step, None))
    states = []
    for mesh in ("data=1", "expert=4", "data=2,model=2", "data=4,fsdp=True"):
        sizes = {"mesh.data": "1", "mesh.expert": "1", "mesh.model": "1"}
        sizes |= {f"mesh.{item.split('=')[0]}": item.split("=")[1] for item in mesh.split(",")}
        config = override_config(trained_config, sizes)
        program = TrainProgram(config, make_mesh(config))
        batches, checkpoints = open_batches(config, "train"), Checkpointer(Workdir(workdir), keep=3)
        state = restore_state(checkpoints, program.abstract_state, batches)
        checkpoints.close()
        assert int(state.step) == step
        assert jax.tree.all(jax.tree.map(np.array_equal, next(batches), rows))
        shardings = jax.tree.leaves(program.state_sharding)
        assert all(x.sharding == s for x, s in zip(jax.tree.leaves(state), shardings))
        states.append(jax.device_get(state))
    for state in states[1:]:
        assert jax.tree.all(jax.tree.map(np.array_equal, state, states[0]))
    return True


def test_losses_do_not_depend_on_the_number_of_processes(config, tmp_path):
    """One process trains. Four continue from step 20, with experts and model split over them and
    one checkpoint that process 1 cannot read, until a signal to one process stops them. One
    process continues their run. Two processes train from the start, and one of them is killed. All
    losses equal those of the first process.
    """
    small = [f"--config.{key}={value}" for key, value in runs.SMALL.items()]
    command = ["train", "--config", config, *small]
    workdir, four_dir, two_dir = (tmp_path / name for name in ("one", ODD_NAME, "two"))
    one_process = [*command, "--config.mesh.data=2"]
    runs.run(*one_process, "--workdir", workdir, XLA_FLAGS=runs.xla_flags(2))
    reference = runs.losses(workdir)

    # Four processes, each with half of the experts of half of the model
    shutil.copytree(workdir, four_dir)
    shutil.rmtree(four_dir / "checkpoints" / "60")
    (four_dir / "metrics.jsonl").unlink()
    four = start(
        launches_by_flags(4),
        [*command, "--workdir", four_dir, "--config.mesh.expert=2", "--config.mesh.model=2"],
        UNREADABLE.format(step=40),
    )
    runs.wait_for_step(four[0], four_dir, 22)
    four[3].send_signal(signal.SIGTERM)
    codes, outs, errs = zip(*wait_for_exit(four))
    assert codes == (128 + signal.SIGTERM,) * 4, errs
    assert "continuing from step 20" in errs[0]
    assert outs[0].startswith("Stopped at step ") and not any(outs[1:])
    four_losses = runs.losses(four_dir)
    stopped = max(four_losses)
    assert {p.name for p in (four_dir / "checkpoints").iterdir()} == {
        "20",
        "corrupt-40",
        str(stopped),
    }
    assert runs.same_losses(four_losses, reference)
    assert restores_on_any_mesh(four_dir, stopped)

    last = f"--config.train.steps={stopped + 3}"
    runs.run(*one_process, "--workdir", four_dir, last, XLA_FLAGS=runs.xla_flags(2))
    four_losses = runs.losses(four_dir)
    assert max(four_losses) == stopped + 3 and runs.same_losses(four_losses, reference)

    two = start(
        launches_by_slurm(2),
        [*command, "--workdir", two_dir, "--config.mesh.data=2", "--config.mesh.fsdp=True"],
    )
    runs.wait_for_step(two[0], two_dir, 4)
    two[1].kill()
    (code, _, err), _ = wait_for_exit(two, seconds=30)
    assert code not in (0, 128 + signal.SIGTERM), err
    assert runs.same_losses(runs.losses(two_dir), reference)


def test_two_processes_write_the_predictions_of_one_process(config, tmp_path):
    """Five examples in batches of four: the last batch is not full; each process has half."""
    for split in ("train", "validation"):
        pairs = [{"inputs": "so " * i + str(i), "targets": "a" * (9 - i)} for i in range(5)]
        miniature.write_jsonl(tmp_path / f"{split}.jsonl", pairs)
    changes = runs.SMALL | {
        "data.mixture": f"pairs:{tmp_path}/{{split}}.jsonl",
        "data.data_dir": "none",
        "data.vocabulary": "bytes",
        "model.vocab_size": 384,
        "optimizer.learning_rate": 2.0,
        "train.steps": 20,
        "train.keep_best": "cross_entropy",
        "train.checkpoint_every": 1000,
        "mesh.data": 2,
    }
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    command = ["train", "--config", config, *flags]
    runs.run(*command, "--workdir", tmp_path / "one", XLA_FLAGS=runs.xla_flags(2))
    codes, outs, errs = zip(
        *wait_for_exit(start(launches_by_flags(2), [*command, "--workdir", tmp_path / "two"]))
    )
    assert codes == (0, 0), errs
    assert "pairs." in outs[0] and "Best by cross_entropy" in outs[0] and not outs[1]
    [one], [two] = (list((tmp_path / name / "predictions/20").iterdir()) for name in ("one", "two"))
    assert one.read_text() == two.read_text()
    written = [json.loads(line)["prediction"] for line in one.read_text().splitlines()]
    assert len(written) == 5 and any(written)


def test_one_process_writes_answers_and_all_refuse_what_it_refuses(tmp_path):
    output = tmp_path / "out.jsonl"
    command = ["generate", "--workdir", goldens.WORKDIR / "run", "--text", "import ___ as np"]
    command += ["--max_length=4", "--output", output]
    codes, outs, errs = zip(*wait_for_exit(start(launches_by_slurm(2), command)))
    assert codes == (0, 0), errs
    assert outs == (f"{output}: 1 answered\n", "")
    assert json.loads(output.read_text())["text"] == "import ___ as np"
    output.rename(tmp_path / "out.jsonl.partial")
    codes, outs, errs = zip(*wait_for_exit(start(launches_by_slurm(2), command)))
    assert codes == (2, 2) and outs == ("", "")
    assert "out.jsonl.partial is a file; move it" in errs[0]
    assert "Process 0 cannot go on; its own message says why." in errs[1]


def test_every_started_process_names_the_missing_ones(config, tmp_path):
    launches = launches_by_flags(4)
    hosts = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "SWITCH_JAX_START_TIMEOUT": "4"}
    started = [(flags, hosts) for flags, _ in (launches[0], launches[2])]
    start_time = time.monotonic()
    results = wait_for_exit(
        start(started, ["train", "--config", config, "--workdir", tmp_path / "run"])
    )
    assert time.monotonic() - start_time < 60
    for code, _, err in results:
        assert code == 2
        assert err.startswith(
            "switch-jax: 2 of 4 processes did not start within 4 s: process 1 (b)"
        )
        assert ", process 3 (d);" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
