"""Command line: reports of wrong input, and the verbs end to end."""

import ctypes
import io
import json
import signal
import subprocess
import sys
import time

import pytest

from switch_jax.cli.main import main
from switch_jax.errors import NotFiniteError, UserError
from tests.support import runs

TRAIN_ONE_STEP = ["--config.train.steps=1", "--config.train.eval_batches=1"]

# A command where importing these fails as if they were not installed.
BLOCKED = """
import sys
for name in ("tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio"):
    sys.modules[name] = None
import importlib, pkgutil, switch_jax
for module in pkgutil.walk_packages(switch_jax.__path__, "switch_jax."):
    name = module.name
    if name != "switch_jax.__main__" and not name.startswith("switch_jax.data.seqio_"):
        importlib.import_module(module.name)
from switch_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""

# A command line that computes with 36 MB buffers; prints how many pages the kernel gives the last
# 20 runs. The thread stands for those of libraries, which may have a heap before JAX starts.
PAGE_FAULTS = """
import contextlib, resource, sys, threading
from switch_jax import __main__ as entry
sys.argv = ["switch-jax", "--version"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None):
    entry.main()
barrier = threading.Barrier(5)
for _ in range(4):
    threading.Thread(target=lambda: (bytearray(10**5), barrier.wait()), daemon=True).start()
barrier.wait()
from switch_jax.cli.startup import start_jax
start_jax()
import jax, jax.numpy as jnp
matmul, x = jax.jit(lambda x: (x * 2) @ x.T), jnp.ones((3000, 3000))
faults = []
for _ in range(40):
    matmul(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[19])
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return runs.write_config(folder, runs.make_store(folder))


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["train", "--config", str(config), "--workdir", str(path)]
    assert main([*arguments, "--config.train.steps=4"]) == 0
    return path


def failure(capsys, *arguments):
    """The one sentence on stderr of a command that must end with code 2."""
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("switch-jax: ") and err.endswith("\n")
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


def test_control_characters_in_messages_are_escaped(capsys):
    err = failure(capsys, "train", "--config", "a\x1b[2J\nb.py", "--workdir", "x")
    assert r"a\x1b[2J\nb.py" in err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Unable to initialize backend 'foo': Backend 'foo' is not in the list."),
        ValueError("invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
        ValueError('Invalid value "x" for JAX flag jax_num_cpu_devices'),
    ],
)
def test_wrong_settings_of_jax_are_a_sentence(error, monkeypatch, capsys):
    def fail(arguments):
        raise error

    monkeypatch.setitem(main.__globals__, "_run", fail)
    err = failure(capsys, "train")
    assert "JAX cannot start: " in err and err.endswith("unset that environment variable.\n")


