"""Expert layers against naive references: a loop over tokens, and one-hot einsums."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from switch_jax.config import expert_capacity
from switch_jax.distributed.mesh import make_mesh
from switch_jax.distributed.sharding import batch_sharding, partition_spec
from switch_jax.model.moe import expert_selection, gather, slot_dispatch
from switch_jax.model.moe.expert_layers import SwitchMlp
from switch_jax.model.moe.expert_selection import Scores
from switch_jax.model.moe.gather import gather_rows
from switch_jax.model.moe.router import RoutingSpec
from switch_jax.model.moe.slot_dispatch import flat_slots, invert_slots
from switch_jax.model.parameters import named_parameters, with_parameters
from switch_jax.model.transformer import SwitchTransformer
from tests.support.configs import make_batch, tiny

B, L, D, F, E = 4, 6, 8, 12, 4
ROWS = 2  # rows of a group
CLOSE = dict(rtol=1e-5, atol=1e-6)


def layer(*, activation: str = "relu", d_ff: int = F, **moe) -> SwitchMlp:
    """Returns an expert layer with a confident router: its weights are 50 times the usual ones."""
    model = {"d_model": D, "d_ff": d_ff, "activation": activation, "init_scale": 1.0}
    values = {f"model.{key}": value for key, value in model.items()}
    values |= {f"moe.{key}": value for key, value in ({"num_experts": E} | moe).items()}
    mlp = SwitchMlp(tiny(**values), jax.random.key(0))
    mlp.router.kernel[...] = 50 * mlp.router.kernel[...]
    return mlp


def configured(mlp: SwitchMlp, **values) -> SwitchMlp:
    """Returns the layer with the same weights and another `moe` configuration."""
    copy = jax.tree.map(lambda x: x, mlp)
    copy.router.config = dataclasses.replace(mlp.router.config, **values)
    return copy


@cache
def inputs(holes: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Returns activations, and a mask with padding at any position, as in packed rows."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(B, L, D)).astype(np.float32)
    mask = rng.random((B, L)) < 0.8 if holes else np.ones((B, L), bool)
    return x, mask


def call(mlp: SwitchMlp, x, mask, factor, rows=ROWS, keys=None):
    """Returns the layer's output and statistics; token ids count from 0."""

    def forward(mlp, x, mask, keys):
        y, routing = mlp(x, routing_spec(mask, factor, rows), keys)
        return y, routing.stats

    return jax.jit(forward)(mlp, x, mask, keys)


def routing_spec(mask, factor, rows=ROWS) -> RoutingSpec:
    return RoutingSpec(jnp.arange(mask.size).reshape(mask.shape), mask, rows, factor)


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def loop_reference(mlp: SwitchMlp, x, mask, capacity: int) -> tuple[np.ndarray, int]:
    """Output of the layer, token by token in NumPy float64, and number of dropped assignments."""
    moe = mlp.router.config
    router, wi, wo = (
        np.asarray(w[...], np.float64) for w in (mlp.router.kernel, mlp.experts.wi, mlp.experts.wo)
    )
    groups, y, dropped = x.reshape(-1, ROWS * L, D).astype(np.float64), [], 0
    for tokens, real in zip(groups, mask.reshape(-1, ROWS * L)):
        probs = softmax(tokens @ router)
        choice = np.argsort(-probs, -1, kind="stable")
        out, count = np.zeros_like(tokens), np.zeros(E, int)
        for k in range(moe.num_selected):
            for t in np.flatnonzero(real):
                e = choice[t, k]
                count[e] += 1
                if count[e] > capacity:
                    dropped += 1
                    continue
                h = tokens[t] @ wi[e]
                if mlp.experts.gate is None:
                    h = np.maximum(h, 0)
                else:
                    gate = tokens[t] @ np.asarray(mlp.experts.gate[...], np.float64)[e]
                    h *= np.asarray(jax.nn.gelu(gate.astype(np.float32)))
                total = probs[t, choice[t, : moe.num_selected]].sum() if moe.renormalize else 1
                out[t] += probs[t, e] / total * (h @ wo[e])
        y.append(out)
    return np.stack(y).reshape(x.shape), dropped


