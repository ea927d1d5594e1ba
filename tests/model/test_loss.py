"""Loss sums, their denominators, loss terms and router metrics."""

import contextlib
import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from switch_jax.config import expert_capacity, rows_per_group
from switch_jax.distributed.mesh import make_mesh
from switch_jax.model import loss
from switch_jax.model.loss import (
    LossDenominators,
    LossSums,
    first_choice_counts,
    loss_denominators,
    loss_terms,
    router_metrics,
)
from switch_jax.model.moe.expert_selection import Scores, top_k
from switch_jax.model.moe.router import RouterOutput, RouterStats, router_stats
from switch_jax.model.transformer import RouterStatsByStack, token_masks
from tests.support.configs import make_batch, tiny

FOUR = {"model.num_encoder_layers": 4, "model.num_decoder_layers": 4}
CONFIG = tiny(**FOUR, **{"moe.z_loss_weight": 0.001, "moe.group_size": 32})


@pytest.fixture(scope="module")
def batch():
    return make_batch(CONFIG)


@pytest.fixture(scope="module")
def logits(batch):
    rng = np.random.default_rng(0)
    shape = (*batch["decoder_target_tokens"].shape, CONFIG.model.vocab_size)
    return 3 * rng.normal(size=shape).astype(np.float32)


def layer_stats(
    config, mask_BxL, seed: int, blocks: int = 2
) -> tuple[Callable[[np.ndarray], RouterStats], np.ndarray]:
    """Returns a function that computes the statistics of a layer, and random logits for it."""
    moe, (B, L) = config.moe, mask_BxL.shape
    rows = rows_per_group(moe, config.data.batch_size, L)
    mask = mask_BxL.reshape(B // rows, rows * L)
    C = expert_capacity(moe, rows * L, moe.capacity_factor)
    E = moe.num_experts
    rng = np.random.default_rng(seed)
    whole = rng.normal(size=(blocks, config.data.batch_size, L, E)).astype(np.float32)

    def stats_of_layer(logits):
        probs = jax.nn.softmax(logits)
        scores = Scores(probs, logits, mask)
        assignment = jax.vmap(lambda s: top_k(s, moe, C))(scores)
        return router_stats(RouterOutput(logits, scores, assignment), C)

    return stats_of_layer, whole.reshape(blocks, -1, *mask.shape[1:], E)


def stats_of(config, batch, rows=slice(None)) -> RouterStatsByStack:
    """Router statistics of both stacks for some rows of a global batch."""
    stats = {}
    for i, (stack, mask) in enumerate(zip(("encoder", "decoder"), token_masks(batch, config))):
        stats_of_layer, logits = layer_stats(config, np.asarray(mask)[rows], seed=i)
        groups = logits.shape[1]
        chosen = np.arange(len(mask))[rows] * groups // len(mask)
        stats[f"{stack}/mlp"] = jax.jit(jax.vmap(stats_of_layer))(logits[:, np.unique(chosen)])
    return stats


def token_losses(logits, batch) -> LossSums:
    """Loss sums of given logits: they are the states, and the head is the identity matrix."""
    return loss.token_losses(logits, jnp.eye(logits.shape[-1]), batch)


def test_cross_entropy_is_a_mean_over_tokens_without_padding(batch, logits):
    sums = token_losses(logits, batch)
    weights, targets = batch["decoder_loss_weights"], batch["decoder_target_tokens"]
    assert 0 < (weights == 0).mean() < 1
    log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    at_target = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    real = weights > 0
    np.testing.assert_allclose(sums.cross_entropy, (log_z - at_target)[real].sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.z, (log_z**2)[real].sum(), rtol=1e-5)
    assert sums.correct == (logits.argmax(-1) == targets)[real].sum()

    denominators = loss_denominators(batch, CONFIG)
    terms = loss_terms(sums, {}, denominators, CONFIG)
    np.testing.assert_allclose(terms["cross_entropy"], (log_z - at_target)[real].mean(), rtol=1e-5)
    np.testing.assert_allclose(terms["z_loss"], 1e-4 * (log_z**2)[real].mean(), rtol=1e-5)
    # The mean over rows of means over tokens is a different number.
    by_row = ((log_z - at_target) * real).sum(-1) / real.sum(-1)
    assert abs(by_row.mean() - terms["cross_entropy"]) > 1e-3


def test_logits_of_padding_do_not_change_the_sums(batch, logits):
    noise = 10 * (batch["decoder_loss_weights"] == 0)[..., None].astype(np.float32)
    without_noise, with_noise = (
        jax.tree.leaves(token_losses(x, batch)) for x in (logits, logits + noise * logits)
    )
    np.testing.assert_allclose(without_noise, with_noise, rtol=1e-6)


def test_denominators_count_tokens_and_groups_without_padding():
    config = tiny(**{"data.batch_size": 8, "moe.group_size": 32})
    batch = make_batch(config)
    for name in batch:
        batch[name][4:] = 0  # the last two groups of two rows are padding only
    denominators = loss_denominators(batch, config)
    assert denominators.tokens["encoder"] == (batch["encoder_input_tokens"] > 0).sum()
    assert (
        denominators.tokens["decoder"]
        == denominators.targets
        == batch["decoder_loss_weights"].sum()
    )
    assert denominators.groups == {"encoder": 2, "decoder": 1}
    routed = dataclasses.replace(config, moe=dataclasses.replace(config.moe, padding="routed"))
    denominators = loss_denominators(batch, routed)
    assert denominators.tokens == {s: batch[f"{s}_input_tokens"].size for s in denominators.tokens}
    assert denominators.targets == batch["decoder_loss_weights"].sum()


def test_terms_of_microbatches_add_up_to_the_terms_of_the_batch(batch, logits):
    denominators = loss_denominators(batch, CONFIG)
    whole = loss_terms(token_losses(logits, batch), stats_of(CONFIG, batch), denominators, CONFIG)
    assert all(value > 0 for value in whole.values())
    parts = []
    for i in range(0, 16, 8):
        rows = slice(i, i + 8)
        sums = token_losses(logits[rows], {k: v[rows] for k, v in batch.items()})
        stats = stats_of(CONFIG, batch, rows)
        parts.append(loss_terms(sums, stats, denominators, CONFIG))
    for name, value in whole.items():
        np.testing.assert_allclose(sum(p[name] for p in parts), value, rtol=1e-5, err_msg=name)


def test_auxiliary_loss_is_a_sum_or_a_mean_over_layers(batch, logits):
    sums, denominators = token_losses(logits, batch), loss_denominators(batch, CONFIG)
    stats = stats_of(CONFIG, batch)
    summed = loss_terms(sums, stats, denominators, CONFIG)
    moe = dataclasses.replace(CONFIG.moe, aux_loss_reduction="mean")
    mean_config = dataclasses.replace(CONFIG, moe=moe)
    mean = loss_terms(sums, stats, denominators, mean_config)
    for name in ("aux_loss", "router_z_loss"):
        np.testing.assert_allclose(summed[name], 4 * mean[name], rtol=1e-6)  # 2 stacks × 2
    by_hand = sum(
        float(balance) / denominators.groups[key.split("/")[0]]
        for key in stats
        for balance in stats[key].balance_loss
    )
    np.testing.assert_allclose(summed["aux_loss"], 0.01 * by_hand, rtol=1e-5)
    # Near balance each layer contributes about α, whatever the number of experts.
    assert 4 * 0.01 <= summed["aux_loss"] < 4 * 0.015


def scoped(config, scope: str):
    """Returns the config with a balance scope."""
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, balance_scope=scope))


