"""configs/*.py resolve to what was reviewed, and bad input ends in one sentence.

`python tests/test_configs.py` writes the golden files anew; review their diff.
"""

import json
import math
import re
import shlex

import pytest

from switch_jax.config.load import config_from_dict, config_to_dict, load_config
from switch_jax.distributed.mesh import check_mesh, resolve_mesh
from switch_jax.errors import UserError
from switch_jax.model.flops import format_si, params_by_group
from switch_jax.performance.cost_model import cost_summary
from tests.support.paths import CONFIGS, GOLDEN

GOLDEN_CONFIGS = GOLDEN / "configs"
WITH_TABLE9 = ("switch_base", "switch_large", "switch_xxl", "switch_c", "t5_base", "t5_large")
PAPER = (*WITH_TABLE9, "t5_xxl", "moe_base", "mt5_base", "mswitch_base")

# Golden file → config spec: every preset there is, and every variant.
SPECS = {
    path.stem: str(path)
    for path in sorted(CONFIGS.rglob("*.py"))
    if path.parent.name != "sweeps"  # test_sweep.py has those
} | {f"{name}-table9": f"{CONFIGS / name}.py:variant=table9" for name in WITH_TABLE9}


def resolved(spec: str) -> dict:
    config = load_config(spec)
    params = sum(params_by_group(config).values())
    return {"params": params, "config": config_to_dict(config)}


@pytest.mark.parametrize("name", SPECS)
def test_resolves_as_reviewed(name):
    assert resolved(SPECS[name]) == json.loads((GOLDEN / f"{name}.json").read_text())


def test_no_golden_file_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(SPECS)


@pytest.mark.parametrize("name", PAPER)
def test_docstring_states_the_command_and_the_cost(name):
    doc = re.search(r'"""(.*?)"""', (CONFIGS / f"{name}.py").read_text(), re.DOTALL)[1]
    for variant in (name, f"{name}-table9"):
        if variant in SPECS:
            summary = cost_summary(load_config(SPECS[variant]))
            assert f"{summary['params']:,}" in doc
            assert format_si(summary["flops_per_sequence"], "FLOP") in doc
            assert format_si(summary["state_bytes"], "B") in doc
    command = re.search(r"    switch-jax train (.*?)\n\n", doc.replace("\\\\\n", ""), re.DOTALL)[1]
    words = shlex.split(command)
    overrides = dict(
        word.removeprefix("--config.").split("=") for word in words if "--config." in word
    )
    config = load_config(str(CONFIGS.parent / words[words.index("--config") + 1]), overrides)
    sizes = [config.mesh.slice, config.mesh.data, config.mesh.expert, config.mesh.model]
    devices = math.prod(size for size in sizes if size != -1)
    check_mesh(config, resolve_mesh(config.mesh, devices))


def test_switch_base_states_every_parameter_count():
    doc = (CONFIGS / "switch_base.py").read_text()
    for num_experts in (2, 4, 8, 16, 32, 64, 128, 256):
        for variant in ("", "table9"):
            config = load_config(
                f"{CONFIGS / 'switch_base.py'}:num_experts={num_experts},variant={variant}"
            )
            assert config.moe.num_experts == num_experts
            params = sum(params_by_group(config).values())
            assert f"{num_experts:>7} {params:>16,}" in doc


def test_every_preset_has_the_recipe_of_the_paper():
    for name in PAPER:
        config = load_config(SPECS[name])
        multilingual = name.startswith("m") and name != "moe_base"
        assert config.data.batch_size * config.data.inputs_length == 2**20
        assert config.data.targets_length == (229 if multilingual else 114)
        assert config.train.steps == (1_000_000 if multilingual else 550_000)
        assert config.model.dropout_rate == 0
        assert (config.optimizer.name, config.optimizer.schedule) == ("adafactor", "rsqrt")
        assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (1.0, 10_000)
        assert config.moe.renormalize is False


def test_overrides_reach_every_kind_of_key():
    config = load_config(
        SPECS["switch_base"],
        {
            "moe.capacity_factor": "None",
            "moe.eval_capacity_factor": "3",
            "mesh.fsdp": "true",
            "data.mixture": "some_text",
            "optimizer.learning_rate": "1e-3",
            "init_from": "runs/teacher",
        },
    )
    assert config.moe.capacity_factor is None
    assert config.moe.eval_capacity_factor == 3.0
    assert isinstance(config.moe.eval_capacity_factor, float)
    assert config.mesh.fsdp is True
    assert (config.data.mixture, config.init_from) == ("some_text", "runs/teacher")
    assert config.optimizer.learning_rate == 1e-3
    assert config_from_dict(config_to_dict(config)) == config


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith((".", "?")) and not re.search(r"[.?] ", message), message
    return message