def test_output_that_the_encoding_lacks_is_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setitem(main.__globals__, "_run", lambda arguments: print("2 ×"))
    main([])
    out.flush()
    assert out.buffer.getvalue() == b"2 \\xd7\n"


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["--config.moe.num_expert=4"], ["moe.num_expert", "did you mean 'moe.num_experts'"]),
        (["--config.model.d_model=wide"], ["model.d_model", "whole number", "'wide'"]),
        (["--config.mesh.model=3"], ["model.num_heads=2", "mesh.model=3"]),
        (["--config.mesh.data=64"], ["64 devices", "there are 8"]),
        (["--config.mesh.data=3"], ["make data.batch_size a multiple of 3"]),
        (["--config.mesh.expert=8"], ["moe.num_experts=4", "mesh.expert can be 1, 2, 4"]),
        (["--config.data.vocabulary=/no/such.model"], ["/no/such.model"]),
        (["--config.data.data_dir=/no/such"], ["/no/such"]),
        (["--config.data.mixture=c5", "--config.data.data_dir=None"], ["c5", "python_docs"]),
        (["--config.init_from=/no/such"], ["/no/such does not exist"]),
        (["--config.model.d_model"], ["--config.model.d_model=VALUE"]),
    ],
)
def test_bad_input_is_one_sentence(config, tmp_path, capsys, overrides, words):
    workdir = tmp_path / "run"
    err = failure(capsys, "train", "--config", config, "--workdir", workdir, *overrides)
    assert all(word in err for word in words), err
    assert not (workdir / "checkpoints").exists() and not (workdir / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "the following arguments are required: VERB"),
        (["trian"], "'trian'"),
        (["train", "--workdir", "x"], "are required: --config"),
        (["plot", "--workdir", "a", "--workdir", "b"], "--workdir: it is given twice"),
        (["train", "--config", "c", "--config=d", "--workdir", "x"], "--config: it is given twice"),
        (["eval", "--workdir", ""], "a path is empty"),
        (["train", "--config", "c", "--workdir", "FILE"], "FILE is a file; name a folder"),
        (["sweep", "--config", "c", "--workdir", "FILE/x/y"], "is in FILE, which is no folder"),
        (["data", "pack", "--config", "c", "--output", "FILE"], "FILE is a file; name a folder"),
        (["compile", "--config", "c", "--output", "."], ". is a folder; name a file in it"),
        (["export", "--workdir", "x", "--output", "FILE"], "FILE exists; name a folder"),
        (["convert", "from-hf", "x", "FILE"], "FILE exists; name a folder"),
        (["bench", "--config", "c", "--repeats", "0"], "0 is not at least 1"),
        (["bench", "--config", "c", "--repeats", "9" * 5000], "is not a whole number"),
        (["bench", "--config", "c", "--repeats", "1e3"], "'1e3' is not a whole number"),
        (["inspect", "--config", "c", "--slices", "3000000000"], "at most 2147483647"),
        (["data", "vocab", "--config", "c", "--megabytes", "nan"], "'nan' is not a number"),
        (["generate", "--workdir", "x", "--text", "y", "--temperature", "inf"], "is not a number"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, words, tmp_path, capsys):
    (tmp_path / "FILE").write_text("")
    arguments = [a.replace("FILE", str(tmp_path / "FILE")) for a in arguments]
    words = words.replace("FILE", str(tmp_path / "FILE"))
    err = failure(capsys, *arguments)
    assert words.casefold() in err.casefold() and err.endswith(".\n")


def test_the_last_value_of_a_config_key_counts_and_is_named(config, capsys):
    twice = ["--config.train.steps=3", "--config.train.steps=4"]
    assert main(["inspect", "--config", str(config), "--json", *twice]) == 0
    printed = capsys.readouterr()
    assert printed.err == "--config.train.steps is given twice; its last value 4 is used.\n"
    assert main(["inspect", "--config", str(config), "--json", "--config.train.steps=4"]) == 0
    assert capsys.readouterr() == (printed.out, "")


def test_missing_files_are_one_sentence(config, tmp_path, capsys):
    assert "does not exist" in failure(capsys, "train", "--config", "no.py", "--workdir", tmp_path)
    assert "does not exist" in failure(capsys, "eval", "--workdir", tmp_path / "no")
    assert "config.json" in failure(capsys, "generate", "--workdir", tmp_path, "--text", "a ___")
    assert "no metrics.jsonl" in failure(capsys, "plot", "--workdir", tmp_path)


def test_help_is_quick_and_without_jax():
    script = "import sys; from switch_jax.cli import main\ntry: main(['--help'])\nfinally:"
    script += " assert not {'jax', 'numpy', 'ml_collections'} & set(sys.modules)"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert time.perf_counter() - began < 2  # a second alone; the test machine is busy


