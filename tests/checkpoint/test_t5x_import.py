"""Import of T5X checkpoints: both layouts, with scanned layers and without."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import serialization

import switch_jax
from switch_jax.checkpoint.interop import t5x_import
from switch_jax.checkpoint.interop.expert_placement import infer_placement
from switch_jax.checkpoint.interop.t5x_import import is_t5x, read_t5x
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.cli.main import main
from switch_jax.errors import UserError
from switch_jax.model.parameters import named_parameters
from switch_jax.model.transformer import SwitchTransformer
from tests.support.paths import ODD_NAME
from tests.support.t5x import (
    random_model,
    scan_layers,
    t5x_arrays,
    train_state,
    write_legacy,
    write_orbax,
)


def logits(model: SwitchTransformer) -> np.ndarray:
    rng = np.random.default_rng(0)
    source, target = rng.integers(1, 40, (3, 16)), rng.integers(1, 40, (3, 8))
    return np.asarray(jax.jit(lambda m: m(source, target))(model))


def check_same(path: Path, model: SwitchTransformer) -> SwitchTransformer:
    """Checks the parameters and the config of a loaded checkpoint; returns the loaded model."""
    loaded = switch_jax.load(path)
    expected = named_parameters(model)
    assert named_parameters(loaded).keys() == expected.keys()
    for name, leaf in named_parameters(loaded).items():
        np.testing.assert_array_equal(leaf[...], expected[name][...], err_msg=name)
    assert [loaded.config.block_runs(s) for s in t5x_import.STACKS] == [
        model.config.block_runs(s) for s in t5x_import.STACKS
    ]
    return loaded


@pytest.fixture(scope="module")
def switch() -> SwitchTransformer:
    return random_model("switch")


@pytest.fixture(scope="module")
def legacy(switch, tmp_path_factory) -> Path:
    return write_legacy(tmp_path_factory.mktemp("t5x") / "checkpoint_7", t5x_arrays(switch))


@pytest.mark.parametrize("layout", ["legacy", "orbax"])
def test_loaded_model_has_the_same_logits(layout, switch, legacy, tmp_path):
    path = legacy
    if layout == "orbax":
        (tmp_path / ODD_NAME).mkdir()
        written = write_orbax(tmp_path / "checkpoint_7", t5x_arrays(switch))
        path = written.rename(tmp_path / ODD_NAME / "checkpoint_7")
    loaded = check_same(path, switch)
    np.testing.assert_allclose(logits(loaded), logits(switch), rtol=1e-6, atol=1e-6)
    assert switch_jax.load(path.parent).config == loaded.config  # the newest in a folder


@pytest.mark.parametrize("name", ["switch-c", "top", "t5-1.0", "t5-1.1"])
def test_the_config_is_inferred_from_names_and_shapes(name, tmp_path):
    model = random_model(name)
    loaded = check_same(write_legacy(tmp_path / "checkpoint_1", t5x_arrays(model)), model)
    inferred, original = loaded.config.model, model.config.model
    for key in ("vocab_size", "num_heads", "head_dim", "activation", "relative_buckets"):
        assert getattr(inferred, key) == getattr(original, key), key


@pytest.mark.parametrize("name, every", [("switch", 2), ("t5-1.1", 1)])
@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_layers(name, every, axis, tmp_path):
    model = random_model(name)
    arrays = scan_layers(t5x_arrays(model), every, axis)
    check_same(write_orbax(tmp_path / "checkpoint_1", arrays), model)


def test_scanned_layers_with_a_relative_bias_each(tmp_path):
    """T5X's own models repeat the table in scanned layers."""
    model = random_model("t5-1.1")
    arrays = scan_layers(t5x_arrays(model), 1, 1)
    for stack in t5x_import.STACKS:
        table = arrays.pop(f"{stack}/relpos_bias/rel_embedding")
        arrays[f"{stack}/{stack}/relpos_bias/rel_embedding"] = np.stack([table, table], 1)
    check_same(write_legacy(tmp_path / "checkpoint_1", arrays), model)
    arrays["decoder/decoder/relpos_bias/rel_embedding"][0, 1, 0] += 1
    write_legacy(tmp_path / "checkpoint_2", arrays)
    with pytest.raises(UserError, match="differs from layer to layer"):
        read_t5x(tmp_path / "checkpoint_2")


