"""KV cache: keys and values of the decoder, and the model's step for one token.

Axis letters: B inputs · N sequences, those of an input side by side · S encoder positions · T
decoder positions · D d_model · H heads · K head dimension, or sequences of an input · V vocabulary.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from switch_jax.config import Config
from switch_jax.distributed import constrain, no_mesh, num_batch_shards
from switch_jax.model import (
    MIN_BLOCK_ROWS,
    RoutingSpec,
    SwitchTransformer,
    parameter_metadata,
    size_lower_bound,
)

# Keys and values of a block run, each [blocks, layers of a block, rows, positions, H, K] in the
# activation dtype.
KeysValues = tuple[jax.Array, jax.Array]
CACHE_SEQUENCE_AXIS = 2
"""Axis of the N sequences in the arrays of self-attention."""


class KVCache(NamedTuple):
    """Keys and values of a decoder's attention layers, by block run.

    self_attention: [.., N, T, H, K] of the positions decoded so far; zeros at later positions.
    cross_attention: [.., B, S, H, K] of the encoded inputs; the sequences of an input share them.
    """

    self_attention: list[KeysValues]
    cross_attention: list[KeysValues]


def init_cache(
    model: SwitchTransformer, encoded_BxSxD: jax.Array, length: int, num_sequences: int = 1
) -> KVCache:
    """Returns a cache before the first token.

    Args:
      model: its decoder is used.
      encoded_BxSxD: encoder states, in the activation dtype.
      length: T, the maximum number of tokens of a sequence.
      num_sequences: sequences of each input.
    """

    def cross_keys_values(block):
        by_layer = [layer.cross_attention.keys_values(encoded_BxSxD) for layer in block.layers]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *by_layer)

    cache = KVCache([], [])
    for blocks in model.decoder.runs:
        keys, values = jax.lax.map(cross_keys_values, blocks)
        shape = (*keys.shape[:2], num_sequences * keys.shape[2], length, *keys.shape[4:])
        zeros = constrain(jnp.zeros(shape, keys.dtype), None, None, "batch", None, "heads", None)
        cache.self_attention.append((zeros, zeros))
        cache.cross_attention.append((keys, values))
    return cache


def decode_one_token(
    model: SwitchTransformer,
    token_N: jax.Array,
    position: jax.Array,
    cache: KVCache,
    source_mask_BxS: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Runs the decoder on one token of each sequence.

    Args:
      model: its decoder is used.
      token_N: int32; the sequences of an input stand side by side.
      position: int32 scalar, position of the tokens.
      cache: of the positions before.
      source_mask_BxS: bool, where the inputs have tokens.

    Returns logits [N, V] float32 of the next token, and the cache that includes `position`.
    """
    stack, length = model.decoder, cache.self_attention[0][0].shape[3]
    N, B = token_N.shape[0], source_mask_BxS.shape[0]
    position_T = jnp.arange(length)
    bias_Hx1xT = stack.relative_bias(position[None], position_T)
    mask_1x1xT = (position_T <= position)[None, None]
    cross_mask_Bx1xS = source_mask_BxS[:, None]
    token_Nx1 = token_N[:, None]
    spec = RoutingSpec(
        token_Nx1, jnp.ones(token_Nx1.shape, bool), rows_per_group=1, capacity_factor=None
    )
    use_pool = _few_experts_of_many(model.config, size_lower_bound(N))

    def run_block(x_and_self_kv, number_and_block, run, spec):
        (x_Nx1xD, self_kv), (number, scanned, cross_kv) = x_and_self_kv, number_and_block
        if use_pool:
            spec = spec._replace(first_expert=number * model.config.moe.num_experts)
        for i, layer in enumerate(run.block(scanned).layers):
            (query, new_kv), _ = layer.project(x_Nx1xD, spec, None)
            # The arrays are carried by the loop over tokens, and updated in place.
            self_kv = tuple(
                jax.lax.dynamic_update_slice(old, new[None, None], (number, i, 0, position, 0, 0))
                for old, new in zip(self_kv, new_kv)
            )
            kv = tuple(x[number, i] for x in self_kv)
            x_Nx1xD = layer.attend(x_Nx1xD, query, kv, mask_1x1xT, bias_Hx1xT, None)
            # The sequences of an input are queries to the same keys.
            x_BxKxD = x_Nx1xD.reshape(B, N // B, -1)
            kv = (cross_kv[0][i], cross_kv[1][i])
            x_BxKxD = layer.attend_encoder(x_BxKxD, kv, cross_mask_Bx1xS, None)
            x_Nx1xD, _ = layer.feed_forward(x_BxKxD.reshape(N, 1, -1), spec, None)
        return (x_Nx1xD, self_kv), None

    x_Nx1xD, new_self_attention = model.embed(token_Nx1), []
    for blocks, self_kv, cross_kv in zip(stack.runs, cache.self_attention, cache.cross_attention):
        run = _CachedBlockRun(blocks, use_pool)
        numbered = (jnp.arange(len(self_kv[0])), run.scanned, cross_kv)
        (x_Nx1xD, self_kv), _ = jax.lax.scan(
            partial(run_block, run=run, spec=spec), (x_Nx1xD, self_kv), numbered
        )
        new_self_attention.append(self_kv)
    logits_NxV = model.logits(stack.final_norm(x_Nx1xD))[:, 0]
    return logits_NxV, KVCache(new_self_attention, cache.cross_attention)


class _CachedBlockRun:
    """The blocks of a run, for a scan that does not copy the experts of every block.

    Inside a scan over blocks, a loop over the experts in use would get a copy of all experts of a
    block. With `use_pool`, the experts of all blocks of the run are one stacked array outside the
    scan, [blocks · E, ..], and `RoutingSpec.first_expert` selects the part of a block. Without
    `use_pool`, experts are scanned over like all other parameters.

    Attributes:
      scanned: parameters to scan over; None in place of pooled ones.
    """

    def __init__(self, blocks: Any, use_pool: bool):
        leaves, self._structure = jax.tree.flatten(blocks)
        pooled = [use_pool and m.kind == "expert" for m in parameter_metadata(blocks).values()]
        self.scanned = [None if p else leaf for p, leaf in zip(pooled, leaves)]
        self._pool = [
            leaf.reshape(-1, *leaf.shape[2:]) if p else None for p, leaf in zip(pooled, leaves)
        ]

    def block(self, scanned: list) -> Any:
        """Returns a block of the run, from one element of the scan over `scanned`."""
        leaves = [leaf if p is None else p for leaf, p in zip(scanned, self._pool)]
        return jax.tree.unflatten(self._structure, leaves)


def _few_experts_of_many(config: Config, num_sequences: int) -> bool:
    """Whether a step uses few experts of each layer, and a device holds all of them."""
    moe, parts = config.moe, 1
    if not no_mesh():
        mesh = jax.sharding.get_abstract_mesh()
        parts = num_batch_shards(mesh)
        # The experts of a block in a pool are not a shard that devices could hold or gather.
        if mesh.shape["expert"] > 1 or (config.mesh.fsdp and mesh.shape["data"] > 1):
            return False
    # Up to this number of assignments, blocks of rows have the smallest size in either case.
    return num_sequences // parts * moe.max_experts_per_token <= MIN_BLOCK_ROWS * moe.num_experts