def test_inspect_json_is_one_object(config, capsys):
    assert main(["inspect", "--json", "--config", str(config)]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert {"params", "params_by_group", "flops_per_sequence", "state_bytes"} <= summary.keys()
    assert {"stack", "layer", "capacity", "slots_per_token"} <= summary["moe"][0].keys()


def test_eval_generate_plot_and_peek(config, workdir, capsys):
    assert main(["eval", "--workdir", str(workdir), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["neg_log_perplexity"] == -metrics["cross_entropy"]
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert metrics["cross_entropy"] == pytest.approx(logged[-1]["cross_entropy"], rel=1e-6)

    text = ["--text", "import ___ as np", "--max_length", "4"]
    assert main(["generate", "--workdir", str(workdir), *text]) == 0
    output = capsys.readouterr().out  # so early, nothing for the blank: never the text itself
    assert output.endswith("\n") and "import ___ as np" not in output

    assert main(["plot", "--workdir", str(workdir)]) == 0
    assert {path.name for path in (workdir / "figures").iterdir()} == {"loss.png", "router.png"}

    assert main(["data", "peek", "--config", str(config), "--count", "1"]) == 0
    assert "<extra_id_0>" in capsys.readouterr().out


def test_bench_reports_both_models(config, capsys, monkeypatch):
    # tests/performance/test_benchmark.py times decoding.
    monkeypatch.setattr("switch_jax.performance.benchmark.DECODING", {"greedy_1": (1, 1)})
    arguments = ["bench", "--json", "--repeats", "1", "--config", str(config)]
    small = {
        "model.num_encoder_layers": 1,
        "model.num_decoder_layers": 1,
        "moe.every": 1,
        "optimizer.name": "sgd",
    }
    assert main([*arguments, *(f"--config.{key}={value}" for key, value in small.items())]) == 0
    result = json.loads(capsys.readouterr().out)
    for part in ("train_step", "forward", "layer"):
        assert result[part]["ratio"] > 0
        assert result[part]["sparse"]["seconds"] > 0
    assert result["train_step"]["sparse"]["tokens_per_second"] > 0


@pytest.mark.parametrize("reader", ["store", "synthetic"])
def test_trains_without_tensorflow(config, tmp_path, reader):
    command = ["train", "--config", str(config), "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            BLOCKED,
            *command,
            f"--config.data.reader={reader}",
            *TRAIN_ONE_STEP,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "1").exists()


def test_seqio_reader_without_tensorflow_says_what_to_install(config, tmp_path):
    command = ["train", "--config", str(config), "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *command, "--config.data.reader=seqio"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and 'pip install "switch_jax[data]"' in done.stderr


def test_interrupts_and_diverged_runs_have_exit_codes_of_their_own(capsys, monkeypatch):
    def run_and_fail(error):
        def run(arguments):
            raise error

        monkeypatch.setattr(sys.modules["switch_jax.cli.main"], "_run", run)
        return main([]), capsys.readouterr().err

    assert run_and_fail(KeyboardInterrupt()) == (130, "switch-jax: Interrupted.\n")
    assert run_and_fail(NotFiniteError("It diverged.")) == (3, "switch-jax: It diverged.\n")
    assert run_and_fail(UserError("Change it.")) == (2, "switch-jax: Change it.\n")
    for error in (MemoryError("no 8 TB"), RuntimeError("RESOURCE_EXHAUSTED: no 8 TB.\nmore")):
        code, message = run_and_fail(error)
        assert code == 2 and "memory does not suffice" in message and "no 8 TB)" in message
    with pytest.raises(ZeroDivisionError):
        run_and_fail(ZeroDivisionError())


INTERRUPTED = """
import hashlib, signal
from switch_jax.__main__ import _exit_at_interrupts
_exit_at_interrupts()
if {recorded}:  # as the training loop does
    signal.signal(signal.SIGINT, lambda *_: print("recorded", flush=True))
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # native code without the GIL, as a step is
"""


@pytest.mark.parametrize("recorded", [False, True])
def test_ctrl_c_ends_native_code_and_a_second_one_ends_what_records_the_first(recorded):
    process = runs.start(program=("-c", INTERRUPTED.format(recorded=recorded)))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    if recorded:
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "switch-jax: Interrupted.\n")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_steps_on_cpu_reuse_their_memory():
    command = [sys.executable, "-c", PAGE_FAULTS]
    pages = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert pages < 50_000  # 350,000 if each run gets its buffers from the kernel
