"""Hugging Face folders that cannot be read: the error names the cause, and nothing is left."""

import json
import os
import pickle
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from switch_jax.checkpoint.interop import torch_bin as torch_bin_module
from switch_jax.checkpoint.interop.hf_import import read_hugging_face
from switch_jax.checkpoint.interop.torch_bin import TorchFile
from switch_jax.checkpoint.interop.workdir_writer import write_workdir
from switch_jax.cli.main import main
from switch_jax.errors import UserError
from tests.support import torch_bin
from tests.support.hugging_face import SHARED, reference, weights, write_folder


@pytest.fixture(scope="module")
def stored():
    return reference("switch_dropping")


@pytest.fixture
def folder(stored, tmp_path) -> Path:
    return write_folder(tmp_path / "hf", stored)


def check_fails(folder: Path, tmp_path: Path, capsys, *words: str) -> None:
    """Checks for exit code 2, one sentence that contains `words`, and no new files."""
    before = set(tmp_path.iterdir())
    capsys.readouterr()
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    for word in words:
        assert word in error
    assert set(tmp_path.iterdir()) == before


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "bert"}, ("'bert'", "switch_transformers")),
        ({"d_ff": 25}, ("wi.weight", "[24, 16]", "[25, 16]")),
        ({"num_experts": 5}, ("expert_4.wi.weight",)),
        ({"num_layers": 6}, ("encoder.block.4",)),
        ({"dense_act_fn": "silu"}, ("'silu'", "gated-gelu")),
        ({"router_bias": True}, ("router_bias",)),
        ({"layer_norm_epsilon": 1e-5}, ("layer_norm_epsilon=1e-05",)),
        ({"vocab_size": "many"}, ("vocab_size", "whole number")),
        ({"router_dtype": "float16"}, ("router_dtype", "float16")),
    ],
)
def test_error_names_the_config_key_that_does_not_fit(changes, words, folder, tmp_path, capsys):
    edit_config(folder, **changes)
    check_fails(folder, tmp_path, capsys, *words)


def test_error_names_missing_files(folder, tmp_path, capsys):
    check_fails(tmp_path / "nowhere", tmp_path, capsys, "nowhere", "config.json")
    (folder / "model.safetensors").unlink()
    check_fails(folder, tmp_path, capsys, "model.safetensors")


def test_error_names_a_missing_tensor(stored, folder, tmp_path, capsys):
    left = weights(stored)
    del left["decoder.block.1.layer.2.mlp.experts.expert_2.wo.weight"]
    save_file(left, folder / "model.safetensors")
    check_fails(folder, tmp_path, capsys, "decoder.block.1.layer.2.mlp.experts.expert_2.wo.weight")


def test_error_names_an_unknown_tensor(stored, folder, tmp_path, capsys):
    extra = {"classification_head.dense.weight": np.zeros(3, np.float32)}
    save_file(weights(stored) | extra, folder / "model.safetensors")
    check_fails(folder, tmp_path, capsys, "classification_head.dense.weight")


def test_error_names_an_alias_with_other_values(stored, folder, tmp_path, capsys):
    other = {"encoder.embed_tokens.weight": weights(stored)[SHARED] + 1}
    save_file(weights(stored) | other, folder / "model.safetensors")
    check_fails(folder, tmp_path, capsys, SHARED, "encoder.embed_tokens.weight")