def test_orbax_layout_with_a_folder_for_each_array(switch, tmp_path):
    arrays = t5x_arrays(switch)
    path = write_orbax(tmp_path / "checkpoint_1", arrays, use_ocdbt=False)
    check_same(path, switch)
    # The same folder with an index, which contains small arrays.
    small = "encoder/encoder_norm/scale"
    leaves = {name: "PLACEHOLDER://target." + name.replace("/", ".") for name in arrays}
    content = serialization.msgpack_serialize(train_state(leaves | {small: arrays[small] + 1}))
    (path / "state" / "checkpoint").write_bytes(content)
    for folder in (path, path / "state"):
        imported = read_t5x(folder)
        np.testing.assert_array_equal(imported.read_slice("encoder/final_norm/scale", ()), 2)
        router = imported.read_slice("decoder/runs/0/layers/1/mlp/router/kernel", (0,))
        np.testing.assert_array_equal(
            router, arrays["decoder/layers_1/mlp/router/router_weights/w/kernel"]
        )


def test_bfloat16_arrays(switch, tmp_path):
    rounded = {n: v.astype("bfloat16").astype(np.float32) for n, v in t5x_arrays(switch).items()}
    imported = read_t5x(write_legacy(tmp_path / "checkpoint_1", rounded, "bfloat16"))
    value = imported.read_slice("encoder/runs/0/layers/1/mlp/experts/wi", (1, 2))
    assert value.dtype == np.float32
    assert (value == rounded["encoder/layers_3/mlp/expert/wi/kernel"][2]).all()


def test_integer_arrays_are_refused(switch, tmp_path):
    path = write_legacy(tmp_path / "checkpoint_1", t5x_arrays(switch), "uint16")
    assert "uint16" in failure(path)


def test_from_t5x_writes_a_workdir(switch, legacy, tmp_path, capsys):
    assert main(["convert", "from-t5x", str(legacy), str(tmp_path / "out")]) == 0
    assert "optimizer's state" in capsys.readouterr().out
    check_same(tmp_path / "out", switch)
    assert Workdir(tmp_path / "out").config().moe.aux_loss_reduction == "mean"