@pytest.mark.parametrize(
    "spec, words",
    [
        ("switch_base.py:num_experts=3", ["power of two from 2 to 256", "3"]),
        ("switch_base.py:num_experts=512", ["power of two from 2 to 256", "512"]),
        ("switch_base.py:num_experts=64.0", ["num_experts", "whole number", "64.0"]),
        ("switch_base.py:experts=64", ["'experts=64'", "num_experts=…", "variant=…"]),
        ("switch_base.py:num_experts", ["'num_experts'", "num_experts=…"]),
        ("switch_base.py:variant=7", ["variant", "text", "7"]),
        *[(f"{name}.py:variant=tabel9", ["'tabel9'", "'table9'"]) for name in WITH_TABLE9],
        ("switch_bass.py", ["switch_bass.py", "does not exist", "configs/switch_mini.py"]),
    ],
)
def test_bad_config_argument(spec, words):
    with pytest.raises(UserError) as error:
        load_config(str(CONFIGS / spec))
    message = one_sentence(error)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("moe.num_expert", "8", ["'moe.num_expert'", "did you mean 'moe.num_experts'?"]),
        ("num_experts", "8", ["'num_experts'", "did you mean 'moe.num_experts'?"]),
        ("moe", "8", ["moe is a group", "8"]),
        ("moe.top_k.x", "8", ["'moe.top_k.x'"]),
        ("model.d_model", "768.0", ["model.d_model", "whole number", "768.0"]),
        ("model.d_model", "wide", ["model.d_model", "whole number", "'wide'"]),
        ("model.d_model", "None", ["model.d_model", "None"]),
        ("model.d_model", "0", ["model.d_model", "at least 1", "0"]),
        ("model.tied_embeddings", "1", ["model.tied_embeddings", "True or False", "1"]),
        ("model.activation", "gelu", ["model.activation", "relu, geglu", "'gelu'"]),
        ("model.dropout_rate", "1.0", ["model.dropout_rate", "below 1", "1.0"]),
        ("moe.capacity_factor", "'1.25'", ["moe.capacity_factor", "a number", "'1.25'"]),
        ("moe.capacity_factor", "0", ["moe.capacity_factor", "above 0 or None", "0"]),
        ("moe.every", "5", ["num_encoder_layers=12", "multiple of moe.every=5"]),
        ("model.num_decoder_layers", "11", ["num_decoder_layers=11", "moe.every=2"]),
        ("moe.top_k", "129", ["moe.top_k=129", "moe.num_experts=128"]),
        ("moe.top_k", "2", ["moe.router=switch", "moe.top_k=2", "set moe.router=top_k"]),
        ("train.accumulate", "3", ["data.batch_size=2048", "train.accumulate=3"]),
        ("mesh.expert", "-1", ["mesh.expert", "only one of them may be -1"]),
        ("mesh.model", "0", ["mesh.model", "at least 1"]),
    ],
)
def test_bad_override(key, value, words):
    with pytest.raises(UserError) as error:
        load_config(SPECS["switch_base"], {key: value})
    message = one_sentence(error)
    assert all(word in message for word in words), message


