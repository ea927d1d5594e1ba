"""A small token store and config for tests, and `switch-jax` in processes of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from switch_jax.checkpoint.checkpoint_reader import restore_params
from switch_jax.checkpoint.metrics_log import read_metrics
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.config.schema import DataConfig
from switch_jax.data.sources.python_text import is_held_out_path, python_documents
from switch_jax.data.token_store.build import build_token_store
from switch_jax.data.vocabulary import read_vocabulary
from switch_jax.data.vocabulary_builder import train_vocabulary
from switch_jax.distributed.mesh import make_mesh
from switch_jax.training.step import TrainProgram

TIMED_METRICS = {"time", "tokens_per_second", "step_seconds", "data_wait_fraction"}

CONFIG = """
from switch_jax.config import defaults

def get_config(arg=""):
    config = defaults()
    config.model.update(
        vocab_size=900, d_model=16, d_ff=32, num_heads=2, head_dim=8,
        num_encoder_layers=2, num_decoder_layers=2, dropout_rate=0.1, dtype="float32",
    )
    config.moe.update(num_experts=4, min_capacity=1, group_size=32, jitter=0.01)
    config.data.update(
        mixture="text", data_dir={store!r}, inputs_length=32, targets_length=11, batch_size=4
    )
    config.optimizer.update(warmup_steps=10)
    config.train.update(
        steps=90, log_every=1, eval_every=45, eval_batches=2, checkpoint_every=15
    )
    config.mesh.data = 1
    return config
"""

# Changes of it for several processes: every process but the first compiles for itself.
SMALL = {
    "model.num_encoder_layers": 1,
    "model.num_decoder_layers": 1,
    "moe.every": 1,
    "moe.stacks": "encoder",
    "moe.jitter": 0.0,
    "moe.balance_scope": "batch",  # loads are counted over all processes
    "train.steps": 60,
    "train.eval_batches": 1,
    "train.eval_every": 1000,
    "train.checkpoint_every": 20,
}


def write_text(folder: Path, **splits: Sequence[str]) -> str:
    """Writes texts as JSON lines, a file per split; returns the `data.mixture` of source `text`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in splits.items():
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"text-{split}.jsonl").write_text("".join(lines))
    return f"{folder}/text-{{split}}.jsonl"


def make_store(folder: Path) -> Path:
    """Builds a token store of 16 documents of the standard library and its own vocabulary."""
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    for document in python_documents():
        split = "validation" if is_held_out_path(document.path) else "train"
        texts[split] += [document.text][: max(0, 8 - len(texts[split]))]
    mixture = write_text(folder, **texts)
    train_vocabulary(texts["train"], folder / "tiny.model", 900)
    build_token_store(
        DataConfig(mixture=mixture),
        read_vocabulary(folder / "tiny.model"),
        folder / "store",
        workers=1,
    )
    return folder / "store"


def write_config(folder: Path, store_folder: Path) -> Path:
    """Writes a config file of a tiny model that trains on a token store; returns its path."""
    path = folder / "tiny.py"
    path.write_text(CONFIG.format(store=str(store_folder)))
    return path


def xla_flags(count: int) -> str:
    """Returns XLA_FLAGS of the tests with another number of devices."""
    return os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={count}")


def start(
    *arguments: object,
    program: Sequence[str] = ("-m", "switch_jax"),
    cwd: Path | None = None,
    **environment: str,
) -> subprocess.Popen:
    """Starts `switch-jax ARGUMENTS`, or another Python program, with output to pipes."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
    )


def run(*arguments: object, code: int = 0, **settings: Any) -> tuple[str, str]:
    """Runs a program that must exit with `code`; returns stdout and stderr. Settings as `start`."""
    process = start(*arguments, **settings)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err or out
    return out, err


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Waits until a running `switch-jax train` has logged `step`."""
    deadline = time.time() + 300
    while time.time() < deadline:
        assert process.poll() is None, process.communicate()
        lines = read_metrics(Workdir(workdir))
        if lines and lines[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def untimed_metrics(content: str) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl without measured times."""
    return [
        {k: v for k, v in line.items() if k not in TIMED_METRICS and not k.startswith("goodput/")}
        for line in map(json.loads, content.splitlines())
    ]


def losses(workdir: Path) -> dict[int, float]:
    """Returns the cross-entropy of training by step."""
    lines = read_metrics(Workdir(workdir))
    return {m["step"]: m["cross_entropy"] for m in lines if m["split"] == "train"}


def same_losses(losses: dict[int, float], reference: dict[int, float]) -> bool:
    """Compares losses by step up to rounding: sums over devices have another order."""
    assert losses
    for step, value in losses.items():
        assert value == pytest.approx(reference[step], abs=2e-5), step
    return True


def checkpoint_parameters(path: Path | str, step: int) -> dict[str, np.ndarray]:
    """Returns the parameters, by path, of the checkpoint of a step in a WORKDIR."""
    workdir = Workdir(path)
    config = workdir.config()
    program = TrainProgram(config, make_mesh(config))
    params = restore_params(workdir.open_checkpoint(step), program.abstract_state.params)
    return {name: np.asarray(value) for name, value in params.items()}


def same_parameters(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether two models have the same parameters, bit for bit."""
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)
