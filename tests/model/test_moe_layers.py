"""The expert layer against naive versions of itself."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from switch_jax.distributed.mesh import make_mesh
from switch_jax.distributed.sharding import batch_sharding, partition_spec
from switch_jax.model.moe import routing, slot_dispatch
from switch_jax.model.moe.layers import SwitchMlp
from switch_jax.model.moe.router import RoutingSpec
from switch_jax.model.moe.routing import Scores
from switch_jax.model.moe.slot_dispatch import gather_rows, slots_of_tokens, tokens_of_slots
from switch_jax.model.parameters import named_parameters, with_parameters
from switch_jax.model.transformer import SwitchTransformer
from tests.support.configs import make_batch, tiny

B, L, D, F, E = 4, 6, 8, 12, 4
ROWS = 2  # of a group
CLOSE = dict(rtol=1e-5, atol=1e-6)


def layer(*, activation: str = "relu", d_ff: int = F, **moe) -> SwitchMlp:
    """An expert layer whose router has opinions: its weights are 50 times the usual ones."""
    model = {"d_model": D, "d_ff": d_ff, "activation": activation, "init_scale": 1.0}
    values = {f"model.{key}": value for key, value in model.items()}
    values |= {f"moe.{key}": value for key, value in ({"num_experts": E} | moe).items()}
    mlp = SwitchMlp(tiny(**values), jax.random.key(0))
    mlp.router.kernel[...] = 50 * mlp.router.kernel[...]
    return mlp


def configured(mlp: SwitchMlp, **values) -> SwitchMlp:
    """The same weights under another `moe` configuration."""
    other = jax.tree.map(lambda x: x, mlp)
    other.router.config = dataclasses.replace(mlp.router.config, **values)
    return other


@cache
def inputs(holes: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Activations, and a mask with padding anywhere, as in packed rows."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(B, L, D)).astype(np.float32)
    mask = rng.random((B, L)) < 0.8 if holes else np.ones((B, L), bool)
    return x, mask


def call(mlp: SwitchMlp, x, mask, factor, rows=ROWS, keys=None):
    """The layer's output and its sums; tokens are numbered from 0."""

    def run(mlp, x, mask, keys):
        y, routed = mlp(x, plan(mask, factor, rows), keys)
        return y, routed.sums

    return jax.jit(run)(mlp, x, mask, keys)


def plan(mask, factor, rows=ROWS) -> RoutingSpec:
    return RoutingSpec(jnp.arange(mask.size).reshape(mask.shape), mask, rows, factor)


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def loop_reference(mlp: SwitchMlp, x, mask, capacity: int) -> tuple[np.ndarray, int]:
    """Token by token, in NumPy; also the number of dropped assignments."""
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
def test_equals_a_loop_over_tokens(values, factor):
    mlp, (x, mask) = layer(**values), inputs()
    capacity = mlp.router.config.capacity(ROWS * L, factor)
    expected, dropped = loop_reference(mlp, x, mask, capacity)
    y, sums = call(mlp, x, mask, factor)
    assert dropped > 0
    K = mlp.router.config.num_selected
    np.testing.assert_allclose(sums.dropped * K, dropped, rtol=1e-5)
    assert sums.tokens == mask.sum() == sums.load_E.sum() / K
    np.testing.assert_allclose(y, expected, **CLOSE)


def einsum_layer(weights, x_GxSxD, mask_GxS, capacity, *, jittered=None, trap=None):
    """The paper's Figs 15 and 16 put right: top-1 with one-hot tensors; `trap` puts them wrong."""
    router, wi, wo = weights
    logits = jnp.einsum("GSD,DE->GSE", x_GxSxD if jittered is None else jittered, router)
    probs = jax.nn.softmax(logits)
    gate = probs.max(-1) / (probs.max(-1) if trap == "renormalised" else 1)
    one_hot = jax.nn.one_hot(probs.argmax(-1), E) * mask_GxS[..., None]
    place = (jnp.cumsum(one_hot, 1) - (trap != "T1")) * one_hot
    place = jax.nn.one_hot(place.sum(-1).astype(int), capacity)
    mask_GxSxExC = one_hot[..., None] * place[..., None, :]
    if trap == "T2":
        x_GxSxD = jittered
    slots = jnp.einsum("GSD,GSEC->EGCD", x_GxSxD, mask_GxSxExC)
    slots = jax.nn.relu(jnp.einsum("EGCD,EDF->EGCF", slots, wi))
    slots = jnp.einsum("EGCF,EFD->EGCD", slots, wo)
    combine = gate[..., None, None] * mask_GxSxExC
    if trap == "T3":  # over experts alone: a slot of every expert lands on the token
        return jnp.einsum("EGCD,GSEC->GSD", slots, (combine.sum(-1) > 0)[..., None] * place.sum())
    return jnp.einsum("EGCD,GSEC->GSD", slots, combine)


