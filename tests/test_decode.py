"""switch_jax.decode: cached decoding equals the whole decoder, and blanks are filled."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny
from test_parity import load_reference, model_config, reference

from switch_jax import decode
from switch_jax.model import SwitchTransformer, named_parameters, with_parameters


@pytest.fixture(scope="module")
def model():
    """Random weights whose outputs differ from token to token."""
    stored = reference("switch_relu_tied")
    config = model_config(json.loads(str(stored["config"])))
    # Training capacity so small that a decoder which heeded it would drop.
    moe = dataclasses.replace(config.moe, capacity_factor=0.1, min_capacity=1)
    config = dataclasses.replace(config, moe=moe)
    abstract = jax.eval_shape(lambda: SwitchTransformer(config, jax.random.key(0)))
    return load_reference(abstract, stored)


def check_cached_steps_equal_the_whole_decoder(model, rows: int):
    vocab_size = model.config.model.vocab_size
    source = jax.random.randint(jax.random.key(rows), (rows, 13), 2, vocab_size).at[0, 9:].set(0)
    target = jax.random.randint(jax.random.key(7), (rows, 11), 2, vocab_size)
    batch = {"encoder_input_tokens": source, "decoder_input_tokens": target}
    logits, _ = jax.jit(lambda m, b: m.forward(b, factor=None))(model, batch)

    @jax.jit
    def stepwise(model):
        mask = source > 0
        encoded, _ = model.encode(source, mask.astype(jnp.int32), None)
        cache = decode.start_cache(model, encoded, target.shape[1])

        def step(cache, position_and_token):
            position, token = position_and_token
            logits, cache = decode.decode_step(model, token, position, cache, mask)
            return cache, logits

        return jax.lax.scan(step, cache, (jnp.arange(target.shape[1]), target.T))[1]

    np.testing.assert_allclose(stepwise(model).swapaxes(0, 1), logits, atol=2e-5)


@pytest.mark.parametrize("rows", [3, 6])
def test_cached_steps_equal_the_whole_decoder(model, rows):
    check_cached_steps_equal_the_whole_decoder(model, rows)


@pytest.mark.parametrize(
    "values",
    [
        {"moe.sublayer": "both", "moe.last": 2, "moe.shared_d_ff": 8},
        {"moe.router": "hash", "moe.first": 2, "moe.every": 1},
    ],
    ids=["attention", "hash"],
)
def test_experts_anywhere_decode_as_they_train(values):
    layers = {"model.num_encoder_layers": 2, "model.num_decoder_layers": 4}
    config = tiny(**layers, **values, **{"model.init_scale": 1.0})
    model = SwitchTransformer(config, jax.random.key(0))
    check_cached_steps_equal_the_whole_decoder(model, 3)


def test_expert_choice_generates_at_its_evaluation_capacity():
    values = {"moe.router": "expert_choice", "moe.stacks": "encoder", "model.init_scale": 1.0}
    values["moe.eval_capacity_factor"] = 1.25
    model = SwitchTransformer(tiny(**values), jax.random.key(0))
    source = jax.random.randint(jax.random.key(0), (2, 16), 2, 32)
    output = decode.generate(model, source, max_length=4)
    batch = np.pad(np.asarray(output), ((0, 0), (1, 0)))[:, :-1]
    logits = model(source, jnp.asarray(batch))
    first_end = np.asarray((output == 1).cumsum(-1) > 1)
    np.testing.assert_array_equal(
        np.where(first_end, 0, output), np.where(first_end, 0, logits.argmax(-1))
    )


def test_greedy_takes_the_best_token_and_stops_at_eos(model):
    source = jax.random.randint(jax.random.key(0), (3, 13), 2, 96)
    output = np.asarray(decode.generate(model, source, max_length=6))
    shifted = np.pad(output, ((0, 0), (1, 0)))[:, :-1]
    batch = {"encoder_input_tokens": source, "decoder_input_tokens": jnp.asarray(shifted)}
    logits, _ = jax.jit(lambda m, b: m.forward(b, factor=None))(model, batch)
    np.testing.assert_array_equal(output, logits.argmax(-1))

    # Exchange EOS with what a row begins with: that row ends at once, and zeros follow.
    order = np.arange(96)
    order[[decode.EOS, output[0, 0]]] = output[0, 0], decode.EOS
    swapped = dict(named_parameters(model))
    swapped["embedding"] = model.embedding[...][order]
    renamed = with_parameters(model, {n: getattr(v, "value", v) for n, v in swapped.items()})
    output = np.asarray(decode.generate(renamed, order[source], max_length=6))
    np.testing.assert_array_equal(output[0], [decode.EOS, 0, 0, 0, 0, 0])


class Words:
    """A vocabulary of words, with the sentinels that `fill_blanks` looks for."""

    words = ("<pad>", "</s>", "import", "as", "np", "numpy", "<extra_id_1>", "<extra_id_0>")

    def encode(self, text):
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


@pytest.mark.parametrize(
    "text, answer, filled",
    [
        ("import ___ as np", "<extra_id_0> numpy </s>", "import numpy as np"),
        ("import <extra_id_0> as np", "<extra_id_0> numpy </s>", "import numpy as np"),
        ("___ numpy as ___", "<extra_id_0> import <extra_id_1> np </s>", "import numpy as np"),
        ("import ___ as np", "numpy </s>", "import ___ as np"),
    ],
)
def test_fill_blanks(monkeypatch, text, answer, filled):
    words = Words()
    monkeypatch.setattr(decode, "generate", lambda *a, **k: np.array([words.encode(answer)]))
    assert decode.fill_blanks(None, words, text) == filled
