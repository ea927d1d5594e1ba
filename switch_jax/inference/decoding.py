"""Searching for sequences, token by token: greedily, by drawing, or with beams.

Pure functions over whatever gives the logits of the next token; no model, no vocabulary. Axis
letters: B inputs · N sequences that are scored at once, those of an input side by side · K beams
or results of an input · L positions · V vocabulary · X anything.
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

# What was computed for the tokens so far, such as keys and values: arrays that have the N
# sequences along the same axis.
State = Any

# Tokens [N] int32 and their position → float32 logits [N, V] of what comes behind. The first
# token is 0, at position 0.
Step = Callable[[jax.Array, jax.Array, State], tuple[jax.Array, State]]

# Logits [N, V] of what comes behind a position → tokens [N] int32.
Choose = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How sequences are searched for; raises `UserError` for what makes no sense.

    beam_size: sequences that are followed at once; 1 is greedy.
    length_penalty: alpha of `penalty`; 0 prefers short sequences.
    num_return: results of an input: the best of the beams, or so many draws.
    temperature: 0 takes the best token; above, tokens are drawn.
    top_k: draws only among so many of the best; 0: among all.
    top_p: draws only among the fewest of the best that have this probability together.
    seed: of the draws.
    """

    beam_size: int = 1
    length_penalty: float = 0.6
    num_return: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        drawn = self.temperature > 0
        for wrong, sentence in (
            (self.beam_size < 1, f"beam_size={self.beam_size} is not at least 1"),
            (self.num_return < 1, f"num_return={self.num_return} is not at least 1"),
            (not 0 <= self.length_penalty < math.inf, "length_penalty must be 0 or more"),
            (not 0 <= self.temperature < math.inf, "temperature must be 0 or more"),
            (self.top_k < 0, f"top_k={self.top_k} is negative; 0 stands for all tokens"),
            (not 0 < self.top_p <= 1, f"top_p={self.top_p} is not above 0 and at most 1"),
            (not 0 <= self.seed < 2**32, f"seed={self.seed} is not within 0 … 2^32 - 1"),
            (
                drawn and self.beam_size > 1,
                f"temperature={self.temperature} draws tokens and beam_size={self.beam_size} does"
                " not; set one of them only",
            ),
            (
                not drawn and (self.top_k > 0 or self.top_p < 1),
                "top_k and top_p are for drawing tokens; set temperature above 0",
            ),
            (
                not drawn and self.num_return > self.beam_size,
                f"num_return={self.num_return} is more than beam_size={self.beam_size} finds; make"
                " beam_size larger, or set temperature above 0",
            ),
        ):
            if wrong:
                raise UserError(f"{sentence}.")


class Sequences(NamedTuple):
    """Results of a search, the best first.

    token_BxKxL: int32, up to and with the end token, then 0.
    score_BxK: float32, log probability; of beams divided by `penalty`. -inf: there is none.
    """

    token_BxKxL: jax.Array
    score_BxK: jax.Array


def greedy_choice(logits_NxV: jax.Array, position: jax.Array) -> jax.Array:
    """The best token, the first of equals."""
    del position
    return logits_NxV.argmax(-1).astype(jnp.int32)


class Sampler(NamedTuple):
    """How tokens are drawn, by keys that a sequence shares with no other.

    key_N: random keys; a position is folded in, so that draws depend on nothing else.
    temperature: the logits are divided by it.
    top_k: only so many of the best tokens are drawn; None: all.
    top_p: only the fewest of the best that have this probability together; None: all.
    """

    key_N: jax.Array
    temperature: jax.Array | float
    top_k: jax.Array | int | None = None
    top_p: jax.Array | float | None = None

    def choose(self, logits_NxV: jax.Array, position: jax.Array) -> jax.Array:
        """Tokens [N] int32, drawn for the place behind `position`."""
        key_N = jax.vmap(jax.random.fold_in, (0, None))(self.key_N, position)
        draw = jax.vmap(jax.random.categorical)
        logits_NxV = logits_NxV / self.temperature
        if self.top_k is None and self.top_p is None:
            return draw(key_N, logits_NxV).astype(jnp.int32)
        # Among sorted ones, where "the best" are those in front, also of equals.
        order_NxV = jnp.argsort(-logits_NxV, axis=-1, stable=True)
        sorted_NxV = jnp.take_along_axis(logits_NxV, order_NxV, -1)
        if self.top_k is not None:
            beyond_V = jnp.arange(logits_NxV.shape[1]) >= self.top_k
            sorted_NxV = jnp.where(beyond_V, -jnp.inf, sorted_NxV)
        if self.top_p is not None:
            probs_NxV = jax.nn.softmax(sorted_NxV)
            before_NxV = jnp.cumsum(probs_NxV, -1) - probs_NxV
            sorted_NxV = jnp.where(before_NxV < self.top_p, sorted_NxV, -jnp.inf)
        drawn_N = draw(key_N, sorted_NxV)
        token_N = jnp.take_along_axis(order_NxV, drawn_N[:, None], -1)[:, 0]
        return token_N.astype(jnp.int32)