@pytest.mark.parametrize(
    "values, factor",
    [
        ({}, 1.0),
        ({"router": "top_k", "top_k": 2}, 1.0),
        ({"router": "top_k", "top_k": 2, "renormalize": True, "activation": "geglu"}, 2.0),
    ],
    ids=["top-1", "top-2", "top-2-renormalised-geglu"],
)
def test_layer_equals_a_loop_over_tokens(values, factor):
    mlp, (x, mask) = layer(**values), inputs()
    capacity = expert_capacity(mlp.router.config, ROWS * L, factor)
    expected, dropped = loop_reference(mlp, x, mask, capacity)
    y, stats = call(mlp, x, mask, factor)
    assert dropped > 0
    K = mlp.router.config.num_selected
    np.testing.assert_allclose(stats.dropped * K, dropped, rtol=1e-5)
    assert stats.tokens == mask.sum() == stats.load_E.sum() / K
    np.testing.assert_allclose(y, expected, **CLOSE)


def einsum_layer(weights, x_GxSxD, mask_GxS, capacity, *, jittered=None, trap=None):
    """Figs 15 and 16 of the paper, corrected: one-hot tensors, top-1; `trap` restores an error."""
    router, wi, wo = weights
    logits = jnp.einsum("GSD,DE->GSE", x_GxSxD if jittered is None else jittered, router)
    probs = jax.nn.softmax(logits)
    gate = probs.max(-1) / (probs.max(-1) if trap == "renormalised" else 1)
    one_hot = jax.nn.one_hot(probs.argmax(-1), E) * mask_GxS[..., None]
    position = (jnp.cumsum(one_hot, 1) - (trap != "T1")) * one_hot
    slot = jax.nn.one_hot(position.sum(-1).astype(int), capacity)
    mask_GxSxExC = one_hot[..., None] * slot[..., None, :]
    if trap == "T2":
        x_GxSxD = jittered
    slots = jnp.einsum("GSD,GSEC->EGCD", x_GxSxD, mask_GxSxExC)
    slots = jax.nn.relu(jnp.einsum("EGCD,EDF->EGCF", slots, wi))
    slots = jnp.einsum("EGCF,EFD->EGCD", slots, wo)
    combine = gate[..., None, None] * mask_GxSxExC
    if trap == "T3":  # a sum over experts only: the token gets a slot of every expert
        return jnp.einsum("EGCD,GSEC->GSD", slots, (combine.sum(-1) > 0)[..., None] * slot.sum())
    return jnp.einsum("EGCD,GSEC->GSD", slots, combine)


def loss_and_gradients(function, mlp, x, mask):
    weights = (mlp.router.kernel[...], mlp.experts.wi[...], mlp.experts.wo[...])
    direction = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    def loss(weights, x):
        return jnp.sum(direction * function(weights, x, mask))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(weights, x)


def ours(mlp: SwitchMlp, factor):
    def function(weights, x, mask):
        copy = jax.tree.unflatten(jax.tree.structure(mlp), [*_ordered(mlp, weights)])
        return copy(x, routing_spec(mask, factor), None)[0]

    return function


def _ordered(mlp, weights):
    by_name = dict(zip(("router/kernel", "experts/wi", "experts/wo"), weights))
    return [by_name[name] for name in named_parameters(mlp)]


def naive(capacity, **options):
    def function(weights, x, mask):
        groups = x.reshape(-1, ROWS * L, D)
        y = einsum_layer(weights, groups, mask.reshape(groups.shape[:2]), capacity, **options)
        return y.reshape(x.shape)

    return function