@pytest.mark.parametrize(
    "file, words",
    [
        ("gone.safetensors", ("gone.safetensors", "missing")),
        ("../hf/model.safetensors", ("../hf/model.safetensors", "not a file of that folder")),
        ("/etc/passwd", ("/etc/passwd",)),
        ("other.safetensors", ("other.safetensors", SHARED)),
    ],
)
def test_error_names_a_wrong_entry_of_the_index(file, words, stored, folder, tmp_path, capsys):
    save_file({"x": np.zeros(1, np.float32)}, folder / "other.safetensors")
    weight_map = dict.fromkeys(weights(stored), "model.safetensors") | {SHARED: file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check_fails(folder, tmp_path, capsys, *words)


@pytest.mark.parametrize("write", [None, torch_bin.write_zip, torch_bin.write_legacy])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_error_names_a_truncated_file(write, share, stored, folder, tmp_path, capsys):
    path = folder / "model.safetensors"
    if write is not None:
        path.unlink()
        path = folder / "pytorch_model.bin"
        write(path, weights(stored))
    os.truncate(path, int(share * path.stat().st_size))
    check_fails(folder, tmp_path, capsys, path.name)


class RunsCommand:
    """An object whose pickle runs a command when `pickle.load` reads it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_commands_in_a_pickle_are_refused_and_not_run(legacy, folder, tmp_path, capsys):
    ran = tmp_path / "hf" / "ran"
    malicious = pickle.dumps({SHARED: RunsCommand(ran)}, 2)
    pickle.loads(malicious)
    assert ran.exists()  # pickle.load runs the command
    ran.unlink()
    torch_file(folder, malicious, legacy=legacy)
    check_fails(folder, tmp_path, capsys, "system", "do not use that file")
    assert not ran.exists()


@pytest.mark.parametrize("entry", ["../data/0", "/data/0", "pytorch_model/../../x"])
def test_archive_entries_outside_of_the_folder_are_refused(entry, folder, tmp_path, capsys):
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch_bin.write_archive(path, pickle.dumps({}, 2), {}, **{entry: b"x"})
    check_fails(folder, tmp_path, capsys, repr(entry), "outside")


def test_a_tensor_larger_than_its_storage_is_refused(stored, folder, tmp_path, capsys):
    """Reading it would return bytes behind the storage."""
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch_bin.write_zip(path, weights(stored))
    with zipfile.ZipFile(path) as archive:
        described = archive.read("pytorch_model/data.pkl")
        storages = {e[19:]: archive.read(e) for e in archive.namelist() if "/data/" in e}
    # 64 rows of the embedding become 65: protocol 2 writes both as one byte.
    shape = described.rindex(b"K\x40K\x10")
    longer = described[:shape] + b"K\x41" + described[shape + 2 :]
    arrays = {key: np.frombuffer(content, np.uint8) for key, content in storages.items()}
    torch_bin.write_archive(path, longer, arrays)
    check_fails(folder, tmp_path, capsys, path.name, f"{SHARED} are not in it")


def test_eval_of_a_hugging_face_folder_names_the_conversion(folder, capsys):
    assert main(["eval", "--workdir", str(folder)]) == 2
    assert "convert from-hf" in capsys.readouterr().err


def test_a_file_truncated_during_the_conversion_leaves_nothing(folder, stored, tmp_path):
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch_bin.write_zip(path, weights(stored))
    imported = read_hugging_face(folder)
    os.truncate(path, 5000)
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        write_workdir(imported, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


def test_links_of_hugging_faces_cache_are_followed_and_no_others(folder, tmp_path, capsys):
    """In the cache every file is a link. A link elsewhere would carry that file along."""
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, repository / "blobs")
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert read_hugging_face(snapshot).config == read_hugging_face(folder).config
    (tmp_path / "secret").write_text("secret")
    for name in ("spiece.model", "generation_config.json", "model.safetensors", "config.json"):
        (folder / name).rename(folder / "kept") if (folder / name).exists() else None
        outside = snapshot / name if name == "config.json" else tmp_path / "secret"
        (folder / name).symlink_to(outside)
        check_fails(folder, tmp_path, capsys, repr(name), "outside of it")
        (folder / name).unlink()
        (folder / "kept").rename(folder / name) if (folder / "kept").exists() else None


def torch_file(folder: Path, pickled: bytes, storages=None, *, legacy=False) -> Path:
    """Writes a `.bin` file with this description of its tensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    path = folder / "pytorch_model.bin"
    if legacy:
        head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path.write_bytes(b"".join([*head, pickled, pickle.dumps([], 2)]))
    else:
        torch_bin.write_archive(path, pickled, storages or {})
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_of_a_few_bytes_takes_little_memory(legacy, folder, tmp_path, capsys):
    """Python's unpickler in C would make a table of 2^24 entries, and of 2^32 entries 64 GiB."""
    memoised = b"\x80\x02}r" + (2**24).to_bytes(4, "little") + b"."
    path = torch_file(folder, memoised, legacy=legacy)
    tracemalloc.start()
    assert TorchFile(path).tensors == {}
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_of_many_bytes_is_refused(legacy, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch_bin_module, "_MAX_PICKLE_BYTES", 10_000)
    torch_file(folder, b"\x80\x02(" + b"]" * 10_000 + b"t.", legacy=legacy)
    check_fails(folder, tmp_path, capsys, "more than 10,000 bytes")


def test_a_tensor_of_one_number_repeated_is_refused(folder, tmp_path, capsys):
    """Its values are in the file, by strides of 0, but would take 4 TB."""
    number = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (2**20, 2**20), (0, 0))
    torch_file(folder, torch_bin.describe({"x": number})[0], {"0": np.zeros(1, np.float32)})
    check_fails(folder, tmp_path, capsys, "values of x are not in it")


def test_the_vocabulary_is_the_first_of_the_tokenizers_files(tmp_path):
    folder = write_folder(tmp_path / "hf", reference("t5_relu_tied"))
    assert read_hugging_face(folder).vocabulary is None
    for name, content, vocabulary in (
        ("tokenizer_config.json", b'{"tokenizer_class": "ByT5Tokenizer"}', b"byt5"),
        ("tokenizer.json", b"{}", b"{}"),
        ("spiece.model", b"pieces", b"pieces"),
    ):
        (folder / name).write_bytes(content)
        assert read_hugging_face(folder).vocabulary == vocabulary
