"""Hugging Face's folders, in and out: what is written is what was read."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import StandardCheckpointer
from safetensors.numpy import load_file, save_file

import switch_jax
from switch_jax.checkpoint.checkpointer import Checkpointer
from switch_jax.checkpoint.interop import hf_export
from switch_jax.checkpoint.interop.hf_config import from_hugging_face, to_hugging_face
from switch_jax.checkpoint.interop.hf_import import read_hugging_face
from switch_jax.checkpoint.interop.hf_names import UNUSED, Structure
from switch_jax.checkpoint.pretrained import find_pretrained
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.cli.main import main
from switch_jax.config.load import config_from_dict, config_to_dict, override_config
from switch_jax.data.vocabulary_builder import open_vocabulary, train_vocabulary
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


def vocabulary() -> bytes:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"hf-{os.getpid()}.model"
    train_vocabulary(["the quick brown fox jumps over the lazy dog " * 9] * 20, path, 500)
    try:
        return path.read_bytes()
    finally:
        path.unlink()


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def check_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].shape == value.shape, name
        assert got[name].tobytes() == value.tobytes(), name


def round_trip(source: Path, folder: Path) -> Path:
    assert main(["convert", "from-hf", str(source), str(folder / "run")]) == 0
    assert main(["convert", "to-hf", str(folder / "run"), str(folder / "out")]) == 0
    return folder / "out"


# --- there and back


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_writes_the_same_tensors(name, tmp_path):
    stored = reference(name)
    out = round_trip(write_folder(tmp_path / "hf", stored), tmp_path)
    check_same(tensors(out), weights(stored))
    said, written = json.loads(str(stored["config"])), json.loads((out / "config.json").read_text())
    changed = {key for key in said if written[key] != said[key]}
    assert changed <= {"tie_word_embeddings"}  # transformers 5 says that of an untied model


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip_of_several_files(stored, dtype, tmp_path, monkeypatch):
    """Two, with an index and types mixed; what is written is in several files, too."""
    source = write_folder(tmp_path / "hf", stored)
    (source / "model.safetensors").unlink()
    wanted = {name: value.astype(dtype) for name, value in weights(stored).items()}
    wanted["encoder.final_layer_norm.weight"] = weights(stored)["encoder.final_layer_norm.weight"]
    ordered = sorted(wanted)
    parts = {"a.safetensors": ordered[::2], "b.safetensors": ordered[1::2]}
    for file, part in parts.items():
        save_file({name: wanted[name] for name in part}, source / file, {"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr(hf_export, "FILE_BYTES", 20_000)
    out = round_trip(source, tmp_path)
    check_same(tensors(out), wanted)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert {f.name for f in out.glob("*.safetensors")} == set(files)
    assert max((out / file).stat().st_size for file in files) < 30_000
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in wanted.values())
    for file in files:
        for name in load_file(out / file):
            assert index["weight_map"][name] == file


@pytest.mark.parametrize("write", [torch_bin.write_zip, torch_bin.write_legacy])
def test_round_trip_of_files_of_pytorch(write, tmp_path):
    """With aliases of tied weights, a tensor nobody uses, and one that is stored transposed."""
    stored = reference("t5_relu_tied")
    source = write_folder(tmp_path / "hf", stored)
    (source / "model.safetensors").unlink()
    wanted = {name: value.astype(np.float32) for name, value in weights(stored).items()}
    aliases = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
    wanted |= dict.fromkeys(aliases, wanted[SHARED])
    wanted[UNUSED] = np.ones((16, 2), np.float32)
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    wanted[query] = np.asfortranarray(wanted[query])
    write(source / "pytorch_model.bin", wanted)
    out = round_trip(source, tmp_path)
    check_same(tensors(out), {n: np.ascontiguousarray(v) for n, v in wanted.items()})


def test_tokenizer_and_other_files_are_carried(converted, tmp_path):
    assert Workdir(converted).vocabulary.read_bytes() == vocabulary()
    assert Workdir(converted).config().data.vocabulary == str(Workdir(converted).vocabulary)
    assert main(["convert", "to-hf", str(converted), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "spiece.model").read_bytes() == vocabulary()
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "model.safetensors", "spiece.model", "tokenizer_config.json"}


def test_of_bin_only_what_has_its_own_head_is_untied(stored, tmp_path):
    """A head that differs from the embedding is believed, and config.json is not."""
    source = write_folder(tmp_path / "hf", stored)
    head = weights(stored)[SHARED][::-1].copy()
    save_file(weights(stored) | {"decoder.lm_head.weight": head}, source / "model.safetensors")
    imported = read_hugging_face(source)
    assert not imported.config.model.tied_embeddings
    assert "another one" in imported.notes[0]
    np.testing.assert_array_equal(imported.read("head", ()), head.T)
    out = round_trip(source, tmp_path)
    check_same(tensors(out), weights(stored) | {"decoder.lm_head.weight": head})
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_is_the_unscaled_embedding_becomes_its_own(tmp_path):
    """transformers 5 saves an untied model that was made anew like this."""
    stored = reference("t5_geglu_untied")
    source = write_folder(tmp_path / "hf", stored)
    wanted = {name: value for name, value in weights(stored).items() if name != HEAD}
    save_file(wanted, source / "model.safetensors")
    imported = read_hugging_face(source)
    np.testing.assert_array_equal(imported.read("head", ()), wanted[SHARED].T)
    check_same(tensors(round_trip(source, tmp_path)), wanted)


def test_an_export_that_fails_leaves_nothing(converted, tmp_path, monkeypatch, capsys):
    def no_room(*_):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(hf_export, "_write", no_room)
    assert main(["convert", "to-hf", str(converted), str(tmp_path / "out")]) == 2
    assert "No space" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused(converted, folder, tmp_path, capsys):
    for verb, source in (("to-hf", converted), ("from-hf", folder)):
        assert main(["convert", verb, str(source), str(folder)]) == 2
        assert "exists" in capsys.readouterr().err
    assert (folder / "model.safetensors").exists()


# --- as a model


@pytest.fixture(scope="module")
def trained(stored, tmp_path_factory) -> Path:
    """A WORKDIR after one step from a folder of theirs, on a mesh, and its export."""
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


def test_a_trained_model_is_written(trained, stored):
    """What the step changed arrives in every tensor."""
    written = tensors(trained / "out")
    assert written.keys() == weights(stored).keys()
    moved = {n for n, v in weights(stored).items() if (written[n] != v.astype(np.float32)).any()}
    assert moved == written.keys()
    tokens = stored["encoder_input_tokens"], stored["decoder_input_tokens"]
    logits = switch_jax.load(trained / "out")(*tokens)
    np.testing.assert_array_equal(logits, switch_jax.load(trained / "run")(*tokens))
    assert np.abs(logits - stored["logits"]).max() > 0.01


def test_transformers_loads_a_trained_model(trained, stored):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(trained / "out")
    tokens = stored["encoder_input_tokens"], stored["decoder_input_tokens"]
    logits = switch_jax.load(trained / "run")(*tokens)
    source, target = (theirs.shared.weight.new_tensor(t).long() for t in tokens)
    out = theirs.eval()(
        input_ids=source, attention_mask=(source > 0).long(), decoder_input_ids=target
    )
    scale = np.abs(logits).max()
    np.testing.assert_allclose(out.logits.detach(), logits, rtol=0, atol=1e-5 * scale)


def test_the_vocabulary_is_inherited(folder):
    (folder / "spiece.model").write_bytes(vocabulary())
    config = override_config(tiny(**{"model.vocab_size": 640}), {"init_from": str(folder)})
    assert open_vocabulary(config).content == vocabulary()


def test_keeps_their_routing(converted):
    moe = Workdir(converted).config().moe
    assert (moe.expert_capacity, moe.padding, moe.group_size) == (6, "routed", 1)
    assert (moe.jitter, moe.aux_loss_weight, moe.z_loss_weight) == (0.0, 0.001, 0.001)


def test_verbs_work_on_a_converted_folder(converted, stored, capsys):
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


def test_training_begins_with_it_and_does_not_continue_it(converted):
    config = Workdir(converted).config()
    program = TrainProgram(config, make_mesh(config))
    checkpoints = Checkpointer(Workdir(converted), 3)
    with pytest.raises(UserError, match="init_from"):
        restore_state(checkpoints, program.abstract_state, None)
    checkpoints.close()


# --- what a config.json says


def switch_c() -> dict:
    """As published (paper.md of its weights says 15 decoder layers, all with experts)."""
    return {
        "model_type": "switch_transformers",
        **{"vocab_size": 32128, "d_model": 2080, "d_ff": 6144, "num_heads": 30, "d_kv": 64},
        **{"num_layers": 15, "num_decoder_layers": 12, "num_experts": 2048},
        **{"encoder_sparse_step": 1, "decoder_sparse_step": 0, "expert_capacity": 64},
    }


def test_what_is_wrong_in_the_config_of_switch_c_is_repaired():
    everywhere = tuple(range(15))
    found = Structure(
        {"encoder": 15, "decoder": 15},
        {"encoder": everywhere, "decoder": everywhere},
        gated=False,
        own_head=True,
    )
    config, notes = from_hugging_face(switch_c(), found)
    assert (config.model.num_encoder_layers, config.model.num_decoder_layers) == (15, 15)
    assert config.sparse_layers("decoder") == everywhere
    assert not config.model.tied_embeddings
    assert len(notes) == 3
    assert any("12 layers" in note and "15" in note for note in notes)
    assert any("decoder_sparse_step=0" in note for note in notes)
    written = to_hugging_face(config, switch_c())
    assert (written["num_decoder_layers"], written["decoder_sparse_step"]) == (15, 1)
    assert from_hugging_face(written, found) == (config, ())


def test_what_the_config_of_switch_base_says_is_taken():
    raw = switch_c() | {"num_layers": 12, "num_decoder_layers": 12, "num_experts": 8}
    del raw["encoder_sparse_step"], raw["decoder_sparse_step"]
    sparse = tuple(range(1, 12, 2))
    stacks = {"encoder": sparse, "decoder": sparse}
    found = Structure({"encoder": 12, "decoder": 12}, stacks, gated=False, own_head=False)
    config, notes = from_hugging_face(raw, found)
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
def test_models_that_are_none_of_theirs_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        to_hugging_face(tiny(**overrides), {})


def test_a_model_of_ours_drops_nothing_there():
    assert to_hugging_face(tiny(), {})["expert_capacity"] == 16
