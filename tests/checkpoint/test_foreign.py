"""A foreign checkpoint, read slice by slice: as a WORKDIR, and on devices."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import switch_jax
from switch_jax.checkpoint.interop.foreign import ForeignCheckpoint, foreign_parameters
from switch_jax.checkpoint.interop.workdir_writer import write_workdir
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.distributed.mesh import make_mesh
from switch_jax.errors import UserError
from switch_jax.model.parameters import named_parameters
from tests.support.configs import tiny

CONFIG = tiny(**{"model.tied_embeddings": False, "mesh.expert": 4})


def foreign(values: dict[str, np.ndarray], **fields) -> ForeignCheckpoint:
    return ForeignCheckpoint(CONFIG, lambda name, index: values[name][index], **fields)


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(stacked.shape, np.float32)
        for name, stacked in foreign_parameters(CONFIG).items()
    }


def test_stacked_dimensions_are_layers_and_experts():
    known = foreign_parameters(CONFIG)
    experts = known["encoder/runs/0/layers/1/mlp/experts/wi"]
    assert experts == ((1, 4, 16, 32), 2)
    assert list(experts.indices()) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert known["encoder/runs/0/layers/1/mlp/router/kernel"].slice_shape == (16, 4)
    assert list(known["embedding"].indices()) == [()]


def test_becomes_a_workdir(values, tmp_path):
    carried = {"huggingface/generation_config.json": b"{}"}
    write_workdir(foreign(values, vocabulary=b"bytes", carried=carried), tmp_path / "out")
    workdir = Workdir(tmp_path / "out")
    data = dataclasses.replace(CONFIG.data, vocabulary=str(workdir.vocabulary))
    assert workdir.config() == dataclasses.replace(CONFIG, data=data)
    assert workdir.vocabulary.read_bytes() == b"bytes"
    assert (workdir.path / "huggingface" / "generation_config.json").read_bytes() == b"{}"
    loaded = named_parameters(switch_jax.load(workdir.path))
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(loaded[name][...], value, err_msg=name)


def test_what_fails_leaves_nothing_behind(values, tmp_path):
    def read(name, index):
        if name.startswith("decoder/runs"):
            raise UserError("It ends here.")
        return values[name][index]

    with pytest.raises(UserError, match="ends here"):
        write_workdir(ForeignCheckpoint(CONFIG, read), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_refuses_a_folder_that_exists(values, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"):
        write_workdir(foreign(values), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_is_placed_on_a_mesh_in_parts(values):
    """Each device asks for its own experts and its own part of them."""
    mesh = make_mesh(CONFIG)
    name = "decoder/runs/0/layers/1/mlp/experts/wo"
    stacked = foreign_parameters(CONFIG)[name]
    read = []

    def reading(name, index):
        read.append(index)
        return values[name][index]

    where = NamedSharding(mesh, P(None, "expert", "data"))
    wanted = {name: jax.ShapeDtypeStruct(stacked.shape, np.float32, sharding=where)}
    placed = ForeignCheckpoint(CONFIG, reading).place(wanted)[name]
    assert placed.sharding == where
    np.testing.assert_array_equal(placed, values[name])
    assert len(read) == 8  # one expert on each of eight devices
