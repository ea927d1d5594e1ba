"""ShardedModel, and the rows of a batch that a process reads."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from switch_jax.distributed.mesh import make_mesh
from switch_jax.distributed.sharding import MESH_AXES
from switch_jax.errors import UserError
from switch_jax.model.sharded import ShardedModel, process_rows
from switch_jax.training.step import TrainProgram
from tests.support.configs import make_batch, tiny


def test_evaluation_needs_no_memory_for_the_optimizer():
    """`optimizer.memory=host` cannot train on CPU, but its parameters can be evaluated there."""
    config = tiny(**{"optimizer.memory": "host", "mesh.data": 1})
    mesh, batch = make_mesh(config), make_batch(config)
    with pytest.raises(UserError, match=r"optimizer\.memory=device"):
        TrainProgram(config, mesh)
    sharded = ShardedModel(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, sharded.abstract_params)
    params = jax.device_put(sharded.init_params(), shardings)
    sums, targets, stats = sharded.eval_step(params, sharded.shard_batch(batch))
    assert targets == batch["decoder_loss_weights"].sum()
    assert stats.keys() == {"encoder/mlp", "decoder/mlp"}
    logits, _ = jax.jit(
        lambda params: sharded.model(params).forward(
            batch, capacity_factor=config.moe.eval_capacity_factor
        )
    )(params)
    target = batch["decoder_target_tokens"][..., None]
    log_probability = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), target, -1)[..., 0]
    expected = -np.sum(log_probability * batch["decoder_loss_weights"])
    np.testing.assert_allclose(sums.cross_entropy, expected, rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class _Device:
    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def rows_by_process(monkeypatch, owners, shape):
    """Returns `process_rows` of every process; `owners` are the processes of the devices."""
    devices = [_Device(i, p) for i, p in enumerate(owners)]
    used = np.empty(shape, object)
    used.flat = devices[: used.size]
    count = max(owners) + 1
    monkeypatch.setattr(jax, "device_count", lambda: len(owners))
    monkeypatch.setattr(jax, "local_device_count", lambda: owners.count(0))
    monkeypatch.setattr(jax, "process_count", lambda: count)
    by_process = []
    for process in range(count):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        by_process.append(process_rows(Mesh(used, MESH_AXES)))
    return by_process


@pytest.mark.parametrize(
    "owners, shape, parts",
    [
        ([0, 0, 0, 0], (1, 4, 1, 1), [(0, 1, 2, 3)]),
        ([0, 0, 1, 1], (1, 2, 2, 1), [(0, 1), (2, 3)]),
        ([0, 1, 2, 3], (1, 1, 2, 2), [(0,), (0,), (1,), (1,)]),  # `model` across processes
        ([0, 1], (1, 1, 1, 2), [(0,), (0,)]),
        ([0, 0, 1, 1], (1, 1, 1, 4), [(0,), (0,)]),
        ([0, 1, 0, 1], (1, 4, 1, 1), [(0, 2), (1, 3)]),  # as on a TPU, where hosts are squares
        ([1, 1, 0, 0], (2, 2, 1, 1), [(2, 3), (0, 1)]),
    ],
)
def test_processes_read_the_rows_of_their_devices(monkeypatch, owners, shape, parts):
    by_process = rows_by_process(monkeypatch, owners, shape)
    assert [r.parts for r in by_process] == parts
    groups = sorted(set(parts))
    assert [(r.group, r.num_groups) for r in by_process] == [
        (groups.index(p), len(groups)) for p in parts
    ]
    # The first processes of the groups together read every row of the batch once.
    rows = [r.indices(8) for r in by_process if r.first_in_group]
    assert sorted(np.concatenate(rows)) == list(range(8))


@pytest.mark.parametrize(
    "owners, shape, words",
    [
        ([0, 0, 1, 1], (1, 2, 1, 1), "the product of mesh.* 4"),
        ([0, 0, 1, 1], (1, 3, 1, 1), "the product of mesh.* 4"),
        ([0, 0, 0, 1, 1, 1], (1, 3, 1, 2), "a divisor or a multiple of 3"),
    ],
)
def test_meshes_that_split_the_batch_within_processes_are_refused(
    monkeypatch, owners, shape, words
):
    with pytest.raises(UserError, match=re.escape(words)):
        rows_by_process(monkeypatch, owners, shape)