@pytest.mark.parametrize("scope, expected", [("group", 2 * 0.9), ("batch", 1.0)])
def test_balance_loss_of_two_groups_that_use_one_expert_each(scope, expected):
    """Group 1: f = (1, 0), P = (0.9, 0.1); group 2: f = (0, 1), P = (0.1, 0.9); N = 2.

    By group: 2 · (1 · 0.9 + 0 · 0.1) in both. Over the batch: f = P = (0.5, 0.5), 2 · 0.5 = 1.
    """
    config = tiny(
        **{"data.batch_size": 2, "moe.num_experts": 2, "moe.group_size": 8, "moe.stacks": "encoder"}
    )
    L = config.length("encoder")
    logits = jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9]]))[:, None].repeat(L, 1)
    scores = Scores(jax.nn.softmax(logits), logits, jnp.ones((2, L), bool))
    assignment = jax.vmap(lambda s: top_k(s, config.moe, L))(scores)
    stats = jax.tree.map(
        lambda x: x[None], router_stats(RouterOutput(logits, scores, assignment), L)
    )
    denominators = LossDenominators(
        jnp.array(1.0), {"encoder": jnp.array(2.0 * L)}, {"encoder": jnp.array(2.0)}
    )
    sums = LossSums(*[jnp.zeros(())] * 3)
    terms = loss_terms(sums, {"encoder/mlp": stats}, denominators, scoped(config, scope))
    np.testing.assert_allclose(terms["aux_loss"], 0.01 * expected, rtol=1e-6)