def decode_loop(
    step: Step, state: State, choose: Choose, num_sequences: int, length: int, end: int
) -> tuple[jax.Array, jax.Array]:
    """Takes one token after the other until every sequence has ended.

    Args:
      step: see `Step`.
      state: the one before the first token.
      choose: `greedy`, or `choose` of a `Drawing`.
      num_sequences: N.
      length: tokens at the most.
      end: the token that ends a sequence.

    Returns tokens [N, length] int32, zeros behind the end, and log probabilities [N] float32.
    """

    def unfinished(carry):
        position, _, _, _, done_N, _ = carry
        return (position < length) & ~done_N.all()

    def advance(carry):
        position, token_N, token_NxL, score_N, done_N, state = carry
        logits_NxV, state = step(token_N, position, state)
        token_N = jnp.where(done_N, 0, choose(logits_NxV, position))
        score_NxV = jax.nn.log_softmax(logits_NxV)
        score_N += jnp.where(
            done_N, 0, jnp.take_along_axis(score_NxV, token_N[:, None], axis=-1)[:, 0]
        )
        token_NxL = token_NxL.at[:, position].set(token_N)
        return position + 1, token_N, token_NxL, score_N, done_N | (token_N == end), state

    N = num_sequences
    zeros_N = jnp.zeros(N, jnp.int32)
    start = (jnp.zeros((N, length), jnp.int32), jnp.zeros(N), jnp.zeros(N, bool), state)
    _, _, token_NxL, score_N, _, _ = jax.lax.while_loop(
        unfinished, advance, (jnp.int32(0), zeros_N, *start)
    )
    return token_NxL, score_N


def length_penalty(length: jax.Array | int, alpha: jax.Array | float) -> jax.Array | float:
    """((5 + length) / 6)^alpha, by which the log probability of so many tokens is divided.

    Wu et al. (2016), eq. 14, as in T5X, where the end token counts.
    """
    return ((5.0 + length) / 6.0) ** alpha


class _Beams(NamedTuple):
    position: jax.Array
    token_BxKxL: jax.Array  # of the live
    score_BxK: jax.Array  # log probability of the live, best first; -inf: there is none
    ended: Sequences
    state: State