def loss_and_gradients(function, mlp, x, mask):
    weights = (mlp.router.kernel[...], mlp.experts.wi[...], mlp.experts.wo[...])
    direction = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    def loss(weights, x):
        return jnp.sum(direction * function(weights, x, mask))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(weights, x)


def ours(mlp: SwitchMlp, factor):
    def function(weights, x, mask):
        other = jax.tree.unflatten(jax.tree.structure(mlp), [*_ordered(mlp, weights)])
        return other(x, plan(mask, factor), None)[0]

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


def test_the_router_learns_from_raw_top_1_gates_and_would_not_from_renormalised_ones():
    mlp, (x, mask) = layer(), inputs()
    _, ((router, _, _), _) = loss_and_gradients(ours(mlp, None), mlp, x, mask)
    assert np.abs(router).max() > 1e-2
    renormalised = naive(ROWS * L, trap="renormalised")
    _, ((router, _, _), _) = loss_and_gradients(renormalised, mlp, x, mask)
    assert np.abs(router).max() < 1e-6


@pytest.mark.parametrize("trap", ["T1", "T3"])
def test_traps_of_the_pseudo_code_are_not_in_the_layer(trap):
    mlp, (x, mask) = layer(), inputs()
    weights = mlp.router.kernel[...], mlp.experts.wi[...], mlp.experts.wo[...]
    y = call(mlp, x, mask, 1.0)[0]
    np.testing.assert_allclose(y, naive(3)(weights, x, mask), **CLOSE)
    assert np.abs(y - naive(3, trap=trap)(weights, x, mask)).max() > 0.1


def logits(mlp: SwitchMlp, x, keys):
    return mlp.router._logits(x, plan(np.ones((B, L), bool), None), keys)


def test_trap_2_jitter_multiplies_the_routers_input_and_nothing_else():
    mlp = layer(jitter=0.5)
    keys = jax.random.split(jax.random.key(3), B)
    weight = np.asarray(mlp.router.kernel[...])
    # One feature a token: its logits are that feature times noise times a row of weights.
    x = np.zeros((B, L, D), np.float32)
    x[:, np.arange(L), np.arange(L)] = 2.0
    noise = logits(mlp, x, keys) / (2.0 * weight[:L])
    np.testing.assert_allclose(noise, np.broadcast_to(noise[..., :1], noise.shape), rtol=1e-5)
    assert 0.5 <= noise.min() < 0.7 and 1.3 < noise.max() <= 1.5
    assert np.unique(np.round(noise[..., 0], 5)).size == B * L
    # Fig 15 adds the noise to the logits instead, so that zeros would not stay zeros.
    assert np.abs(logits(mlp, 0 * x, keys)).max() == 0

    clean = configured(mlp, jitter=0.0)
    np.testing.assert_array_equal(logits(mlp, x, None), logits(clean, x, None))


def test_trap_2_experts_see_clean_input():
    """With one expert the gate is 1 whatever the router sees: only a noisy expert would show."""
    mlp, (x, mask) = layer(num_experts=1, jitter=0.5), inputs()
    keys = jax.random.split(jax.random.key(3), B)
    noisy, noisy_sums = call(mlp, x, mask, None, keys=keys)
    clean, clean_sums = call(mlp, x, mask, None)
    np.testing.assert_allclose(noisy, clean, **CLOSE)
    assert abs(noisy_sums.z - clean_sums.z) > 1e-2
    jittered = x * np.random.default_rng(0).uniform(0.5, 1.5, x.shape).astype(np.float32)
    assert np.abs(call(mlp, jittered, mask, None)[0] - clean).max() > 0.1