def test_balance_over_the_batch_is_the_same_in_microbatches(batch, logits):
    config = scoped(CONFIG, "batch")
    denominators, stats = loss_denominators(batch, config), stats_of(config, batch)
    sums = token_losses(logits, batch)
    whole = loss_terms(sums, stats, denominators, config)["aux_loss"]
    by_hand = 0
    for layers in stats.values():
        for f, p in zip(layers.first_choices_E, layers.probs_E):
            by_hand += len(f) * np.sum(f / f.sum() * (p / p.sum()))
    np.testing.assert_allclose(whole, 0.01 * by_hand, rtol=1e-5)
    by_group = loss_terms(sums, stats, denominators, CONFIG)["aux_loss"]
    assert (by_group - whole) / whole > 0.01  # few tokens are less even than many
    parts = [stats_of(config, batch, slice(i, i + 4)) for i in range(0, 16, 4)]
    counts = first_choice_counts(stats)
    of_parts = [loss_terms(sums, p, denominators, config, 0.0, counts)["aux_loss"] for p in parts]
    np.testing.assert_allclose(sum(of_parts), whole, rtol=1e-5)
    alone = [loss_terms(sums, p, denominators, config)["aux_loss"] for p in parts]
    assert sum(alone) > 1.005 * whole  # f of a microbatch alone is another loss


def test_balance_over_the_batch_has_the_gradient_of_the_probabilities_alone(batch, logits):
    """d/dlogits of N Σ f·P with constant f: N / tokens · Σ_j f_j p_j (δ_ij - p_i)."""
    config = scoped(tiny(**{"moe.group_size": 32, "model.num_encoder_layers": 2}), "batch")
    mask = np.asarray(token_masks(batch, config)[0])
    stats_of_layer, layer_logits = layer_stats(config, mask, seed=3, blocks=1)
    denominators, sums = loss_denominators(batch, config), token_losses(logits, batch)

    def aux_loss(logits):
        stats = {"encoder/mlp": jax.vmap(stats_of_layer)(logits)}
        return loss_terms(sums, stats, denominators, config)["aux_loss"]

    gradient = np.asarray(jax.jit(jax.grad(aux_loss))(layer_logits)).reshape(-1, 4)
    p = np.asarray(jax.nn.softmax(layer_logits)).reshape(-1, 4)
    kept = mask.reshape(-1, 1)
    f = np.bincount(p.argmax(-1)[kept[:, 0]], minlength=4) / kept.sum()
    expected = 0.01 * 4 / kept.sum() * kept * p * (f - (f * p).sum(-1, keepdims=True))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-9)


def test_router_metrics_stay_within_their_bounds(batch):
    metrics = router_metrics(stats_of(CONFIG, batch), CONFIG)
    names = {"load_max", "load_min", "load_cv", "dropped_fraction", "entropy", "confidence", "z"}
    layers = [f"{stack}/{layer}" for stack in ("encoder", "decoder") for layer in (1, 3)]
    places = ["router", "router/encoder", "router/decoder", *(f"router/{x}" for x in layers)]
    assert metrics.keys() == {f"{place}/{n}" for place in places for n in names}
    for layer in layers:
        of = {n: float(metrics[f"router/{layer}/{n}"]) for n in names}
        assert 0 <= of["load_min"] <= 1 <= of["load_max"] <= 4
        assert 0 < of["entropy"] <= np.log(4)
        assert 0.25 <= of["confidence"] <= 1
        assert 0 <= of["dropped_fraction"] < 1
    for n in names:
        for of, inner in (("", layers), ("encoder/", layers[:2]), ("decoder/", layers[2:])):
            mean = np.mean([metrics[f"router/{layer}/{n}"] for layer in inner])
            np.testing.assert_allclose(metrics[f"router/{of}{n}"], mean, rtol=1e-6)