def edited(arrays, **changes):
    """Returns the arrays with some of them replaced, or removed with None."""
    changed = arrays | {name.replace("__", "/"): value for name, value in changes.items()}
    return {name: value for name, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"decoder__layers_1__mlp__expert__wi__kernel": np.ones((4, 16, 25))},
            ["decoder/layers_1/mlp/expert/wi/kernel", "[4, 16, 25]", "[4, 16, 24]"],
        ),
        ({"encoder__layers_2__mlp__wo__kernel": None}, ["encoder/layers/2/mlp/wo"]),
        ({"encoder__layers_0__extra_mlp__wi__kernel": np.ones(3)}, ["layers_0/extra_mlp/wi"]),
        ({"encoder__layers_9__mlp__wo__kernel": np.ones((24, 16))}, ["Layer 4 of the encoder"]),
        ({"token_embedder__embedding": None}, ["embedding", "incomplete"]),
        (
            {"decoder__layers_0__mlp__wi_0__kernel": np.ones((16, 24))},
            ["gate", "incomplete"],
        ),
    ],
)
def test_error_names_the_array_of_another_model_in_one_sentence(
    changes, words, switch, tmp_path, capsys
):
    path = write_legacy(tmp_path / "checkpoint_1", edited(t5x_arrays(switch), **changes))
    assert main(["convert", "from-t5x", str(path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in [str(path), *words]), error
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint_1"]


@pytest.fixture
def copy(legacy, tmp_path) -> Path:
    return shutil.copytree(legacy, tmp_path / "checkpoint_1")


ARRAY = "target.encoder.layers_1.mlp.expert.wi.kernel"


def failure(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        read_t5x(path)
    return str(raised.value)


def test_error_names_a_missing_array_or_chunk(copy):
    chunk = min(file for file in (copy / ARRAY).iterdir() if not file.name.startswith("."))
    chunk.unlink()
    assert ARRAY in failure(copy) and "chunks are there" in failure(copy)
    shutil.rmtree(copy / ARRAY)
    assert f"lacks the array {ARRAY}" in failure(copy)


def test_damaged_files_leave_nothing(copy, tmp_path, capsys):
    chunk = min(file for file in (copy / ARRAY).iterdir() if not file.name.startswith("."))
    chunk.write_bytes(b"not gzip")
    assert main(["convert", "from-t5x", str(copy), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert ARRAY in error and "cannot be read" in error and error.count("\n") == 1
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint_1"]
    (copy / ARRAY / ".zarray").write_text(json.dumps({"zarr_format": 2}))
    assert ARRAY in failure(copy)
    (copy / "checkpoint").write_bytes(b"\x81\xa3")
    assert "checkpoint cannot be read" in failure(copy)


@pytest.mark.parametrize("path_in_index", ["../outside", "/etc", "", "link"])
def test_paths_outside_of_the_folder_are_refused(path_in_index, copy, tmp_path):
    shutil.copytree(copy / ARRAY, tmp_path / "outside")
    (copy / "link").symlink_to(tmp_path / "outside")
    content = serialization.msgpack_restore((copy / "checkpoint").read_bytes())
    leaf = content["optimizer"]["target"]["encoder"]["layers_1"]["mlp"]["expert"]["wi"]
    leaf["kernel"]["kvstore"]["path"] = path_in_index
    (copy / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    assert ("outside of it" if path_in_index else "without a name") in failure(copy)


@pytest.mark.parametrize("key, value", [("shape", [2**30, 2**20]), ("chunks", [2**40, 1, 1])])
def test_absurd_sizes_are_refused_with_their_bytes_before_reading(key, value, copy):
    file = copy / ARRAY / ".zarray"
    metadata = json.loads(file.read_text())
    value = value[: len(metadata["shape"])] + [1] * (len(metadata["shape"]) - len(value))
    file.write_text(json.dumps(metadata | {key: value}))
    size = 4 * np.prod(value, dtype=np.int64)
    assert f"{ARRAY} expands to {size:,} bytes" in failure(copy)


def test_a_chunk_that_is_a_link_out_of_the_checkpoint_is_refused(copy):
    chunk = min(file for file in (copy / ARRAY).iterdir() if not file.name.startswith("."))
    chunk.unlink()
    chunk.symlink_to("/etc/passwd")
    assert "leads to /etc/passwd, outside of it" in failure(copy)


def test_an_index_nested_deeply_is_damaged(copy):
    (copy / "checkpoint").write_bytes(b"\x81\xa6target" + b"\x81\xa1a" * 1010 + b"\xc0")
    assert "checkpoint cannot be read" in failure(copy)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1"\n')
    assert not is_t5x(tmp_path) and not is_t5x(tmp_path / "none")
    assert "is no T5X checkpoint" in failure(tmp_path)


def test_expert_placements_without_config_keys_are_refused():
    layers = {"encoder": 6, "decoder": 6}
    keys = infer_placement(layers, {"encoder": (0, 1, 2), "decoder": (0, 1, 2)})
    assert keys == {"every": 1, "first": 3, "last": None, "stacks": "both"}
    with pytest.raises(UserError, match=r"\[2, 3\]"):
        infer_placement(layers, {"encoder": (2, 3), "decoder": (1, 3, 5)})
    with pytest.raises(UserError, match=r"\[\]"):
        infer_placement(layers, {"encoder": (), "decoder": ()})
