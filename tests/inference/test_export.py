"""An exported model, run without switch_jax, decodes the same tokens."""

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

# Runs a script like `python SCRIPT`, but import of switch_jax fails.
WITHOUT_SWITCH_JAX = """
import runpy, sys
sys.modules["switch_jax"] = None
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def decode_without_switch_jax(folder, rows):
    """Output of `greedy.py` in a process that cannot import switch_jax."""
    command = [sys.executable, "-c", WITHOUT_SWITCH_JAX, str(folder / "greedy.py")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    text = json.dumps(rows)
    finished = subprocess.run(
        command, input=text, capture_output=True, text=True, env=environment, check=True
    )
    return json.loads(finished.stdout)


def sources(rows: int, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(rows)
    return [rng.integers(2, vocab_size, INPUTS - row).tolist() for row in range(rows)]


def generated(model, rows):
    padding = [model.config.model.pad_id]
    padded = [row + padding * (INPUTS - len(row)) for row in rows]
    return np.asarray(switch_jax.generate(model, padded, max_length=OUTPUTS)).tolist()


def random_model(**overrides) -> SwitchTransformer:
    """A model with large weights, whose outputs differ from token to token."""
    large = {"model.init_scale": 8.0, "model.tied_embeddings": False}
    return SwitchTransformer(tiny(**large | overrides), jax.random.key(0))


@pytest.fixture(scope="module")
def model() -> SwitchTransformer:
    """A model with experts in some layers only, other special ids than T5's, and arrays in Fortran
    memory order.
    """
    ids = {"model.pad_id": 1, "model.eos_id": 12, "model.start_id": 13}
    model = random_model(**{"model.num_encoder_layers": 4, "moe.last": 2} | ids)
    values = {n: np.asfortranarray(leaf[...]) for n, leaf in named_parameters(model).items()}
    return with_parameters(model, values)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("exports") / "model"
    export_model(model, output, inputs_length=INPUTS, max_length=OUTPUTS, vocabulary=b"bytes")
    return output


@pytest.mark.parametrize("rows", [1, 5])
def test_exported_programs_decode_the_same_tokens_for_any_batch(model, folder, rows):
    inputs = sources(rows, model.config.model.vocab_size)
    expected = generated(model, inputs)
    assert decode_without_switch_jax(folder, inputs) == expected
    assert len({token for row in expected for token in row}) > 2


def test_signature_describes_arguments_and_results(model, folder):
    signature = json.loads((folder / "signature.json").read_text())
    ids = [signature[f"{name}_token"] for name in ("pad", "end", "start")]
    assert ids == [1, 12, 13]
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
def test_exported_programs_of_other_routers_decode_the_same_tokens(moe, tmp_path):
    model = random_model(**moe)
    export_model(model, tmp_path / "out", inputs_length=INPUTS, max_length=OUTPUTS)
    inputs = sources(3, 32)
    expected = generated(model, inputs)
    assert decode_without_switch_jax(tmp_path / "out", inputs) == expected
    assert len({token for row in expected for token in row}) > 2


def test_parameters_are_stored_in_the_dtype_of_their_use(tmp_path):
    model = random_model(**{"model.dtype": "bfloat16", "moe.num_experts": 2})
    export_model(model, tmp_path / "out", inputs_length=INPUTS, max_length=OUTPUTS)
    signature = json.loads((tmp_path / "out" / "signature.json").read_text())
    for name, parameter in signature["parameters"].items():
        is_float32 = any(part in name for part in ("norm", "router", "relative_bias"))
        assert parameter["dtype"] == ("float32" if is_float32 else "bfloat16"), name


def test_a_failed_export_leaves_no_files(model, tmp_path, capsys):
    def export(output):
        export_model(model, output, inputs_length=INPUTS, max_length=OUTPUTS)

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists"):
        export(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be made"):
        export(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert main(["export", "--workdir", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "is not a WORKDIR" in capsys.readouterr().err
