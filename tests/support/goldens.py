"""Golden data: its folders, the machine it depends on, and the functions that compute it.

Tests compare with the golden data and scripts/golden/make_*.py write it; both call the functions
here. The scripts import `conftest` first, because it sets XLA's flags.
"""

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import switch_jax
from switch_jax.config.schema import Config
from switch_jax.distributed.mesh import make_mesh
from switch_jax.model.lora import add_adapters, init_adapters
from switch_jax.model.parameters import abstract_model, parameter_metadata
from switch_jax.model.transformer import SwitchTransformer
from switch_jax.training.step import TrainProgram
from tests.support import runs
from tests.support.configs import make_batch, tiny
from tests.support.paths import GOLDEN

FOLDER = GOLDEN
LOSSES = FOLDER / "losses"
PARAMETERS = FOLDER / "parameters"
WORKDIR = FOLDER / "workdir"


def machine() -> dict[str, str]:
    """Returns what the bits of results depend on beside this package.

    Versions of libraries, the processor and XLA's flags.
    """
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    return versions | {
        "processor": f"{platform.machine()} {_processor()}",
        "xla_flags": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
    }


def _processor() -> str:
    """Returns a digest of the processor's model and instruction sets; "" except on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return ""
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    model = [facts.get(key, "") for key in ("vendor_id", "cpu family", "model", "stepping")]
    flags = sorted(facts.get("flags", facts.get("Features", "")).split())
    return hashlib.blake2b(json.dumps([model, flags]).encode(), digest_size=8).hexdigest()


def bits(numbers: Any) -> Any:
    """Returns a float32 array as exact hexadecimal text, in nested lists of its shape."""
    array = np.asarray(numbers, np.float32)
    return [bits(item) for item in array] if array.ndim else float(array).hex()


def numbers(bits: Any) -> np.ndarray:
    """Returns the float32 array from the text of `bits`."""
    if isinstance(bits, str):
        return np.float32(float.fromhex(bits))
    return np.array([numbers(item) for item in bits], np.float32)


# Losses: runs of a few thousand parameters that use every source of randomness.

STEPS = 20  # of every run
_NOISY = {
    "model.dropout_rate": 0.1,
    "model.init_scale": 1.0,
    "moe.capacity_factor": 1.0,
    "moe.jitter": 0.1,
    "moe.expert_dropout_rate": 0.2,
    "moe.z_loss_weight": 0.001,
    "optimizer.warmup_steps": 100,
}
_SGD = {"optimizer.name": "sgd", "optimizer.schedule": "constant", "optimizer.learning_rate": 0.3}
_GEGLU = {"model.activation": "geglu", "model.tied_embeddings": False}
RUNS: dict[str, dict[str, Any]] = {
    "one_switch": {"mesh.data": 1},
    "one_top_k_accumulate": {
        "mesh.data": 1,
        "moe.router": "top_k",
        "train.accumulate": 2,
        "train.seed": 1,
    }
    | _SGD,
    "one_bfloat16": {"mesh.data": 1, "model.dtype": "bfloat16", "train.seed": 2} | _SGD,
    "eight_top_k_geglu": {"mesh.data": 8, "moe.router": "top_k", "train.seed": 3} | _GEGLU | _SGD,
    "eight_packed_accumulate": {
        "mesh.data": 2,
        "mesh.expert": 4,
        "data.pack": True,
        "train.accumulate": 2,
        "train.seed": 4,
    }
    | _SGD,
    "eight_fsdp": {
        "mesh.data": 2,
        "mesh.expert": 2,
        "mesh.model": 2,
        "mesh.fsdp": True,
        "train.seed": 5,
    },
}


def trace(name: str) -> dict[str, Any]:
    """Trains `RUNS[name]` and returns its losses, as `bits` of float32.

    The keys are loss and grad_norm, with a value per step, and param_norm of the last step.
    """
    config = tiny(**_NOISY | RUNS[name])
    program = TrainProgram(config, make_mesh(config))
    state, metrics = program.init(), []
    for step in range(STEPS):
        state, step_metrics, _ = program.train_step(
            state, program.sharded.shard_batch(make_batch(config, seed=step))
        )
        metrics.append(step_metrics)
    traces = {key: bits([step[key] for step in metrics]) for key in ("loss", "grad_norm")}
    return traces | {"param_norm": bits(metrics[-1]["param_norm"])}


# Parameters: their paths in checkpoints, shapes and axes.


def parameters(config: Config) -> str:
    """Returns a line for each parameter, adapters included: path, shape and logical axes."""
    metadata = parameter_metadata(abstract_model(config))

    def values() -> dict[str, jax.Array]:
        leaves = jax.tree.leaves(SwitchTransformer(config, jax.random.key(0)))
        return init_adapters(dict(zip(metadata, leaves)), metadata, config)

    shapes = jax.eval_shape(values)
    complete = add_adapters(metadata, config)
    assert shapes.keys() == complete.keys()
    return "".join(
        f"{name}  {'×'.join(map(str, shapes[name].shape))}  {' '.join(complete[name].axes)}\n"
        for name in sorted(shapes)
    )


# WORKDIR: written by the command line when the golden data was made.

WORKDIR_STEPS = 4  # step of its newest checkpoint
MORE = f"--config.train.steps={WORKDIR_STEPS + 2}"
_TIMINGS = ("time", "tokens_per_second", "step_seconds", "data_wait_fraction")


def logits(workdir: Path) -> list:
    """Returns every 40th logit of the model in a WORKDIR for a fixed batch, dropless, as `bits`."""
    model = switch_jax.load(workdir)
    batch = make_batch(tiny(**{"data.batch_size": 2}))
    all_logits = jax.jit(lambda model, batch: model.forward(batch, capacity_factor=None)[0])(
        model, batch
    )
    return bits(all_logits[..., ::40])


def evaluation(folder: Path) -> dict[str, float]:
    """Returns the output of `switch-jax eval --json` for the WORKDIR `run` in a folder."""
    out, _ = runs.run("eval", "--workdir", "run", "--json", cwd=folder)
    return json.loads(out)


def later_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the metrics that a run logged after `WORKDIR_STEPS`, without timings."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        {
            key: value
            for key, value in line.items()
            if key not in _TIMINGS and not key.startswith("goodput/")
        }
        for line in lines
        if line["step"] > WORKDIR_STEPS
    ]
