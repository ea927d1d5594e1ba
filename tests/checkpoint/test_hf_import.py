"""Import and export of Hugging Face folders: an export writes the tensors that were imported."""

import functools
import io
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from orbax.checkpoint import StandardCheckpointer
from safetensors.numpy import load_file, save_file

import switch_jax
from switch_jax.checkpoint.checkpointer import Checkpointer
from switch_jax.checkpoint.interop import hf_export
from switch_jax.checkpoint.interop.hf_config import config_from_hugging_face, config_to_hugging_face
from switch_jax.checkpoint.interop.hf_import import read_hugging_face
from switch_jax.checkpoint.interop.hf_names import UNUSED, Structure
from switch_jax.checkpoint.pretrained import find_pretrained
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.cli.main import main
from switch_jax.config.load import config_from_dict, config_to_dict, override_config
from switch_jax.data.vocabulary_builder import open_vocabulary
from switch_jax.distributed.mesh import make_mesh
from switch_jax.errors import UserError
from switch_jax.model.parameters import named_parameters
from switch_jax.training.initial_state import make_initial_state
from switch_jax.training.state import restore_state
from switch_jax.training.step import TrainProgram
from tests.support import torch_bin
from tests.support.configs import make_batch, tiny
from tests.support.hugging_face import HEAD, MODELS, SHARED, reference, weights, write_folder


@pytest.fixture(scope="module")
def stored():
    return reference("switch_dropping")


@pytest.fixture
def folder(stored, tmp_path) -> Path:
    return write_folder(tmp_path / "hf", stored)


