"""Presets resolve to the reviewed configs, and wrong input gives one sentence.

`python scripts/golden/make_configs.py` writes the reviewed configs again; review their diff.
"""

import configparser
import json
import math
import re
import shlex
import sys
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_jax.config import (
    Config,
    change_effect,
    config_from_dict,
    config_to_dict,
    flatten_config,
    load_config,
    override_config,
)
from switch_jax.config.load import _leaf_types
from switch_jax.distributed.mesh import check_mesh, resolve_mesh
from switch_jax.errors import UserError
from switch_jax.model.flops import format_si, params_by_group
from switch_jax.performance.cost_model import cost_summary
from switch_jax.sweeps.spec import load_sweep
from tests.support.paths import CONFIGS, GOLDEN, ROOT

GOLDEN_CONFIGS = GOLDEN / "configs"
WITH_TABLE9 = ("switch_base", "switch_large", "switch_xxl", "switch_c", "t5_base", "t5_large")
PAPER = (*WITH_TABLE9, "t5_xxl", "moe_base", "mt5_base", "mswitch_base")

FINETUNING_TASKS = (
    *("glue", "superglue", "squad", "cnn_dailymail", "xsum", "winogrande"),
    *("anli", "arc", "closed_book_qa", "pairs", "wmt_ende", "wmt_enfr", "wmt_enro"),
)

# Config spec by golden file: every preset and every variant.
SPECS = {
    path.stem: str(path)
    for path in sorted(CONFIGS.rglob("*.py"))
    if path.parent.name != "sweeps"  # tests/sweeps/test_spec.py has the sweeps
    if path.name != "finetune.py"
}
SPECS |= {task: f"{CONFIGS / 'finetune.py'}:task={task}" for task in FINETUNING_TASKS}
SPECS |= {f"{name}-table9": f"{CONFIGS / name}.py:variant=table9" for name in WITH_TABLE9}


def resolved(spec: str) -> dict:
    """Returns the number of parameters and all values of a config."""
    config = load_config(spec)
    params = sum(params_by_group(config).values())
    return {"params": params, "config": config_to_dict(config)}


@pytest.mark.parametrize("name", SPECS)
def test_resolves_as_reviewed(name):
    assert resolved(SPECS[name]) == json.loads((GOLDEN_CONFIGS / f"{name}.json").read_text())


def test_no_golden_file_is_left_over():
    assert {path.stem for path in GOLDEN_CONFIGS.glob("*.json")} == set(SPECS)


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
        ("switch_base.py:variant=7", ["no variant '7'", "'table9'"]),
        *[(f"{name}.py:variant=tabel9", ["'tabel9'", "'table9'"]) for name in WITH_TABLE9],
        ("switch_bass.py", ["switch_bass.py", "does not exist", "did you mean switch_base "]),
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
        ("model.start_id", "40000", ["model.start_id=40000", "model.vocab_size=32128"]),
        ("model.pad_id", "1", ["model.pad_id and model.eos_id are both 1"]),
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
        ("train.steps", "1e3", ["train.steps", "whole number", "'1e3'"]),
        ("train.steps", "2147483648", ["train.steps", "at most 2147483647"]),
        ("train.steps", "9" * 5000, ["train.steps", "whole number"]),
        ("train.seed", "4294967296", ["train.seed", "to 4294967295"]),
        ("optimizer.learning_rate", "1e39", ["optimizer.learning_rate", "32 bits"]),
        ("optimizer.learning_rate", "nan", ["optimizer.learning_rate", "a number", "nan"]),
        ("optimizer.learning_rate", "{[]:1}", ["optimizer.learning_rate", "'{[]:1}'"]),
        ("optimizer.trained", "[", ["optimizer.trained='['", "no regular expression"]),
        ("optimizer.trained", "a{99999999999}", ["optimizer.trained", "no regular expression"]),
        ("data.data_dir", "", ["data.data_dir is empty"]),
        ("init_rules", "router", ["init_rules", "'router'", "no ->"]),
        ("init_rules", r"wi -> \1", ["init_rules", "invalid group reference"]),
        ("init_rules", "router ->", ["init_rules needs init_from"]),
        ("model.init_scale", "0.0", ["model.init_scale", "above 0"]),
        ("lora.alpha", "-3", ["lora.alpha", "above 0"]),
    ],
)
def test_bad_override(key, value, words):
    with pytest.raises(UserError) as error:
        load_config(SPECS["switch_base"], {key: value})
    message = one_sentence(error)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", ["2024", "1_1_1", "1e5", "007", "0x10", "True", "(1,2)", "{[]:1}"])
