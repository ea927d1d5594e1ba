"""Runs, packed text, conversions and figures in buckets of Google and of S3."""

import json
import re
import signal
import time

import pytest

from switch_jax.checkpoint import find_pretrained
from switch_jax.checkpoint.workdir import step_numbers
from switch_jax.data import read_vocabulary
from switch_jax.files import as_path
from tests.support import runs
from tests.support.buckets import reachable_bucket
from tests.support.ports import free_port

STEPS = 90  # of the config in `runs`


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request):
    """URL of a bucket of a server that this process and those that it starts reach."""
    with reachable_bucket(request.param) as url:
        yield url


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Folder with a store, and a WORKDIR of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("local")
    config = runs.write_config(folder, runs.make_store(folder))
    runs.run("train", "--config", config, "--workdir", folder / "run")
    return folder


@pytest.fixture(scope="module")
def workdir(bucket, local):
    """URL of a WORKDIR, and of a store beside it, of a run that was killed and continued."""
    text = f"--config.data.mixture={local}/text-{{split}}.jsonl"
    vocabulary = f"--config.data.vocabulary={local}/tiny.model"
    pack = ("data", "pack", "--config", local / "tiny.py", text, vocabulary)
    data_dir = "--config.data.data_dir=None"
    runs.run(*pack, data_dir, "--output", f"{bucket}/store", "--workers", 1)

    url = f"{bucket}/runs/killed"
    store = f"--config.data.data_dir={bucket}/store"
    often = "--config.train.checkpoint_every=5"  # so that the kill comes before the end
    command = ("train", "--config", local / "tiny.py", store, often, "--workdir", url)
    killed = runs.start(*command)
    wait_for_checkpoint(killed, url, step=10)
    killed.kill()
    killed.wait()
    _, err = runs.run(*command)
    assert "continuing from step" in err
    return url


def wait_for_checkpoint(process, workdir, step):
    """Waits until a running `switch-jax train` has saved a checkpoint of `step` or a later one."""
    deadline = time.time() + 300
    while max(step_numbers(as_path(workdir) / "checkpoints"), default=0) < step:
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.1)


def own_lines(err):
    """Returns the lines of stderr without TensorStore's on the credentials of these tests."""
    return [line for line in err.splitlines() if "GOOGLE_AUTH_TOKEN_FOR_TESTING" not in line]


def test_a_pack_in_a_bucket_has_the_bytes_of_one_on_a_disk(bucket, workdir, local):
    files = [path for path in (local / "store").rglob("*") if path.is_file()]
    assert len(files) > 5
    for file in files:
        name = file.relative_to(local / "store").as_posix()
        stored = as_path(f"{bucket}/store/{name}").read_bytes()
        if name != "manifest.json":  # which names the sources
            assert stored == file.read_bytes(), name


def test_a_run_killed_and_continued_equals_an_uninterrupted_one_to_the_bit(workdir, local):
    assert runs.same_parameters(
        runs.checkpoint_parameters(workdir, STEPS),
        runs.checkpoint_parameters(local / "run", STEPS),
    )
    stored = as_path(workdir) / "metrics.jsonl"
    expected = (local / "run" / "metrics.jsonl").read_text()
    assert runs.untimed_metrics(stored.read_text()) == runs.untimed_metrics(expected)
    assert not (as_path(workdir) / "train.lock").exists()


def test_every_verb_reads_a_run_in_a_bucket(bucket, workdir, local):
    text = local / "text.txt"
    text.write_text("def f(x):\n    return ___\n")
    on_disk = local / "run"
    for verb, *flags in (("eval", "--json"), ("generate", "--input", text)):
        expected, _ = runs.run(verb, "--workdir", on_disk, *flags)
        assert runs.run(verb, "--workdir", workdir, *flags)[0] == expected
    assert f" {workdir}/checkpoints/" in runs.run("eval", "--workdir", workdir)[0]
    answers = f"{bucket}/answers/all.jsonl"
    runs.run("generate", "--workdir", workdir, "--input", text, "--output", answers)
    assert [json.loads(line)["text"] for line in as_path(answers).read_text().splitlines()] == (
        text.read_text().splitlines()
    )
    out, _ = runs.run("plot", "--workdir", workdir)
    assert all((as_path(figure)).read_bytes() for figure in out.split())
    assert f"{workdir}/figures/loss.png" in out
    out, _ = runs.run("experts", "--workdir", workdir)
    assert (as_path(workdir) / "experts" / "experts.html").exists()
    assert f"{workdir}/experts/experts.html" in out


