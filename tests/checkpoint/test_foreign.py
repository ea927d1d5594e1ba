"""Foreign checkpoints, read slice by slice: written as a WORKDIR, and restored on devices."""

import dataclasses
import weakref

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import switch_jax
from switch_jax.checkpoint.interop import workdir_writer
from switch_jax.checkpoint.interop.foreign_checkpoint import ForeignCheckpoint, stacked_shapes
from switch_jax.checkpoint.interop.workdir_writer import write_workdir
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.config.load import override_config
from switch_jax.distributed.mesh import make_mesh
from switch_jax.errors import UserError
from switch_jax.model.parameters import named_parameters
from tests.support.configs import tiny
from tests.support.paths import ODD_NAME

CONFIG = tiny(**{"model.tied_embeddings": False, "mesh.expert": 4})


def foreign(values: dict[str, np.ndarray], **fields) -> ForeignCheckpoint:
    return ForeignCheckpoint(CONFIG, lambda name, index: values[name][index], **fields)


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(stacked.shape, np.float32)
        for name, stacked in stacked_shapes(CONFIG).items()
    }


def test_stacked_dimensions_are_layers_and_experts():
    shapes = stacked_shapes(CONFIG)
    experts = shapes["encoder/runs/0/layers/1/mlp/experts/wi"]
    assert experts == ((1, 4, 16, 32), 2)
    assert list(experts.indices()) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert shapes["encoder/runs/0/layers/1/mlp/router/kernel"].slice_shape == (16, 4)
    assert list(shapes["embedding"].indices()) == [()]


def test_write_workdir_writes_config_vocabulary_files_and_parameters(values, tmp_path):
    files = {"huggingface/generation_config.json": b"{}"}
    write_workdir(foreign(values, vocabulary=b"bytes", companion_files=files), tmp_path / ODD_NAME)
    workdir = Workdir(tmp_path / ODD_NAME)
    data = dataclasses.replace(CONFIG.data, vocabulary=str(workdir.vocabulary))
    assert workdir.config() == dataclasses.replace(CONFIG, data=data)
    assert workdir.vocabulary.read_bytes() == b"bytes"
    assert (workdir.path / "huggingface" / "generation_config.json").read_bytes() == b"{}"
    loaded = named_parameters(switch_jax.load(workdir.path))
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(loaded[name][...], value, err_msg=name)


def test_orbax_alone_reads_the_written_parameters(values, tmp_path):
    """`write_workdir` writes Orbax's layout itself; Orbax must read the same from it as its own."""
    write_workdir(foreign(values), tmp_path / "out")
    folder = Workdir(tmp_path / "out").checkpoints / "0" / "params"
    reference = tmp_path / "reference"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(reference, values)
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}
    abstract = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in values.items()
    }
    for checkpointer in (ocp.StandardCheckpointer(), ocp.PyTreeCheckpointer()):
        with checkpointer:
            metadata = [checkpointer.metadata(path) for path in (folder, reference)]
            shapes = [
                {name: (array.shape, array.dtype) for name, array in m.item_metadata.tree.items()}
                for m in metadata
            ]
            assert shapes[0] == shapes[1]
            restored = [checkpointer.restore(folder)]
            if isinstance(checkpointer, ocp.StandardCheckpointer):
                restored.append(checkpointer.restore(folder, abstract))
        for tree in restored:
            assert tree.keys() == values.keys()
            for name, value in values.items():
                assert tree[name].dtype == np.float32, name
                np.testing.assert_array_equal(tree[name], value, err_msg=name)


def test_write_workdir_keeps_few_slices_in_memory(values, tmp_path, monkeypatch):
    """Of 32 experts, at most two are in memory at the same time."""
    config = override_config(CONFIG, {"moe.num_experts": "32"})
    expert_bytes = 4 * 16 * 32
    monkeypatch.setattr(workdir_writer, "_MAX_BYTES_IN_FLIGHT", 2 * expert_bytes)
    shapes = stacked_shapes(config)
    in_memory = set()
    peak = 0

    def read_slice(name, index):
        nonlocal peak
        value = np.ones(shapes[name].slice_shape, np.float32)
        if "/experts/" in name:
            in_memory.add((name, index))
            weakref.finalize(value, in_memory.remove, (name, index))
            peak = max(peak, len(in_memory))
        return value

    write_workdir(ForeignCheckpoint(config, read_slice), tmp_path / "out")
    assert peak == 2


def test_write_workdir_leaves_nothing_after_an_error(values, tmp_path):
    def read_slice(name, index):
        if name.startswith("decoder/runs"):
            raise UserError("It ends here.")
        return values[name][index]

    with pytest.raises(UserError, match="ends here"):
        write_workdir(ForeignCheckpoint(CONFIG, read_slice), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_write_workdir_refuses_an_existing_folder(values, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"):
        write_workdir(foreign(values), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_restore_on_a_mesh_reads_only_the_slices_of_each_shard(values):
    """Each device reads its own experts once, and keeps its own part of them."""
    mesh = make_mesh(CONFIG)
    name = "decoder/runs/0/layers/1/mlp/experts/wo"
    stacked = stacked_shapes(CONFIG)[name]
    indices = []

    def read_slice(name, index):
        indices.append(index)
        return values[name][index]

    sharding = NamedSharding(mesh, P(None, "expert", "data"))
    abstract = {name: jax.ShapeDtypeStruct(stacked.shape, np.float32, sharding=sharding)}
    restored = ForeignCheckpoint(CONFIG, read_slice).restore(abstract)[name]
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, values[name])
    assert len(indices) == 8  # one expert on each of eight devices
