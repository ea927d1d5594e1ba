"""Decoding: the search of `search.py` with a model whose keys and values are kept.

Axis letters: as in `search.py`, and T positions of the decoder, S of the encoder, D d_model.
"""

from functools import partial

import jax
import jax.numpy as jnp

from switch_jax.data import EOS
from switch_jax.distributed import constrain, no_mesh, num_batch_shards
from switch_jax.errors import UserError
from switch_jax.inference.decoding import (
    Sampler,
    SamplingOptions,
    Sequences,
    Step,
    beam_search,
    decode_loop,
    greedy_choice,
)
from switch_jax.inference.kv_cache import (
    KVCache,
    Pairs,
    cast_parameters,
    decode_one_token,
    start_cache,
)
from switch_jax.model import SwitchTransformer


def generate(
    model: SwitchTransformer,
    encoder_input_tokens: jax.typing.ArrayLike,
    *,
    max_length: int = 128,
    beam_size: int = 1,
    length_penalty: float = 0.6,
    num_return: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> jax.Array:
    """What a model says to each input: greedily, with beams, or drawn.

    Args:
      model: as from `switch_jax.load`; on a mesh with that mesh in context (`jax.set_mesh`).
      encoder_input_tokens: [B, S] int32, 0 is padding.
      max_length: tokens to generate at the most.
      beam_size, length_penalty, num_return, temperature, top_k, top_p, seed: see `search.Options`.

    Returns [B, max_length] int32, tokens up to and with EOS (1), then 0; with `num_return` above
    1 [B, num_return, max_length], the best beam first. `find` has their scores too. What is
    returned for an input does not depend on the others, draws not on its padding either.

    Raises `UserError` for options that make no sense.
    """
    options = SamplingOptions(
        beam_size, length_penalty, num_return, temperature, top_k, top_p, seed
    )
    token_BxKxL = find_sequences(model, encoder_input_tokens, max_length, options).token_BxKxL
    return token_BxKxL[:, 0] if num_return == 1 else token_BxKxL


def find_sequences(
    model: SwitchTransformer,
    encoder_input_tokens: jax.typing.ArrayLike,
    max_length: int,
    options: SamplingOptions,
    first_row: int = 0,
) -> Sequences:
    """As `generate`, with scores: tokens [B, num_return, max_length] and scores [B, num_return].

    Draws depend on (seed, number of the row, position) alone; `first_row` is the number of the
    first one. An expert layer drops no token; but an encoder's expert choice is as in training, and
    so is `moe.expert_capacity`.
    """
    source_BxS = jnp.asarray(encoder_input_tokens, jnp.int32)
    if source_BxS.ndim != 2:
        raise UserError(f"encoder_input_tokens is {source_BxS.shape}; make it [rows, tokens].")
    if max_length < 1:
        raise UserError(f"max_length={max_length} is not at least 1.")
    shards = 1 if no_mesh() else num_batch_shards(jax.sharding.get_abstract_mesh())
    if len(source_BxS) % shards:
        raise UserError(
            f"{len(source_BxS)} rows of inputs do not divide over the mesh's {shards} parts of a"
            " batch; fill them up with rows that are left out of the result."
        )
    if options.temperature == 0:
        found = _find_best(model, source_BxS, options.length_penalty, max_length, options.beam_size)
        return Sequences(*(x[:, : options.num_return] for x in found))
    return _draw(
        model,
        source_BxS,
        jax.random.key(options.seed),
        first_row,
        options.temperature,
        options.top_k or None,
        options.top_p if options.top_p < 1 else None,
        max_length,
        options.num_return,
    )


@partial(jax.jit, static_argnames=("max_length", "num_beams"))
def _find_best(
    model: SwitchTransformer,
    source_BxS: jax.Array,
    alpha: float,
    max_length: int,
    num_beams: int,
) -> Sequences:
    step, own = bind_decoder(model, *encode_inputs(model, source_BxS), max_length, num_beams)
    if num_beams == 1:
        found = decode_loop(step, own, greedy_choice, len(source_BxS), max_length, EOS)
        return Sequences(*(x[:, None] for x in found))
    return beam_search(step, own, 2, len(source_BxS), num_beams, max_length, EOS, alpha)


@partial(jax.jit, static_argnames=("max_length", "num_draws"))
def _draw(
    model: SwitchTransformer,
    source_BxS: jax.Array,
    key: jax.Array,
    first_row: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    max_length: int,
    num_draws: int,
) -> Sequences:
    B = len(source_BxS)

    def keys(row):
        row_key = jax.random.fold_in(key, row)
        return jax.vmap(jax.random.fold_in, (None, 0))(row_key, jnp.arange(num_draws))

    key_N = jax.vmap(keys)(first_row + jnp.arange(B)).reshape(-1)
    drawing = Sampler(key_N, temperature, top_k, top_p)
    step, own = bind_decoder(model, *encode_inputs(model, source_BxS), max_length, num_draws)
    found = decode_loop(step, own, drawing.choose, B * num_draws, max_length, EOS)
    return Sequences(*(x.reshape(B, num_draws, *x.shape[1:]) for x in found))


def encode_inputs(model: SwitchTransformer, source_BxS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encoder states [B, S, D] of inputs, and where these are [B, S] bool."""
    mask_BxS = source_BxS > 0
    moe = model.config.moe
    # Where capacity is part of the model, it holds here too: an expert chooses so many tokens, or
    # takes so many of a sequence. A decoder's tokens come one by one, and find room.
    lasting = moe.router == "expert_choice" or moe.expert_capacity is not None
    factor = moe.eval_capacity_factor if lasting else None
    # Groups of one row each, so that they are the same whatever the batch is.
    encoded_BxSxD, _ = model.encode(source_BxS, mask_BxS.astype(jnp.int32), factor, batch_size=1)
    return encoded_BxSxD, mask_BxS


def bind_decoder(
    model: SwitchTransformer,
    encoded_BxSxD: jax.Array,
    mask_BxS: jax.Array,
    length: int,
    num_sequences: int,
) -> tuple[Step, list[Pairs]]:
    """What `search` needs of a model: the step, and the state before the first token.

    Args:
      model: whose decoder it is.
      encoded_BxSxD, mask_BxS: as from `encode`.
      length: tokens of a sequence at the most.
      num_sequences: of each input, side by side; they are along axis 2 of the state.
    """
    cache = start_cache(model, encoded_BxSxD, length, num_sequences)
    model = cast_parameters(model, experts=False)

    def step(token_N, position, own):
        logits_NxV, (own, _) = decode_one_token(
            model, token_N, position, KVCache(own, cache.cross), mask_BxS
        )
        return constrain(logits_NxV, "batch", None), own

    return step, cache.own
