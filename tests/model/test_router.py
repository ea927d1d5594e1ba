"""Exploration, precision, balance without a loss, and what is counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_jax.distributed.mesh import make_mesh
from switch_jax.model.moe.layers import SwitchMlp
from switch_jax.model.moe.router import (
    Router,
    RouterOutput,
    RoutingResult,
    RoutingSpec,
    hash_expert,
    router_stats,
)
from switch_jax.model.moe.routing import Assignment, Scores
from switch_jax.model.parameters import named_parameters
from switch_jax.model.transformer import SwitchTransformer
from switch_jax.training.idle_experts import IdleExperts
from switch_jax.training.step import TrainProgram
from tests.support.configs import make_batch, tiny

B, L, D, E = 64, 16, 8, 4


def router(**values) -> Router:
    made = Router(tiny(**{f"moe.{k}": v for k, v in values.items()}).moe, D, jax.random.key(0))
    if made.kernel is not None:
        made.kernel[...] = 50 * made.kernel[...]
    return made


def plan(mask=None, tokens=None, factor=100.0) -> RoutingSpec:
    mask = np.ones((B, L), bool) if mask is None else mask
    return RoutingSpec(
        jnp.zeros(mask.shape, jnp.int32) if tokens is None else tokens, mask, 1, factor
    )


def keys(rows: int = B):
    return jax.random.split(jax.random.key(3), rows)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)


def route(made: Router, x, plan=None, keys=None):
    plan = globals()["plan"]() if plan is None else plan
    rows, factor = plan.rows_per_group, plan.capacity_factor  # static

    def run(made, x, token, mask, keys):
        decision = made(x, RoutingSpec(token, mask, rows, factor), keys)
        C = made.config.capacity(rows * x.shape[1], factor)
        return RoutingResult(decision.assignment, router_stats(decision, C))

    routed = jax.jit(run)(made, x, plan.token_BxL, plan.mask_BxL, keys)
    return jax.tree.map(np.asarray, routed)


def test_input_dropout_zeroes_features_of_the_routers_input_in_training_only():
    made = router(input_dropout_rate=0.25)
    # One feature a token: its logits are gone, or that feature times 1 / 0.75.
    x = np.zeros((B, L, D), np.float32)
    x[:, np.arange(L), np.arange(L) % D] = 3.0
    clean = np.asarray(made._logits(x, plan(), None))
    noisy = np.asarray(made._logits(x, plan(), keys()))
    gone = np.abs(noisy).max(-1) == 0
    assert 0.2 < gone.mean() < 0.3
    np.testing.assert_allclose(noisy[~gone], clean[~gone] / 0.75, rtol=1e-5)


def test_sampling_draws_from_the_softmax_and_keeps_the_drawn_experts_probability(x):
    made = router(sampling_temperature=1.0)
    x = np.broadcast_to(x[:1, :1], x.shape)  # every token has the same distribution
    probs = np.asarray(jax.nn.softmax(made._logits(x[:1, :1], plan(), None)))[0, 0]
    assert probs.max() < 0.9
    expert, gate, _ = route(made, x, keys=keys()).assignment
    share = np.bincount(expert.reshape(-1), minlength=E) / expert.size
    np.testing.assert_allclose(share, probs, atol=4 * np.sqrt(0.25 / expert.size))
    np.testing.assert_allclose(gate, probs[expert], rtol=1e-5)
    # Not in evaluation, and hardly at a low temperature.
    assert (route(made, x).assignment.expert_SxK == probs.argmax()).all()
    cold = router(sampling_temperature=0.001)
    assert (route(cold, x, keys=keys()).assignment.expert_SxK == probs.argmax()).all()


def test_draws_are_keyed_by_row(x):
    for values in (
        {"sampling_temperature": 1.0},
        {"jitter": 0.5},
        {"input_dropout_rate": 0.5},
        {"router": "top_k", "second_policy": "random", "second_threshold": 0.9},
    ):
        made = router(**values)
        whole = route(made, x, keys=keys()).assignment.expert_SxK
        assert (whole != route(made, x).assignment.expert_SxK).any()
        half = route(made, x[8:], plan(np.ones((B - 8, L), bool)), keys()[8:])
        np.testing.assert_array_equal(half.assignment.expert_SxK, whole[8:])


def test_second_experts_at_random_are_kept_as_often_as_their_gate_says(x):
    values = {"router": "top_k", "renormalize": True, "second_threshold": 0.8}
    made = router(second_policy="random", **values)
    expert, gate, _ = route(made, x, keys=keys()).assignment
    second = gate[..., 1]
    assert (expert[..., 0] < E).all()
    for low, high in ((0.0, 0.1), (0.2, 0.3), (0.4, 0.5)):
        some = (second > low) & (second < high)
        kept = (expert[..., 1] < E)[some].mean()
        expected = (second[some] / 0.8).mean()
        assert abs(kept - expected) < 4 * np.sqrt(0.25 / some.sum()), (low, high)
    # Evaluation draws nothing: the threshold decides.
    kept = route(made, x).assignment.expert_SxK[..., 1] < E
    np.testing.assert_array_equal(kept, second > 0.8)


def test_router_dtype_is_that_of_logits_and_softmax_but_not_of_sums(x):
    low, full = (router(router_dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert low._logits(x, plan(), None).dtype == jnp.bfloat16
    routed = route(low, x.astype(jnp.bfloat16))
    assert routed.assignment.gate_SxK.dtype == np.float32
    assert all(s.dtype == np.float32 for s in routed.sums)
    gate = routed.assignment.gate_SxK
    assert (gate == gate.astype(jnp.bfloat16)).all()  # no finer than bfloat16
    other = route(full, x.astype(jnp.bfloat16)).assignment.gate_SxK
    assert (other != other.astype(jnp.bfloat16)).any()


def test_hash_routing_follows_the_token_alone(x):
    made = router(router="hash")
    assert jax.tree.leaves(made) == []  # nothing to learn
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 500, (B, L)), jnp.int32)
    routed = route(made, x, plan(tokens=tokens))
    np.testing.assert_array_equal(
        routed.assignment.expert_SxK.reshape(B, L), hash_expert(tokens, E)
    )
    assert (routed.assignment.gate_SxK == 1).all()
    assert routed.sums.confidence == B * L
    assert routed.sums.entropy == routed.sums.z == 0


def test_sums_do_not_change_with_padding_or_grouping(x):
    made = router()
    mask = np.random.default_rng(2).random((B, L)) < 0.7
    sums = route(made, x, plan(mask, factor=1.0)).sums
    # Padding with other contents, and as many rows again of nothing but padding.
    noisy = np.where(mask[..., None], x, 9.0)
    more = np.concatenate([noisy, x]), np.concatenate([mask, np.zeros_like(mask)])
    other = route(made, more[0], plan(more[1], factor=1.0)).sums
    parts = [
        route(made, x[rows], plan(mask[rows], factor=1.0)).sums
        for rows in (slice(0, 24), slice(24, B))
    ]
    assert sums.dropped > 10
    for name, value in sums._asdict().items():
        np.testing.assert_allclose(getattr(other, name), value, rtol=1e-5, err_msg=name)
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
    made, rng = router(**values), np.random.default_rng(4)
    tokens = jnp.asarray(rng.integers(0, 500, (B, L)), jnp.int32)
    mask = rng.random((B, L)) < 0.8
    order = rng.permutation(B // 2)
    rows = (2 * order[:, None] + np.arange(2)).reshape(-1)  # of groups of two rows

    def grouped(rows):
        return RoutingSpec(tokens[rows], mask[rows], rows_per_group=2, capacity_factor=1.0)

    one, other = (route(made, x[r], grouped(r)) for r in (np.arange(B), rows))
    for got, want in zip(other.assignment, one.assignment):
        np.testing.assert_array_equal(got, want[order])
    for got, want in zip(other.sums, one.sums):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert one.sums.dropped > 10 or made.config.router == "ntlb"


def test_dropped_counts_tokens_by_the_share_of_their_places():
    expert = jnp.array([[0, 1], [0, 4], [4, 4], [0, 1]])  # 4: none
    slot = jnp.array([[0, 0], [1, 0], [0, 0], [2, 1]])
    mask = jnp.array([True, True, True, True])
    probs = jnp.full((4, 4), 0.25)
    scores = Scores(probs, probs, mask)
    assignment = Assignment(expert, jnp.ones((4, 2)), slot)
    grouped = RouterOutput(jnp.log(probs), scores, assignment)
    grouped = jax.tree.map(lambda a: a[None], grouped)
    # Capacity 1: t0 whole, t1's only place is full, t2 has no place at all, t3 both full.
    assert router_stats(grouped, 1).dropped == 3
    # Capacity 2: t3 loses one of its two.
    assert router_stats(grouped, 2).dropped == 1.5
    np.testing.assert_array_equal(router_stats(grouped, 1).load_E, [3, 2, 0, 0])


def test_the_bias_of_bias_balancing_ranks_but_is_no_gate(x):
    made = router(balance_bias_rate=0.1)
    gate = route(made, x).assignment.gate_SxK
    made.bias[...] = jnp.array([0.0, 0.0, 5.0, 0.0])
    expert, biased_gate, _ = route(made, x).assignment
    assert (expert == 2).all()
    probs = np.asarray(jax.nn.softmax(made._logits(x, plan(), None))).reshape(B, L, E)
    np.testing.assert_allclose(biased_gate[..., 0], probs[..., 2], rtol=1e-5)
    assert (gate >= biased_gate).all()


def test_bias_balancing_moves_load_without_a_loss():
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


def test_a_dead_expert_is_reported_once_by_name():
    config = tiny(**{"train.idle_expert_steps": 3, "moe.stacks": "encoder"})
    idle = IdleExperts(config)
    busy, starved = np.ones((1, E), np.float32), np.array([[5, 0, 5, 1]], np.float32)
    news = []
    for load in [busy, starved, starved, busy, starved, starved, starved, starved, busy, starved]:
        idle.update({"encoder/mlp": jnp.asarray(load)})
        news.append(idle.new_warnings())
    told = "encoder/1: expert 1 received no token for 3 steps"
    assert news == [[]] * 6 + [[told]] + [[]] * 3
    # Asked only later, when it has tokens again: it was idle nevertheless.
    late = IdleExperts(config)
    for load in [starved, starved, starved, busy]:
        late.update({"encoder/mlp": jnp.asarray(load)})
    assert late.new_warnings() == [told]
    dense = IdleExperts(tiny(**{"moe.num_experts": 0}))
    dense.update({})
    assert dense.new_warnings() == []


def test_a_shared_expert_takes_every_token_even_dropped_ones(x):
    config = tiny(**{"model.d_model": D, "moe.shared_d_ff": 4, "model.init_scale": 1.0})
    mlp = SwitchMlp(config, jax.random.key(0))
    one_each = plan(np.ones((1, L), bool), factor=0.01)

    @jax.jit
    def run(mlp, x):
        y, routed = mlp(x, one_each, None)
        return y, mlp.shared(x, None), routed.sums

    y, shared, sums = run(mlp, x[:1])
    dropped = (np.abs(y - shared) < 1e-6).all(-1)
    assert L - E <= dropped.sum() == sums.dropped < L  # one slot an expert
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
def test_experts_are_where_the_config_puts_them(values, encoder, decoder):
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
