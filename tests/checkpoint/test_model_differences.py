"""Models that start from a checkpoint: what differs is told or refused, or taken from it."""

import argparse

import numpy as np
import pytest
from orbax.checkpoint import StandardCheckpointer

import switch_jax
from switch_jax.checkpoint.interop.foreign_checkpoint import ForeignCheckpoint, stacked_shapes
from switch_jax.checkpoint.interop.workdir_writer import write_workdir
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.cli.startup import load_config_argument
from switch_jax.config import config_differences, load_config
from switch_jax.config.load import override_config
from switch_jax.errors import UserError
from switch_jax.training.initial_state import initial_state_notes, initial_state_report
from tests.support.configs import tiny
from tests.support.paths import CONFIGS

# A model as T5 1.1: gates, and a head of its own.
GATED = {"model.activation": "geglu", "model.tied_embeddings": False}
OTHER = {
    **{"model.relative_max_distance": 20, "model.start_id": 7, "moe.router": "top_k"},
    **{"moe.capacity_factor": 1.0, "moe.eval_capacity_factor": 4.0, "model.dropout_rate": 0.3},
}


def config(**overrides):
    return tiny(**{"data.reader": "synthetic"} | overrides)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A WORKDIR of a gated model with keys of its own."""
    path = tmp_path_factory.mktemp("runs") / "source"
    made_with = config(**GATED, **OTHER)
    rng = np.random.default_rng(0)
    values = {n: rng.normal(size=s.shape) for n, s in stacked_shapes(made_with).items()}

    def read_slice(name, index):
        return values[name][index].astype(np.float32)

    write_workdir(ForeignCheckpoint(made_with, read_slice), path)
    return path


def start_from(source, rules="", **overrides):
    return override_config(config(**overrides), {"init_from": str(source), "init_rules": rules})


def test_a_head_and_gates_are_not_left_out_unless_a_rule_says_so(source):
    same_ids = {"model.start_id": 7}
    with pytest.raises(UserError, match=r"head, which .* set model\.tied_embeddings .*'head ->'"):
        initial_state_report(start_from(source, **same_ids, **{"model.activation": "geglu"}))
    for rules in ("", "head ->"):
        with pytest.raises(UserError, match=r"/gate, .* set model\.activation as .*mlp/.*gate ->'"):
            initial_state_notes(start_from(source, rules, **same_ids) if rules else start_from(
                source, **same_ids, **{"model.tied_embeddings": False}
            ))  # fmt: skip
    notes = initial_state_notes(start_from(source, "head ->; .*/gate ->", **same_ids))
    assert "ignored      head" in notes and "mlp/experts/gate" in notes
    with pytest.raises(UserError, match=r"init_rules has 'tail'"):
        initial_state_notes(start_from(source, "head ->; .*/gate ->; tail ->", **same_ids))


def test_a_balance_bias_is_not_left_out(tmp_path):
    biased = config(**{"moe.balance_bias_rate": 0.1})
    zeros = {n: np.zeros(s.shape, np.float32) for n, s in stacked_shapes(biased).items()}
    write_workdir(ForeignCheckpoint(biased, lambda n, i: zeros[n][i]), tmp_path / "run")
    with pytest.raises(UserError, match=r"router/bias, .* set moe\.balance_bias_rate"):
        initial_state_report(start_from(tmp_path / "run"))
    # A dense layer in place of experts needs no rule, and neither does a loaded bias.
    initial_state_report(start_from(tmp_path / "run", **{"moe.num_experts": 0}))
    assert not initial_state_notes(start_from(tmp_path / "run", **{"moe.balance_bias_rate": 0.1}))


def test_differences_that_no_shape_shows_are_told(source):
    same = GATED | OTHER
    assert initial_state_notes(start_from(source, **same)) == ""
    changed = {"model.relative_max_distance": 128, "moe.router": "switch", "model.dropout_rate": 0}
    changed |= {"moe.eval_capacity_factor": 2.0, "moe.capacity_factor": 2.0}
    for text in (initial_state_notes, initial_state_report):
        function, routing = text(start_from(source, **same | changed)).splitlines()[:2]
        assert function == (
            "The model differs from that of init_from: model.relative_max_distance is 20 there and"
            " 128 here; moe.router is 'top_k' there and 'switch' here."
        )
        assert routing == (
            "The model routes otherwise than that of init_from: moe.eval_capacity_factor is 4.0"
            " there and 2.0 here."
        )


@pytest.mark.parametrize("key", ["start_id", "pad_id", "eos_id"])
def test_other_special_ids_are_refused_with_the_embedding(key, source):
    ids = {"model.start_id": 7, f"model.{key}": 9}
    there = {"start_id": 7, "pad_id": 0, "eos_id": 1}[key]
    with pytest.raises(
        UserError, match=rf"model\.{key} is {there} there .* set model\.{key}={there}"
    ):
        initial_state_report(start_from(source, **GATED, **ids))
    rule = "embedding ->"
    assert f"model.{key} is {there}" in initial_state_notes(
        start_from(source, rule, **GATED, **ids)
    )


def parse(spec, workdir=None, **overrides):
    overrides = {key: str(value) for key, value in overrides.items()}
    return load_config_argument(
        argparse.Namespace(config=spec, overrides=overrides, workdir=workdir)
    )


def test_fine_tuning_takes_the_model_from_the_checkpoint(source):
    spec = f"{CONFIGS / 'finetune.py'}:task=pairs"
    found, there = parse(spec, init_from=source), Workdir(source).config()
    differences = set(config_differences(there, found))
    assert {key for key in differences if key.startswith(("model.", "moe."))} == {
        *("model.dropout_rate", "model.dtype", "moe.expert_dropout_rate"),
        *("moe.capacity_factor", "moe.eval_capacity_factor", "moe.group_size", "moe.min_capacity"),
    }
    assert (found.model.dropout_rate, found.moe.expert_dropout_rate) == (0.1, 0.4)
    # What the user sets stays, also where it is the default.
    explicit = parse(spec, init_from=source, **{"model.activation": "relu", "moe.num_experts": 0})
    assert (explicit.model.activation, explicit.moe.num_experts) == ("relu", 0)
    assert explicit.model.d_model == there.model.d_model
    assert parse(f"{spec},num_experts=8", init_from=source).moe.num_experts == 8
    assert parse(spec, init_from=source, init_model="config").model.d_model == 768
    # Without a checkpoint, and for configs that do not ask for it, nothing is taken.
    assert parse(spec).model == load_config(spec).model
    base = str(CONFIGS / "switch_base.py")
    assert parse(base, init_from=source).model == load_config(base).model


def test_a_run_that_has_begun_keeps_its_model(source, tmp_path):
    """Also if the checkpoint is not there any more."""
    spec = f"{CONFIGS / 'finetune.py'}:task=pairs"
    begun = parse(spec, init_from=source)
    Workdir(tmp_path / "run").prepare(begun, None)
    again = parse(spec, tmp_path / "run", init_from=tmp_path / "gone")
    assert (again.model, again.moe) == (begun.model, begun.moe)
    with pytest.raises(UserError, match="gone does not exist"):
        parse(spec, tmp_path / "new", init_from=tmp_path / "gone")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_checkpoint_that_is_not_finite_is_not_used(value, source, tmp_path):
    params = {n: np.zeros(s.shape, np.float32) for n, s in stacked_shapes(config()).items()}
    params["encoder/final_norm/scale"][3] = value
    Workdir(tmp_path).prepare(config(), None)
    with StandardCheckpointer() as writer:
        writer.save(tmp_path / "checkpoints" / "1" / "params", params)
    with pytest.raises(UserError, match=r"encoder/final_norm/scale in .*/1 has 1 values"):
        switch_jax.load(tmp_path)
