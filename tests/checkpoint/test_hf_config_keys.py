"""Keys of Hugging Face's config.json and generation_config.json: all are read or checked."""

import importlib.util
import json
import runpy

import numpy as np
import pytest
from safetensors.numpy import save_file

import switch_jax
from switch_jax.checkpoint.interop.hf_config import config_from_hugging_face
from switch_jax.checkpoint.interop.hf_config_keys import REQUIRED_VALUES, known_keys
from switch_jax.checkpoint.interop.hf_names import Structure
from switch_jax.cli.main import main
from switch_jax.errors import UserError
from tests.support.hugging_face import SHARED, reference, weights, write_folder
from tests.support.paths import GOLDEN, SCRIPTS

STACKS = {"encoder": 2, "decoder": 2}
T5 = {
    "model_type": "t5",
    **{"vocab_size": 64, "d_model": 16, "d_ff": 24, "num_heads": 2, "d_kv": 8, "num_layers": 2},
}
SWITCH = T5 | {"model_type": "switch_transformers", "num_experts": 4}


def read(raw, generation=None, gated=False):
    sparse = dict.fromkeys(STACKS, (1,) if "num_experts" in raw else ())
    structure = Structure(STACKS, sparse, gated=gated, own_head=False)
    return config_from_hugging_face(raw, structure, generation)


def test_the_keys_of_every_version_of_transformers_are_known():
    for version, keys in json.loads((GOLDEN / "hugging_face_keys.json").read_text()).items():
        assert set(keys) <= known_keys(), version


def test_the_keys_of_the_installed_transformers_are_known():
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    script = runpy.run_path(str(SCRIPTS / "golden" / "make_hugging_face_keys.py"))
    assert set(script["config_keys"]()) <= known_keys()


