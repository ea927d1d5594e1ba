"""LoRA adapters: initial values, training, and merging into the model."""

import jax
import numpy as np
import pytest

import switch_jax
from switch_jax.checkpoint.checkpointer import Checkpointer
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.data import open_batches
from switch_jax.distributed.mesh import make_mesh
from switch_jax.errors import UserError
from switch_jax.model.lora import is_adapter, merge_adapters
from switch_jax.training.state import save_state
from switch_jax.training.step import TrainProgram
from tests.support.configs import make_batch, tiny


def config(**overrides):
    defaults = {"data.reader": "synthetic", "mesh.data": 1, "lora.rank": 2}
    return tiny(**defaults | {"optimizer.schedule": "constant"} | overrides)


def train(settings, steps=2):
    program = TrainProgram(settings, make_mesh(settings))
    state, batch = program.init(), program.sharded.shard_batch(make_batch(settings))
    losses = []
    for _ in range(steps):
        state, metrics, _ = program.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    return program, state, losses


@pytest.fixture(scope="module")
def trained():
    return train(config())


def test_new_adapters_leave_the_model_unchanged_and_only_adapters_are_trained(trained):
    program, state, losses = trained
    plain = TrainProgram(config(**{"lora.rank": 0}), program.mesh)
    fresh, base = program.init().params, plain.init().params
    adapters = {name for name in fresh if is_adapter(name)}
    assert {name.rsplit(".", 1)[0] for name in adapters} == {
        name for name in base if "attention/" in name or "/experts/" in name
    }
    batch = plain.sharded.shard_batch(make_batch(config()))
    merged = merge_adapters(fresh, config())
    assert all((np.asarray(merged[n]) == np.asarray(base[n])).all() for n in base)
    assert losses[0] == pytest.approx(float(plain.train_step(plain.init(), batch)[1]["loss"]))
    assert losses[1] < losses[0]
    for name, before in program.init().params.items():
        changed = (np.asarray(state.params[name]) != np.asarray(before)).any()
        # B is 0 at first, so A has no gradient in the first step; this is after two steps.
        assert changed == (name in adapters), name
    sizes = sum(state.params[name].size for name in adapters)
    assert sizes < 0.5 * sum(p.size for p in base.values())


def test_every_layer_and_expert_has_its_own_adapters(trained):
    _, state, _ = trained
    name = "encoder/runs/0/layers/1/mlp/experts/wi"
    a, b = (np.asarray(state.params[f"{name}.lora_{x}"]) for x in "ab")
    base = np.asarray(state.params[name])
    assert a.shape == (*base.shape[:-1], 2) and b.shape == (*base.shape[:-2], 2, base.shape[-1])
    merged = np.asarray(merge_adapters(state.params, config())[name])
    for layer, expert in np.ndindex(base.shape[:2]):
        expected = base[layer, expert] + 16 / 2 * a[layer, expert] @ b[layer, expert]
        np.testing.assert_allclose(merged[layer, expert], expected, atol=1e-5)


@pytest.mark.slow
def test_losses_do_not_depend_on_the_mesh(trained):
    _, _, losses = train(config(**{"mesh.expert": 4, "mesh.model": 2, "train.accumulate": 2}))
    assert losses == pytest.approx(trained[2], abs=1e-5)


def test_a_loaded_model_has_its_adapters_merged(trained, tmp_path):
    _, state, _ = trained
    workdir = Workdir(tmp_path / "run")
    workdir.prepare(config(), None)
    checkpoints = Checkpointer(workdir, keep=1)
    save_state(checkpoints, state, open_batches(config(), "train"))
    checkpoints.close()
    model = switch_jax.load(workdir.path)
    merged = merge_adapters(state.params, config())
    loaded = dict(zip(merged, jax.tree.leaves(model)))
    assert len(jax.tree.leaves(model)) == len(merged)
    assert all((np.asarray(loaded[n]) == np.asarray(merged[n])).all() for n in merged)


def test_settings_that_match_nothing_or_contradict_are_refused():
    with pytest.raises(UserError, match=r"lora\.of='adapters' is found in no"):
        TrainProgram(config(**{"lora.of": "adapters"}), make_mesh(config()))
    with pytest.raises(UserError, match=r"leave optimizer\.trained at all"):
        TrainProgram(config(**{"optimizer.trained": "experts"}), make_mesh(config()))
    with pytest.raises(UserError, match=r"lora\.of='\[' is no regular expression"):
        TrainProgram(config(**{"lora.of": "["}), make_mesh(config()))
