"""Greedy decoding, sampling and beam search.

The functions are pure and take a `DecodeStep`, which computes the logits of the next token; they
depend on no model and no vocabulary.

Axis letters: B inputs · N sequences that are decoded at once, those of an input side by side · K
beams or results of an input · L positions · V vocabulary · X, Y any.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from switch_jax.distributed import partition_spec, shard_map
from switch_jax.errors import UserError

# State of the decoded tokens, such as a KV cache: arrays with the N sequences along the same axis.
DecodeState = Any

# (tokens [N] int32, their position, state) → (logits [N, V] float32 of the next token, new state).
# The first token is the start token, at position 0.
DecodeStep = Callable[[jax.Array, jax.Array, DecodeState], tuple[jax.Array, DecodeState]]

# (logits [N, V] of the next token, position of the last token) → next tokens [N] int32.
ChooseToken = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Options of greedy decoding, beam search and sampling.

    Raises `UserError` for values that are out of range or exclude each other.

    beam_size: beams of an input; 1 is greedy decoding.
    length_penalty: alpha of `length_penalty`; 0 prefers short sequences.
    num_return: results of an input: the best beams, or independent samples.
    temperature: of sampling; 0 is greedy decoding or beam search.
    top_k: samples from the `top_k` most probable tokens; 0: from all.
    top_p: nucleus sampling: from the smallest set of tokens with total probability `top_p`.
    seed: of sampling.
    """

    beam_size: int = 1
    length_penalty: float = 0.6
    num_return: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        samples = self.temperature > 0
        for is_wrong, sentence in (
            (self.beam_size < 1, f"beam_size={self.beam_size} is not at least 1"),
            (self.num_return < 1, f"num_return={self.num_return} is not at least 1"),
            (not 0 <= self.length_penalty < math.inf, "length_penalty must be 0 or more"),
            (not 0 <= self.temperature < math.inf, "temperature must be 0 or more"),
            (self.top_k < 0, f"top_k={self.top_k} is negative; 0 stands for all tokens"),
            (not 0 < self.top_p <= 1, f"top_p={self.top_p} is not above 0 and at most 1"),
            (not 0 <= self.seed < 2**32, f"seed={self.seed} is not within 0 … 2^32 - 1"),
            (
                samples and self.beam_size > 1,
                f"temperature={self.temperature} samples tokens and beam_size={self.beam_size} does"
                " not; set one of them only",
            ),
            (
                not samples and (self.top_k > 0 or self.top_p < 1),
                "top_k and top_p are for sampling; set temperature above 0",
            ),
            (
                not samples and self.num_return > self.beam_size,
                f"{self.num_return} results are more than beam_size={self.beam_size} has; make"
                " beam_size larger, or set temperature above 0",
            ),
        ):
            if is_wrong:
                raise UserError(f"{sentence}.")


class SpecialIds(NamedTuple):
    """Ids that begin and end a sequence, and that fill it up behind its end."""

    start: int
    end: int
    pad: int


class Sequences(NamedTuple):
    """Decoded sequences; those of beam search by descending score.

    token_BxKxL: int32, up to and including the end token, then padding.
    score_BxK: float32 log probability of the tokens behind a forced prefix, of beam search divided
      by `length_penalty`; -inf where there is no sequence.
    """

    token_BxKxL: jax.Array
    score_BxK: jax.Array


def greedy_choice(logits_NxV: jax.Array, position: jax.Array) -> jax.Array:
    """Returns the most probable tokens [N] int32, the first of equal ones."""
    del position
    return logits_NxV.argmax(-1).astype(jnp.int32)


class Sampler(NamedTuple):
    """Sampler of tokens: temperature, top-k and nucleus sampling.

    key_N: random keys, one per sequence; the position is folded in, so that a sampled token
      depends on its sequence's key, its position and its logits only.
    temperature: divisor of the logits.
    top_k: sample from the `top_k` most probable tokens; None: from all.
    top_p: sample from the smallest set of tokens with total probability `top_p`; None: from all.
    """

    key_N: jax.Array
    temperature: jax.Array | float
    top_k: jax.Array | int | None = None
    top_p: jax.Array | float | None = None

    def sample(self, logits_NxV: jax.Array, position: jax.Array) -> jax.Array:
        """Returns sampled tokens [N] int32 for the position after `position`."""
        key_N = jax.vmap(jax.random.fold_in, (0, None))(self.key_N, position)
        categorical = jax.vmap(jax.random.categorical)
        logits_NxV = logits_NxV / self.temperature
        if self.top_k is None and self.top_p is None:
            return categorical(key_N, logits_NxV).astype(jnp.int32)
        # A stable sort decides which of equally probable tokens belong to the best.
        order_NxV = jnp.argsort(-logits_NxV, axis=-1, stable=True)
        sorted_NxV = jnp.take_along_axis(logits_NxV, order_NxV, -1)
        if self.top_k is not None:
            beyond_V = jnp.arange(logits_NxV.shape[1]) >= self.top_k
            sorted_NxV = jnp.where(beyond_V, -jnp.inf, sorted_NxV)
        if self.top_p is not None:
            probs_NxV = jax.nn.softmax(sorted_NxV)
            before_NxV = jnp.cumsum(probs_NxV, -1) - probs_NxV
            sorted_NxV = jnp.where(before_NxV < self.top_p, sorted_NxV, -jnp.inf)
        rank_N = categorical(key_N, sorted_NxV)
        token_N = jnp.take_along_axis(order_NxV, rank_N[:, None], -1)[:, 0]
        return token_N.astype(jnp.int32)


