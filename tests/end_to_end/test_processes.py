"""Several processes as one run: started, stopped, killed, continued, refused; and their parts."""

import itertools
import json
import os
import shutil
import signal
import socket
import threading
import time

import jax
import numpy as np
import pytest

from switch_jax.checkpoint.checkpointer import Checkpointer
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.config.load import override_config
from switch_jax.data import open_batches
from switch_jax.distributed.cluster import Launch
from switch_jax.distributed.mesh import make_mesh
from switch_jax.distributed.rendezvous import wait_for_processes
from switch_jax.errors import UserError
from switch_jax.training.state import restore_state
from switch_jax.training.step import TrainProgram
from tests.support import runs
from tests.support import tasks as miniature

# As small as a model with experts can be: every process but the first compiles for itself.
SMALL = {
    "model.num_encoder_layers": 1,
    "model.num_decoder_layers": 1,
    "moe.every": 1,
    "moe.stacks": "encoder",
    "moe.jitter": 0.0,
    "train.steps": 60,
    "train.eval_batches": 1,
    "train.eval_every": 1000,
    "train.checkpoint_every": 20,
}

# `switch-jax` where process 1 cannot read checkpoint STEP and the others can.
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


def devices(count):
    """The tests' compiler flags with another number of devices."""
    return os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={count}")


def free_port(first=0, last=0):
    for port in range(first, last + 1):
        with socket.socket() as free:
            try:
                free.bind(("localhost", port))
            except OSError:
                continue
            return free.getsockname()[1]
    raise AssertionError("no free port")


