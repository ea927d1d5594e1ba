"""Cost model: exact figures of the paper, and expert slots computed by hand."""

import json
import os
import subprocess
import sys

import pytest

from switch_jax.config import Config
from switch_jax.config.load import load_config
from switch_jax.distributed.hardware import peak_flops
from switch_jax.model.flops import (
    dropped_if_uniform,
    expert_layers,
    flops_by_part,
    flops_per_sequence,
    format_si,
    mfu,
    params_by_group,
)
from switch_jax.performance.cost_model import cost_summary, cost_table, state_bytes
from tests.support.paths import CONFIGS


def load(spec: str, **overrides) -> Config:
    return load_config(
        str(CONFIGS / spec), {key.replace("__", "."): str(v) for key, v in overrides.items()}
    )


UNTIED, TIED = {"model__tied_embeddings": False}, {"model__tied_embeddings": True}
RELU_10240 = {"model__activation": "relu"}

# The counts follow from the paper's architecture by arithmetic, independently of the code.
PARAMETERS = [
    ("t5_base.py", {}, 222_903_552),
    ("t5_base.py:variant=table9", {}, 222_903_552),
    ("t5_base.py", UNTIED, 247_577_856),
    ("t5_large.py", {}, 737_668_096),
    ("t5_large.py", UNTIED, 770_567_168),
    ("t5_large.py:variant=table9", {}, 750_251_008),
    ("t5_large.py:variant=table9", UNTIED, 783_150_080),
    ("t5_xxl.py", {}, 11_135_332_352),
    ("t5_xxl.py", TIED, 11_003_736_064),
    ("switch_base.py:num_experts=2", {}, 279_545_088),
    ("switch_base.py:num_experts=4", {}, 392_809_728),
    ("switch_base.py:num_experts=8", {}, 619_339_008),
    ("switch_base.py:num_experts=16", {}, 1_072_397_568),
    ("switch_base.py:num_experts=32", {}, 1_978_514_688),
    ("switch_base.py:num_experts=64", {}, 3_790_748_928),
    ("switch_base.py", {}, 7_415_217_408),
    ("switch_base.py:num_experts=256", {}, 14_664_154_368),
    ("switch_base.py", UNTIED, 7_439_891_712),
    ("switch_base.py:num_experts=64,variant=table9", {}, 3_790_748_928),
    ("moe_base.py", {}, 7_415_217_408),
    ("switch_large.py", {}, 26_309_291_008),
    ("switch_large.py", UNTIED, 26_342_190_080),
    ("switch_large.py:variant=table9", {}, 27_120_888_832),
    ("switch_large.py:variant=table9", UNTIED, 27_153_787_904),
    ("switch_xxl.py", {}, 394_675_073_024),
    ("switch_xxl.py", TIED, 394_543_476_736),
    ("switch_xxl.py", RELU_10240, 264_819_421_184),
    ("switch_xxl.py:variant=table9", {}, 201_395_253_248),
    ("switch_xxl.py:variant=table9", {"moe__every": 1}, 391_655_174_144),
    ("switch_c.py", {}, 1_571_327_875_360),
    ("switch_c.py", TIED, 1_571_261_049_120),
    ("switch_c.py:variant=table9", {}, 1_571_375_798_688),
    ("switch_c.py:variant=table9", {"model__activation": "geglu"}, 2_356_549_507_488),
    ("mt5_base.py", {}, 582_401_280),
    ("mt5_base.py", TIED, 390_315_264),
]


@pytest.mark.parametrize("spec, overrides, count", PARAMETERS)
def test_parameter_counts_are_exact(spec, overrides, count):
    assert sum(params_by_group(load(spec, **overrides)).values()) == count


def test_parameters_by_group_by_hand():
    assert params_by_group(load("switch_c.py")) == {
        "experts": 30 * 2048 * 2 * 2080 * 6144,
        "routers": 30 * 2080 * 2048,
        "encoder_attention": 15 * 4 * 2080 * 1920,
        "decoder_attention": 15 * 8 * 2080 * 1920,
        "relative_bias": 2 * 32 * 30,
        "norms": (15 * 2 + 15 * 3 + 2) * 2080,
        "embedding": 32128 * 2080,
        "head": 32128 * 2080,
    }
    assert params_by_group(load("switch_xxl.py"))["dense_ffn"] == 24 * 3 * 4096 * 10240


