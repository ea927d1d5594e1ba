"""Flat routers: reported once by name, after the first steps, and only while they are flat."""

import math

import jax.numpy as jnp
import pytest

from switch_jax.checkpoint.workdir import Workdir
from switch_jax.training.flat_routers import FlatRouters
from switch_jax.training.loop import train
from tests.support.configs import tiny

FLAT, CONFIDENT = 0.3, 0.4  # largest probability of 4 experts; the limit is 1.5 / 4.5 = 0.333


def metrics(**confidence):
    """Metrics of a step; names of layers have `_` in place of `/`."""
    values = {"loss": 1.0, "router/confidence": FLAT, "router/encoder/confidence": FLAT}
    for layer, value in confidence.items():
        name = f"router/{layer.replace('_', '/')}"
        values |= {f"{name}/confidence": value, f"{name}/entropy": 1.35}
    return {name: jnp.float32(value) for name, value in values.items()}


def warnings_by_step(config, steps):
    """Returns the steps with warnings, and these; `steps`: metrics by number of the step."""
    flat, found = FlatRouters(config), {}
    for step, values in steps.items():
        flat.update(step, values)
        if new := flat.new_warnings(values):
            found[step] = new
    return found


def test_a_flat_router_is_reported_once_by_name():
    config = tiny(**{"train.idle_expert_steps": 3})
    # Steps 1 to 3 do not count, and the encoder's router is confident in step 5.
    encoder = [FLAT] * 4 + [CONFIDENT] + [FLAT] * 7
    steps = {n: metrics(encoder_1=p, decoder_1=0.33) for n, p in enumerate(encoder, 1)}
    found = warnings_by_step(config, steps)
    advice = (
        "try moe.balance_scope=batch, a smaller moe.aux_loss_weight or a larger data.batch_size"
    )
    assert found == {
        6: [
            "decoder/1: the router has been nearly uniform for 3 steps (largest probability 0.330,"
            " uniform 0.250; entropy 1.350 of at most 1.386 nats), so that gates are about 1/4;"
            f" {advice}"
        ],
        8: [found[6][0].replace("decoder/1", "encoder/1").replace("0.330", "0.300")],
    }
    # A restarted run counts from 0.
    assert list(warnings_by_step(config, {n: steps[n] for n in range(7, 13)})) == [9]


def test_a_router_that_is_not_flat_any_more_is_not_reported():
    flat = FlatRouters(tiny(**{"train.idle_expert_steps": 3}))
    for step in range(1, 9):
        values = metrics(encoder_1_attention=FLAT if step < 8 else CONFIDENT)
        flat.update(step, values)
    assert flat.new_warnings(values) == []


@pytest.mark.parametrize("experts, limit", [(2, 3 / 5), (8, 3 / 17), (2048, 3 / 4097)])
def test_the_limit_is_1_5_times_the_probability_of_every_other_expert(experts, limit):
    config = tiny(**{"moe.num_experts": experts, "train.idle_expert_steps": 1})
    assert warnings_by_step(config, {2: metrics(encoder_1=0.999 * limit)})
    assert not warnings_by_step(config, {2: metrics(encoder_1=1.001 * limit)})
    assert not warnings_by_step(config, {2: metrics(encoder_1=math.nan)})


def test_a_short_run_has_a_shorter_interval():
    intervals = [FlatRouters(tiny(**{"train.steps": n})).min_steps for n in (1, 600, 10_000)]
    assert intervals == [1, 150, 1000]


def test_gates_that_are_renormalized_are_not_small():
    moe = {"moe.router": "top_k", "moe.renormalize": True}
    config = tiny(**moe, **{"train.idle_expert_steps": 1})
    ((warning,),) = warnings_by_step(config, {2: metrics(encoder_1=FLAT)}).values()
    assert "1.386 nats); try" in warning


@pytest.mark.parametrize(
    "values, advice",
    [
        ({"aux_loss_weight": 0.0}, "try a larger data.batch_size"),
        ({"router": "expert_choice", "stacks": "encoder"}, "try a larger data.batch_size"),
    ],
)
def test_the_balance_loss_is_named_where_there_is_one(values, advice):
    moe = {f"moe.{key}": value for key, value in values.items()}
    config = tiny(**moe, **{"train.idle_expert_steps": 1, "moe.eval_capacity_factor": 1.25})
    ((warning,),) = warnings_by_step(config, {2: metrics(encoder_1=FLAT)}).values()
    assert warning.endswith(f"; {advice}")


@pytest.mark.parametrize("router, reported", [("switch", True), ("hash", False)])
def test_a_run_with_untrained_routers_is_told(router, reported, tmp_path, capsys):
    settings = {
        "data.reader": "synthetic",
        "mesh.data": 1,
        "model.num_encoder_layers": 1,
        "model.num_decoder_layers": 1,
        "moe.every": 1,
        "moe.router": router,
        "optimizer.learning_rate": 1e-6,
        "train.steps": 8,
        "train.log_every": 3,
        "train.eval_batches": 1,
    }
    assert train(tiny(**settings), Workdir(tmp_path / "run")) is None
    lines = [line for line in capsys.readouterr().err.splitlines() if "nearly uniform" in line]
    expected = ["step 6  decoder/0: ", "step 6  encoder/0: "] if reported else []
    assert [line.split("the router")[0] for line in lines] == expected