def force_prefix(step: DecodeStep, prefix_NxP: jax.Array, pad: int) -> DecodeStep:
    """Returns `step` with every sequence forced to begin with its prefix.

    At the positions of a prefix, its token has log probability 0 and all others have -inf. So every
    method of decoding takes it, and a score is the log probability of the tokens behind the prefix.

    Args:
      step: computes the logits of the next token.
      prefix_NxP: int32 tokens, none of them the end token; padding behind each prefix.
      pad: id of padding.
    """
    P = prefix_NxP.shape[1]

    def forced_step(token_N, position, state):
        logits_NxV, state = step(token_N, position, state)
        prefix_N = prefix_NxP[:, jnp.minimum(position, P - 1)]
        is_forced_N = (position < P) & (prefix_N != pad)
        is_prefix_NxV = prefix_N[:, None] == jnp.arange(logits_NxV.shape[1])
        forced_NxV = jnp.where(is_prefix_NxV, 0.0, -jnp.inf)
        return jnp.where(is_forced_N[:, None], forced_NxV, logits_NxV), state

    return forced_step


def decode_loop(
    step: DecodeStep,
    state: DecodeState,
    choose_token: ChooseToken,
    num_sequences: int,
    length: int,
    special: SpecialIds,
) -> tuple[jax.Array, jax.Array]:
    """Decodes token by token until every sequence has ended.

    Args:
      step: computes the logits of the next token.
      state: state before the first token.
      choose_token: `greedy_choice`, or `sample` of a `Sampler`.
      num_sequences: N.
      length: maximum number of tokens.
      special: start token, end token and padding.

    Returns tokens [N, length] int32, padding after the end token, and log probabilities [N]
    float32.
    """

    def unfinished(carry):
        position, _, _, _, done_N, _ = carry
        return (position < length) & ~done_N.all()

    def advance(carry):
        position, token_N, token_NxL, score_N, done_N, state = carry
        logits_NxV, state = step(token_N, position, state)
        token_N = jnp.where(done_N, special.pad, choose_token(logits_NxV, position))
        score_NxV = jax.nn.log_softmax(logits_NxV)
        score_N += jnp.where(
            done_N, 0, jnp.take_along_axis(score_NxV, token_N[:, None], axis=-1)[:, 0]
        )
        token_NxL = token_NxL.at[:, position].set(token_N)
        return position + 1, token_N, token_NxL, score_N, done_N | (token_N == special.end), state

    N = num_sequences
    token_N = jnp.full(N, special.start, jnp.int32)
    token_NxL = jnp.full((N, length), special.pad, jnp.int32)
    first = (jnp.int32(0), token_N, token_NxL, jnp.zeros(N), jnp.zeros(N, bool), state)
    _, _, token_NxL, score_N, _, _ = jax.lax.while_loop(unfinished, advance, first)
    return token_NxL, score_N


def length_penalty(length: jax.Array | int, alpha: jax.Array | float) -> jax.Array | float:
    """Returns ((5 + length) / 6)^alpha, the divisor of the log probability of `length` tokens.

    Wu et al. (2016), eq. 14. As in T5X, the end token counts; so does a forced prefix.
    """
    return ((5.0 + length) / 6.0) ** alpha


class _BeamState(NamedTuple):
    """State of beam search: K live and K ended sequences of each input."""

    position: jax.Array
    token_BxKxL: jax.Array  # live sequences
    score_BxK: jax.Array  # log probability of live sequences, descending; -inf: no sequence
    ended: Sequences
    state: DecodeState