# FLOPs by the paper's convention, with the digits to compare; the printed figure, where it fits.
FLOPS = [
    ("t5_base.py", "124.6e9", 124e9),
    ("t5_base.py:variant=table9", "124.6e9", 124e9),
    ("switch_base.py", "124.6e9", 124e9),
    ("switch_base.py:num_experts=2", "124.6e9", 124e9),
    ("t5_large.py", "424.9e9", 425e9),
    ("switch_large.py", "424.9e9", 425e9),
    ("switch_large.py:variant=table9", "432.8e9", None),
    ("t5_xxl.py", "6.26e12", 6.3e12),
    ("switch_xxl.py", "6.26e12", 6.3e12),
    ("switch_c.py:variant=table9", "894e9", 890e9),
    ("switch_c.py", "869e9", None),
]


@pytest.mark.parametrize("spec, convention, paper", FLOPS)
def test_flops_per_sequence_of_the_paper(spec, convention, paper):
    flops = flops_per_sequence(load(spec))
    digits, exponent = convention.split("e")
    decimals = len(digits.partition(".")[2])
    assert f"{flops / 10 ** int(exponent):.{decimals}f}" == digits
    if paper:
        # 6.3T has two digits; its relative rounding error alone is 0.8 %.
        assert flops == pytest.approx(paper, rel=0.008 if paper == 6.3e12 else 0.006)


@pytest.mark.parametrize(
    "spec, billions",
    [
        ("t5_base.py", 142.0),
        ("switch_base.py", 142.0),
        ("t5_large.py", 481.4),
        ("t5_xxl.py", 6967),
        ("switch_c.py:variant=table9", 1016),
    ],
)
def test_computed_flops_without_routing_are_the_complete_count(spec, billions):
    parts = flops_by_part(load(spec))
    rest = sum(v for k, v in parts.items() if k not in ("routers", "empty_slots"))
    assert float(f"{rest / 1e9:.4g}") == billions


def test_two_experts_per_token_cost_twice_the_expert_flops():
    switch, moe = load("switch_base.py"), load("moe_base.py")
    experts = 6 * (512 + 114) * 2 * 2 * 768 * 3072
    assert flops_by_part(switch)["experts"] == experts
    assert flops_by_part(moe)["experts"] == 2 * experts
    assert flops_per_sequence(moe) - flops_per_sequence(switch) == experts
    # At 1.25 slots per token, most second choices are never computed.
    small_capacity = load("moe_base.py", moe__capacity_factor=1.25, moe__num_experts=32)
    layer = expert_layers(small_capacity)[0]
    assert layer.slots_per_token == 1.25
    parts = flops_by_part(small_capacity)
    assert "empty_slots" not in parts
    assert experts < parts["experts"] < 2 * experts


def test_flops_of_other_expert_layers_by_hand():
    """Base: six expert layers a stack, 626 tokens, matrices of 768 × 768 in attention."""
    tokens, square = 6 * (512 + 114), 768 * 768

    def both(**overrides):
        config = load("switch_base.py", **overrides)
        return flops_per_sequence(config), flops_by_part(config)

    flops, parts = both()
    # Queries, and shared keys and values, from experts: three dense matrices become two.
    attention, attention_parts = both(moe__sublayer="attention")
    assert attention - flops == -2 * tokens * square
    assert attention_parts["experts"] == 2 * tokens * 2 * square
    assert attention_parts["attention"] - parts["attention"] == -2 * tokens * 3 * square
    assert attention_parts["dense_ffn"] == 2 * parts["dense_ffn"]
    every, every_parts = both(moe__sublayer="both")
    assert every == attention
    assert every_parts["experts"] == parts["experts"] + attention_parts["experts"]
    assert every_parts["routers"] == 2 * parts["routers"]
    layers = expert_layers(load("switch_base.py", moe__sublayer="both"))
    assert [x.sublayer for x in layers[:2]] == ["attention", "ff"] and len(layers) == 24

    shared, shared_parts = both(moe__shared_d_ff=100)
    assert shared - flops == shared_parts["dense_ffn"] - parts["dense_ffn"]
    assert shared - flops == 2 * tokens * 2 * 768 * 100
    assert "routers" not in both(moe__router="hash")[1]

    dropless, dropless_parts = both(moe__capacity_factor=None)
    assert dropless == flops and "empty_slots" not in dropless_parts
    assert dropless_parts["experts"] == parts["experts"]
    second = {"moe__router": "top_k", "moe__capacity_factor": 2.0}
    assert both(**second)[0] - flops == parts["experts"]
    assert both(**second, moe__second_policy="none")[0] == flops


