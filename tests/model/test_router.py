"""Router: exploration noise, precision, bias balancing and statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_jax.config import expert_capacity
from switch_jax.distributed.mesh import make_mesh
from switch_jax.model.moe.expert_layers import SwitchMlp
from switch_jax.model.moe.expert_selection import Assignment, Scores
from switch_jax.model.moe.router import (
    Router,
    RouterOutput,
    RoutingResult,
    RoutingSpec,
    hash_expert,
    router_stats,
)
from switch_jax.model.parameters import named_parameters
from switch_jax.model.transformer import SwitchTransformer
from switch_jax.training.idle_experts import IdleExperts
from switch_jax.training.step import TrainProgram
from tests.support.configs import make_batch, tiny

B, L, D, E = 64, 16, 8, 4


def router(**values) -> Router:
    config = tiny(**{f"moe.{k}": v for k, v in values.items()})
    module = Router(config.moe, D, jax.random.key(0))
    if module.kernel is not None:
        module.kernel[...] = 50 * module.kernel[...]
    return module


def routing_spec(mask=None, tokens=None, factor=100.0) -> RoutingSpec:
    mask = np.ones((B, L), bool) if mask is None else mask
    return RoutingSpec(
        jnp.zeros(mask.shape, jnp.int32) if tokens is None else tokens, mask, 1, factor
    )


def keys(rows: int = B):
    return jax.random.split(jax.random.key(3), rows)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)


def route(module: Router, x, spec=None, keys=None) -> RoutingResult:
    spec = routing_spec() if spec is None else spec
    rows, factor = spec.rows_per_group, spec.capacity_factor  # static

    def forward(module, x, token, mask, keys):
        C = expert_capacity(module.config, rows * x.shape[1], factor)
        output = module(x, RoutingSpec(token, mask, rows, factor), C, keys)
        return RoutingResult(output.assignment, router_stats(output, C))

    result = jax.jit(forward)(module, x, spec.token_BxL, spec.mask_BxL, keys)
    return jax.tree.map(np.asarray, result)


def test_input_dropout_zeroes_features_of_the_routers_input_in_training_only():
    module = router(input_dropout_rate=0.25)
    # One feature per token: its logits are zero, or that feature times 1 / 0.75.
    x = np.zeros((B, L, D), np.float32)
    x[:, np.arange(L), np.arange(L) % D] = 3.0
    clean = np.asarray(module._logits(x, routing_spec(), None))
    noisy = np.asarray(module._logits(x, routing_spec(), keys()))
    zeroed = np.abs(noisy).max(-1) == 0
    assert 0.2 < zeroed.mean() < 0.3
    np.testing.assert_allclose(noisy[~zeroed], clean[~zeroed] / 0.75, rtol=1e-5)


def test_sampling_draws_from_the_softmax_and_keeps_the_drawn_experts_probability(x):
    module = router(sampling_temperature=1.0)
    x = np.broadcast_to(x[:1, :1], x.shape)  # every token has the same distribution
    probs = np.asarray(jax.nn.softmax(module._logits(x[:1, :1], routing_spec(), None)))[0, 0]
    assert probs.max() < 0.9
    expert, gate, _ = route(module, x, keys=keys()).assignment
    share = np.bincount(expert.reshape(-1), minlength=E) / expert.size
    np.testing.assert_allclose(share, probs, atol=4 * np.sqrt(0.25 / expert.size))
    np.testing.assert_allclose(gate, probs[expert], rtol=1e-5)
    # Evaluation takes the maximum, and a low temperature nearly always does.
    assert (route(module, x).assignment.expert_SxK == probs.argmax()).all()
    cold = router(sampling_temperature=0.001)
    assert (route(cold, x, keys=keys()).assignment.expert_SxK == probs.argmax()).all()


def test_random_numbers_are_keyed_by_row(x):
    for values in (
        {"sampling_temperature": 1.0},
        {"jitter": 0.5},
        {"input_dropout_rate": 0.5},
        {"router": "top_k", "second_policy": "random", "second_threshold": 0.9},
    ):
        module = router(**values)
        whole = route(module, x, keys=keys()).assignment.expert_SxK
        assert (whole != route(module, x).assignment.expert_SxK).any()
        half = route(module, x[8:], routing_spec(np.ones((B - 8, L), bool)), keys()[8:])
        np.testing.assert_array_equal(half.assignment.expert_SxK, whole[8:])


def test_random_second_experts_are_kept_in_proportion_to_their_gate(x):
    values = {"router": "top_k", "renormalize": True, "second_threshold": 0.8}
    module = router(second_policy="random", **values)
    expert, gate, _ = route(module, x, keys=keys()).assignment
    second = gate[..., 1]
    assert (expert[..., 0] < E).all()
    for low, high in ((0.0, 0.1), (0.2, 0.3), (0.4, 0.5)):
        some = (second > low) & (second < high)
        kept = (expert[..., 1] < E)[some].mean()
        expected = (second[some] / 0.8).mean()
        assert abs(kept - expected) < 4 * np.sqrt(0.25 / some.sum()), (low, high)
    # Evaluation uses the threshold without random numbers.
    kept = route(module, x).assignment.expert_SxK[..., 1] < E
    np.testing.assert_array_equal(kept, second > 0.8)


def test_router_dtype_is_that_of_logits_and_softmax_but_not_of_statistics(x):
    low, full = (router(router_dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert low._logits(x, routing_spec(), None).dtype == jnp.bfloat16
    result = route(low, x.astype(jnp.bfloat16))
    assert result.assignment.gate_SxK.dtype == np.float32
    assert all(s.dtype == np.float32 for s in result.stats)
    gate = result.assignment.gate_SxK
    assert (gate == gate.astype(jnp.bfloat16)).all()  # exact in bfloat16
    full_gate = route(full, x.astype(jnp.bfloat16)).assignment.gate_SxK
    assert (full_gate != full_gate.astype(jnp.bfloat16)).any()


def test_hash_routing_depends_on_the_token_id_only(x):
    module = router(router="hash")
    assert jax.tree.leaves(module) == []  # nothing to learn
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 500, (B, L)), jnp.int32)
    result = route(module, x, routing_spec(tokens=tokens))
    np.testing.assert_array_equal(
        result.assignment.expert_SxK.reshape(B, L), hash_expert(tokens, E)
    )
    assert (result.assignment.gate_SxK == 1).all()
    assert result.stats.confidence == B * L
    assert result.stats.entropy == result.stats.z_loss == 0


def test_statistics_do_not_depend_on_padding_or_grouping(x):
    module = router()
    mask = np.random.default_rng(2).random((B, L)) < 0.7
    stats = route(module, x, routing_spec(mask, factor=1.0)).stats
    # Other values at padding, and as many rows again with only padding.
    changed = np.where(mask[..., None], x, 9.0)
    padded_x = np.concatenate([changed, x])
    padded_mask = np.concatenate([mask, np.zeros_like(mask)])
    padded = route(module, padded_x, routing_spec(padded_mask, factor=1.0)).stats
    parts = [
        route(module, x[rows], routing_spec(mask[rows], factor=1.0)).stats
        for rows in (slice(0, 24), slice(24, B))
    ]
    assert stats.dropped > 10
    for name, value in stats._asdict().items():
        np.testing.assert_allclose(getattr(padded, name), value, rtol=1e-5, err_msg=name)
        summed = sum(getattr(part, name) for part in parts)
        np.testing.assert_allclose(summed, value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"router": "top_k", "renormalize": True},
        {"router": "ntlb"},
        {"router": "batch_prioritized"},
        {"router": "expert_choice", "stacks": "encoder", "eval_capacity_factor": 1.25},
        {"router": "hash"},
    ],
    ids=lambda values: values.get("router", "switch"),
)
def test_permuting_groups_permutes_results(x, values):
    module, rng = router(**values), np.random.default_rng(4)
    tokens = jnp.asarray(rng.integers(0, 500, (B, L)), jnp.int32)
    mask = rng.random((B, L)) < 0.8
    order = rng.permutation(B // 2)
    rows = (2 * order[:, None] + np.arange(2)).reshape(-1)  # of groups of two rows

    def grouped(rows):
        return RoutingSpec(tokens[rows], mask[rows], rows_per_group=2, capacity_factor=1.0)

    original, permuted = (route(module, x[r], grouped(r)) for r in (np.arange(B), rows))
    for got, want in zip(permuted.assignment, original.assignment):
        np.testing.assert_array_equal(got, want[order])
    for got, want in zip(permuted.stats, original.stats):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert original.stats.dropped > 10 or module.config.router == "ntlb"


def test_dropped_counts_tokens_by_the_share_of_their_assignments():
    expert = jnp.array([[0, 1], [0, 4], [4, 4], [0, 1]])  # 4: none
    slot = jnp.array([[0, 0], [1, 0], [0, 0], [2, 1]])
    mask = jnp.array([True, True, True, True])
    probs = jnp.full((4, 4), 0.25)
    scores = Scores(probs, probs, mask)
    assignment = Assignment(expert, jnp.ones((4, 2)), slot)
    output = RouterOutput(jnp.log(probs), scores, assignment)
    grouped = jax.tree.map(lambda a: a[None], output)
    # Capacity 1: t0 keeps both, t1's only expert is full, t2 has no expert, t3's are both full.
    assert router_stats(grouped, 1).dropped == 3
    # Capacity 2: t3 loses one of its two assignments.
    assert router_stats(grouped, 2).dropped == 1.5
    np.testing.assert_array_equal(router_stats(grouped, 1).load_E, [3, 2, 0, 0])


def test_the_bias_of_bias_balancing_changes_ranks_but_not_gates(x):
    module = router(balance_bias_rate=0.1)
    gate = route(module, x).assignment.gate_SxK
    module.bias[...] = jnp.array([0.0, 0.0, 5.0, 0.0])
    expert, biased_gate, _ = route(module, x).assignment
    assert (expert == 2).all()
    probs = np.asarray(jax.nn.softmax(module._logits(x, routing_spec(), None))).reshape(B, L, E)
    np.testing.assert_allclose(biased_gate[..., 0], probs[..., 2], rtol=1e-5)
    assert (gate >= biased_gate).all()


def test_bias_balancing_balances_load_without_a_loss():
    config = tiny(
        **{
            "moe.balance_bias_rate": 0.01,
            "moe.aux_loss_weight": 0.0,
            "moe.last": 1,
            "moe.every": 1,
            "moe.stacks": "encoder",
            "optimizer.name": "sgd",
            "optimizer.learning_rate": 0.0,
            "mesh.data": 2,
        }
    )
    program = TrainProgram(config, make_mesh(config))
    state = program.init()
    name = "encoder/runs/1/layers/0/mlp/router/bias"
    batch = program.sharded.shard_batch(make_batch(config))
    spreads = []
    for _ in range(8):
        before = np.asarray(state.params[name])
        state, metrics, load = program.train_step(state, batch)
        spreads.append(float(metrics["router/load_cv"]))
        share = np.asarray(load["encoder/mlp"])
        moved = 0.01 * np.sign(share.mean(-1, keepdims=True) - share)
        np.testing.assert_allclose(state.params[name] - before, moved, atol=1e-7)
    assert min(spreads[1:]) < 0.7 * spreads[0]


def test_an_idle_expert_is_reported_once_by_name():
    config = tiny(**{"train.idle_expert_steps": 3, "moe.stacks": "encoder"})
    idle = IdleExperts(config)
    busy, starved = np.ones((1, E), np.float32), np.array([[5, 0, 5, 1]], np.float32)
    news = []
    for load in [busy, starved, starved, busy, starved, starved, starved, starved, busy, starved]:
        idle.update({"encoder/mlp": jnp.asarray(load)})
        news.append(idle.new_warnings())
    message = "encoder/1: expert 1 received no token for 3 steps"
    assert news == [[]] * 6 + [[message]] + [[]] * 3
    # Read only after the expert has tokens again: it is reported nevertheless.
    late = IdleExperts(config)
    for load in [starved, starved, starved, busy]:
        late.update({"encoder/mlp": jnp.asarray(load)})
    assert late.new_warnings() == [message]
    dense = IdleExperts(tiny(**{"moe.num_experts": 0}))
    dense.update({})
    assert dense.new_warnings() == []


def test_a_shared_expert_computes_every_token_even_dropped_tokens(x):
    config = tiny(**{"model.d_model": D, "moe.shared_d_ff": 4, "model.init_scale": 1.0})
    mlp = SwitchMlp(config, jax.random.key(0))
    one_slot_per_expert = routing_spec(np.ones((1, L), bool), factor=0.01)

    @jax.jit
    def forward(mlp, x):
        y, routing = mlp(x, one_slot_per_expert, None)
        return y, mlp.shared(x, None), routing.stats

    y, shared, stats = forward(mlp, x[:1])
    dropped = (np.abs(y - shared) < 1e-6).all(-1)
    assert L - E <= dropped.sum() == stats.dropped < L
    assert np.abs(shared).min(-1).max() > 1e-3
    assert named_parameters(mlp)["shared/wi"].shape == (D, 4)


@pytest.mark.parametrize(
    "values, encoder, decoder",
    [
        ({}, (1, 3), (1, 3)),
        ({"moe.every": 1}, (0, 1, 2, 3), (0, 1, 2, 3)),
        ({"moe.every": 4}, (3,), (3,)),
        ({"moe.first": 2}, (1,), (1,)),
        ({"moe.last": 2, "moe.every": 1}, (2, 3), (2, 3)),
        ({"moe.stacks": "encoder"}, (1, 3), ()),
        ({"moe.stacks": "decoder", "moe.last": 2}, (), (3,)),
    ],
)
def test_the_config_selects_the_layers_with_experts(values, encoder, decoder):
    four = {"model.num_encoder_layers": 4, "model.num_decoder_layers": 4}
    config = tiny(**four, **values)
    assert (config.sparse_layers("encoder"), config.sparse_layers("decoder")) == (encoder, decoder)
    model = jax.eval_shape(lambda: SwitchTransformer(config, jax.random.key(0)))
    counts = {"encoder": 0, "decoder": 0}
    for name, leaf in named_parameters(model).items():
        if name.endswith("experts/wi"):
            counts[name.split("/")[0]] += leaf.shape[0]
    assert (counts["encoder"], counts["decoder"]) == (len(encoder), len(decoder))
    layers = [leaf for name, leaf in named_parameters(model).items() if "self_norm" in name]
    assert sum(leaf.shape[0] for leaf in layers) == 8
