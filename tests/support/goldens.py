"""Golden data: where it lies, the machine it was made on, and what makes it.

Tests compare with it and scripts/golden/make_*.py write it; both come here, so that they run the
same. The scripts import `conftest` first, for XLA's flags.
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
    """What bits depend on beside this program: libraries, processor, flags."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    return versions | {
        "processor": f"{platform.machine()} {_processor()}",
        "xla_flags": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
    }


def _processor() -> str:
    """Model and instruction sets, which XLA compiles for, as a digest; nothing but on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return ""
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    model = [facts.get(key, "") for key in ("vendor_id", "cpu family", "model", "stepping")]
    flags = sorted(facts.get("flags", facts.get("Features", "")).split())
    return hashlib.blake2b(json.dumps([model, flags]).encode(), digest_size=8).hexdigest()


def bits(numbers: Any) -> Any:
    """Numbers as text that holds every bit, in lists as the array has dimensions."""
    array = np.asarray(numbers, np.float32)
    return [bits(one) for one in array] if array.ndim else float(array).hex()


def numbers(bits: Any) -> np.ndarray:
    """The array that `bits` made text of."""
    if isinstance(bits, str):
        return np.float32(float.fromhex(bits))
    return np.array([numbers(one) for one in bits], np.float32)


# Losses: runs of a few thousand parameters in which all that is random has a part.

STEPS = 20
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
    """Trains `RUNS[name]`; loss and norm of gradients by step, and norm of parameters at the end.

    All in float32, as `bits`.
    """
    config = tiny(**_NOISY | RUNS[name])
    program = TrainProgram(config, make_mesh(config))
    state, metrics = program.init(), []
    for step in range(STEPS):
        state, of_step, _ = program.train_step(
            state, program.sharded.shard_batch(make_batch(config, seed=step))
        )
        metrics.append(of_step)
    found = {key: bits([of_step[key] for of_step in metrics]) for key in ("loss", "grad_norm")}
    return found | {"param_norm": bits(metrics[-1]["param_norm"])}


# Parameters: what checkpoints hold under which names.


def parameters(config: Config) -> str:
    """A line for each parameter, adapters included: name, shape and logical axes."""
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


# WORKDIR: what a command line of the day wrote, and what must come of it.

WORKDIR_STEPS = 4  # of its newest checkpoint
MORE = f"--config.train.steps={WORKDIR_STEPS + 2}"
_MOMENTARY = ("time", "tokens_per_second", "step_seconds", "data_wait_fraction")


def logits(workdir: Path) -> list:
    """Some logits of the model in a WORKDIR, dropless, as `bits`."""
    model = switch_jax.load(workdir)
    batch = make_batch(tiny(**{"data.batch_size": 2}))
    all_logits = jax.jit(lambda model, batch: model.forward(batch, capacity_factor=None)[0])(
        model, batch
    )
    return bits(all_logits[..., ::40])


def evaluation(folder: Path) -> dict[str, float]:
    """What `switch-jax eval` says of the WORKDIR `run` in a folder."""
    out, _ = runs.run("eval", "--workdir", "run", "--json", cwd=folder)
    return json.loads(out)


def later_metrics(workdir: Path) -> list[dict[str, Any]]:
    """What a run logged after `WORKDIR_STEPS`, but for what is measured in seconds."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if key not in _MOMENTARY}
        for line in lines
        if line["step"] > WORKDIR_STEPS
    ]