def test_expert_choice_fills_every_slot():
    config = load(
        "switch_base.py",
        moe__router="expert_choice",
        moe__stacks="encoder",
        moe__eval_capacity_factor=1.25,
    )
    layers = expert_layers(config)
    assert [(x.stack, x.layer) for x in layers] == [("encoder", i) for i in range(1, 12, 2)]
    assert {(x.slots_per_token, x.assignments_per_token) for x in layers} == {(1.25, 1.25)}
    parts = flops_by_part(config)
    assert "empty_slots" not in parts
    assert parts["experts"] == 6 * 512 * 1.25 * 2 * 2 * 768 * 3072
    # The share of tokens that none of 128 experts chooses, each taking 80 of 8192 at random.
    assert layers[0].dropped_if_uniform == pytest.approx((1 - 80 / 8192) ** 128)


def test_slots_of_switch_base_by_hand():
    layers = expert_layers(load("switch_base.py"))
    assert [(x.stack, x.layer) for x in layers] == [
        (stack, i) for stack in ("encoder", "decoder") for i in (1, 3, 5, 7, 9, 11)
    ]
    encoder, decoder = layers[0], layers[6]
    # 8192 // 512 = 16 rows; 1.25 × 8192 / 128 = 80 exactly.
    assert (encoder.group_rows, encoder.group_tokens, encoder.capacity) == (16, 8192, 80)
    assert (encoder.slots_per_token, encoder.changed_by) == (1.25, None)
    # 8192 // 114 = 71 rows, of which 64 divide 2048; 1.25 × 7296 / 128 = 71.25.
    assert (decoder.group_rows, decoder.group_tokens, decoder.capacity) == (64, 7296, 72)
    assert (decoder.slots_per_token, decoder.changed_by) == (128 * 72 / 7296, "rounding")
    assert (decoder.eval_capacity, decoder.eval_slots_per_token) == (114, 2.0)


def test_slots_of_switch_c_by_hand():
    config = load("switch_c.py")
    encoder, decoder = (expert_layers(config)[i] for i in (0, 15))
    assert (encoder.group_rows, encoder.group_tokens, encoder.capacity) == (256, 2**17, 80)
    assert (decoder.group_rows, decoder.group_tokens, decoder.capacity) == (1024, 116736, 72)
    together = (512 * 1.25 + 114 * 2048 * 72 / 116736) / (512 + 114)
    assert cost_summary(config)["slots_per_token"] == pytest.approx(together)
    assert max(encoder.dropped_if_uniform, decoder.dropped_if_uniform) < 0.002


FLAXFORMER = {"moe__group_size": 2048, "moe__min_capacity": 2, "moe__capacity_factor": 1.0}


def test_slots_of_switch_c_in_small_groups_by_hand():
    config = load("switch_c.py", **FLAXFORMER)
    layers = expert_layers(config)
    assert [x.layer for x in layers] == 2 * list(range(15))
    encoder, decoder = layers[0], layers[15]
    # 2048 tokens for 2048 experts make one slot each; min_capacity makes it two.
    assert (encoder.group_tokens, encoder.capacity, encoder.slots_per_token) == (2048, 2, 2.0)
    assert (decoder.group_tokens, decoder.capacity) == (16 * 114, 2)
    assert (encoder.changed_by, decoder.changed_by) == ("min_capacity", "min_capacity")
    tokens = 512 + 114
    together = (512 * 2 + 114 * 4096 / 1824) / tokens
    assert cost_summary(config)["slots_per_token"] == pytest.approx(together)
    empty = flops_by_part(config)["empty_slots"]
    assert empty == pytest.approx(15 * (together - 1) * tokens * 2 * 2 * 2080 * 6144)


def test_reasons_why_slots_per_token_differ_from_the_capacity_factor():
    def changed_by(**overrides):
        return expert_layers(load("switch_base.py", **overrides))[0].changed_by

    assert changed_by(moe__num_experts=96) == "rounding"
    assert changed_by(moe__num_experts=96, moe__capacity_rounding="floor") == "rounding"
    assert changed_by(moe__expert_capacity=64) == "expert_capacity"
    assert changed_by(moe__num_experts=2816) == "rounding"  # 3.6 slots become min_capacity's 4
    assert changed_by(moe__num_experts=4096) == "min_capacity"
    assert changed_by(moe__num_experts=1) == "group_tokens"
    assert changed_by(moe__capacity_factor=None) is None


