"""kv_cache: to be written."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from switch_jax.config import Config
from switch_jax.distributed import constrain, no_mesh, num_batch_shards
from switch_jax.model import (
    SMALLEST,
    Router,
    RouterOutput,
    RoutingSpec,
    SwitchTransformer,
    assignments_at_least,
    parameter_metadata,
)

# Keys and values of a run's blocks, [blocks, layers of a block, rows, positions, H, K].
Pairs = tuple[jax.Array, jax.Array]


class KVCache(NamedTuple):
    """Keys and values of a decoder, by run of blocks.

    own: [.., N, T, H, K] of the positions decoded so far, zeros behind them.
    cross: [.., B, S, H, K] of the encoded inputs, which the sequences of an input share.
    """

    own: list[Pairs]
    cross: list[Pairs]


def start_cache(
    model: SwitchTransformer, encoded_BxSxD: jax.Array, length: int, num_sequences: int = 1
) -> KVCache:
    """A cache for `length` positions of so many sequences behind each encoded input."""

    def cross(block):
        pairs = [layer.cross_attention.keys_values(encoded_BxSxD) for layer in block.layers]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *pairs)

    cache = KVCache([], [])
    for blocks in model.decoder.runs:
        keys, values = jax.lax.map(cross, blocks)
        shape = (*keys.shape[:2], num_sequences * keys.shape[2], length, *keys.shape[4:])
        zeros = constrain(jnp.zeros(shape, keys.dtype), None, None, "batch", None, "heads", None)
        cache.own.append((zeros, zeros))
        cache.cross.append((keys, values))
    return cache


def decode_one_token(
    model: SwitchTransformer,
    token_N: jax.Array,
    position: jax.Array,
    cache: KVCache,
    source_mask_BxS: jax.Array,
) -> tuple[jax.Array, KVCache]:
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
    spec = RoutingSpec(
        token_Nx1, jnp.ones(token_Nx1.shape, bool), rows_per_group=1, capacity_factor=None
    )
    pool = _few_experts_of_many(model.config, assignments_at_least(N))

    def body(x_and_own, number_and_block, run):
        (x_Nx1xD, own), (number, cut, cross) = x_and_own, number_and_block
        for i, layer in enumerate(run.block(number, cut).layers):
            (query, offered), _ = layer.project(x_Nx1xD, spec, None)
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
            x_Nx1xD, _ = layer.feed_forward(x_BxKxD.reshape(N, 1, -1), spec, None)
        return (x_Nx1xD, own), None

    x_Nx1xD, own_by_run = model.embed(token_Nx1), []
    for blocks, own, cross in zip(stack.runs, cache.own, cache.cross):
        run = _CachedBlockRun(blocks, pool)
        numbered = (jnp.arange(len(own[0])), run.cut, cross)
        (x_Nx1xD, own), _ = jax.lax.scan(partial(body, run=run), (x_Nx1xD, own), numbered)
        own_by_run.append(own)
    return model.logits(stack.final_norm(x_Nx1xD))[:, 0], KVCache(own_by_run, cache.cross)


class _CachedBlockRun:
    """The blocks of a run, for a scan that does not copy the experts of every block.

    A loop over the experts that are used, inside a scan over blocks, would be given all experts of
    a block as a copy. With `pool`, all experts of the run are one pool, which the scan leaves where
    it is, and a block's router names them by their place in the pool; else they are cut like all
    the other parameters.
    """

    def __init__(self, blocks: Any, pool: bool):
        leaves, self._structure = jax.tree.flatten(blocks)
        pooled = [pool and m.kind == "expert" for m in parameter_metadata(blocks).values()]
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
    if not no_mesh():
        mesh = jax.sharding.get_abstract_mesh()
        parts = num_batch_shards(mesh)
        # In a pool, experts of a block are no longer a piece that devices can share or gather.
        if mesh.shape["expert"] > 1 or (config.mesh.fsdp and mesh.shape["data"] > 1):
            return False
    # Up to there, blocks of rows are as small as they can be, with or without a pool.
    return num_sequences // parts * moe.max_experts_per_token <= SMALLEST * moe.num_experts


class _PoolRouter(Router):
    """The router of a block whose experts are in the pool of a run."""

    def __init__(self, router: Router, number: jax.Array, blocks: int):
        self.config, self.kernel, self.bias = router.config, router.kernel, router.bias
        self.number, self.blocks = number, blocks

    def __call__(self, x_BxLxD: jax.Array, spec: RoutingSpec, keys: Any) -> RouterOutput:
        decision = super().__call__(x_BxLxD, spec, keys)
        E, expert = self.config.num_experts, decision.assignment.expert_SxK
        expert = jnp.where(expert < E, expert + E * self.number, E * self.blocks)
        return decision._replace(assignment=decision.assignment._replace(expert_SxK=expert))


def cast_parameters(model: SwitchTransformer, *, experts: bool) -> SwitchTransformer:
    """The same weights in the activation dtype, once instead of at every token.

    Not those that are used in another; `experts` too, of which few are used at a time?
    """
    dtype = model.config.model.dtype
    kept = {"norm", "relative_bias", "router", "router_bias"} | (set() if experts else {"expert"})
    kinds = [metadata.kind for metadata in parameter_metadata(model).values()]
    leaves, structure = jax.tree.flatten(model)
    cast = [x if kind in kept else x.astype(dtype) for x, kind in zip(leaves, kinds)]
    return jax.tree.unflatten(structure, cast)
