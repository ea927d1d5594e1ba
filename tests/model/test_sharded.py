"""Model on a mesh, without an optimizer."""

import jax
import numpy as np
import pytest

from switch_jax.distributed.mesh import make_mesh
from switch_jax.errors import UserError
from switch_jax.model.sharded import ShardedModel
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
    # Before training a model is about as good as chance.
    assert sums.cross_entropy / targets == pytest.approx(np.log(config.model.vocab_size), rel=0.3)