def test_gradients_equal_those_of_one_hot_einsums_with_drops():
    mlp, (x, mask) = layer(), inputs()
    assert float(call(mlp, x, mask, 1.0)[1].dropped) > 0
    value, gradients = loss_and_gradients(ours(mlp, 1.0), mlp, x, mask)
    expected, expected_gradients = loss_and_gradients(naive(3), mlp, x, mask)
    np.testing.assert_allclose(value, expected, **CLOSE)
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients)):
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_router_gets_a_gradient_from_raw_top_1_gates_and_none_from_renormalised_gates():
    mlp, (x, mask) = layer(), inputs()
    _, ((router, _, _), _) = loss_and_gradients(ours(mlp, None), mlp, x, mask)
    assert np.abs(router).max() > 1e-2
    renormalised = naive(ROWS * L, trap="renormalised")
    _, ((router, _, _), _) = loss_and_gradients(renormalised, mlp, x, mask)
    assert np.abs(router).max() < 1e-6


@pytest.mark.parametrize("trap", ["T1", "T3"])
def test_errors_of_the_papers_pseudo_code_are_not_in_the_layer(trap):
    mlp, (x, mask) = layer(), inputs()
    weights = mlp.router.kernel[...], mlp.experts.wi[...], mlp.experts.wo[...]
    y = call(mlp, x, mask, 1.0)[0]
    np.testing.assert_allclose(y, naive(3)(weights, x, mask), **CLOSE)
    assert np.abs(y - naive(3, trap=trap)(weights, x, mask)).max() > 0.1


def logits(mlp: SwitchMlp, x, keys):
    return mlp.router._logits(x, routing_spec(np.ones((B, L), bool), None), keys)


def test_trap_2_jitter_multiplies_only_the_routers_input():
    mlp = layer(jitter=0.5)
    keys = jax.random.split(jax.random.key(3), B)
    weight = np.asarray(mlp.router.kernel[...])
    # One feature per token: its logits are that feature times noise times a row of weights.
    x = np.zeros((B, L, D), np.float32)
    x[:, np.arange(L), np.arange(L)] = 2.0
    noise = logits(mlp, x, keys) / (2.0 * weight[:L])
    np.testing.assert_allclose(noise, np.broadcast_to(noise[..., :1], noise.shape), rtol=1e-5)
    assert 0.5 <= noise.min() < 0.7 and 1.3 < noise.max() <= 1.5
    assert np.unique(np.round(noise[..., 0], 5)).size == B * L
    # Fig 15 adds the noise to the logits instead: zeros would not stay zeros.
    assert np.abs(logits(mlp, 0 * x, keys)).max() == 0

    clean = configured(mlp, jitter=0.0)
    np.testing.assert_array_equal(logits(mlp, x, None), logits(clean, x, None))


def test_trap_2_experts_get_input_without_noise():
    """With one expert the gate is 1 for any router input: only noise in the expert would show."""
    mlp, (x, mask) = layer(num_experts=1, jitter=0.5), inputs()
    keys = jax.random.split(jax.random.key(3), B)
    noisy, noisy_stats = call(mlp, x, mask, None, keys=keys)
    clean, clean_stats = call(mlp, x, mask, None)
    np.testing.assert_allclose(noisy, clean, **CLOSE)
    assert abs(noisy_stats.z_loss - clean_stats.z_loss) > 1e-2
    jittered = x * np.random.default_rng(0).uniform(0.5, 1.5, x.shape).astype(np.float32)
    assert np.abs(call(mlp, jittered, mask, None)[0] - clean).max() > 0.1


def test_trap_5_the_router_computes_in_float32_on_bfloat16_activations():
    """The router weights of the two experts are equal in bfloat16."""
    mlp = layer(num_experts=2)
    mlp.router.kernel[...] = jnp.tile(jnp.array([1.0, 1.0 + 2**-10]), (D, 1))
    x = jnp.ones((1, 1, D), jnp.bfloat16)
    low = jnp.dot(x, mlp.router.kernel[...].astype(jnp.bfloat16)).astype(jnp.float32)
    assert low.argmax(-1).item() == 0
    y, stats = call(mlp, x, np.ones((1, 1), bool), None, rows=1)
    assert stats.load_E.tolist() == [0, 1]
    assert y.dtype == jnp.bfloat16
    assert all(s.dtype == jnp.float32 for s in stats)
    np.testing.assert_allclose(stats.confidence, 1 / (1 + np.exp(-D * 2**-10)), rtol=1e-6)