def test_drops_of_uniform_routing():
    moe = load("switch_base.py", moe__num_experts=2).moe
    # Two tokens, two experts, one slot each: they collide half of the time.
    assert dropped_if_uniform(2, 1, moe) == pytest.approx(0.25)
    assert dropped_if_uniform(2, 2, moe) == 0
    both = load("moe_base.py", moe__num_experts=2).moe
    assert dropped_if_uniform(4, 1, both) == 0.75
    # Of 4096 loads of mean 1 about Poisson's 3/e - 1 is beyond the second.
    assert dropped_if_uniform(
        4096, 2, load("switch_c.py", moe__num_experts=4096).moe
    ) == pytest.approx(3 / 2.718281828 - 1, abs=1e-3)


def test_state_bytes_by_hand():
    config = load("t5_base.py", model__num_encoder_layers=1, model__num_decoder_layers=1)
    parts = state_bytes(config)
    counts = params_by_group(config)
    assert parts["parameters"] == 4 * sum(counts.values())
    # Adafactor: a row and a column for a matrix, and a counter and the unused one of the two
    # forms, of one float each. Norms and the bias tables (12 × 32) are not factored.
    matrices = [(768, 768)] * 12 + [(768, 3072)] * 4 + [(32128, 768)]
    vectors = [768] * 7 + [12 * 32] * 2
    floats = sum(rows + columns + 1 for rows, columns in matrices) + sum(n + 2 for n in vectors)
    schedule_step = 1
    assert parts["optimizer"] == 4 * (floats + len(matrices) + len(vectors) + schedule_step)

    adamw = state_bytes(load("t5_base.py", optimizer__name="adamw"))
    assert adamw["optimizer"] == 2 * adamw["parameters"] + 2 * 4


def test_mfu_excludes_empty_slots_and_is_none_for_unknown_devices():
    config = load("switch_base.py")
    parts = flops_by_part(config)
    useful = sum(parts.values()) - parts["empty_slots"]
    seconds = 3 * 2048 * useful / (32 * 275e12)
    assert mfu(config, seconds, "TPU v4", 32) == pytest.approx(1.0)
    assert mfu(config, 2 * seconds, "TPU v4", 32) == pytest.approx(0.5)
    dropless = load("switch_base.py", moe__capacity_factor=None)
    assert mfu(dropless, seconds, "TPU v4", 32) == pytest.approx(1.0)
    assert mfu(config, seconds, "cpu", 1) is None
    assert peak_flops("NVIDIA H200 MIG 1g.18gb") is None


@pytest.mark.parametrize("spec", ["t5_base.py", "switch_c.py", "moe_base.py"])
def test_summary_is_json_and_has_a_table(spec):
    summary = cost_summary(load(spec))
    assert json.loads(json.dumps(summary)) == summary
    assert sum(summary["params_by_group"].values()) == summary["params"]
    assert sum(summary["state_bytes_by_part"].values()) == summary["state_bytes"]
    text = cost_table(summary)
    assert f"{summary['params']:,}" in text
    for name, convention in summary["flops_conventions"].items():
        line = next(line for line in text.splitlines() if line.startswith(name + " "))
        assert format_si(summary[name], "FLOP") in line and convention in line
    assert max(map(len, text.splitlines())) < 100


def test_the_table_names_the_reason_for_a_changed_capacity():
    text = cost_table(cost_summary(load("switch_c.py", **FLAXFORMER)))
    assert "configured 1.0, changed by min_capacity" in text


def test_the_table_of_a_dropless_config():
    text = cost_table(cost_summary(load("switch_base.py", moe__capacity_factor=None)))
    assert "1.000  configured dropless" in text


@pytest.mark.parametrize(
    "value, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (29.7123e9, "29.71 GB"), (6.29e12, "6.29 TB")],
)
def test_format_si(value, text):
    assert format_si(value, "B") == text


def test_the_cost_model_needs_no_device():
    code = f"""
from switch_jax.config import load_config
from switch_jax.performance import cost_summary
print(cost_summary(load_config({str(CONFIGS / "switch_c.py")!r}))["params"])
"""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "there_is_none"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    assert finished.stdout == "1571327875360\n"
