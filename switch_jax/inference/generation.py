"""Generation: tokens for each input, by greedy decoding, beam search or sampling, with a KV cache.

Axis letters: B inputs · N sequences, those of an input side by side · K results of an input · S
encoder positions · L decoder positions · D d_model · V vocabulary.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from switch_jax.config import Config
from switch_jax.distributed import constrain, device_memory_bytes, no_mesh, num_batch_shards
from switch_jax.errors import UserError
from switch_jax.inference.decoding import (
    DecodeStep,
    Sampler,
    SamplingOptions,
    Sequences,
    SpecialIds,
    beam_search,
    decode_loop,
    force_prefix,
    greedy_choice,
)
from switch_jax.inference.kv_cache import (
    CACHE_SEQUENCE_AXIS,
    KeysValues,
    KVCache,
    decode_one_token,
    init_cache,
)
from switch_jax.model import FLOAT32_KINDS, SwitchTransformer, cast_weights, check_token_ids


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
    """Generates tokens for each input by greedy decoding, beam search or sampling.

    Args:
      model: as from `switch_jax.load`; on a mesh with that mesh in context (`jax.set_mesh`).
      encoder_input_tokens: [B, S] int32, `model.pad_id` is padding.
      max_length: maximum number of tokens to generate.

    The other arguments are those of `SamplingOptions`.

    Returns [B, max_length] int32, tokens up to and including EOS, then padding; with `num_return`
    above 1 [B, num_return, max_length], the best beam first. The result for an input does not
    depend on the other inputs or on its padding. `generate_with_scores` also returns scores.

    Raises `UserError` for options that are out of range or exclude each other, and for ids outside
    the vocabulary; not for ids where the call is traced, as in `jax.jit`: they are not known there.
    """
    options = SamplingOptions(
        beam_size, length_penalty, num_return, temperature, top_k, top_p, seed
    )
    sequences = generate_with_scores(model, encoder_input_tokens, max_length, options)
    return sequences.token_BxKxL[:, 0] if num_return == 1 else sequences.token_BxKxL


def generate_with_scores(
    model: SwitchTransformer,
    encoder_input_tokens: jax.typing.ArrayLike,
    max_length: int,
    options: SamplingOptions,
    *,
    row_numbers: Sequence[int] | np.ndarray | None = None,
    prefix_tokens: np.ndarray | None = None,
) -> Sequences:
    """Generates as `generate`; returns tokens [B, num_return, max_length], scores [B, num_return].

    Scores are log probabilities of the tokens behind the prefix; those of beam search are divided
    by `length_penalty`.

    A sampled token depends only on the model, its input, its prefix and (seed, row number, result
    number, position). Expert layers drop no tokens, except in encoders with expert-choice routing
    or `moe.expert_capacity`.

    Args:
      model, encoder_input_tokens, max_length, options: see `generate`.
      row_numbers: B numbers, for sampling; None: 0 to B-1.
      prefix_tokens: [B, P] int32, with which the results begin, P at most `max_length`; padding
        behind each prefix.
    """
    check_token_ids("encoder_input_tokens", encoder_input_tokens, model.config.model.vocab_size)
    source_BxS = jnp.asarray(encoder_input_tokens, jnp.int32)
    if source_BxS.ndim != 2:
        raise UserError(f"encoder_input_tokens is {source_BxS.shape}; make it [rows, tokens].")
    if max_length < 1:
        raise UserError(f"max_length={max_length} is not at least 1.")
    num_sequences = len(source_BxS) * max(options.beam_size, options.num_return)
    _check_cache_bytes(model.config, num_sequences, max_length)
    shards = 1 if no_mesh() else num_batch_shards(jax.sharding.get_abstract_mesh())
    if len(source_BxS) % shards:
        raise UserError(
            f"{len(source_BxS)} rows of inputs do not divide over the mesh's {shards} parts of a"
            " batch; fill them up with rows that are left out of the result."
        )
    prefix_BxP = None
    if prefix_tokens is not None and prefix_tokens.shape[1]:
        check_token_ids("prefix_tokens", prefix_tokens, model.config.model.vocab_size)
        prefix_BxP = jnp.asarray(prefix_tokens, jnp.int32)
    if options.temperature == 0:
        sequences = _greedy_or_beam_search(
            model, source_BxS, prefix_BxP, options.length_penalty, max_length, options.beam_size
        )
        return Sequences(*(x[:, : options.num_return] for x in sequences))
    return _sample(
        model,
        source_BxS,
        prefix_BxP,
        jax.random.key(options.seed),
        jnp.arange(len(source_BxS)) if row_numbers is None else jnp.asarray(row_numbers),
        options.temperature,
        options.top_k or None,
        options.top_p if options.top_p < 1 else None,
        max_length,
        options.num_return,
    )


def _check_cache_bytes(config: Config, num_sequences: int, max_length: int) -> None:
    """Raises `UserError` where all devices together cannot hold the cache of the sequences."""
    model = config.model
    token_bytes = 2 * model.num_decoder_layers * model.num_heads * model.head_dim
    token_bytes *= jnp.dtype(model.dtype).itemsize
    size = num_sequences * max_length * token_bytes
    memory = device_memory_bytes(jax.local_devices())
    if memory is not None and size > memory * jax.device_count():
        available = memory * jax.device_count()
        raise UserError(
            f"{num_sequences:,} sequences of max_length={max_length:,} take {size / 2**30:,.0f} GiB"
            f" and the devices have {available / 2**30:,.0f}; lower max_length or beam_size, or"
            " generate for fewer inputs at once."
        )


@partial(jax.jit, static_argnames=("max_length", "num_beams"))
def _greedy_or_beam_search(
    model: SwitchTransformer,
    source_BxS: jax.Array,
    prefix_BxP: jax.Array | None,
    alpha: float,
    max_length: int,
    num_beams: int,
) -> Sequences:
    B, special = len(source_BxS), _special_ids(model)
    step, cache = _first_step(model, source_BxS, prefix_BxP, max_length, num_beams)
    if num_beams == 1:
        tokens_and_scores = decode_loop(step, cache, greedy_choice, B, max_length, special)
        return Sequences(*(x[:, None] for x in tokens_and_scores))
    return beam_search(step, cache, CACHE_SEQUENCE_AXIS, B, num_beams, max_length, special, alpha)


@partial(jax.jit, static_argnames=("max_length", "num_samples"))
def _sample(
    model: SwitchTransformer,
    source_BxS: jax.Array,
    prefix_BxP: jax.Array | None,
    key: jax.Array,
    row_B: jax.Array,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    max_length: int,
    num_samples: int,
) -> Sequences:
    B = len(source_BxS)

    def row_keys(row):
        row_key = jax.random.fold_in(key, row)
        return jax.vmap(jax.random.fold_in, (None, 0))(row_key, jnp.arange(num_samples))

    sampler = Sampler(jax.vmap(row_keys)(row_B).reshape(-1), temperature, top_k, top_p)
    step, cache = _first_step(model, source_BxS, prefix_BxP, max_length, num_samples)
    tokens_and_scores = decode_loop(
        step, cache, sampler.sample, B * num_samples, max_length, _special_ids(model)
    )
    return Sequences(*(x.reshape(B, num_samples, *x.shape[1:]) for x in tokens_and_scores))


def _first_step(
    model: SwitchTransformer,
    source_BxS: jax.Array,
    prefix_BxP: jax.Array | None,
    max_length: int,
    num_sequences: int,
) -> tuple[DecodeStep, list[KeysValues]]:
    """Encodes the inputs; returns the decode step, and the cache before the first token."""
    encoded = encode_inputs(model, source_BxS)
    step, cache = make_decode_step(model, *encoded, max_length, num_sequences)
    if prefix_BxP is not None:
        prefix_NxP = jnp.repeat(prefix_BxP, num_sequences, 0)
        step = force_prefix(step, prefix_NxP, model.config.model.pad_id)
    return step, cache


def _special_ids(model: SwitchTransformer) -> SpecialIds:
    ids = model.config.model
    return SpecialIds(ids.start_id, ids.eos_id, ids.pad_id)


def encode_inputs(model: SwitchTransformer, source_BxS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns encoder states [B, S, D] in the activation dtype, and the mask [B, S] of inputs."""
    mask_BxS = source_BxS != model.config.model.pad_id
    moe = model.config.moe
    # Other encoders, and all decoders, are dropless here. These two have a capacity that is part
    # of the model: an expert chooses, or takes, a fixed number of tokens of a sequence.
    capacity_is_fixed = moe.router == "expert_choice" or moe.expert_capacity is not None
    factor = moe.eval_capacity_factor if capacity_is_fixed else None
    # A group is one row, so that it does not depend on the batch.
    encoded_BxSxD, _ = model.encode(source_BxS, mask_BxS.astype(jnp.int32), factor, batch_size=1)
    return encoded_BxSxD, mask_BxS


def make_decode_step(
    model: SwitchTransformer,
    encoded_BxSxD: jax.Array,
    mask_BxS: jax.Array,
    length: int,
    num_sequences: int,
) -> tuple[DecodeStep, list[KeysValues]]:
    """Returns the decode step of a model, and the self-attention cache before the first token.

    Args:
      model: its decoder is used.
      encoded_BxSxD: states of the inputs, from `encode_inputs`.
      mask_BxS: which of them are real tokens, from `encode_inputs`.
      length: maximum number of tokens of a sequence.
      num_sequences: sequences of each input, side by side along `CACHE_SEQUENCE_AXIS`.
    """
    cache = init_cache(model, encoded_BxSxD, length, num_sequences)
    # Once, and not at every token; of the experts a token uses only few.
    model = cast_weights(model, model.config.model.dtype, {*FLOAT32_KINDS, "expert"})

    def step(token_N, position, self_attention):
        logits_NxV, new_cache = decode_one_token(
            model, token_N, position, KVCache(self_attention, cache.cross_attention), mask_BxS
        )
        return constrain(logits_NxV, "batch", None), new_cache.self_attention

    return step, cache.self_attention
