"""Decoding with a KV cache equals the whole decoder, alone, in batches and on a mesh."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import switch_jax
from switch_jax.data.vocabulary import EOS
from switch_jax.distributed.mesh import make_mesh
from switch_jax.distributed.sharding import batch_sharding
from switch_jax.errors import UserError
from switch_jax.inference.decoding import SamplingOptions, SpecialIds, beam_search
from switch_jax.inference.generation import (
    encode_inputs,
    generate,
    generate_with_scores,
    make_decode_step,
)
from switch_jax.model.parameters import named_parameters, with_parameters
from switch_jax.model.transformer import SwitchTransformer
from switch_jax.training.step import TrainProgram
from tests.support.configs import tiny
from tests.support.hugging_face import reference, write_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights whose outputs differ from token to token."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    loaded = switch_jax.load(write_folder(folder, reference("switch_relu_tied")))
    # A decoder that used this training capacity would drop tokens.
    moe = dataclasses.replace(
        loaded.config.moe, expert_capacity=None, capacity_factor=0.1, min_capacity=1
    )
    config = dataclasses.replace(loaded.config, moe=moe)
    abstract = jax.eval_shape(lambda: SwitchTransformer(config, jax.random.key(0)))
    values = {name: leaf[...] for name, leaf in named_parameters(loaded).items()}
    return with_parameters(abstract, values)


def forced_logits(model, source, target, num_sequences: int = 1):
    """[N, T, V] logits of decode steps with a cache, after each token of `target` [N, T]."""

    @jax.jit
    def stepwise(model):
        encoded = encode_inputs(model, source)
        step, cache = make_decode_step(model, *encoded, target.shape[1], num_sequences)

        def body(cache, position_and_token):
            position, token = position_and_token
            logits, cache = step(token, position, cache)
            return cache, logits

        return jax.lax.scan(body, cache, (jnp.arange(target.shape[1]), target.T))[1]

    return stepwise(model).swapaxes(0, 1)


@jax.jit
def whole_logits(model, source, target):
    """[N, T, V] logits of the whole decoder, dropless."""
    batch = {"encoder_input_tokens": source, "decoder_input_tokens": target}
    return model.forward(batch, capacity_factor=None)[0]


def check_decode_steps_equal_the_whole_decoder(model, rows: int, num_sequences: int = 1):
    vocab_size = model.config.model.vocab_size
    source = jax.random.randint(jax.random.key(rows), (rows, 13), 2, vocab_size).at[0, 9:].set(0)
    N = rows * num_sequences
    target = jax.random.randint(jax.random.key(7), (N, 11), 2, vocab_size)
    logits = whole_logits(model, jnp.repeat(source, num_sequences, 0), target)
    actual = forced_logits(model, source, target, num_sequences)
    np.testing.assert_allclose(actual, logits, atol=1e-5)
    assert logits.std() > 0.1


@pytest.mark.parametrize("rows, num_sequences", [(3, 1), (6, 1), (2, 3)])
def test_decode_steps_equal_the_whole_decoder(model, rows, num_sequences):
    check_decode_steps_equal_the_whole_decoder(model, rows, num_sequences)


@pytest.mark.parametrize(
    "values",
    [
        {"moe.sublayer": "both", "moe.last": 2, "moe.shared_d_ff": 8},
        {"moe.router": "hash", "moe.first": 2, "moe.every": 1},
        {"moe.router": "top_k", "moe.second_policy": "threshold", "moe.second_threshold": 0.25},
    ],
    ids=["attention", "hash", "top-2"],
)
def test_decode_steps_equal_the_whole_decoder_with_other_expert_layers(values):
    layers = {"model.num_encoder_layers": 2, "model.num_decoder_layers": 4}
    config = tiny(**layers, **values, **{"model.init_scale": 1.0})
    model = SwitchTransformer(config, jax.random.key(0))
    check_decode_steps_equal_the_whole_decoder(model, 3)


def test_expert_choice_encoder_uses_its_evaluation_capacity():
    values = {"moe.router": "expert_choice", "moe.stacks": "encoder", "model.init_scale": 1.0}
    values["moe.eval_capacity_factor"] = 1.25
    model = SwitchTransformer(tiny(**values), jax.random.key(0))
    source = jax.random.randint(jax.random.key(0), (2, 16), 2, 32)
    output = generate(model, source, max_length=4)
    batch = np.pad(np.asarray(output), ((0, 0), (1, 0)))[:, :-1]
    logits = model(source, jnp.asarray(batch))
    first_end = np.asarray((output == 1).cumsum(-1) > 1)
    np.testing.assert_array_equal(
        np.where(first_end, 0, output), np.where(first_end, 0, logits.argmax(-1))
    )


def test_greedy_decoding_takes_the_best_token_and_stops_at_eos(model):
    vocab_size = model.config.model.vocab_size
    source = jax.random.randint(jax.random.key(0), (3, 13), 2, vocab_size)
    output = np.asarray(generate(model, source, max_length=6))
    shifted = np.pad(output, ((0, 0), (1, 0)))[:, :-1]
    batch = {"encoder_input_tokens": source, "decoder_input_tokens": jnp.asarray(shifted)}
    logits, _ = jax.jit(lambda m, b: m.forward(b, capacity_factor=None))(model, batch)
    ended = np.cumsum(shifted == EOS, axis=1) > 0
    row = output.all(-1).argmax()
    assert output[row].all() and ended.any()
    np.testing.assert_array_equal(output, np.where(ended, 0, logits.argmax(-1)))

    # Exchange EOS and the first token of a row: the row then ends at once, and zeros follow.
    order = np.arange(vocab_size)
    first = output[row, 0]
    order[[EOS, first]] = first, EOS
    swapped = dict(named_parameters(model))
    swapped["embedding"] = model.embedding[...][order]
    renamed = with_parameters(model, {n: getattr(v, "value", v) for n, v in swapped.items()})
    output = np.asarray(generate(renamed, order[source], max_length=6))
    np.testing.assert_array_equal(output[row], [EOS, 0, 0, 0, 0, 0])


def log_probabilities(model, source, tokens):
    """[N] log probabilities of tokens [N, L] for inputs [N, S], by the whole decoder."""
    tokens = jnp.asarray(tokens)
    shifted = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    logp = jax.nn.log_softmax(whole_logits(model, source, shifted))
    logp = jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]
    after_end = jnp.cumsum(shifted == EOS, 1) > 0
    return jnp.where(after_end, 0, logp).sum(1)


def lengths(tokens):
    """[N] number of tokens up to and including EOS."""
    return 1 + (np.cumsum(np.asarray(tokens) == EOS, -1)[..., :-1] == 0).sum(-1)


# With tied embeddings, every token would be its own most probable successor.
VARIED = {"model.vocab_size": 16, "model.init_scale": 3.0, "model.tied_embeddings": False}


@pytest.fixture(scope="module")
def varied_model():
    """A model that ends some outputs early; its experts get few or many tokens, by batch."""
    config = tiny(**VARIED, **{"moe.num_experts": 2, "model.num_decoder_layers": 4})
    return SwitchTransformer(config, jax.random.key(0))


def prompts(count: int, length: int = 16):
    """[count, length] int32 random tokens, with rows of various lengths."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 16, (count, length), dtype=np.int32)
    return tokens * (np.arange(length) < rng.integers(4, length, (count, 1), endpoint=True))