def by_flags(count):
    address = f"localhost:{free_port()}"
    return [
        ([f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}"], {})
        for i in range(count)
    ]


def by_slurm(count):
    """What Slurm sets, and JAX finds: the port follows from the number of the job."""
    port = free_port(61440, 65535)
    common = {
        "SLURM_JOB_ID": str(port - 61440),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_TASKS": str(count),
    }
    return [([], common | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(count)]


def start(launches, command, script=None):
    """One process with one device for each of `launches`."""
    program = ["-m", "switch_jax"] if script is None else ["-c", script]
    return [
        runs.start(*command, *flags, program=program, XLA_FLAGS=devices(1), **environment)
        for flags, environment in launches
    ]


def ends(group, seconds=300):
    """Exit code, stdout and stderr of each; none may outlast `seconds`."""
    deadline = time.time() + seconds
    try:
        outputs = [p.communicate(timeout=max(1, deadline - time.time())) for p in group]
    finally:
        for process in group:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(group, outputs)]


def losses(workdir):
    """Cross-entropy of training, by step."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {m["step"]: m["cross_entropy"] for m in lines if m["split"] == "train"}


def same_losses(some, reference):
    """Up to rounding: sums over devices have another order."""
    assert some
    for step, value in some.items():
        assert value == pytest.approx(reference[step], abs=2e-5), step
    return True


def restored_anywhere(workdir, step):
    """The checkpoint of a step holds the same bits, and the same next rows, on any mesh."""
    made_with = Workdir(workdir).config()
    rows = next(itertools.islice(open_batches(made_with, "train"), step, None))
    states = []
    for mesh in ("data=1", "expert=4", "data=2,model=2", "data=4,fsdp=True"):
        sizes = {"mesh.data": "1", "mesh.expert": "1", "mesh.model": "1"}
        sizes |= {f"mesh.{item.split('=')[0]}": item.split("=")[1] for item in mesh.split(",")}
        config = override_config(made_with, sizes)
        program = TrainProgram(config, make_mesh(config))
        batches, checkpoints = open_batches(config, "train"), Checkpointer(Workdir(workdir), keep=3)
        state = restore_state(checkpoints, program.abstract_state, batches)
        checkpoints.close()
        assert int(state.step) == step
        assert jax.tree.all(jax.tree.map(np.array_equal, next(batches), rows))
        wanted = jax.tree.leaves(program.state_sharding)
        assert all(x.sharding == s for x, s in zip(jax.tree.leaves(state), wanted))
        states.append(jax.device_get(state))
    for state in states[1:]:
        assert jax.tree.all(jax.tree.map(np.array_equal, state, states[0]))
    return True


def test_four_two_and_one_process_are_one_run(config, tmp_path):
    """One process begins. Four continue, experts and model cut across them, without a checkpoint
    that one of them cannot read, until one signal stops them. One process continues that. Two
    begin anew, and one of them dies. All losses are those of the first process.
    """
    small = [f"--config.{key}={value}" for key, value in SMALL.items()]
    command = ["train", "--config", config, *small]
    workdir, four_dir, two_dir = (tmp_path / name for name in ("one", "four", "two"))
    one = [*command, "--config.mesh.data=2"]
    runs.run(*one, "--workdir", workdir, XLA_FLAGS=devices(2))
    reference = losses(workdir)

    # Four processes, each with half of the experts of half of the model
    shutil.copytree(workdir, four_dir)
    shutil.rmtree(four_dir / "checkpoints" / "60")
    (four_dir / "metrics.jsonl").unlink()
    four = start(
        by_flags(4),
        [*command, "--workdir", four_dir, "--config.mesh.expert=2", "--config.mesh.model=2"],
        UNREADABLE.format(step=40),
    )
    runs.wait_for_step(four[0], four_dir, 22)
    four[3].send_signal(signal.SIGTERM)
    codes, outs, errs = zip(*ends(four))
    assert codes == (128 + signal.SIGTERM,) * 4, errs
    assert "continuing from step 20" in errs[0]
    assert outs[0].startswith("Stopped at step ") and not any(outs[1:])
    of_four = losses(four_dir)
    stopped = max(of_four)
    assert {p.name for p in (four_dir / "checkpoints").iterdir()} == {
        "20",
        "corrupt-40",
        str(stopped),
    }
    assert same_losses(of_four, reference)
    assert restored_anywhere(four_dir, stopped)

    last = f"--config.train.steps={stopped + 3}"
    runs.run(*one, "--workdir", four_dir, last, XLA_FLAGS=devices(2))
    assert max(losses(four_dir)) == stopped + 3 and same_losses(losses(four_dir), reference)

    two = start(
        by_slurm(2),
        [*command, "--workdir", two_dir, "--config.mesh.data=2", "--config.mesh.fsdp=True"],
    )
    runs.wait_for_step(two[0], two_dir, 4)
    two[1].kill()
    (code, _, err), _ = ends(two, seconds=30)
    assert code not in (0, 128 + signal.SIGTERM), err
    assert same_losses(losses(two_dir), reference)


def test_two_processes_share_the_answers_to_a_task(config, tmp_path):
    """Five examples in batches of four: the last one is ragged, and each process has half."""
    for split in ("train", "validation"):
        pairs = [{"inputs": "so " * i + str(i), "targets": "a" * (9 - i)} for i in range(5)]
        miniature.write_jsonl(tmp_path / f"{split}.jsonl", pairs)
    changes = SMALL | {
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
    runs.run(*command, "--workdir", tmp_path / "one", XLA_FLAGS=devices(2))
    codes, outs, errs = zip(*ends(start(by_flags(2), [*command, "--workdir", tmp_path / "two"])))
    assert codes == (0, 0), errs
    assert "pairs." in outs[0] and "Best by cross_entropy" in outs[0] and not outs[1]
    [one], [two] = (list((tmp_path / name / "predictions/20").iterdir()) for name in ("one", "two"))
    assert one.read_text() == two.read_text()
    written = [json.loads(line)["prediction"] for line in one.read_text().splitlines()]
    assert len(written) == 5 and any(written)


def test_missing_processes_are_named_by_those_that_are_there(config, tmp_path):
    launches = by_flags(4)
    hosts = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "SWITCH_JAX_START_TIMEOUT": "4"}
    there = [(flags, hosts) for flags, _ in (launches[0], launches[2])]
    began = time.monotonic()
    found = ends(start(there, ["train", "--config", config, "--workdir", tmp_path / "run"]))
    assert time.monotonic() - began < 60
    for code, _, err in found:
        assert code == 2
        assert err.startswith(
            "switch-jax: 2 of 4 processes did not start within 4 s: process 1 (b)"
        )
        assert ", process 3 (d);" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def meet(count, come, seconds=5.0, facts=None):
    """What each of the processes in `come` is told, by threads that stand for them."""
    address = f"localhost:{free_port()}"
    facts = facts or [{}] * len(come)
    said = [None] * len(come)

    def run(place):
        try:
            wait_for_processes(Launch(address, count, come[place]), facts[place], seconds)
        except UserError as error:
            said[place] = str(error)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(come))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    return said


def test_processes_meet():
    assert meet(4, [3, 1, 0, 2], facts=[{"a": 1}] * 4) == [None] * 4


def test_missing_processes_are_named():
    said = meet(4, [0, 2], seconds=1)
    assert said[0] == said[1] and "2 of 4" in said[0] and "process 1, process 3;" in said[0]


def test_process_0_that_is_missing_is_named():
    said = meet(2, [1], seconds=1)
    assert "Process 0 cannot be reached at localhost:" in said[0]


def test_two_that_are_the_same_process_are_named():
    said = meet(3, [0, 1, 1], seconds=2)
    assert "started as process 1" in said[0] and said[0] in said[1:]


def test_another_config_is_named():
    facts = [{"train.seed": 0, "verb": "train"}, {"train.seed": 0, "verb": "train"}]
    said = meet(2, [0, 1], facts=[facts[0], facts[1] | {"train.seed": 7}])
    assert said[0] == said[1] and "Process 1 on" in said[0]
    assert "has train.seed = 7 and process 0 has 0" in said[0]


def test_strangers_and_those_who_left_are_no_processes():
    """One that came and left may come again, and whoever else knocks at the port is let go."""
    address = f"localhost:{free_port()}"
    failures = []

    def run(index):
        try:
            wait_for_processes(Launch(address, 3, index), {}, 20)
        except UserError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    threads[0].start()
    left = {"process": 1, "count": 3, "host": "x", "facts": {}}
    for message in ("GET / HTTP/1.1", json.dumps({"process": 1}), json.dumps(left)):
        for _ in range(100):
            try:
                talk = socket.create_connection(("localhost", int(address.split(":")[1])))
                break
            except OSError:
                time.sleep(0.05)
        talk.sendall(message.encode() + b"\n")
        time.sleep(0.3)
        talk.close()
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert not failures


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on port {port}"):
            wait_for_processes(Launch(f"localhost:{port}", 2, 0), {}, 1)
