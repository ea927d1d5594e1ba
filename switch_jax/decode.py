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
from switch_jax.model import SwitchTransformer
from switch_jax.router import Plan

# Keys and values of a run's blocks, with leading axes [blocks, layers of a block].
Pairs = tuple[jax.Array, jax.Array]


class Cache(NamedTuple):
    """Keys and values of a decoder, by run of blocks.

    own: [.., B, T, H, K] of the positions decoded so far, zeros behind them.
    cross: [.., B, S, H, K] of the encoded input.
    """

    own: list[Pairs]
    cross: list[Pairs]


def generate(
    model: SwitchTransformer, encoder_input_tokens: jax.Array, *, max_length: int = 128
) -> jax.Array:
    """Greedy decoding; no token is dropped by an expert layer (but for expert choice).

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
    moe = model.config.moe
    # Capacity is how many tokens an expert chooses; there, and there alone, it holds here too.
    factor = moe.eval_capacity_factor if moe.router == "expert_choice" else None
    encoded, _ = model.encode(source_BxS, source_mask_BxS.astype(jnp.int32), factor)
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

    cache = Cache([], [])
    for blocks in model.decoder.runs:
        keys, values = jax.lax.map(cross, blocks)
        zeros = jnp.zeros((*keys.shape[:3], length, *keys.shape[4:]), keys.dtype)
        cache.own.append((zeros, zeros))
        cache.cross.append((keys, values))
    return cache


def decode_step(
    model: SwitchTransformer,
    token_B: jax.Array,
    position: jax.Array,
    cache: Cache,
    source_mask_BxS: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] float32 behind the token at `position`, and the cache with it."""
    stack, length = model.decoder, cache.own[0][0].shape[3]
    position_T = jnp.arange(length)
    bias_Hx1xT = stack.relative_bias(position[None], position_T)
    mask_1x1xT = (position_T <= position)[None, None]
    cross_mask_Bx1xS = source_mask_BxS[:, None]
    token_Bx1 = token_B[:, None]
    plan = Plan(token_Bx1, jnp.ones(token_Bx1.shape, bool), rows=len(token_B), factor=None)

    def body(x, block_and_cache):
        block, own, cross = block_and_cache
        fresh = []
        for i, layer in enumerate(block.layers):
            (query, offered), _ = layer.project(x, plan, None)
            kv = tuple(
                jax.lax.dynamic_update_slice_in_dim(old[i], new, position, axis=1)
                for old, new in zip(own, offered)
            )
            fresh.append(kv)
            x = layer.attend(x, query, kv, mask_1x1xT, bias_Hx1xT, None)
            x = layer.attend_encoder(x, (cross[0][i], cross[1][i]), cross_mask_Bx1xS, None)
            x, _ = layer.feed_forward(x, plan, None)
        return x, jax.tree.map(lambda *arrays: jnp.stack(arrays), *fresh)

    x, own_by_run = model.embed(token_Bx1), []
    for blocks, own, cross in zip(stack.runs, cache.own, cache.cross):
        x, own = jax.lax.scan(body, x, (blocks, own, cross))
        own_by_run.append(own)
    return model.logits(stack.final_norm(x))[:, 0], Cache(own_by_run, cache.cross)


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
