"""Descriptions of keys: every key has one, in the command line and in the docs."""

import json

import pytest

from scripts.docs import config_keys
from switch_jax.cli import main
from switch_jax.config import defaults, describe_groups, describe_keys, flatten_config, load_config


def test_every_key_is_described():
    described = describe_keys()
    assert list(described) == list(flatten_config(load_config("t5_base")))
    assert not [key for key, one in described.items() if len(one.text) < 8]
    assert described["moe.stacks"].values == "both, encoder, decoder"
    assert described["moe.capacity_factor"].values == "float or None"
    assert described["data.seed"].text.startswith("of the order of training rows")
    assert described["init_model"].text.startswith("checkpoint: keys of `model` and `moe` that")
    raw = defaults().to_dict()
    for key, one in described.items():
        group, _, name = key.rpartition(".")
        assert one.default == (raw[group] if group else raw)[name], key


def test_every_group_is_described():
    groups = {key.rpartition(".")[0] for key in describe_keys()} - {""}
    assert describe_groups().keys() == groups and all(describe_groups().values())


def test_the_page_is_made_from_the_schema():
    assert config_keys.PAGE.read_text() == config_keys.key_page()


def test_the_command_shows_what_differs(capsys):
    arguments = ["config", "switch_tiny", "--config.train.steps=7", "--config.mesh.data=-1"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    [steps] = [line for line in lines if line[2:8] == "steps "]
    assert steps.split()[:5] == ["*", "steps", "7", "(default", "550000)"]
    [data] = [line for line in lines if line.startswith("  data ")]
    assert data.split()[:2] == ["data", "-1"]
    starred = {line.split()[1] for line in lines[1:] if line.startswith("* ")}
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {key.rpartition(".")[2] for key in printed["changed"]} == starred
    assert (
        printed["config"]["train"]["steps"] == 7
        and printed["keys"]["train.steps"]["default"] == 550_000
    )
    assert printed["keys"]["moe.every"]["text"] == "every n-th layer has experts"


@pytest.mark.parametrize("argument", ["nothing", "--config.train.steps=3"])
def test_a_config_must_be_named(argument, capsys):
    assert main(["config", argument]) == 2
    assert capsys.readouterr().err.startswith("switch-jax: ")
