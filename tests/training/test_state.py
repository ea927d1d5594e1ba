"""TrainState: what it holds besides parameters, and continuing from a checkpoint."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from switch_jax.checkpoint import Checkpointer, Workdir
from switch_jax.distributed import make_mesh
from switch_jax.training import TrainProgram
from switch_jax.training.state import TrainState, restore_state, save_state
from tests.support.configs import make_batch, tiny


class NoPosition:
    """Position in data that has none."""

    def save(self, folder):
        (folder / "position.json").write_text(json.dumps(0))

    def restore(self, folder):
        pass


@pytest.fixture(scope="module")
def program():
    config = tiny(**{"model.dtype": "bfloat16", "mesh.data": 2, "mesh.expert": 2})
    return TrainProgram(config, make_mesh(config))


@pytest.fixture(scope="module")
def trained(program):
    """The states after three and after five steps."""
    after_three = train(program, program.init(), range(3))
    host = jax.device_get(after_three)  # the next step donates its state
    return host, jax.device_get(train(program, after_three, range(3, 5)))


def train(program, state, steps):
    for step in steps:
        batch = program.sharded.shard_batch(make_batch(program.config, step))
        state, _, _ = program.train_step(state, batch, {})
    return state


def continued(program, folder, state: TrainState, *, rms: bool = True) -> TrainState:
    """Returns the state after two more steps from a checkpoint of `state`, with `rms` or not."""
    workdir = Workdir(folder)
    workdir.prepare(program.config, None)
    checkpoints = Checkpointer(workdir, 1)
    placed = jax.device_put(state, program.state_sharding)
    placed = placed if rms else dataclasses.replace(placed, rms={})
    save_state(checkpoints, placed, NoPosition())
    checkpoints.close()
    checkpoints = Checkpointer(workdir, 1)
    restored = restore_state(checkpoints, program.abstract_state, NoPosition())
    checkpoints.close()
    return jax.device_get(train(program, program.complete_state(restored), range(3, 5)))


def test_a_continued_bfloat16_run_has_the_bits_of_an_uninterrupted_one(program, trained, tmp_path):
    after_three, after_five = trained
    assert after_three.rms and after_three.weights
    got = continued(program, tmp_path / "run", after_three)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(after_five), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_without_rms_is_continued(program, trained, tmp_path):
    """As versions wrote them that computed the RMS in every step."""
    after_three, after_five = trained
    got = continued(program, tmp_path / "run", after_three, rms=False)
    for name, value in after_five.params.items():
        np.testing.assert_allclose(got.params[name], value, atol=1e-5, err_msg=name)
    assert got.rms.keys() == after_five.rms.keys()


def test_rms_and_weights_are_those_of_the_new_parameters(trained):
    _, state = trained
    for name, weight in state.weights.items():
        np.testing.assert_array_equal(weight, state.params[name].astype(weight.dtype))
    for name, rms in state.rms.items():
        values = state.weights.get(name, state.params[name]).astype(np.float32)
        axes = tuple(range(rms.ndim, values.ndim))
        np.testing.assert_allclose(rms, np.sqrt((values**2).mean(axes)), rtol=1e-5)


def test_float32_runs_and_adapters_hold_nothing_twice():
    for values in ({}, {"model.dtype": "bfloat16", "lora.rank": 2}):
        config = tiny(**values)
        state = TrainProgram(config, make_mesh(config)).abstract_state
        assert not state.rms and not state.weights
