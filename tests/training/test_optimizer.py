"""Adafactor per slice, schedules, weight decay, gradient clipping."""

import jax
import numpy as np
import optax
import pytest

from switch_jax.config.schema import OptimizerConfig, TrainConfig
from switch_jax.distributed.mesh import make_mesh
from switch_jax.distributed.sharding import partition_spec
from switch_jax.model.parameters import ParameterMetadata
from switch_jax.training.optimizer import learning_rate_schedule, make_optimizer
from tests.support.configs import tiny

AXES = {
    "wi": ("layers", "expert", "embed", "mlp"),
    "square": ("layers", "embed", "heads"),
    "embedding": ("vocab", "embed"),
    "norm/scale": ("layers", "norm"),
}
KINDS = {"wi": "expert", "square": "attention", "embedding": "embedding", "norm/scale": "norm"}
METADATA = {name: ParameterMetadata(axes, KINDS[name]) for name, axes in AXES.items()}
SHAPES = {"wi": (2, 4, 128, 256), "square": (2, 128, 128), "embedding": (160, 128)}
SHAPES |= {"norm/scale": (2, 128)}


def random_tree(seed: int) -> dict[str, np.ndarray]:
    """Returns arrays whose slices have different scales, to reveal an average over slices."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name, shape in SHAPES.items():
        slices = rng.uniform(0.01, 10, shape[: len(shape) - 2])
        tree[name] = (rng.normal(size=shape) * slices[..., None, None]).astype(np.float32)
    return tree


def two_updates(optimizer, params, gradients):
    """Returns the updates of two steps, the second of which depends on decayed second moments."""

    @jax.jit
    def run(params, gradients):
        state, updates = optimizer.init(params), []
        for gradient in gradients:
            update, state = optimizer.update(gradient, state, params)
            updates.append(update)
        return updates, state

    return run(params, gradients)


def unstacked_updates(name: str, index: tuple[int, ...], params, gradients):
    """Returns updates of one slice by optax's Adafactor, at a constant learning rate of 0.5."""
    optimizer = optax.adafactor(0.5, min_dim_size_to_factor=128, eps=1e-30)
    slices = [tree[name][index] for tree in (params, *gradients)]
    return two_updates(optimizer, slices[0], slices[1:])[0]


@pytest.fixture(scope="module")
def adafactor():
    values = {"learning_rate": 0.5, "schedule": "constant", "warmup_steps": 0}
    return make_optimizer(tiny(**{f"optimizer.{k}": v for k, v in values.items()}), METADATA)


def test_adafactor_updates_every_layer_and_expert_separately(adafactor):
    params, gradients = random_tree(0), [random_tree(1), random_tree(2)]
    updates, state = two_updates(adafactor, params, gradients)
    slices = [("wi", (0, 0)), ("wi", (1, 3)), ("square", (1,)), ("embedding", ())]
    for name, index in [*slices, ("norm/scale", (0,))]:
        unstacked = unstacked_updates(name, index, params, gradients)
        for stacked, expected in zip(updates, unstacked):
            np.testing.assert_allclose(stacked[name][index], expected, rtol=1e-4, atol=1e-7)
    # Statistics of every slice are rows and columns.
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert {(2, 4, 128), (2, 4, 256)} <= shapes
    assert SHAPES["wi"] not in shapes and SHAPES["square"] not in shapes


def test_adafactor_over_a_whole_stack_differs():
    params, gradients = random_tree(0), [random_tree(1), random_tree(2)]
    whole = unstacked_updates("square", (), params, gradients)
    slice_1 = unstacked_updates("square", (1,), params, gradients)
    assert np.abs(whole[1][1] / slice_1[1] - 1).max() > 0.1