BEAMS = SamplingOptions(beam_size=4, num_return=4)
SAMPLES = SamplingOptions(temperature=1.5, top_k=12, num_return=2, seed=5)


@pytest.mark.parametrize(
    "options", [SamplingOptions(), BEAMS, SAMPLES], ids=["greedy", "beams", "samples"]
)
def test_scores_are_the_log_probabilities_of_the_sequences(varied_model, options):
    source, K = prompts(16), options.num_return
    sequences = generate_with_scores(varied_model, source, 7, options)
    assert sequences.token_BxKxL.shape == (16, K, 7) and sequences.token_BxKxL.dtype == jnp.int32
    tokens = np.asarray(sequences.token_BxKxL).reshape(16 * K, 7)
    expected = np.asarray(log_probabilities(varied_model, jnp.repeat(source, K, 0), tokens))
    if options.beam_size > 1:
        expected = expected / ((5 + lengths(tokens)) / 6) ** 0.6
    np.testing.assert_allclose(sequences.score_BxK.reshape(-1), expected, atol=1e-5)
    assert 0 < (tokens == EOS).any(-1).mean() <= 1
    assert len({tuple(row) for row in tokens}) > K  # not the same for every input


def with_ids(model, order, start_id: int):
    """Returns the model with id `order[i]` for what was i, and another start token."""
    config, old = model.config, np.argsort(order)
    ids = dict(pad_id=int(order[0]), eos_id=int(order[1]), start_id=start_id)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **ids))
    values = {name: leaf[...] for name, leaf in named_parameters(model).items()}
    values |= {"embedding": values["embedding"][old], "head": values["head"][:, old]}
    abstract = jax.eval_shape(lambda: SwitchTransformer(config, jax.random.key(0)))
    return with_parameters(abstract, values)