def test_a_text_key_takes_its_text_as_it_stands(text):
    config = load_config(SPECS["switch_base"], {"data.data_dir": text, "data.vocabulary": "'7'"})
    assert (config.data.data_dir, config.data.vocabulary) == (text, "7")


KINDS = dict(_leaf_types(Config))
TEXTS = st.one_of(
    st.text(),
    st.text("0123456789_-+.eExX'\"None[]{}(),:\\ "),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["", "None", "none", "true", "False", "9" * 5000, "1e999", "((" * 3000, "\0"]),
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(KINDS)), TEXTS)
def test_an_override_has_the_type_of_its_key_or_is_a_sentence(key, text):
    try:
        value = flatten_config(override_config(Config(), {key: text}))[key]
    except UserError as error:
        assert key in str(error) or key.partition(".")[0] in str(error)
        return
    kinds = typing.get_args(KINDS[key]) or (KINDS[key],)
    assert value in kinds or type(value) in kinds  # a choice, or a plain type
    if str in kinds and text[:1] not in ("'", '"') and value is not None:
        assert value == text


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
        (CHOICE | {"moe.balance_scope": "batch"}, ["expert_choice", "moe.balance_scope=group"]),
        ({"moe.router": "hash", "moe.balance_scope": "batch"}, ["hash", "balance_scope=group"]),
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
        (
            {"model.attention": "fused", "data.inputs_length": "2049"},
            ["model.attention=fused", "2048", "2049", "einsum"],
        ),
        ({"train.profile_steps": "9"}, ["train.profile_steps='9'", "FIRST:LAST", "10:15"]),
        ({"train.profile_steps": "5:3"}, ["FIRST ≤ LAST"]),
        ({"train.profile_steps": "1:9999999"}, ["train.steps=550000"]),
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


def test_change_effects_are_those_of_the_contract():
    keys = flatten_config(Config())
    fixed = ("model.", "moe.", "lora.", "optimizer.name", "optimizer.trained")
    fixed += ("data.mixture", "data.reader")
    neutral = ("mesh.", "train.accumulate", "train.profile_steps", "model.remat", "model.attention")
    neutral += ("train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "init_model")
    neutral += ("train.trackers",)
    for key in keys:
        expected = "checkpoint" if key.startswith(fixed) else "results"
        assert change_effect(key) == ("none" if key.startswith(neutral) else expected), key
    with pytest.raises(KeyError):
        change_effect("model.no_such_key")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["switch_mini", "distill/mini"])
def test_a_bare_name_is_a_preset(elsewhere, name):
    assert load_config(name) == load_config(str(CONFIGS / f"{name}.py"))


def test_a_preset_takes_arguments_and_overrides(elsewhere):
    config = load_config("switch_base:num_experts=64", {"train.steps": "7"})
    assert (config.moe.num_experts, config.train.steps) == (64, 7)


def test_a_file_comes_before_a_preset_of_its_name(elsewhere):
    code = (CONFIGS / "switch_mini.py").read_text().replace("d_ff=256", "d_ff=192")
    (elsewhere / "switch_mini").write_text(code)
    assert load_config("switch_mini").model.d_ff == 192


@pytest.mark.parametrize("name", ["switch_mega", "configs/switch_mini.py", "/x/switch_mini"])
def test_an_unknown_name_lists_the_presets(elsewhere, name):
    with pytest.raises(UserError) as error:
        load_config(name)
    message = one_sentence(error)
    assert name in message and "switch_mini, " in message and "t5_base" in message


def test_an_unknown_sweep_lists_the_sweeps(elsewhere):
    with pytest.raises(UserError) as error:
        load_sweep("sweeps/no_such")
    assert "sweeps/experts_mini" in one_sentence(error) and "_sizes" not in one_sentence(error)


def test_a_config_file_may_import_its_neighbours(elsewhere):
    for folder, steps in (("a", 3), ("b", 4)):
        (elsewhere / folder).mkdir()
        (elsewhere / folder / "shared.py").write_text(f"STEPS = {steps}\n")
        (elsewhere / folder / "mine.py").write_text(
            "from shared import STEPS\nfrom switch_jax.config import defaults\n"
            "def get_config(arg=''):\n    config = defaults()\n    config.train.steps = STEPS\n"
            "    return config\n"
        )
        assert load_config(f"{folder}/mine.py").train.steps == steps
    assert "shared" not in sys.modules


def test_the_wheel_lists_every_package_and_the_presets():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    folders = {path.parent for path in (ROOT / "switch_jax").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    presets = {path.parent.relative_to(CONFIGS).parts for path in CONFIGS.rglob("*.py")}
    assert listed == packages | {".".join(("switch_jax", "presets", *parts)) for parts in presets}
    assert setup["options"]["package_dir"].strip() == "switch_jax.presets = configs"
