"""Decoding: greedy search with cached keys and values, and the blanks of a text."""

import itertools
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switch_jax.data.spans import EOS
from switch_jax.data.vocabulary import NUM_SENTINELS, Vocabulary
from switch_jax.errors import UserError
from switch_jax.model import SwitchTransformer, layers_per_block
from switch_jax.moe import Plan


class Cache(NamedTuple):
    """Keys and values of a decoder: pairs of arrays with leading axes [blocks, layers of a block].

    own: [.., B, T, H, K] of the positions decoded so far, zeros behind them.
    cross: [.., B, S, H, K] of the encoded input.
    """

    own: tuple[jax.Array, jax.Array]
    cross: tuple[jax.Array, jax.Array]


def generate(
    model: SwitchTransformer, encoder_input_tokens: jax.Array, *, max_length: int = 128
) -> jax.Array:
    """Greedy decoding; no token is ever dropped by an expert layer.

    Args:
      model: as from `switch_jax.load`.
      encoder_input_tokens: [B, S] int32, 0 is padding.
      max_length: tokens to generate at the most.

    Returns [B, max_length] int32: tokens up to and with EOS (1), then 0.
    """
    return _greedy(model, jnp.asarray(encoder_input_tokens, jnp.int32), max_length)


@partial(jax.jit, static_argnames="max_length")
def _greedy(model: SwitchTransformer, source_BxS: jax.Array, max_length: int) -> jax.Array:
    B = source_BxS.shape[0]
    source_mask_BxS = source_BxS > 0
    encoded, _ = model.encode(source_BxS, source_mask_BxS.astype(jnp.int32), None)
    cache = start_cache(model, encoded, max_length)

    def unfinished(carry):
        step, _, _, _, done_B = carry
        return (step < max_length) & ~done_B.all()

    def advance(carry):
        step, token_B, output_BxT, cache, done_B = carry
        logits_BxV, cache = decode_step(model, token_B, step, cache, source_mask_BxS)
        token_B = jnp.where(done_B, 0, logits_BxV.argmax(-1).astype(jnp.int32))
        output_BxT = output_BxT.at[:, step].set(token_B)
        return step + 1, token_B, output_BxT, cache, done_B | (token_B == EOS)

    start_B, output = jnp.zeros(B, jnp.int32), jnp.zeros((B, max_length), jnp.int32)
    carry = (jnp.int32(0), start_B, output, cache, jnp.zeros(B, bool))
    return jax.lax.while_loop(unfinished, advance, carry)[2]


def start_cache(model: SwitchTransformer, encoded_BxSxD: jax.Array, length: int) -> Cache:
    """A cache for `length` positions after the encoded input."""

    def cross(block):
        pairs = [layer.cross_attention.keys_values(encoded_BxSxD) for layer in block.layers]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *pairs)

    keys, values = jax.lax.map(cross, model.decoder.blocks)
    shape = (*keys.shape[:3], length, *keys.shape[4:])
    return Cache((jnp.zeros(shape, keys.dtype), jnp.zeros(shape, keys.dtype)), (keys, values))


def decode_step(
    model: SwitchTransformer,
    token_B: jax.Array,
    position: jax.Array,
    cache: Cache,
    source_mask_BxS: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] float32 behind the token at `position`, and the cache with it."""
    stack, length = model.decoder, cache.own[0].shape[3]
    position_T = jnp.arange(length)
    bias_Hx1xT = stack.relative_bias(position[None], position_T)
    mask_1x1xT = (position_T <= position)[None, None]
    cross_mask_Bx1xS = source_mask_BxS[:, None]
    plan = Plan(rows=token_B.shape[0], factor=None)
    token_mask_Bx1 = jnp.ones((token_B.shape[0], 1), bool)

    def body(x, block_and_cache):
        block, own, cross = block_and_cache
        fresh = []
        for i in range(layers_per_block(model.config)):
            layer = block.layers[i]
            kv = tuple(
                jax.lax.dynamic_update_slice_in_dim(old[i], new, position, axis=1)
                for old, new in zip(own, layer.self_keys_values(x))
            )
            fresh.append(kv)
            x = layer.attend(x, kv, mask_1x1xT, bias_Hx1xT, None)
            x = layer.attend_encoder(x, (cross[0][i], cross[1][i]), cross_mask_Bx1xS, None)
            x, _ = layer.feed_forward(x, token_mask_Bx1, plan, None)
        return x, jax.tree.map(lambda *arrays: jnp.stack(arrays), *fresh)

    x = model.embed(token_B[:, None])
    x, own = jax.lax.scan(body, x, (stack.blocks, cache.own, cache.cross))
    return model.logits(stack.final_norm(x))[:, 0], Cache(own, cache.cross)


def fill_blanks(
    model: SwitchTransformer, vocabulary: Vocabulary, text: str, *, max_length: int = 128
) -> str:
    """`text` with its blanks filled: `___`, or sentinels such as `<extra_id_0>`, in order.

    A blank that the model says nothing about stays `___`.
    """
    numbers = itertools.count()
    text = re.sub(r"_{3,}", lambda _: f"<extra_id_{next(numbers)}>", text)
    if next(numbers) > NUM_SENTINELS:
        raise UserError(f"A text has more than {NUM_SENTINELS} blanks; split it.")
    tokens = [*vocabulary.encode(text), EOS]
    # Padded, so that texts of different lengths share a compiled program.
    source = jnp.array([tokens + [0] * (-len(tokens) % 64)], jnp.int32)
    output = np.asarray(generate(model, source, max_length=max_length))[0]
    pieces = re.split(r"<extra_id_(\d+)>", vocabulary.decode([int(t) for t in output if t > EOS]))
    answers = dict(zip(pieces[1::2], pieces[2::2]))

    def fill(blank: re.Match) -> str:
        return answers.get(blank[1], "").strip() or "___"

    return re.sub(r"<extra_id_(\d+)>", fill, text)