def test_other_special_ids_give_the_same_sequences(varied_model):
    order = np.array([5, 9, *(i for i in range(16) if i not in (5, 9))])
    source, L = prompts(6), 7
    renamed = with_ids(varied_model, order, start_id=5)
    expected = generate_with_scores(varied_model, source, L, BEAMS)
    actual = generate_with_scores(renamed, order[source], L, BEAMS)
    np.testing.assert_array_equal(actual.token_BxKxL, order[expected.token_BxKxL])
    assert (actual.token_BxKxL[:, :, -1] == 5).any()  # padding


def test_decoding_begins_with_the_start_token(varied_model):
    source, L = jnp.asarray(prompts(6)), 7
    started = with_ids(varied_model, np.arange(16), start_id=7)
    output = np.asarray(generate(started, source, max_length=L))
    shifted = np.pad(output, ((0, 0), (1, 0)), constant_values=7)[:, :-1]
    best = whole_logits(varied_model, source, jnp.asarray(shifted)).argmax(-1)
    ended = np.cumsum(shifted == EOS, axis=1) > 0
    np.testing.assert_array_equal(output, np.where(ended, 0, best))
    assert (output != generate(varied_model, source, max_length=L)).any()


def test_beam_search_is_the_same_without_a_cache(varied_model):
    """The state holds only the tokens; a cache of the wrong beams would give other results."""
    source, K, L = jnp.asarray(prompts(6)), 4, 7

    def step(token_N, position, tokens_NxL):
        tokens_NxL = tokens_NxL.at[:, position].set(token_N)
        logits = whole_logits(varied_model, jnp.repeat(source, K, 0), tokens_NxL)
        return logits[:, position], tokens_NxL

    start = jnp.zeros((6 * K, L), jnp.int32)
    expected = jax.jit(lambda s: beam_search(step, s, 0, 6, K, L, SpecialIds(0, EOS, 0), 0.6))(
        start
    )
    actual = generate_with_scores(varied_model, source, L, BEAMS)
    np.testing.assert_array_equal(actual.token_BxKxL, expected.token_BxKxL)
    np.testing.assert_allclose(actual.score_BxK, expected.score_BxK, atol=1e-5)
    best = switch_jax.generate(varied_model, source, max_length=L, beam_size=K)
    np.testing.assert_array_equal(best, actual.token_BxKxL[:, 0])
    greedy = switch_jax.generate(varied_model, source, max_length=L)
    assert (np.asarray(best) != np.asarray(greedy)).any()


@pytest.mark.parametrize(
    "options", [SamplingOptions(), BEAMS, SAMPLES], ids=["greedy", "beams", "samples"]
)
def test_generated_sequences_do_not_depend_on_batch_or_padding(varied_model, options):
    """One input uses few experts of a pool; 32 inputs use all experts."""
    source = prompts(32)
    batch = generate_with_scores(varied_model, source, 6, options)
    for row in (0, 17):
        longer = np.pad(source[row : row + 1], ((0, 0), (0, 24)))
        alone = generate_with_scores(varied_model, longer, 6, options, row_numbers=[row])
        np.testing.assert_array_equal(alone.token_BxKxL[0], batch.token_BxKxL[row])
        np.testing.assert_allclose(alone.score_BxK[0], batch.score_BxK[row], atol=1e-5)


def test_logits_do_not_depend_on_batch_or_padding(varied_model):
    source, target = prompts(32), jax.random.randint(jax.random.key(0), (32, 6), 2, 16)
    batch = forced_logits(varied_model, jnp.asarray(source), target)
    longer = jnp.pad(source[17:18], ((0, 0), (0, 24)))
    alone = forced_logits(varied_model, longer, target[17:18])
    np.testing.assert_allclose(alone[0], batch[17], atol=1e-5)


def test_expert_choice_groups_are_single_inputs():
    values = {"moe.router": "expert_choice", "moe.stacks": "encoder", "moe.group_size": 128}
    values |= {"moe.eval_capacity_factor": 1.25, "model.init_scale": 1.0}
    model = SwitchTransformer(tiny(**values), jax.random.key(0))
    source = prompts(8)
    batch = generate_with_scores(model, source, 2, SamplingOptions())
    alone = generate_with_scores(model, source[5:6], 2, SamplingOptions())
    np.testing.assert_allclose(alone.score_BxK[0], batch.score_BxK[5], atol=1e-5)


def test_samples_differ_by_seed_row_and_result_number(varied_model):
    source = np.repeat(prompts(1), 4, 0)

    def sample(seed, **options):
        options |= {"temperature": 3.0, "seed": seed, "max_length": 6}
        return np.asarray(switch_jax.generate(varied_model, source, **options))

    pairs = sample(0, num_return=2)
    assert pairs.shape == (4, 2, 6)
    assert len({tuple(row) for row in pairs.reshape(8, 6)}) == 8
    single = sample(0)
    np.testing.assert_array_equal(single, pairs[:, 0])
    assert (sample(1) != single).any(-1).all()
    np.testing.assert_array_equal(sample(0), single)