def test_dropped_tokens_and_padding_get_exactly_zero():
    mlp, (x, mask) = layer(), inputs()
    y, stats = call(mlp, x, mask, 0.5)
    assert stats.dropped > 2
    zero = (np.asarray(y) == 0).all(-1)
    assert zero.sum() == (~mask).sum() + stats.dropped
    assert zero[~mask].all()


@pytest.mark.parametrize("top_k", [1, 2])  # fewer and more assignments than slots
def test_gathers_have_the_gradients_of_indexing(top_k):
    C = 3
    moe = layer(top_k=top_k, router="top_k").router.config
    rng = np.random.default_rng(4)
    probs = softmax(rng.normal(size=(8, E)) + np.arange(E)).astype(np.float32)
    expert, gate, slot = expert_selection.top_k(Scores(probs, probs, rng.random(8) < 0.8), moe, C)
    slot_SxK = flat_slots(expert, slot, E, C)
    assignment_M = invert_slots(slot_SxK, E, C).reshape(-1)
    assert (assignment_M == 8 * top_k).any() and (slot_SxK == E * C).any()
    tokens, slots = (jnp.array(rng.normal(size=(n, D)), jnp.float32) for n in (8, E * C))
    for x, index, inverse in (
        (tokens, assignment_M // top_k, slot_SxK),
        (slots, slot_SxK.reshape(-1), assignment_M[:, None]),
    ):
        direction = jnp.array(rng.normal(size=(index.size, D)), jnp.float32)
        got, back = jax.vjp(partial(gather_rows, index_M=index, inverse_NxJ=inverse), x)
        want, back_want = jax.vjp(lambda x, i=index: x.at[i].get(mode="fill", fill_value=0), x)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_allclose(back(direction)[0], back_want(direction)[0], **CLOSE)

    def indexed_sum(slots, gates):
        rows = slots.at[slot_SxK].get(mode="fill", fill_value=0)
        return jnp.sum(rows * gates[..., None], axis=1)

    gather_sum = partial(gather.gather_sum, index_NxK=slot_SxK, inverse_M=assignment_M)
    got, back = jax.vjp(gather_sum, slots, jnp.asarray(gate))
    want, back_want = jax.vjp(indexed_sum, slots, jnp.asarray(gate))
    direction = jnp.array(rng.normal(size=got.shape), jnp.float32)
    for a, b in zip((got, *back(direction)), (want, *back_want(direction))):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_a_loop_over_tokens_and_a_loop_over_slots_give_the_same_results(monkeypatch):
    values = {"router": "expert_choice", "stacks": "encoder", "eval_capacity_factor": 1.25}
    mlp, (x, mask) = layer(**values), inputs()
    results = []
    for by_token in (True, False):
        monkeypatch.setattr(slot_dispatch, "_by_token", lambda *_, value=by_token: value)
        results.append(loss_and_gradients(ours(mlp, 1.0), mlp, x, mask))
    jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), *results)


def test_a_fixed_capacity_drops_the_same_assignments_as_a_capacity_factor():
    """Compares `moe.expert_capacity` with a factor that gives the same capacity."""
    x, mask = inputs()
    slots, factor = layer(min_capacity=1), 2 * E / (ROWS * L)
    fixed = configured(slots, expert_capacity=2)
    (expected, stats), (y, got_stats) = call(slots, x, mask, factor), call(fixed, x, mask, 1.0)
    assert stats.dropped > 1
    np.testing.assert_allclose(y, expected, **CLOSE)
    jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), got_stats, stats)
    _, expected = loss_and_gradients(ours(slots, factor), slots, x, mask)
    _, got = loss_and_gradients(ours(fixed, 1.0), fixed, x, mask)
    jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), got, expected)
    dropless, stats = call(fixed, x, mask, None)  # factor None overrides the fixed capacity
    assert stats.dropped == 0 and np.abs(dropless - y).max() > 0.01