@pytest.fixture(scope="module")
def converted(stored, tmp_path_factory) -> Path:
    """A WORKDIR."""
    base = tmp_path_factory.mktemp("converted")
    source = write_folder(base / "hf", stored)
    (source / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    (source / "spiece.model").write_bytes(vocabulary())
    assert main(["convert", "from-hf", str(source), str(base / "run")]) == 0
    return base / "run"


@functools.cache
def vocabulary() -> bytes:
    """Returns a vocabulary of at most 64 ids, with two sentinels."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog " * 9] * 20),
        model_writer=model,
        **{"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2},
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        user_defined_symbols=["<extra_id_1>", "<extra_id_0>"],
    )
    return model.getvalue()


def tensors(folder: Path) -> dict[str, np.ndarray]:
    by_name: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        by_name |= load_file(file)
    return by_name


def check_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        assert actual[name].tobytes() == value.tobytes(), name


def round_trip(source: Path, folder: Path) -> Path:
    assert main(["convert", "from-hf", str(source), str(folder / "run")]) == 0
    assert main(["convert", "to-hf", str(folder / "run"), str(folder / "out")]) == 0
    return folder / "out"


# --- round trip


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_writes_the_same_tensors(name, tmp_path):
    stored = reference(name)
    out = round_trip(write_folder(tmp_path / "hf", stored), tmp_path)
    check_same(tensors(out), weights(stored))
    original = json.loads(str(stored["config"]))
    written = json.loads((out / "config.json").read_text())
    changed = {key for key in original if written[key] != original[key]}
    assert changed <= {"tie_word_embeddings"}  # true for untied models of transformers 5


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip_of_several_files(stored, dtype, tmp_path, monkeypatch):
    """Reads two files with an index and mixed dtypes, and writes several files with an index."""
    source = write_folder(tmp_path / "hf", stored)
    (source / "model.safetensors").unlink()
    expected = {name: value.astype(dtype) for name, value in weights(stored).items()}
    expected["encoder.final_layer_norm.weight"] = weights(stored)["encoder.final_layer_norm.weight"]
    ordered = sorted(expected)
    parts = {"a.safetensors": ordered[::2], "b.safetensors": ordered[1::2]}
    for file, part in parts.items():
        save_file({name: expected[name] for name in part}, source / file, {"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr(hf_export, "FILE_BYTES", 20_000)
    out = round_trip(source, tmp_path)
    check_same(tensors(out), expected)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert {f.name for f in out.glob("*.safetensors")} == set(files)
    assert max((out / file).stat().st_size for file in files) < 30_000
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    for file in files:
        for name in load_file(out / file):
            assert index["weight_map"][name] == file


@pytest.mark.parametrize("write", [torch_bin.write_zip, torch_bin.write_legacy])
def test_round_trip_of_pytorch_files(write, tmp_path):
    """With aliases of tied weights, an unused tensor, and a tensor that is stored transposed."""
    stored = reference("t5_relu_tied")
    source = write_folder(tmp_path / "hf", stored)
    (source / "model.safetensors").unlink()
    expected = {name: value.astype(np.float32) for name, value in weights(stored).items()}
    aliases = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
    expected |= dict.fromkeys(aliases, expected[SHARED])
    expected[UNUSED] = np.ones((16, 2), np.float32)
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    expected[query] = np.asfortranarray(expected[query])
    write(source / "pytorch_model.bin", expected)
    out = round_trip(source, tmp_path)
    check_same(tensors(out), {n: np.ascontiguousarray(v) for n, v in expected.items()})


def test_export_writes_the_imported_tokenizer_and_other_files(converted, tmp_path):
    assert Workdir(converted).vocabulary.read_bytes() == vocabulary()
    assert Workdir(converted).config().data.vocabulary == str(Workdir(converted).vocabulary)
    assert main(["convert", "to-hf", str(converted), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "spiece.model").read_bytes() == vocabulary()
    written = {file.name for file in (tmp_path / "out").iterdir()}
    weights_and_card = {"config.json", "model.safetensors", "README.md"}
    assert written == weights_and_card | {"spiece.model", "tokenizer_config.json"}


def test_a_vocabulary_larger_than_the_model_is_refused_by_every_verb(converted, tmp_path, capsys):
    run, out = tmp_path / "run", str(tmp_path / "out")
    shutil.copytree(converted, run)
    (run / "vocabulary.model").write_text("bytes")
    config = json.loads((run / "config.json").read_text())
    del config["vocabulary_digest"]  # as in WORKDIRs of older versions
    (run / "config.json").write_text(json.dumps(config))
    for verb in (
        ["generate", "--text", "the dog", "--workdir", str(run)],
        ["export", "--output", out, "--workdir", str(run)],
        ["eval", "--workdir", str(run), f"--config.data.vocabulary={run}/vocabulary.model"],
        ["convert", "to-hf", str(run), out],
    ):
        assert main(verb) == 2
        assert "has 359 ids, sentinels included, and model.vocab_size" in capsys.readouterr().err
    assert not Path(out).exists()


def test_a_head_that_differs_from_the_embedding_is_untied(stored, tmp_path):
    """The weights are used where config.json contradicts them."""
    source = write_folder(tmp_path / "hf", stored)
    head = weights(stored)[SHARED][::-1].copy()
    save_file(weights(stored) | {"decoder.lm_head.weight": head}, source / "model.safetensors")
    imported = read_hugging_face(source)
    assert not imported.config.model.tied_embeddings
    assert "another one" in imported.notes[0]
    np.testing.assert_array_equal(imported.read_slice("head", ()), head.T)
    out = round_trip(source, tmp_path)
    check_same(tensors(out), weights(stored) | {"decoder.lm_head.weight": head})
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_equal_to_the_unscaled_embedding_becomes_a_parameter(tmp_path):
    """transformers 5 saves a newly initialised untied model without a head."""
    stored = reference("t5_geglu_untied")
    source = write_folder(tmp_path / "hf", stored)
    expected = {name: value for name, value in weights(stored).items() if name != HEAD}
    save_file(expected, source / "model.safetensors")
    imported = read_hugging_face(source)
    np.testing.assert_array_equal(imported.read_slice("head", ()), expected[SHARED].T)
    check_same(tensors(round_trip(source, tmp_path)), expected)


def test_a_failed_export_leaves_nothing(converted, tmp_path, monkeypatch, capsys):
    def raise_no_space(*_):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(hf_export, "_write_tensors", raise_no_space)
    assert main(["convert", "to-hf", str(converted), str(tmp_path / "out")]) == 2
    assert "No space" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_refused(converted, folder, tmp_path, capsys):
    for verb, source in (("to-hf", converted), ("from-hf", folder)):
        assert main(["convert", verb, str(source), str(folder)]) == 2
        assert "exists" in capsys.readouterr().err
    assert (folder / "model.safetensors").exists()


# --- converted models


@pytest.fixture(scope="module")
def trained(stored, tmp_path_factory) -> Path:
    """Folder with `run`, a WORKDIR after one train step on a mesh, and `out`, its export.

    Training starts from a Hugging Face folder.
    """
    base = tmp_path_factory.mktemp("trained")
    folder = write_folder(base / "hf", stored)
    raw = config_to_dict(find_pretrained(folder).config)
    raw["data"] |= {"batch_size": 8, "inputs_length": 16, "targets_length": 8}
    raw["data"]["reader"] = "synthetic"
    raw["model"]["dropout_rate"] = raw["moe"]["jitter"] = 0.0
    raw["optimizer"] |= {"warmup_steps": 1, "learning_rate": 0.1}
    raw["mesh"]["expert"] = 4
    config = config_from_dict(raw | {"init_from": str(folder)})
    program = TrainProgram(config, make_mesh(config))
    state = make_initial_state(program)
    first = named_parameters(switch_jax.load(folder))
    for name, leaf in first.items():
        np.testing.assert_array_equal(state.params[name], leaf[...], err_msg=name)
    assert state.params["encoder/runs/0/layers/1/mlp/experts/wi"].sharding.spec[1] == "expert"
    state, _, _ = program.train_step(state, program.sharded.shard_batch(make_batch(config)))

    run = base / "run"
    Workdir(run).prepare(config, None)
    with StandardCheckpointer() as writer:
        writer.save(run.absolute() / "checkpoints" / "1" / "params", state.params)
    assert main(["convert", "to-hf", str(run), str(base / "out")]) == 0
    return base


def test_export_of_a_trained_model_has_its_parameters(trained, stored):
    """The train step changes every tensor."""
    written = tensors(trained / "out")
    assert written.keys() == weights(stored).keys()
    moved = {n for n, v in weights(stored).items() if (written[n] != v.astype(np.float32)).any()}
    assert moved == written.keys()
    tokens = stored["encoder_input_tokens"], stored["decoder_input_tokens"]
    logits = switch_jax.load(trained / "out")(*tokens)
    np.testing.assert_array_equal(logits, switch_jax.load(trained / "run")(*tokens))
    assert np.abs(logits - stored["logits"]).max() > 0.01


def test_transformers_computes_the_same_logits(trained, stored):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference_model = transformers.AutoModelForSeq2SeqLM.from_pretrained(trained / "out")
    tokens = stored["encoder_input_tokens"], stored["decoder_input_tokens"]
    logits = switch_jax.load(trained / "run")(*tokens)
    source, target = (reference_model.shared.weight.new_tensor(t).long() for t in tokens)
    out = reference_model.eval()(
        input_ids=source, attention_mask=(source > 0).long(), decoder_input_ids=target
    )
    scale = np.abs(logits).max()
    np.testing.assert_allclose(out.logits.detach(), logits, rtol=0, atol=1e-5 * scale)


def test_init_from_provides_the_vocabulary(folder):
    (folder / "spiece.model").write_bytes(vocabulary())
    config = override_config(tiny(**{"model.vocab_size": 640}), {"init_from": str(folder)})
    assert open_vocabulary(config).content == vocabulary()


def test_import_keeps_the_routing_of_hugging_face(converted):
    moe = Workdir(converted).config().moe
    assert (moe.expert_capacity, moe.padding, moe.group_size) == (6, "routed", 1)
    assert (moe.jitter, moe.aux_loss_weight, moe.z_loss_weight) == (0.0, 0.001, 0.001)


def test_generate_eval_and_inspect_work_on_a_converted_workdir(converted, stored, capsys):
    assert main(["generate", "--workdir", str(converted), "--text", "a ___", "--max_length=4"]) == 0
    capsys.readouterr()
    overrides = {"reader": "synthetic", "inputs_length": "16", "targets_length": "8"}
    flags = [f"--config.data.{key}={value}" for key, value in overrides.items()]
    argv = ["eval", "--workdir", str(converted), "--json", "--config.train.eval_batches=1", *flags]
    assert main(argv) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert 3 < metrics["cross_entropy"] < 8
    assert main(["inspect", "--workdir", str(converted), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["params"] == sum(value.size for value in weights(stored).values())
    assert {layer["capacity"] for layer in summary["moe"]} == {6}


def test_training_cannot_continue_a_converted_workdir(converted):
    config = Workdir(converted).config()
    program = TrainProgram(config, make_mesh(config))
    checkpoints = Checkpointer(Workdir(converted), 3)
    with pytest.raises(UserError, match="init_from"):
        restore_state(checkpoints, program.abstract_state, None)
    checkpoints.close()


# --- config.json


def switch_c() -> dict:
    """Returns the published config.json; the weights have 15 decoder layers, all with experts."""
    return {
        "model_type": "switch_transformers",
        **{"vocab_size": 32128, "d_model": 2080, "d_ff": 6144, "num_heads": 30, "d_kv": 64},
        **{"num_layers": 15, "num_decoder_layers": 12, "num_experts": 2048},
        **{"encoder_sparse_step": 1, "decoder_sparse_step": 0, "expert_capacity": 64},
    }


def test_errors_in_the_config_of_switch_c_are_repaired():
    all_layers = tuple(range(15))
    structure = Structure(
        {"encoder": 15, "decoder": 15},
        {"encoder": all_layers, "decoder": all_layers},
        gated=False,
        own_head=True,
    )
    config, notes = config_from_hugging_face(switch_c(), structure)
    assert (config.model.num_encoder_layers, config.model.num_decoder_layers) == (15, 15)
    assert config.sparse_layers("decoder") == all_layers
    assert not config.model.tied_embeddings
    assert len(notes) == 3
    assert any("12 layers" in note and "15" in note for note in notes)
    assert any("decoder_sparse_step=0" in note for note in notes)
    written = config_to_hugging_face(config, switch_c())
    assert (written["num_decoder_layers"], written["decoder_sparse_step"]) == (15, 1)
    assert config_from_hugging_face(written, structure) == (config, ())


def test_the_config_of_switch_base_is_used():
    raw = switch_c() | {"num_layers": 12, "num_decoder_layers": 12, "num_experts": 8}
    del raw["encoder_sparse_step"], raw["decoder_sparse_step"]
    sparse = tuple(range(1, 12, 2))
    stacks = {"encoder": sparse, "decoder": sparse}
    structure = Structure({"encoder": 12, "decoder": 12}, stacks, gated=False, own_head=False)
    config, notes = config_from_hugging_face(raw, structure)
    assert not notes
    assert (config.moe.every, config.moe.num_experts, config.moe.stacks) == (2, 8, "both")
    assert config.model.tied_embeddings and config.model.dtype == "float32"


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"moe.router": "top_k"}, "moe.router=switch"),
        ({"moe.stacks": "encoder"}, "moe.stacks=both"),
        ({"moe.shared_d_ff": 8}, "moe.shared_d_ff=0"),
        ({"moe.every": 4, "model.num_encoder_layers": 4, "model.num_decoder_layers": 4}, "1 or 2"),
    ],
)
def test_export_refuses_models_that_hugging_face_does_not_have(overrides, words):
    with pytest.raises(UserError, match=words):
        config_to_hugging_face(tiny(**overrides), {})


def test_exported_capacity_drops_no_token():
    assert config_to_hugging_face(tiny(), {})["expert_capacity"] == 16