CHOICE = {
    "moe.router": "expert_choice",
    "moe.stacks": "encoder",
    "moe.eval_capacity_factor": "1.25",
}
TOP_2 = {"moe.router": "top_k"}


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"moe.router": "expert_choice"}, ["expert_choice", "later ones", "moe.stacks=encoder"]),
        (CHOICE | {"moe.stacks": "decoder"}, ["later ones", "moe.stacks=encoder"]),
        (CHOICE | {"moe.capacity_factor": "None"}, ["expert_choice", "moe.capacity_factor"]),
        (CHOICE | {"moe.eval_capacity_factor": "2.0"}, ["moe.eval_capacity_factor=1.25"]),
        (CHOICE | {"moe.top_k": "2"}, ["expert_choice", "moe.top_k=2", "None"]),
        (CHOICE | {"moe.sampling_temperature": "1"}, ["no expert to draw", "sampling"]),
        (CHOICE | {"moe.balance_bias_rate": "0.1"}, ["expert_choice", "moe.balance_bias_rate=0"]),
        ({"moe.router": "hash", "moe.top_k": "2"}, ["moe.router=hash", "moe.top_k=2"]),
        ({"moe.router": "hash", "moe.jitter": "0.1"}, ["moe.router=hash", "moe.jitter=0"]),
        ({"moe.router": "hash", "moe.balance_bias_rate": "0.1"}, ["hash", "balance_bias_rate=0"]),
        ({"moe.router": "ntlb", "moe.top_k": "200"}, ["moe.top_k=200", "moe.num_experts=128"]),
        (TOP_2 | {"moe.top_k": "129"}, ["moe.top_k=129", "moe.num_experts=128"]),
        ({"moe.renormalize": "True"}, ["moe.renormalize=True", "moe.router=top_k"]),
        ({"moe.second_policy": "random"}, ["moe.second_policy=random", "moe.top_k=2"]),
        (
            TOP_2 | {"moe.top_k": "1", "moe.second_policy": "none"},
            ["moe.second_policy=none", "moe.top_k=2"],
        ),
        (
            {"moe.jitter": "0.1", "moe.sampling_temperature": "1.0"},
            ["moe.jitter and moe.sampling_temperature", "all but one"],
        ),
        (
            {"moe.balance_bias_rate": "0.1", "moe.sampling_temperature": "1.0"},
            ["moe.balance_bias_rate", "moe.sampling_temperature", "one of them"],
        ),
        ({"moe.first": "4", "moe.last": "4"}, ["moe.first=4", "moe.last=4", "None"]),
        ({"moe.first": "3"}, ["moe.first=3", "moe.every=2"]),
        ({"moe.last": "14"}, ["moe.last=14", "model.num_encoder_layers=12"]),
        (
            {"moe.sublayer": "attention", "moe.shared_d_ff": "64"},
            ["moe.shared_d_ff=64", "moe.sublayer=attention"],
        ),
        (
            {"moe.sublayer": "attention", "moe.expert_dropout_rate": "0.4"},
            ["moe.expert_dropout_rate=0.4", "moe.sublayer=attention"],
        ),
        (
            {
                "moe.min_capacity": "0",
                "moe.capacity_rounding": "floor",
                "moe.group_size": "64",
                "data.targets_length": "64",
            },
            ["moe.capacity_factor=1.25", "decoder", "64", "128 experts", "moe.min_capacity=1"],
        ),
        (
            {"moe.expert_capacity": "64", "moe.eval_capacity_factor": "None"},
            ["moe.expert_capacity=64", "moe.eval_capacity_factor", "a number"],
        ),
        (CHOICE | {"moe.expert_capacity": "64"}, ["expert_choice", "moe.expert_capacity=None"]),
        ({"moe.expert_capacity": "0"}, ["moe.expert_capacity", "at least 1"]),
        ({"moe.padding": "dropped"}, ["moe.padding", "skipped, routed"]),
        ({"moe.input_dropout_rate": "1"}, ["moe.input_dropout_rate", "below 1"]),
        ({"moe.router": "soft"}, ["moe.router", "expert_choice", "'soft'"]),
    ],
)
def test_contradictory_routing_says_what_to_change(overrides, words):
    with pytest.raises(UserError) as error:
        load_config(SPECS["switch_base"], overrides)
    message = one_sentence(error)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "overrides, choices",
    [
        ({}, 1),
        (TOP_2, 2),
        (TOP_2 | {"moe.top_k": "4", "moe.renormalize": "True"}, 4),
        ({"moe.router": "ntlb"}, 4),
        ({"moe.router": "ntlb", "moe.num_experts": "2"}, 2),
        ({"moe.router": "batch_prioritized"}, 1),
        ({"moe.router": "hash"}, 1),
        (CHOICE, 1),
        ({"moe.min_capacity": "0", "moe.capacity_rounding": "floor"}, 1),
        ({"moe.last": "4", "moe.every": "1", "moe.sublayer": "both"}, 1),
    ],
)
def test_one_key_is_enough_for_another_router(overrides, choices):
    assert load_config(SPECS["switch_base"], overrides).moe.num_selected == choices


@pytest.mark.parametrize(
    "body, words",
    [
        ("config.moe.num_expert = 8", ["moe.num_expert", "moe.num_experts"]),
        ("config.model.dmodel = 8", ["model.dmodel", "model.d_model"]),
        ("config.model = 8", ["model", "8"]),
    ],
)
def test_bad_config_file(tmp_path, body, words):
    path = tmp_path / "mine.py"
    path.write_text(
        "from switch_jax.config import defaults\n"
        f"def get_config(arg=''):\n    config = defaults()\n    {body}\n    return config\n"
    )
    with pytest.raises(UserError) as error:
        load_config(str(path))
    message = one_sentence(error)
    assert all(word in message for word in words), message


def test_config_file_without_get_config(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("")
    with pytest.raises(UserError) as error:
        load_config(str(path))
    assert "get_config" in one_sentence(error)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, spec in SPECS.items():
        (GOLDEN / f"{name}.json").write_text(json.dumps(resolved(spec), indent=2) + "\n")
    for path in GOLDEN.glob("*.json"):
        if path.stem not in SPECS:
            path.unlink()