@pytest.mark.parametrize(
    "load, expected",
    [
        ([3, 3, 3, 3], (1, 1, 0)),
        ([12, 0, 0, 0], (4, 0, 3**0.5)),
        ([1, 3, 1, 3], (1.5, 0.5, 0.5)),
        ([0, 0, 0, 0], (0, 0, 0)),
    ],
)
def test_loads_are_in_units_of_a_fair_share(load, expected):
    sums = RouterStats(jnp.array([load], jnp.float32), *[jnp.zeros(1)] * 8)
    metrics = router_metrics({"encoder/mlp": sums}, tiny())
    got = [metrics[f"router/{name}"] for name in ("load_max", "load_min", "load_cv")]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("chunks", [1, 3, 8, 100])
def test_logits_in_chunks_give_the_same_sums_and_gradients(batch, monkeypatch, chunks):
    """128 tokens do not divide by 3 or 100."""
    rng = np.random.default_rng(5)
    B, T = batch["decoder_target_tokens"].shape
    states = jnp.asarray(rng.normal(size=(B, T, 16)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(16, CONFIG.model.vocab_size)), jnp.float32)
    teacher = states[..., :12] + 1, head[:12]

    def combined_loss(states, head):
        sums = loss.token_losses(states, head, batch, teacher, 2.0, label_smoothing=0.1)
        return sums.cross_entropy + 0.1 * sums.z + 0.5 * sums.soft + 0.2 * sums.uniform, sums

    both = jax.value_and_grad(combined_loss, (0, 1), has_aux=True)
    (_, whole), gradients = both(states, head)
    both_logits = 2 * B * T * CONFIG.model.vocab_size * 4
    monkeypatch.setattr(loss, "LOGITS_BYTES", both_logits // chunks)
    (_, chunked), chunked_gradients = both(states, head)
    for expected, got in zip((*whole, *gradients), (*chunked, *chunked_gradients)):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    shapes = str(jax.make_jaxpr(combined_loss)(states, head))
    assert (f"f32[{B * T},{CONFIG.model.vocab_size}]" in shapes) == (chunks == 1)


def test_a_device_has_the_logits_of_its_rows_and_its_vocabulary_only(batch):
    """The vocabulary is split over `model`, rows over the other mesh axes."""
    config = tiny(**FOUR, **{"mesh.data": 2, "mesh.expert": 2, "mesh.model": 2})
    B, T = batch["decoder_target_tokens"].shape
    V = config.model.vocab_size
    with jax.set_mesh(make_mesh(config)):
        text = (
            jax.jit(jax.grad(lambda s, h: loss.token_losses(s, h, batch, (s + 1, h)).soft))
            .lower(jnp.ones((B, T, 16)), jnp.ones((16, V)))
            .compile()
            .as_text()
        )
    assert f"f32[{B // 4},{T},{V // 2}]" in text
    assert not re.search(rf"f32\[\d+,{T},{V}\]", text)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_label_smoothing_equals_the_loss_of_smoothed_labels(batch, logits, on_mesh):
    meshes = {"mesh.data": 2, "mesh.expert": 2, "mesh.model": 2} if on_mesh else {}
    config = tiny(**FOUR, **meshes, **{"train.label_smoothing": 0.1})
    V = config.model.vocab_size
    denominators = loss_denominators(batch, config)

    def smoothed_loss(logits):
        sums = loss.token_losses(logits, jnp.eye(V), batch, label_smoothing=0.1)
        return loss_terms(sums, {}, denominators, config)["cross_entropy"]

    def expected_loss(logits):
        labels = optax.smooth_labels(jax.nn.one_hot(batch["decoder_target_tokens"], V), 0.1)
        losses = optax.softmax_cross_entropy(logits, labels)
        return (batch["decoder_loss_weights"] * losses).sum() / denominators.targets

    with jax.set_mesh(make_mesh(config)) if on_mesh else contextlib.nullcontext():
        found = jax.jit(jax.value_and_grad(smoothed_loss))(logits)
    expected = jax.value_and_grad(expected_loss)(jnp.asarray(logits))
    for value, reference in zip(found, expected):
        np.testing.assert_allclose(value, reference, rtol=1e-5, atol=1e-6)