def test_conversions_and_vocabularies_are_written_to_a_bucket_and_read_there(
    bucket, workdir, local
):
    runs.run("convert", "to-hf", workdir, f"{bucket}/hf")
    runs.run("convert", "from-hf", f"{bucket}/hf", f"{bucket}/again")
    original = runs.checkpoint_parameters(workdir, STEPS)
    for again in (find_pretrained(f"{bucket}/again"), find_pretrained(f"{bucket}/hf")):
        assert again.shapes.keys() == original.keys()
        for name in ("encoder/final_norm/scale", *list(original)[:3]):
            assert (again.read_merged(name) == original[name]).all(), name
    runs.run("eval", "--workdir", f"{bucket}/again")

    vocabulary = f"{bucket}/vocabularies/tiny.model"
    text = f"--config.data.mixture={local}/text-{{split}}.jsonl"
    settings = (text, "--config.data.data_dir=None", "--config.model.vocab_size=900")
    runs.run("data", "vocab", "--config", local / "tiny.py", *settings, "--output", vocabulary)
    assert read_vocabulary(vocabulary).size <= 900


def test_what_a_bucket_cannot_do_is_told(bucket, workdir, local):
    train = ("train", "--config", local / "tiny.py", "--workdir")
    for arguments, sentence in (
        (("eval", "--workdir", f"{bucket}/runs/none"), "does not exist"),
        (("eval", "--workdir", f"{bucket}-of-others/runs/a"), "does not exist|cannot be reached"),
        (("convert", "to-hf", workdir, f"{bucket}/store"), "store exists"),
        (("convert", "from-hf", f"{bucket}/nothing", f"{bucket}/out"), "does not exist"),
        (
            ("generate", "--workdir", workdir, "--text", "a", "--output", f"{workdir}/config.json"),
            "exists",
        ),
        (("sweep", "--config", "experts_mini", "--workdir", f"{bucket}/sweep"), "needs locks"),
        ((*train, workdir, "--config.model.d_model=32"), "holds another run"),
    ):
        _, err = runs.run(*arguments, code=2)
        assert re.search(sentence, err), err
        assert [line.startswith("switch-jax: ") for line in own_lines(err)] == [True], err


def test_only_one_process_trains_in_a_bucket(bucket, workdir, local):
    command = ("train", "--config", local / "tiny.py", "--workdir", f"{bucket}/runs/two")
    first = runs.start(*command, "--config.train.steps=100000")
    wait_for_checkpoint(first, f"{bucket}/runs/two", step=15)
    _, err = runs.run(*command, code=2)
    assert f"Process {first.pid} on" in err and f"trains in {bucket}/runs/two" in err
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=300)
    assert first.returncode == 128 + signal.SIGTERM
    assert not (as_path(bucket) / "runs" / "two" / "train.lock").exists()


def test_two_processes_train_in_a_bucket_of_google(bucket, local):
    url = f"{bucket}/runs/together"
    flags = ["--config.mesh.expert=2", "--config.mesh.data=1", "--config.train.steps=10"]
    command = ("train", "--config", local / "tiny.py", "--workdir", url, *flags)
    environment = {"XLA_FLAGS": runs.xla_flags(1)}
    address = f"localhost:{free_port()}"
    started = [
        runs.start(
            *command,
            f"--coordinator={address}",
            "--num_processes=2",
            f"--process_id={i}",
            **environment,
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    codes = [process.returncode for process in started]
    if bucket.startswith("s3://"):
        assert codes == [2, 2] and "takes the checkpoints of one process only" in errors[0]
        return
    assert codes == [0, 0], errors
    together = runs.losses(url)
    assert len(together) == 10
    assert runs.same_losses(together, runs.losses(local / "run"))
    assert runs.checkpoint_parameters(url, 10)
