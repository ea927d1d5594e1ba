"""A teacher with experts and a dense student, tiny."""

import dataclasses
from pathlib import Path

from switch_jax.checkpoint.checkpointer import Checkpointer
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.data import open_batches
from switch_jax.distributed.mesh import make_mesh
from switch_jax.training.state import save_state
from switch_jax.training.step import TrainProgram
from tests.support.configs import tiny

BASE = {"data.reader": "synthetic", "mesh.data": 1, "optimizer.name": "sgd"}
# Few slots, so that the groups of tokens matter, and noise that must not affect its logits.
TEACHER = BASE | {
    "model.init_scale": 1.0,
    "model.d_ff": 48,
    "model.dropout_rate": 0.3,
    "moe.jitter": 0.1,
    "moe.capacity_factor": 0.25,
    "moe.eval_capacity_factor": 0.75,
    "train.seed": 7,
}
STUDENT = BASE | {
    "moe.num_experts": 0,
    "moe.group_size": 32,
    "model.dropout_rate": 0.1,
    "optimizer.learning_rate": 0.5,
    "optimizer.schedule": "constant",
    "distill.soft_weight": 0.4,
    "distill.temperature": 2.0,
    "distill.start_step": 1,
}


def make_teacher(folder: Path) -> str:
    """Makes `folder` the WORKDIR of an untrained teacher; returns its path."""
    workdir, config = Workdir(folder), tiny(**TEACHER)
    workdir.prepare(config, None)
    state = TrainProgram(config, make_mesh(config)).init()
    checkpoints = Checkpointer(workdir, keep=1)
    save_state(
        checkpoints, dataclasses.replace(state, step=state.step + 1), open_batches(config, "train")
    )
    checkpoints.close()
    return str(workdir.path)