def test_the_published_config_of_switch_base_needs_no_note():
    published = {
        **{
            "add_router_probs": False,
            "architectures": ["SwitchTransformersForConditionalGeneration"],
        },
        **{"batch_prioritized_routing": False, "decoder_sparse_step": 2, "encoder_sparse_step": 2},
        **{"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
        **{"dense_act_fn": "relu", "feed_forward_proj": "relu", "is_gated_act": False},
        **{"dropout_rate": 0.1, "expert_capacity": 64, "initializer_factor": 1.0},
        **{"is_encoder_decoder": True, "layer_norm_epsilon": 1e-6, "num_selected_experts": 1},
        **{"num_sparse_decoder_layers": 1, "num_sparse_encoder_layers": 1},
        **{"router_ignore_padding_tokens": False, "router_jitter_noise": 0},
        **{"router_type": "tokens_masked", "torch_dtype": "bfloat16", "use_cache": True},
        "transformers_version": "4.25.0.dev0",
    }
    config, notes = read(SWITCH | published)
    assert not notes and config.moe.jitter == 0.0 and config.model.dtype == "bfloat16"


@pytest.mark.parametrize("key", REQUIRED_VALUES)
def test_a_value_that_models_here_do_not_have_is_refused(key):
    required = REQUIRED_VALUES[key]
    read(SWITCH | {key: required})
    read(SWITCH | {key: None})
    others = [not required, int(required), "true"] if isinstance(required, bool) else [2, "x", True]
    for other in others:
        with pytest.raises(UserError, match=rf"config\.json has {key}="):
            read(SWITCH | {key: other})


@pytest.mark.parametrize("key, value", [
    ("vocab_size", True), ("d_model", 16.0), ("num_layers", None), ("num_heads", [2]),
    ("dropout_rate", "0.1"), ("dropout_rate", True), ("tie_word_embeddings", "yes"),
    ("tie_word_embeddings", 0), ("dense_act_fn", 1), ("router_dtype", False),
    ("router_dtype", "float8"), ("expert_capacity", {}), ("eos_token_id", "1"),
    ("pad_token_id", True), ("decoder_start_token_id", 64), ("num_experts", "4"),
])  # fmt: skip
def test_a_value_of_another_type_is_named(key, value):
    word = {"decoder_start_token_id": "start_id"}.get(key, key)
    with pytest.raises(UserError, match=rf"^config\.json.*{word}"):
        read(SWITCH | {key: value})


@pytest.mark.parametrize("change", [{"d_kv": None, "head_dim": 8}, {"hidden_size": 32}])
def test_two_names_of_one_number_must_agree(change):
    with pytest.raises(UserError, match="two names of one number"):
        read(T5 | change)
    assert read(T5 | {"hidden_size": 16})[0] == read(T5)[0]


def test_the_activation_of_t5_has_two_keys_that_must_agree():
    gated = T5 | {"feed_forward_proj": "gated-gelu"}
    assert read(gated | {"dense_act_fn": "gelu_new"}, gated=True)[0].model.activation == "geglu"
    for own in ("relu", "gelu"):
        with pytest.raises(UserError, match=f"dense_act_fn={own!r} and not 'gelu_new'"):
            read(gated | {"dense_act_fn": own}, gated=True)


def test_special_ids_are_read_from_both_files():
    def ids(raw, generation=None):
        model = read(T5 | raw, generation)[0].model
        return model.pad_id, model.eos_id, model.start_id

    assert ids({}) == (0, 1, 0)
    assert ids({"pad_token_id": 1, "eos_token_id": 2}) == (1, 2, 1)  # T5 starts with padding
    assert ids({"pad_token_id": 1, "eos_token_id": [2], "decoder_start_token_id": 0}) == (1, 2, 0)
    assert ids({"pad_token_id": None}, {"decoder_start_token_id": 7, "eos_token_id": [5]}) == (
        *(0, 5, 7),
    )
    with pytest.raises(UserError, match=r"eos_token_id=1, and generation_config\.json .*=5"):
        ids({"eos_token_id": 1}, {"eos_token_id": 5})
    with pytest.raises(UserError, match=r"generation_config\.json has eos_token_id=\[1, 5\]"):
        ids({}, {"eos_token_id": [1, 5]})
    with pytest.raises(UserError, match=r"^generation_config\.json: pad_token_id must be"):
        ids({}, {"pad_token_id": "0"})


def test_keys_that_are_not_obeyed_are_told():
    generation = {"num_beams": 4, "do_sample": False, "max_length": 512, "temperature": 1.0}
    config, notes = read(T5 | {"rotary": "yes" * 50, "use_cache": False}, generation)
    assert config == read(T5)[0]
    unknown, decoding = notes
    assert "rotary='yesyes" in unknown and "use_cache" not in unknown and len(unknown) < 150
    assert "num_beams=4" in decoding and "do_sample" not in decoding and "512" not in decoding


def test_special_ids_are_written_again(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", reference("t5_relu_tied"))
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"decoder_start_token_id": 7, "pad_token_id": 3, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2], "num_beams": 2}')
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "run")]) == 0
    assert "num_beams=2" in capsys.readouterr().out
    model = switch_jax.load(tmp_path / "run").config.model
    assert (model.pad_id, model.eos_id, model.start_id) == (3, 2, 7)
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in raw} == raw
    generation = (tmp_path / "out" / "generation_config.json").read_text()
    assert generation == '{"eos_token_id": [2], "num_beams": 2}'

    # A run with other ids, as after fine-tuning with another config.
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"eos_id": 2', '"eos_id": 5'))
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "other")]) == 0
    assert json.loads((tmp_path / "other" / "config.json").read_text())["eos_token_id"] == 5
    generation = json.loads((tmp_path / "other" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 5, "num_beams": 2}


DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000


@pytest.mark.parametrize("file", [
    "config.json", "generation_config.json", "model.safetensors.index.json",
])  # fmt: skip
@pytest.mark.parametrize("content", [
    "[]", "null", '"model_type"', "7", "{", DEEP, b"\xff\xfe{}", '{"vocab_size": 1e999}',
    '{"weight_map": ["a"], "eos_token_id": {}}', '{"weight_map": {"a": 3}, "eos_token_id": 1.5}',
])  # fmt: skip
def test_json_files_that_are_none_are_named(file, content, tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", reference("t5_relu_tied"))
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and file in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tensors_that_are_not_finite_are_refused(value, tmp_path, capsys):
    """Also where a sum of squares overflows in float32, which is finite."""
    stored = reference("t5_relu_tied")
    folder = write_folder(tmp_path / "hf", stored)
    tensors = {name: tensor.astype(np.float32) for name, tensor in weights(stored).items()}
    tensors[SHARED][5, 3] = 1e30
    save_file(tensors, folder / "model.safetensors")
    assert switch_jax.load(folder).embedding[...][5, 3] == np.float32(1e30)
    name = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    tensors[name][0, 1] = value
    save_file(tensors, folder / "model.safetensors")
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "mlp/wo/1 in the checkpoint has 1 values that are NaN or infinite" in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=rf"mlp/wo in {folder} has 1 values"):
        switch_jax.load(folder)


def test_a_value_that_the_written_dtype_does_not_hold_is_refused(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", reference("t5_relu_tied"))  # float16
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "run")]) == 0
    record = tmp_path / "run" / "huggingface" / "tensors.json"
    big = {n: t.astype(np.float32) for n, t in weights(reference("t5_relu_tied")).items()}
    big[SHARED][0, 0] = 1e6
    save_file(big, folder / "model.safetensors")
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "big")]) == 0
    (tmp_path / "big" / "huggingface" / "tensors.json").write_bytes(record.read_bytes())
    capsys.readouterr()
    assert main(["convert", "to-hf", str(tmp_path / "big"), str(tmp_path / "out")]) == 2
    assert f"{SHARED} has values that F16" in capsys.readouterr().err