@pytest.mark.parametrize(
    "values, expected",
    [
        # T5's schedule: constant during warm-up, then the inverse square root of the step.
        (
            {"schedule": "rsqrt", "learning_rate": 1.0, "warmup_steps": 10_000},
            {0: 0.01, 9_999: 0.01, 40_000: 0.005, 250_000: 0.002},
        ),
        ({"schedule": "rsqrt", "learning_rate": 1.0, "warmup_steps": 0}, {0: 1.0, 4: 0.5}),
        (
            {"schedule": "constant", "learning_rate": 0.2, "warmup_steps": 4},
            {0: 0.05, 1: 0.1, 3: 0.2, 4: 0.2, 900: 0.2},
        ),
        (
            {"schedule": "linear", "learning_rate": 0.2, "warmup_steps": 100},
            {49: 0.1, 100: 0.2, 550: 0.1, 1000: 0.0, 1100: 0.0},
        ),
        (
            {"schedule": "cosine", "learning_rate": 0.2, "warmup_steps": 100},
            {49: 0.1, 100: 0.2, 325: 0.1 * (1 + 0.5**0.5), 550: 0.1, 1000: 0.0},
        ),
        (
            {"schedule": "constant", "learning_rate": 0.2, "warmup_steps": 0}
            | {"cooldown_steps": 100},
            {0: 0.2, 900: 0.2, 950: 0.1, 1000: 0.0},
        ),
    ],
)
def test_schedules_at_given_steps(values, expected):
    rate = jax.jit(learning_rate_schedule(OptimizerConfig(**values), TrainConfig(steps=1000)))
    rates = [float(rate(step)) for step in expected]
    np.testing.assert_allclose(rates, list(expected.values()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name, shrink", [("adamw", 0.5 * 0.1), ("adafactor", 0.1)])
def test_weight_decay_applies_to_matrices_only(name, shrink):
    """Adafactor's decay is not scaled by the learning rate, as in optax and T5X."""
    metadata = {
        "encoder/runs/0/layers/0/self_norm/scale": (("layers", "norm"), "norm"),
        "encoder/final_norm/scale": (("norm",), "norm"),
        "encoder/relative_bias/table": (("heads", "buckets"), "relative_bias"),
        "encoder/runs/0/layers/0/self_attention/out": (("layers", "heads", "embed"), "attention"),
        "embedding": (("vocab", "embed"), "embedding"),
    }
    metadata = {path: ParameterMetadata(*m) for path, m in metadata.items()}
    values = {"name": name, "learning_rate": 0.5, "schedule": "constant", "warmup_steps": 0}
    values["weight_decay"] = 0.1
    optimizer = make_optimizer(tiny(**{f"optimizer.{k}": v for k, v in values.items()}), metadata)
    params = {path: np.ones((2,) * len(m.axes), np.float32) for path, m in metadata.items()}
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for path, update in updates.items():
        decayed = path.endswith(("out", "embedding"))
        np.testing.assert_allclose(update, -shrink if decayed else 0, atol=1e-8, err_msg=path)


def test_gradients_are_clipped_by_their_global_norm():
    values = {"name": "sgd", "learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0}
    values["max_grad_norm"] = 1.0
    optimizer = make_optimizer(tiny(**{f"optimizer.{k}": v for k, v in values.items()}), METADATA)
    params = random_tree(0)
    updates, _ = optimizer.update(random_tree(1), optimizer.init(params), params)
    np.testing.assert_allclose(optax.global_norm(updates), 1.0, rtol=1e-5)


def test_sharded_adafactor_gives_the_same_updates(adafactor):
    params, gradients = random_tree(0), [random_tree(1), random_tree(2)]
    expected, _ = two_updates(adafactor, params, gradients)
    mesh = make_mesh(tiny(**{"mesh.data": 2, "mesh.expert": 2, "mesh.model": 2}))
    shardings = {
        name: jax.sharding.NamedSharding(mesh, partition_spec(axes, fsdp=True))
        for name, axes in AXES.items()
    }
    sharded = [jax.device_put(tree, shardings) for tree in (params, *gradients)]
    updates, _ = two_updates(adafactor, sharded[0], sharded[1:])
    assert not updates[0]["wi"].sharding.is_fully_replicated
    for update, expected_update in zip(updates, expected):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
            update,
            expected_update,
        )