def test_expert_dropout_acts_on_hidden_activations_and_is_keyed_by_row():
    mlp, (x, mask) = layer(expert_dropout_rate=0.5), inputs(holes=False)
    one_unit = layer(expert_dropout_rate=0.5, d_ff=1)
    keys = jax.random.split(jax.random.key(5), B)
    clean = np.asarray(call(one_unit, x, mask, None)[0])
    y = np.asarray(call(one_unit, x, mask, None, keys=keys)[0])
    # A single hidden unit is either zeroed or doubled.
    active = np.abs(clean).max(-1) > 0
    zeroed = (y == 0).all(-1) & active
    assert 0.2 < zeroed.sum() / active.sum() < 0.8
    np.testing.assert_allclose(y[~zeroed], 2 * clean[~zeroed], **CLOSE)

    whole = call(mlp, x, mask, 1.0, keys=keys)[0]
    half = call(mlp, x[ROWS:], mask[ROWS:], 1.0, keys=keys[ROWS:])[0]
    np.testing.assert_allclose(whole[ROWS:], half, **CLOSE)


@pytest.mark.parametrize(
    "mesh",
    [
        {"mesh.expert": 2, "mesh.model": 2, "mesh.data": 2},
        # XLA once returned the rows of two devices exchanged: it may get the reshard of a matmul
        # wrong whose tokens are split over slice × data and whose weight over data.
        {"mesh.slice": 2, "mesh.model": 2, "mesh.data": 2},
    ],
    ids=["expert", "slice"],
)
def test_layer_does_not_depend_on_a_mesh_that_splits_weights_over_data(mesh):
    config = tiny(**mesh, **{"mesh.fsdp": True, "model.init_scale": 1.0})
    mlp = SwitchMlp(config, jax.random.key(0))
    rng = np.random.default_rng(7)
    x, direction = rng.normal(size=(2, 16, 16, 16)).astype(np.float32)
    batch = x, rng.random((16, 16)) < 0.9, direction

    @jax.jit
    def output_and_gradients(mlp, x, mask, direction):
        y, back = jax.vjp(lambda mlp, x: mlp(x, routing_spec(mask, 0.5, 1), None)[0], mlp, x)
        return y, back(direction)

    expected = output_and_gradients(mlp, *batch)
    devices = make_mesh(config)
    axes = [p.get_metadata()["axes"] for p in named_parameters(mlp).values()]
    shardings = [NamedSharding(devices, partition_spec(a, fsdp=True)) for a in axes]
    sharded = jax.device_put(mlp, jax.tree.unflatten(jax.tree.structure(mlp), shardings))
    rows = batch_sharding(devices)
    with jax.set_mesh(devices):
        got = output_and_gradients(sharded, *jax.device_put(batch, rows))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


def test_a_model_with_one_expert_that_drops_nothing_equals_the_dense_model():
    model = {"model.num_encoder_layers": 1, "model.num_decoder_layers": 1}
    sparse_config = tiny(**model, **{"moe.num_experts": 1, "moe.every": 1})
    dense_config = tiny(**model, **{"moe.num_experts": 0})
    sparse, dense = (
        jax.eval_shape(lambda c=c: SwitchTransformer(c, jax.random.key(0)))
        for c in (sparse_config, dense_config)
    )
    rng = np.random.default_rng(6)
    values = {
        name: np.float32(rng.normal(1.0 if "norm" in name else 0.0, 0.3, leaf.shape))
        for name, leaf in named_parameters(sparse).items()
    }
    shapes = {name: leaf.shape for name, leaf in named_parameters(dense).items()}
    dense_values = {name.replace("experts/", ""): value for name, value in values.items()}
    assert dense_values.keys() - shapes.keys() == {n for n in values if "router" in n}
    sparse = with_parameters(sparse, values)
    dense = with_parameters(
        dense, {n: dense_values[n].reshape(shape) for n, shape in shapes.items()}
    )

    batch = make_batch(sparse_config)
    logits = jax.jit(lambda model: model.forward(batch, capacity_factor=1.0)[0])
    real = batch["decoder_loss_weights"] > 0  # padding gets the dense layer, but no expert
    np.testing.assert_allclose(logits(sparse)[real], logits(dense)[real], rtol=1e-4, atol=1e-5)