# Experts split over devices, or all experts on every device, in a pool.
SPLIT = {"mesh.data": 2, "mesh.expert": 2, "mesh.model": 2, "mesh.fsdp": True}
REPLICATED = {"mesh.data": 4, "mesh.model": 2}


@pytest.mark.parametrize(
    "mesh, options",
    [(SPLIT, SamplingOptions()), (SPLIT, BEAMS), (SPLIT, SAMPLES), (REPLICATED, BEAMS)],
    ids=["greedy", "beams", "samples", "beams, replicated"],
)
def test_generation_on_a_mesh_equals_one_device(mesh, options):
    config = tiny(**mesh, **VARIED, **{"model.num_decoder_layers": 4})
    program = TrainProgram(config, make_mesh(config))
    split = program.init().params
    whole = {name: jnp.asarray(np.asarray(value)) for name, value in split.items()}
    source = prompts(8)
    expected = generate_with_scores(program.sharded.model(whole), source, 6, options)
    on_mesh = jax.device_put(source, batch_sharding(program.mesh))
    with jax.set_mesh(program.mesh):
        actual = generate_with_scores(program.sharded.model(split), on_mesh, 6, options)
        with pytest.raises(UserError, match=r"3 rows .* 4 parts"):
            generate_with_scores(program.sharded.model(split), source[:3], 6, options)
    assert len(actual.token_BxKxL.sharding.device_set) == 8
    np.testing.assert_array_equal(actual.token_BxKxL, expected.token_BxKxL)
    np.testing.assert_allclose(actual.score_BxK, expected.score_BxK, atol=1e-5)
    assert len({tuple(row) for row in np.asarray(expected.token_BxKxL[:, 0])}) > 1


@pytest.mark.parametrize("on_mesh", [False, True])
def test_a_decode_step_does_not_copy_unused_experts(on_mesh):
    values = {"moe.num_experts": 64, "model.num_decoder_layers": 4, "moe.stacks": "decoder"}
    config = tiny(**values, **{"mesh.data": 1})
    model = SwitchTransformer(config, jax.random.key(0))
    mask = jnp.ones((4, 8), bool)

    def one_step(model, encoded):
        step, cache = make_decode_step(model, encoded, mask, 4, 1)
        return step(jnp.zeros(4, jnp.int32), jnp.int32(0), cache)[0]

    mesh = make_mesh(config)
    with jax.set_mesh(mesh) if on_mesh else contextlib.nullcontext():
        compiled = jax.jit(one_step).lower(model, jnp.zeros((4, 8, 16))).compile()
    experts_of_a_block = 64 * 2 * 16 * 32 * 4  # bytes
    assert compiled.memory_analysis().temp_size_in_bytes < experts_of_a_block / 2


@pytest.mark.parametrize(
    "source, options, words",
    [
        ([[3, 4]], {"beam_size": 2, "temperature": 1.0}, ["beam_size=2", "temperature=1.0"]),
        ([[3, 4]], {"max_length": 0}, ["max_length=0"]),
        ([3, 4], {}, ["(2,)", "[rows, tokens]"]),
    ],
)
def test_wrong_arguments_are_an_error_that_names_them(model, source, options, words):
    with pytest.raises(UserError) as error:
        switch_jax.generate(model, np.array(source), **options)
    assert all(word in str(error.value) for word in words)


def test_caches_that_no_memory_holds_are_refused(model):
    ids = np.ones((1, 4), np.int32)
    for options in ({"max_length": 10**12}, {"max_length": 10**6, "beam_size": 10**6}):
        with pytest.raises(UserError, match=r"take [\d,]+ GiB and the devices have"):
            generate(model, ids, **options)


def test_ids_outside_the_vocabulary_are_refused(model):
    ids = np.ones((1, 4), np.int32)
    last = model.config.model.vocab_size - 1
    for wrong in (ids * (last + 1), -ids, ids * np.int64(2**32), ids * 1.5, [[2**70]]):
        with pytest.raises(UserError, match="encoder_input_tokens has the"):
            generate(model, wrong, max_length=2)
        with pytest.raises(UserError, match="encoder_input_tokens has the"):
            model(wrong, ids)
    with pytest.raises(
        UserError, match=f"decoder_input_tokens has the id {last + 1}, .* 0 to {last}"
    ):
        model(ids, jnp.array(ids * (last + 1)))