def beam_search(
    step: DecodeStep,
    state: DecodeState,
    axis: int,
    num_inputs: int,
    num_beams: int,
    length: int,
    special: SpecialIds,
    alpha: jax.Array | float,
) -> Sequences:
    """Runs beam search with T5X's rules.

    Each of the K live sequences is continued by every token. Of the 2K best continuations, the
    ended ones compete with the K best ended sequences so far, and the K best of the rest stay live.
    An input is finished when the highest score that a live sequence can still reach, its log
    probability divided by the penalty of `length`, does not exceed the lowest score of K ended
    sequences.

    Args:
      step: computes the logits of the next token, with N = B·K.
      state: state before the first token.
      axis: axis of the sequences in the arrays of `state`.
      num_inputs: B.
      num_beams: K.
      length: maximum number of tokens.
      special: start token, end token and padding.
      alpha: exponent of `length_penalty`, not negative.

    Returns K sequences per input: the ended ones by score, then the live ones by score. (T5X
    returns live sequences only if no sequence ended.)
    """
    B, K = num_inputs, num_beams

    def unfinished(beams: _BeamState):
        reachable_B = beams.score_BxK[:, 0] / length_penalty(length, alpha)
        return (beams.position < length) & (beams.ended.score_BxK[:, -1] < reachable_B).any()

    def advance(beams: _BeamState):
        position, ended = beams.position, beams.ended
        live_token_BxK = jax.lax.dynamic_index_in_dim(
            beams.token_BxKxL, jnp.maximum(position - 1, 0), 2, keepdims=False
        )
        live_token_BxK = jnp.where(position == 0, special.start, live_token_BxK)
        logits_NxV, state = step(live_token_BxK.reshape(-1), position, beams.state)
        V = logits_NxV.shape[1]
        score_BxKxV = jax.nn.log_softmax(logits_NxV).reshape(B, K, V)
        score_BxKxV += beams.score_BxK[:, :, None]
        score_Bx2K, index_Bx2K = _top_of_rows(score_BxKxV.reshape(B, K * V), 2 * K)
        parent_Bx2K, last_token_Bx2K = jnp.divmod(index_Bx2K, V)
        token_Bx2KxL = (
            _take_per_row(beams.token_BxKxL, parent_Bx2K).at[:, :, position].set(last_token_Bx2K)
        )
        has_ended_Bx2K = last_token_Bx2K == special.end

        ended_score_Bx2K = jnp.where(
            has_ended_Bx2K, score_Bx2K / length_penalty(position + 1, alpha), -jnp.inf
        )
        score_Bx3K = jnp.concatenate([ended.score_BxK, ended_score_Bx2K], 1)
        token_Bx3KxL = jnp.concatenate([ended.token_BxKxL, token_Bx2KxL], 1)
        score_BxK, index_BxK = _top_of_rows(score_Bx3K, K)
        ended = Sequences(_take_per_row(token_Bx3KxL, index_BxK), score_BxK)

        score_BxK, index_BxK = _top_of_rows(jnp.where(has_ended_Bx2K, -jnp.inf, score_Bx2K), K)
        parent_BxK = _take_per_row(parent_Bx2K, index_BxK)
        state = jax.tree.map(lambda x: _select_parents(x, parent_BxK, axis), state)
        return _BeamState(
            position + 1, _take_per_row(token_Bx2KxL, index_BxK), score_BxK, ended, state
        )

    padding = jnp.full((B, K, length), special.pad, jnp.int32)
    no_sequences = Sequences(padding, jnp.full((B, K), -jnp.inf))
    # One live sequence at first: K equal ones would give every continuation K times.
    first = _BeamState(
        jnp.int32(0), padding, no_sequences.score_BxK.at[:, 0].set(0), no_sequences, state
    )
    last = jax.lax.while_loop(unfinished, advance, first)
    # Where fewer than K sequences ended, the loop ran to the last position.
    live_score_BxK = last.score_BxK / length_penalty(length, alpha)
    score_Bx2K = jnp.concatenate([last.ended.score_BxK, live_score_BxK], 1)
    token_Bx2KxL = jnp.concatenate([last.ended.token_BxKxL, last.token_BxKxL], 1)
    rank_Bx2K = jnp.where(score_Bx2K == -jnp.inf, 2, jnp.arange(2 * K) >= K)
    index_BxK = jnp.argsort(rank_Bx2K, axis=1, stable=True)[:, :K]
    score_BxK = _take_per_row(score_Bx2K, index_BxK)
    exists_BxKx1 = (score_BxK > -jnp.inf)[:, :, None]
    token_BxKxL = _take_per_row(token_Bx2KxL, index_BxK)
    return Sequences(jnp.where(exists_BxKx1, token_BxKxL, special.pad), score_BxK)


def _top_of_rows(score_BxX: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns values and indices of the k largest entries of each row, in descending order.

    Of equal entries, the first comes first. The `shard_map` keeps the rows on their devices:
    without it, XLA computes the top k of all rows on every device.
    """
    rows = partition_spec(("batch", None))
    return shard_map(partial(_top_k, k=k), in_specs=rows, out_specs=(rows, rows))(score_BxX)


def _top_k(score_BxX: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    value, index = jax.lax.top_k(score_BxX, k)
    return value, index


def _take_per_row(x_BxXxY: jax.Array, index_BxK: jax.Array) -> jax.Array:
    """[B, K, ..]: entries `index_BxK` of each row."""
    return jax.vmap(lambda x, index: x[index])(x_BxXxY, index_BxK)


def _select_parents(x: jax.Array, parent_BxK: jax.Array, axis: int) -> jax.Array:
    """Returns `x` with the N = B·K sequences along `axis` replaced by their parents."""
    split = x.reshape(*x.shape[:axis], *parent_BxK.shape, *x.shape[axis + 1 :])
    index = parent_BxK.reshape(*[1] * axis, *parent_BxK.shape, *[1] * (x.ndim - axis - 1))
    return jnp.take_along_axis(split, index, axis + 1).reshape(x.shape)
