"""Hugging Face's folders that cannot be read: told what is wrong, and nothing left behind."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from switch_jax.checkpoint.interop.hf_import import read_hugging_face
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


def fails(folder: Path, tmp_path: Path, capsys, *words: str) -> None:
    """Exit code 2, one sentence that names all these, and nothing left behind."""
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
def test_a_config_that_does_not_fit_is_named(changes, words, folder, tmp_path, capsys):
    edit_config(folder, **changes)
    fails(folder, tmp_path, capsys, *words)


def test_missing_files_are_named(folder, tmp_path, capsys):
    fails(tmp_path / "nowhere", tmp_path, capsys, "nowhere", "config.json")
    (folder / "model.safetensors").unlink()
    fails(folder, tmp_path, capsys, "model.safetensors")


def test_a_missing_tensor_is_named(stored, folder, tmp_path, capsys):
    left = weights(stored)
    del left["decoder.block.1.layer.2.mlp.experts.expert_2.wo.weight"]
    save_file(left, folder / "model.safetensors")
    fails(folder, tmp_path, capsys, "decoder.block.1.layer.2.mlp.experts.expert_2.wo.weight")


def test_a_tensor_nobody_knows_is_named(stored, folder, tmp_path, capsys):
    extra = {"classification_head.dense.weight": np.zeros(3, np.float32)}
    save_file(weights(stored) | extra, folder / "model.safetensors")
    fails(folder, tmp_path, capsys, "classification_head.dense.weight")


def test_an_alias_with_other_values_is_named(stored, folder, tmp_path, capsys):
    other = {"encoder.embed_tokens.weight": weights(stored)[SHARED] + 1}
    save_file(weights(stored) | other, folder / "model.safetensors")
    fails(folder, tmp_path, capsys, SHARED, "encoder.embed_tokens.weight")


@pytest.mark.parametrize(
    "file, words",
    [
        ("gone.safetensors", ("gone.safetensors", "missing")),
        ("../hf/model.safetensors", ("../hf/model.safetensors", "not a file of that folder")),
        ("/etc/passwd", ("/etc/passwd",)),
        ("other.safetensors", ("other.safetensors", SHARED)),
    ],
)
def test_an_index_that_is_wrong_is_named(file, words, stored, folder, tmp_path, capsys):
    save_file({"x": np.zeros(1, np.float32)}, folder / "other.safetensors")
    weight_map = dict.fromkeys(weights(stored), "model.safetensors") | {SHARED: file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    fails(folder, tmp_path, capsys, *words)


@pytest.mark.parametrize("write", [None, torch_bin.write_zip, torch_bin.write_legacy])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_named(write, share, stored, folder, tmp_path, capsys):
    path = folder / "model.safetensors"
    if write is not None:
        path.unlink()
        path = folder / "pytorch_model.bin"
        write(path, weights(stored))
    os.truncate(path, int(share * path.stat().st_size))
    fails(folder, tmp_path, capsys, path.name)


class Runs:
    """A pickle of this runs a command when it is read by `pickle.load`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_is_executed(legacy, folder, tmp_path, capsys):
    (folder / "model.safetensors").unlink()
    ran = tmp_path / "hf" / "ran"
    evil = pickle.dumps({SHARED: Runs(ran)}, 2)
    pickle.loads(evil)
    assert ran.exists()  # it would work
    ran.unlink()
    path = folder / "pytorch_model.bin"
    if legacy:
        head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path.write_bytes(b"".join([*head, evil, pickle.dumps([], 2)]))
    else:
        torch_bin.write_archive(path, evil, {})
    fails(folder, tmp_path, capsys, "system", "do not use that file")
    assert not ran.exists()


@pytest.mark.parametrize("entry", ["../data/0", "/data/0", "pytorch_model/../../x"])
def test_an_archive_that_points_outside_is_refused(entry, folder, tmp_path, capsys):
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch_bin.write_archive(path, pickle.dumps({}, 2), {}, **{entry: b"x"})
    fails(folder, tmp_path, capsys, repr(entry), "outside")


def test_a_view_beyond_its_storage_is_refused(stored, folder, tmp_path, capsys):
    """A tensor that claims more than there is would show what lies behind it."""
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
    fails(folder, tmp_path, capsys, path.name, f"{SHARED} are not in it")


def test_a_folder_of_theirs_is_no_workdir(folder, capsys):
    assert main(["eval", "--workdir", str(folder)]) == 2
    assert "convert from-hf" in capsys.readouterr().err


def test_a_file_that_ends_while_it_is_read_leaves_nothing(folder, stored, tmp_path):
    """As when a disk fails half-way."""
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch_bin.write_zip(path, weights(stored))
    imported = read_hugging_face(folder)
    os.truncate(path, 5000)
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        write_workdir(imported, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}


def test_symbolic_links_are_followed(folder, tmp_path):
    """As in Hugging Face's cache, where every file is one."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    assert read_hugging_face(linked).config == read_hugging_face(folder).config