def test_trap_5_the_router_works_in_float32_on_bfloat16_activations():
    """Two experts whose weights bfloat16 cannot tell apart."""
    mlp = layer(num_experts=2)
    mlp.router.kernel[...] = jnp.tile(jnp.array([1.0, 1.0 + 2**-10]), (D, 1))
    x = jnp.ones((1, 1, D), jnp.bfloat16)
    low = jnp.dot(x, mlp.router.kernel[...].astype(jnp.bfloat16)).astype(jnp.float32)
    assert low.argmax(-1).item() == 0
    y, sums = call(mlp, x, np.ones((1, 1), bool), None, rows=1)
    assert sums.load_E.tolist() == [0, 1]
    assert y.dtype == jnp.bfloat16
    assert all(s.dtype == jnp.float32 for s in sums)
    np.testing.assert_allclose(sums.confidence, 1 / (1 + np.exp(-D * 2**-10)), rtol=1e-6)


def test_dropped_tokens_and_padding_get_exactly_zero():
    mlp, (x, mask) = layer(), inputs()
    y, sums = call(mlp, x, mask, 0.5)
    assert sums.dropped > 2
    zero = (np.asarray(y) == 0).all(-1)
    assert zero.sum() == (~mask).sum() + sums.dropped
    assert zero[~mask].all()


@pytest.mark.parametrize("top_k", [1, 2])  # fewer and more places than slots
def test_gathers_have_the_gradients_of_indexing(top_k):
    C = 3
    moe = layer(top_k=top_k, router="top_k").router.config
    rng = np.random.default_rng(4)
    probs = softmax(rng.normal(size=(8, E)) + np.arange(E)).astype(np.float32)
    expert, gate, place = routing.top_k(Scores(probs, probs, rng.random(8) < 0.8), moe, C)
    slot_SxK = slots_of_tokens(expert, place, E, C)
    held_N = tokens_of_slots(slot_SxK, E, C).reshape(-1)
    assert (held_N == 8 * top_k).any() and (slot_SxK == E * C).any()
    tokens, slots = (jnp.array(rng.normal(size=(n, D)), jnp.float32) for n in (8, E * C))
    for x, index, inverse in (
        (tokens, held_N // top_k, slot_SxK),
        (slots, slot_SxK.reshape(-1), held_N[:, None]),
    ):
        direction = jnp.array(rng.normal(size=(index.size, D)), jnp.float32)
        got, back = jax.vjp(partial(gather_rows, index_M=index, inverse_NxJ=inverse), x)
        want, back_want = jax.vjp(lambda x, i=index: x.at[i].get(mode="fill", fill_value=0), x)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_allclose(back(direction)[0], back_want(direction)[0], **CLOSE)

    def indexed_sum(slots, gates):
        rows = slots.at[slot_SxK].get(mode="fill", fill_value=0)
        return jnp.sum(rows * gates[..., None], axis=1)

    gather_sum = partial(slot_dispatch.gather_sum, index_NxK=slot_SxK, inverse_M=held_N)
    got, back = jax.vjp(gather_sum, slots, jnp.asarray(gate))
    want, back_want = jax.vjp(indexed_sum, slots, jnp.asarray(gate))
    direction = jnp.array(rng.normal(size=got.shape), jnp.float32)
    for a, b in zip((got, *back(direction)), (want, *back_want(direction))):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_the_way_through_tokens_and_the_way_through_slots_are_the_same(monkeypatch):
    values = {"router": "expert_choice", "stacks": "encoder", "eval_capacity_factor": 1.25}
    mlp, (x, mask) = layer(**values), inputs()
    results = []
    for token_major in (True, False):
        monkeypatch.setattr(slot_dispatch, "_token_major", lambda *_, way=token_major: way)
        results.append(loss_and_gradients(ours(mlp, 1.0), mlp, x, mask))
    jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), *results)


