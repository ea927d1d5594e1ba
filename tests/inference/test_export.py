"""What is exported, run where switch_jax is not installed, decodes the same."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import switch_jax
from switch_jax.cli.main import main
from switch_jax.errors import UserError
from switch_jax.inference.export import export_model
from switch_jax.model.parameters import named_parameters, with_parameters
from switch_jax.model.transformer import SwitchTransformer
from tests.support.configs import tiny

INPUTS, OUTPUTS = 13, 9

# Runs a script as `python SCRIPT` would, but with switch_jax out of reach.
ALONE = """
import runpy, sys
sys.modules["switch_jax"] = None
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def decoded_alone(folder, rows):
    """What `greedy.py` prints, in a process that cannot import switch_jax."""
    command = [sys.executable, "-c", ALONE, str(folder / "greedy.py")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    text = json.dumps(rows)
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, env=environment, check=True
    )
    return json.loads(done.stdout)


def sources(rows: int, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(rows)
    return [rng.integers(2, vocab_size, INPUTS - row).tolist() for row in range(rows)]


def generated(model, rows):
    padded = [row + [0] * (INPUTS - len(row)) for row in rows]
    return np.asarray(switch_jax.generate(model, padded, max_length=OUTPUTS)).tolist()


def random_model(**overrides) -> SwitchTransformer:
    """Weights so large that outputs differ from token to token."""
    large = {"model.init_scale": 8.0, "model.tied_embeddings": False}
    return SwitchTransformer(tiny(**large | overrides), jax.random.key(0))


@pytest.fixture(scope="module")
def model() -> SwitchTransformer:
    """With experts in some layers only, and arrays in memory in another order than C's."""
    model = random_model(**{"model.num_encoder_layers": 4, "moe.last": 2})
    values = {n: np.asfortranarray(leaf[...]) for n, leaf in named_parameters(model).items()}
    return with_parameters(model, values)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("exports") / "model"
    export_model(model, output, inputs_length=INPUTS, max_length=OUTPUTS, vocabulary=b"bytes")
    return output


@pytest.mark.parametrize("rows", [1, 5])
def test_decodes_to_the_same_tokens_for_any_batch(model, folder, rows):
    inputs = sources(rows, model.config.model.vocab_size)
    expected = generated(model, inputs)
    assert decoded_alone(folder, inputs) == expected
    assert len({token for row in expected for token in row}) > 3


def test_describes_itself(model, folder):
    signature = json.loads((folder / "signature.json").read_text())
    assert signature["encode"]["arguments"][1]["inputs"]["shape"] == ["batch", INPUTS]
    V = model.config.model.vocab_size
    logits = signature["decode_step"]["returns"][0]["logits"]
    assert logits == {"shape": ["batch", V], "dtype": "float32"}
    assert signature["parameters"].keys() == named_parameters(model).keys()
    assert (folder / "vocabulary.model").read_bytes() == b"bytes"
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


@pytest.mark.parametrize(
    "moe",
    [
        {"moe.sublayer": "both", "moe.shared_d_ff": 8, "moe.router": "hash"},
        {"moe.router": "top_k", "moe.top_k": 8, "moe.num_experts": 256},
        {
            "moe.stacks": "encoder",
            "moe.router": "expert_choice",
            "moe.capacity_factor": 2.0,
            "model.dtype": "bfloat16",
        },
    ],
    ids=["attention", "top-8 of many", "expert choice, bfloat16"],
)
def test_other_experts(moe, tmp_path):
    model = random_model(**moe)
    export_model(model, tmp_path / "out", inputs_length=INPUTS, max_length=OUTPUTS)
    inputs = sources(3, 32)
    expected = generated(model, inputs)
    assert decoded_alone(tmp_path / "out", inputs) == expected
    assert len({token for row in expected for token in row}) > 3


def test_weights_are_stored_as_they_are_used(tmp_path):
    model = random_model(**{"model.dtype": "bfloat16", "moe.num_experts": 2})
    export_model(model, tmp_path / "out", inputs_length=INPUTS, max_length=OUTPUTS)
    signature = json.loads((tmp_path / "out" / "signature.json").read_text())
    for name, described in signature["parameters"].items():
        precise = any(part in name for part in ("norm", "router", "relative_bias"))
        assert described["dtype"] == ("float32" if precise else "bfloat16"), name


def test_what_fails_leaves_nothing_behind(model, tmp_path, capsys):
    def write(output):
        export_model(model, output, inputs_length=INPUTS, max_length=OUTPUTS)

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists"):
        write(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be made"):
        write(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert main(["export", "--workdir", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "is not a WORKDIR" in capsys.readouterr().err
