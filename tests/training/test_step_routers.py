"""Train step with every router: equal losses on a mesh, and exchanges in bfloat16."""

import re

import jax
import numpy as np
import pytest

from tests.support.configs import make_batch
from tests.training.test_step import ONE_DEVICE, SMALL, make_program

SPLIT = {
    "mesh.data": 2,
    "mesh.expert": 2,
    "mesh.model": 2,
    "mesh.fsdp": True,
    "train.accumulate": 2,
}
ROUTERS = {
    "expert choice, in attention too, a shared expert": {
        "moe.router": "expert_choice",
        "moe.eval_capacity_factor": 1.25,
        "moe.stacks": "encoder",
        "moe.sublayer": "both",
        "moe.shared_d_ff": 16,
        "moe.input_dropout_rate": 0.2,
    },
    "dropless top-2, second at random": {
        "moe.router": "top_k",
        "moe.second_policy": "random",
        "moe.second_threshold": 0.5,
        "moe.capacity_factor": None,
        "moe.expert_dropout_rate": 0.2,
        "moe.sublayer": "both",
        "model.activation": "geglu",
        "model.remat": "dots",
    },
    "prioritised, balanced by bias, last of two layers": {
        "moe.router": "batch_prioritized",
        "moe.balance_bias_rate": 0.05,
        "moe.aux_loss_weight": 0.0,
        "model.num_encoder_layers": 2,
        "moe.stacks": "encoder",
        "moe.last": 1,
    },
    "no token left behind, drawn experts": {
        "moe.router": "ntlb",
        "moe.sampling_temperature": 1.0,
    },
    # Groups of the decoder's four rows span two devices, and the batch has four groups.
    "balance over the batch": {"moe.balance_scope": "batch", "moe.group_size": 32},
    # Decoder groups of four rows span two devices.
    "hash": {"moe.router": "hash", "model.dropout_rate": 0.1, "moe.group_size": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
def test_routers_give_the_same_metrics_on_a_mesh(name):
    descent = {"optimizer.name": "sgd", "optimizer.learning_rate": 0.5}
    descent |= {"optimizer.schedule": "constant", "model.init_scale": 1.0}
    curves, initial = [], None
    for mesh in (ONE_DEVICE, SPLIT):
        program = make_program(SMALL | descent | ROUTERS[name] | mesh)
        initial = initial or jax.device_get(program.init())
        state, curve = jax.device_put(initial, program.state_sharding), []
        for step in range(3):
            state, metrics, _ = program.train_step(
                state, program.sharded.shard_batch(make_batch(program.config, seed=step))
            )
            curve.append(jax.device_get(metrics))
        curves.append(curve)
    for expected, metrics in zip(*curves):
        assert metrics.keys() == expected.keys()
        for key in expected:
            np.testing.assert_allclose(
                metrics[key], expected[key], rtol=1e-4, atol=1e-5, err_msg=key
            )
    if name.startswith(("expert choice", "hash")):  # balanced without a loss
        assert all(metrics["aux_loss"] == 0 for metrics in curves[0])
    losses, losses_on_mesh = ([float(m["loss"]) for m in curve] for curve in curves)
    assert len(set(losses)) == 3
    np.testing.assert_allclose(losses_on_mesh, losses, rtol=0, atol=1e-5)
    dropped = float(curves[0][0]["router/dropped_fraction"])
    assert (dropped == 0) if "dropless" in name or "behind" in name else (dropped > 0.01)


def test_top_2_trains_on_packed_rows_with_adafactor():
    values = {"moe.router": "top_k", "model.activation": "geglu", "data.pack": True}
    program = make_program(SMALL | {"mesh.data": 2, "mesh.expert": 2} | values)
    state = program.init()
    before = jax.device_get(state.params)
    state, metrics, _ = program.train_step(
        state, program.sharded.shard_batch(make_batch(program.config))
    )
    assert all(np.isfinite(value).all() for value in metrics.values()), metrics
    for path, value in state.params.items():
        assert np.isfinite(value).all() and (value != before[path]).any(), path
    assert metrics["router/dropped_fraction"] > 0.1


@pytest.mark.parametrize(
    "values, exchange, count",
    [
        # Dispatch and combine, forwards and backwards, in both stacks.
        ({}, "all_to_all", 8),
        # Queries are combined separately.
        ({"moe.sublayer": "attention"}, "all_to_all", 12),
        # The backward pass of a reduce-scatter is an all-gather.
        ({"moe.capacity_factor": None}, "reduce_scatter", None),
        ({"moe.capacity_factor": None}, "all_gather", None),
    ],
)
def test_bfloat16_activations_are_exchanged_in_bfloat16(values, exchange, count):
    """No float32 activations are exchanged between devices (paper §2.4).

    In the lowered program; the CPU's compiler has no bfloat16 exchange and widens them.
    """
    mesh = {"mesh.data": 2, "mesh.expert": 2, "mesh.model": 2}
    program = make_program(
        SMALL | mesh | values | {"model.dtype": "bfloat16", "optimizer.name": "sgd"}
    )
    lowered = program.train_step.lower(program.abstract_state, program.abstract_batch)
    exchanges = re.findall(
        rf"stablehlo\.{exchange}.*?\(tensor<([\dx]*)x(\w+)>\)", lowered.as_text(), re.S
    )
    assert len(exchanges) == count or (count is None and len(exchanges) >= 8)
    # Expert indices are int32.
    assert {kind for _, kind in exchanges} in ({"bf16"}, {"bf16", "i32"})