def test_a_fixed_capacity_drops_what_as_many_slots_do():
    """`moe.expert_capacity` limits what is computed; a factor makes room for as much."""
    x, mask = inputs()
    slots, factor = layer(min_capacity=1), 2 * E / (ROWS * L)
    fixed = configured(slots, expert_capacity=2)
    (wanted, sums), (y, got_sums) = call(slots, x, mask, factor), call(fixed, x, mask, 1.0)
    assert sums.dropped > 1
    np.testing.assert_allclose(y, wanted, **CLOSE)
    jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), got_sums, sums)
    _, wanted = loss_and_gradients(ours(slots, factor), slots, x, mask)
    _, got = loss_and_gradients(ours(fixed, 1.0), fixed, x, mask)
    jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), got, wanted)
    dropless, sums = call(fixed, x, mask, None)  # asked for, it holds whatever the capacity
    assert sums.dropped == 0 and np.abs(dropless - y).max() > 0.01


def test_expert_dropout_acts_on_hidden_activations_and_is_keyed_by_row():
    mlp, (x, mask) = layer(expert_dropout_rate=0.5), inputs(holes=False)
    one = layer(expert_dropout_rate=0.5, d_ff=1)
    keys = jax.random.split(jax.random.key(5), B)
    clean = np.asarray(call(one, x, mask, None)[0])
    y = np.asarray(call(one, x, mask, None, keys=keys)[0])
    # A single hidden unit is either gone or doubled.
    alive = np.abs(clean).max(-1) > 0
    gone = (y == 0).all(-1) & alive
    assert 0.2 < gone.sum() / alive.sum() < 0.8
    np.testing.assert_allclose(y[~gone], 2 * clean[~gone], **CLOSE)

    whole = call(mlp, x, mask, 1.0, keys=keys)[0]
    half = call(mlp, x[ROWS:], mask[ROWS:], 1.0, keys=keys[ROWS:])[0]
    np.testing.assert_allclose(whole[ROWS:], half, **CLOSE)


@pytest.mark.parametrize(
    "mesh",
    [
        {"mesh.expert": 2, "mesh.model": 2, "mesh.data": 2},
        # Rows of two of the devices came back exchanged: XLA may get the reshard wrong of a
        # matmul whose tokens are split over slice × data and its weight over data.
        {"mesh.slice": 2, "mesh.model": 2, "mesh.data": 2},
    ],
    ids=["expert", "slice"],
)
def test_equals_itself_on_a_mesh_whose_weights_are_split_over_data(mesh):
    config = tiny(**mesh, **{"mesh.fsdp": True, "model.init_scale": 1.0})
    mlp = SwitchMlp(config, jax.random.key(0))
    rng = np.random.default_rng(7)
    x, direction = rng.normal(size=(2, 16, 16, 16)).astype(np.float32)
    batch = x, rng.random((16, 16)) < 0.9, direction

    @jax.jit
    def run(mlp, x, mask, direction):
        y, back = jax.vjp(lambda mlp, x: mlp(x, plan(mask, 0.5, 1), None)[0], mlp, x)
        return y, back(direction)

    expected = run(mlp, *batch)
    devices = make_mesh(config)
    axes = [p.get_metadata()["axes"] for p in named_parameters(mlp).values()]
    where = [NamedSharding(devices, partition_spec(a, fsdp=True)) for a in axes]
    split = jax.device_put(mlp, jax.tree.unflatten(jax.tree.structure(mlp), where))
    rows = batch_sharding(devices)
    with jax.set_mesh(devices):
        got = run(split, *jax.device_put(batch, rows))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


def test_one_expert_with_room_is_the_dense_model():
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
    of_dense = {name.replace("experts/", ""): value for name, value in values.items()}
    assert of_dense.keys() - shapes.keys() == {n for n in values if "router" in n}
    sparse = with_parameters(sparse, values)
    dense = with_parameters(dense, {n: of_dense[n].reshape(shape) for n, shape in shapes.items()})

    batch = make_batch(sparse_config)
    run = jax.jit(lambda model: model.forward(batch, capacity_factor=1.0)[0])
    real = batch["decoder_loss_weights"] > 0  # padding passes a dense layer, and no expert
    np.testing.assert_allclose(run(sparse)[real], run(dense)[real], rtol=1e-4, atol=1e-5)
