"""Paths, shapes and axes of every preset's parameters equal the golden files.

scripts/golden/make_parameters.py writes the files.
"""

import functools

import pytest

from switch_jax.config.load import load_config
from tests.config import test_configs
from tests.support import goldens

_BASE = test_configs.SPECS["switch_base"]

# Overrides of Switch-Base for parameters that no preset has.
_VARIANTS = {
    "attention": {"moe.sublayer": "both"},
    "balance_bias": {"moe.balance_bias_rate": "0.001"},
    "encoder_last": {"moe.stacks": "encoder", "moe.last": "4", "moe.every": "1"},
    "geglu_untied": {"model.activation": "geglu", "model.tied_embeddings": "False"},
    "hash": {"moe.router": "hash"},
    "lora": {"lora.rank": "4"},
    "shared": {"moe.shared_d_ff": "512"},
}

# Golden file → function that makes the config.
# A fine-tuning preset has the experts of init_from; its golden file is that of Switch-Base's.
PRESETS = {
    name: functools.partial(load_config, spec + ",num_experts=128" * ("finetune.py" in spec))
    for name, spec in test_configs.SPECS.items()
}
PRESETS["switch_base-64"] = functools.partial(load_config, f"{_BASE}:num_experts=64")
for _name, _overrides in _VARIANTS.items():
    PRESETS[f"switch_base-{_name}"] = functools.partial(load_config, _BASE, _overrides)


def test_every_preset_has_a_golden_file():
    assert {path.stem for path in goldens.PARAMETERS.glob("*.txt")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_equal_the_golden_file(name):
    golden = (goldens.PARAMETERS / f"{name}.txt").read_text()
    assert goldens.parameters(PRESETS[name]()).splitlines() == golden.splitlines()