def beam_search(
    step: Step,
    state: State,
    axis: int,
    num_inputs: int,
    num_beams: int,
    length: int,
    end: int,
    alpha: jax.Array | float,
) -> Sequences:
    """Beam search with T5X's rules.

    Each of the K live sequences is continued by every token. Of the 2K best continuations, those
    that end compete for the K places of ended ones, and the best K of the others live on. An input
    is finished when the most that a live sequence can still reach, its log probability over the
    penalty of `length`, is no more than the worst of K ended ones has.

    Args:
      step: see `Step`, with N = B·K.
      state: the one before the first token.
      axis: where the arrays of `state` have the sequences.
      num_inputs: B.
      num_beams: K.
      length: tokens at the most.
      end: the token that ends a sequence.
      alpha: exponent of `penalty`, not negative.

    Returns all K results: those that ended by score, then those that found no end by score. (T5X
    has the latter only where nothing ended.)
    """
    B, K = num_inputs, num_beams

    def unfinished(now: _Beams):
        reach_B = now.score_BxK[:, 0] / length_penalty(length, alpha)
        return (now.position < length) & (now.ended.score_BxK[:, -1] < reach_B).any()

    def advance(now: _Beams):
        position, ended = now.position, now.ended
        live_token_BxK = jax.lax.dynamic_index_in_dim(
            now.token_BxKxL, jnp.maximum(position - 1, 0), 2, keepdims=False
        )
        logits_NxV, state = step(live_token_BxK.reshape(-1), position, now.state)
        V = logits_NxV.shape[1]
        score_BxKxV = jax.nn.log_softmax(logits_NxV).reshape(B, K, V)
        score_BxKxV += now.score_BxK[:, :, None]
        score_Bx2K, index_Bx2K = _top(score_BxKxV.reshape(B, K * V), 2 * K)
        parent_Bx2K, last_Bx2K = jnp.divmod(index_Bx2K, V)
        token_Bx2KxL = _take(now.token_BxKxL, parent_Bx2K).at[:, :, position].set(last_Bx2K)
        ends_Bx2K = last_Bx2K == end

        ended_Bx2K = jnp.where(
            ends_Bx2K, score_Bx2K / length_penalty(position + 1, alpha), -jnp.inf
        )
        score_Bx3K = jnp.concatenate([ended.score_BxK, ended_Bx2K], 1)
        token_Bx3KxL = jnp.concatenate([ended.token_BxKxL, token_Bx2KxL], 1)
        score_BxK, place_BxK = _top(score_Bx3K, K)
        ended = Sequences(_take(token_Bx3KxL, place_BxK), score_BxK)

        score_BxK, place_BxK = _top(jnp.where(ends_Bx2K, -jnp.inf, score_Bx2K), K)
        parent_BxK = _take(parent_Bx2K, place_BxK)
        state = jax.tree.map(lambda x: _take_sequences(x, parent_BxK, axis), state)
        return _Beams(position + 1, _take(token_Bx2KxL, place_BxK), score_BxK, ended, state)

    zeros = jnp.zeros((B, K, length), jnp.int32)
    nothing = Sequences(zeros, jnp.full((B, K), -jnp.inf))
    # One live sequence at first: of K equal ones, every continuation would be found K times.
    start = _Beams(jnp.int32(0), zeros, nothing.score_BxK.at[:, 0].set(0), nothing, state)
    last = jax.lax.while_loop(unfinished, advance, start)
    # Where fewer than K have ended, the search went on to the last position.
    live_score_BxK = last.score_BxK / length_penalty(length, alpha)
    score_Bx2K = jnp.concatenate([last.ended.score_BxK, live_score_BxK], 1)
    token_Bx2KxL = jnp.concatenate([last.ended.token_BxKxL, last.token_BxKxL], 1)
    rank_Bx2K = jnp.where(score_Bx2K == -jnp.inf, 2, jnp.arange(2 * K) >= K)
    place_BxK = jnp.argsort(rank_Bx2K, axis=1, stable=True)[:, :K]
    score_BxK = _take(score_Bx2K, place_BxK)
    exists_BxKx1 = (score_BxK > -jnp.inf)[:, :, None]
    return Sequences(jnp.where(exists_BxKx1, _take(token_Bx2KxL, place_BxK), 0), score_BxK)


def _top(score_BxX: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best of each row and where they are, best first, the first of equals first.

    Left to itself, XLA computes them on every device for the rows of all.
    """
    rows = partition_spec(("batch", None))
    return shard_map(partial(_top_k, k=k), in_specs=rows, out_specs=(rows, rows))(score_BxX)


def _top_k(score_BxX: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    value, index = jax.lax.top_k(score_BxX, k)
    return value, index


def _take(x_BxXxY: jax.Array, index_BxK: jax.Array) -> jax.Array:
    """[B, K, ..]: the entries of each row that are named."""
    return jax.vmap(lambda x, index: x[index])(x_BxXxY, index_BxK)


def _take_sequences(x: jax.Array, parent_BxK: jax.Array, axis: int) -> jax.Array:
    """`x` with, in place of each of an input's K sequences along `axis`, the one that is named."""
    split = x.reshape(*x.shape[:axis], *parent_BxK.shape, *x.shape[axis + 1 :])
    index = parent_BxK.reshape(*[1] * axis, *parent_BxK.shape, *[1] * (x.ndim - axis - 1))
    return jnp.take_along_axis(split, index, axis + 1).reshape(x.shape)
