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
    logits, _ = jax.jit(
        lambda params: sharded.model(params).forward(
            batch, capacity_factor=config.moe.eval_capacity_factor
        )
    )(params)
    target = batch["decoder_target_tokens"][..., None]
    log_probability = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), target, -1)[..., 0]
    expected = -np.sum(log_probability * batch["decoder_loss_weights"])
    np.testing.assert_allclose(sums.cross_entropy, expected, rtol=1e-5)
