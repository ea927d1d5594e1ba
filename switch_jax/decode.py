"""Decoding: the search of `search.py` with a model whose keys and values are kept.

Axis letters: as in `search.py`, and T positions of the decoder, S of the encoder, D d_model.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switch_jax import dropless, search
from switch_jax.data.spans import EOS
from switch_jax.data.vocabulary import NUM_SENTINELS, Vocabulary
from switch_jax.errors import UserError
from switch_jax.model import SwitchTransformer
from switch_jax.router import Decision, Plan, Router
from switch_jax.schema import Config
from switch_jax.search import Options, Sequences
from switch_jax.sharding import alone, constrain, num_batch_shards

# Keys and values of a run's blocks, [blocks, layers of a block, rows, positions, H, K].
Pairs = tuple[jax.Array, jax.Array]

BATCH = 32  # texts that are decoded at once


class Cache(NamedTuple):
    """Keys and values of a decoder, by run of blocks.

    own: [.., N, T, H, K] of the positions decoded so far, zeros behind them.
    cross: [.., B, S, H, K] of the encoded inputs, which the sequences of an input share.
    """

    own: list[Pairs]
    cross: list[Pairs]


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
    options = Options(beam_size, length_penalty, num_return, temperature, top_k, top_p, seed)
    token_BxKxL = find(model, encoder_input_tokens, max_length, options).token_BxKxL
    return token_BxKxL[:, 0] if num_return == 1 else token_BxKxL


def find(
    model: SwitchTransformer,
    encoder_input_tokens: jax.typing.ArrayLike,
    max_length: int,
    options: Options,
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
    shards = 1 if alone() else num_batch_shards(jax.sharding.get_abstract_mesh())
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
    step, own = bind(model, *encode(model, source_BxS), max_length, num_beams)
    if num_beams == 1:
        found = search.walk(step, own, search.greedy, len(source_BxS), max_length, EOS)
        return Sequences(*(x[:, None] for x in found))
    return search.beams(step, own, 2, len(source_BxS), num_beams, max_length, EOS, alpha)


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
    drawing = search.Drawing(key_N, temperature, top_k, top_p)
    step, own = bind(model, *encode(model, source_BxS), max_length, num_draws)
    found = search.walk(step, own, drawing.choose, B * num_draws, max_length, EOS)
    return Sequences(*(x.reshape(B, num_draws, *x.shape[1:]) for x in found))


def encode(model: SwitchTransformer, source_BxS: jax.Array) -> tuple[jax.Array, jax.Array]:
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


def bind(
    model: SwitchTransformer,
    encoded_BxSxD: jax.Array,
    mask_BxS: jax.Array,
    length: int,
    num_sequences: int,
) -> tuple[search.Step, list[Pairs]]:
    """What `search` needs of a model: the step, and the state before the first token.

    Args:
      model: whose decoder it is.
      encoded_BxSxD, mask_BxS: as from `encode`.
      length: tokens of a sequence at the most.
      num_sequences: of each input, side by side; they are along axis 2 of the state.
    """
    cache = start_cache(model, encoded_BxSxD, length, num_sequences)
    model = cast(model, experts=False)

    def step(token_N, position, own):
        logits_NxV, (own, _) = decode_step(
            model, token_N, position, Cache(own, cache.cross), mask_BxS
        )
        return constrain(logits_NxV, "batch", None), own

    return step, cache.own


def start_cache(
    model: SwitchTransformer, encoded_BxSxD: jax.Array, length: int, num_sequences: int = 1
) -> Cache:
    """A cache for `length` positions of so many sequences behind each encoded input."""

    def cross(block):
        pairs = [layer.cross_attention.keys_values(encoded_BxSxD) for layer in block.layers]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *pairs)

    cache = Cache([], [])
    for blocks in model.decoder.runs:
        keys, values = jax.lax.map(cross, blocks)
        shape = (*keys.shape[:2], num_sequences * keys.shape[2], length, *keys.shape[4:])
        zeros = constrain(jnp.zeros(shape, keys.dtype), None, None, "batch", None, "heads", None)
        cache.own.append((zeros, zeros))
        cache.cross.append((keys, values))
    return cache


def decode_step(
    model: SwitchTransformer,
    token_N: jax.Array,
    position: jax.Array,
    cache: Cache,
    source_mask_BxS: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Logits [N, V] float32 behind the tokens at `position`, and the cache with them.

    The N sequences may be several of each input, side by side.
    """
    stack, length = model.decoder, cache.own[0][0].shape[3]
    N, B = token_N.shape[0], source_mask_BxS.shape[0]
    position_T = jnp.arange(length)
    bias_Hx1xT = stack.relative_bias(position[None], position_T)
    mask_1x1xT = (position_T <= position)[None, None]
    cross_mask_Bx1xS = source_mask_BxS[:, None]
    token_Nx1 = token_N[:, None]
    plan = Plan(token_Nx1, jnp.ones(token_Nx1.shape, bool), rows=1, factor=None)
    pool = _few_experts_of_many(model.config, dropless.at_least(N))

    def body(x_and_own, number_and_block, run):
        (x_Nx1xD, own), (number, cut, cross) = x_and_own, number_and_block
        for i, layer in enumerate(run.block(number, cut).layers):
            (query, offered), _ = layer.project(x_Nx1xD, plan, None)
            # Written in place, into what the loop over tokens carries.
            own = tuple(
                jax.lax.dynamic_update_slice(old, new[None, None], (number, i, 0, position, 0, 0))
                for old, new in zip(own, offered)
            )
            kv = tuple(x[number, i] for x in own)
            x_Nx1xD = layer.attend(x_Nx1xD, query, kv, mask_1x1xT, bias_Hx1xT, None)
            # The sequences of an input are queries to the same keys.
            x_BxKxD = x_Nx1xD.reshape(B, N // B, -1)
            kv = (cross[0][i], cross[1][i])
            x_BxKxD = layer.attend_encoder(x_BxKxD, kv, cross_mask_Bx1xS, None)
            x_Nx1xD, _ = layer.feed_forward(x_BxKxD.reshape(N, 1, -1), plan, None)
        return (x_Nx1xD, own), None

    x_Nx1xD, own_by_run = model.embed(token_Nx1), []
    for blocks, own, cross in zip(stack.runs, cache.own, cache.cross):
        run = _Run(blocks, pool)
        numbered = (jnp.arange(len(own[0])), run.cut, cross)
        (x_Nx1xD, own), _ = jax.lax.scan(partial(body, run=run), (x_Nx1xD, own), numbered)
        own_by_run.append(own)
    return model.logits(stack.final_norm(x_Nx1xD))[:, 0], Cache(own_by_run, cache.cross)


class _Run:
    """The blocks of a run, for a scan that does not copy the experts of every block.

    A loop over the experts that are used, inside a scan over blocks, would be given all experts of
    a block as a copy. With `pool`, all experts of the run are one pool, which the scan leaves where
    it is, and a block's router names them by their place in the pool; else they are cut like all
    the other parameters.
    """

    def __init__(self, blocks: Any, pool: bool):
        paths_and_leaves, self._structure = jax.tree.flatten_with_path(blocks)
        pooled = [pool and "experts" in _names(path) for path, _ in paths_and_leaves]
        leaves = [leaf for _, leaf in paths_and_leaves]
        self.cut = [None if p else leaf for p, leaf in zip(pooled, leaves)]
        self._pool = [
            leaf.reshape(-1, *leaf.shape[2:]) if p else None for p, leaf in zip(pooled, leaves)
        ]
        self._blocks = len(leaves[0])

    def block(self, number: jax.Array, cut: list) -> Any:
        """A block of the run, with what a scan over `cut` gives of it."""
        leaves = [c if p is None else p for c, p in zip(cut, self._pool)]
        block = jax.tree.unflatten(self._structure, leaves)
        for layer in block.layers if any(p is not None for p in self._pool) else ():
            for part in (layer.self_attention, layer.mlp):
                if hasattr(part, "router"):
                    part.router = _PoolRouter(part.router, number, self._blocks)
        return block


def _few_experts_of_many(config: Config, num_sequences: int) -> bool:
    """Whether a step reads few of the experts that a device has all of, in every layer."""
    moe, parts = config.moe, 1
    if not alone():
        mesh = jax.sharding.get_abstract_mesh()
        parts = num_batch_shards(mesh)
        # In a pool, experts of a block are no longer a piece that devices can share or gather.
        if mesh.shape["expert"] > 1 or (config.mesh.fsdp and mesh.shape["data"] > 1):
            return False
    # Up to there, blocks of rows are as small as they can be, with or without a pool.
    return num_sequences // parts * moe.places <= dropless.SMALLEST * moe.num_experts


class _PoolRouter(Router):
    """The router of a block whose experts are in the pool of a run."""

    def __init__(self, router: Router, number: jax.Array, blocks: int):
        self.config, self.kernel, self.bias = router.config, router.kernel, router.bias
        self.number, self.blocks = number, blocks

    def __call__(self, x_BxLxD: jax.Array, plan: Plan, keys: Any) -> Decision:
        decision = super().__call__(x_BxLxD, plan, keys)
        E, expert = self.config.num_experts, decision.assignment.expert_SxK
        expert = jnp.where(expert < E, expert + E * self.number, E * self.blocks)
        return decision._replace(assignment=decision.assignment._replace(expert_SxK=expert))


def cast(model: SwitchTransformer, *, experts: bool) -> SwitchTransformer:
    """The same weights in the activation dtype, once instead of at every token.

    Not those that are used in another; `experts` too, of which few are used at a time?
    """
    dtype = model.config.model.dtype

    def one(path, leaf):
        names = _names(path)
        kept = any("norm" in name or name in ("router", "relative_bias") for name in names)
        return leaf if kept or ("experts" in names and not experts) else leaf.astype(dtype)

    return jax.tree.map_with_path(one, model)


def _names(path: tuple) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def complete(
    model: SwitchTransformer,
    vocabulary: Vocabulary,
    texts: Sequence[str],
    *,
    max_length: int = 128,
    options: Options | None = None,
) -> Iterator[str]:
    """Texts with their blanks filled: `___`, or sentinels such as `<extra_id_0>`, in order.

    Of a text without blanks, what the model writes. A blank that it says nothing about stays
    `___`. Of several results, the first counts.
    Raises `UserError` for a text with more blanks than there are sentinels.
    """
    options = Options() if options is None else options
    texts = [_with_sentinels(text) for text in texts]
    tokens = [[*vocabulary.encode(text), EOS] for text in texts]
    for first in range(0, len(texts), BATCH):
        rows = tokens[first : first + BATCH]
        # Filled up, so that few programs are compiled: with zeros to a length that many have,
        # and in the last batch with rows that end when their equals do.
        length = -(-max(map(len, rows)) // 64) * 64
        rows += rows[-1:] * (min(BATCH, len(texts)) - len(rows))
        source = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
        found = find(model, source, max_length, options, first_row=first)
        outputs = np.asarray(found.token_BxKxL[:, 0])
        for text, output in zip(texts[first : first + BATCH], outputs):
            yield _filled(text, vocabulary.decode([int(t) for t in output if t > EOS]))


def _with_sentinels(text: str) -> str:
    """`text` with `___` numbered."""
    numbers = itertools.count()
    text = re.sub(r"_{3,}", lambda _: f"<extra_id_{next(numbers)}>", text)
    if next(numbers) > NUM_SENTINELS:
        raise UserError(f"A text has more than {NUM_SENTINELS} blanks; split it.")
    return text


def _filled(text: str, output: str) -> str:
    """`text` with its sentinels replaced by what follows them in `output`; or that, without any."""
    if not re.search(r"<extra_id_\d+>", text):
        return output.strip()
    pieces = re.split(r"<extra_id_(\d+)>", output)
    answers = dict(zip(pieces[1::2], pieces[2::2]))

    def fill(blank: re.Match) -> str:
        return answers.get(blank[1], "").strip() or "___"

    return re.sub(r"<extra_id_(\d+)>", fill, text)
