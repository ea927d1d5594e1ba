"""Encoder-decoder transformer: T5 layers, some of them with experts.

The layers of a stack are grouped into blocks of `moe.every`, and the last layer of a block is
sparse. The blocks of a run are equal, so their parameters are stacked and a run is one `lax.scan`:
compile time does not grow with depth. Axis letters: see README.md.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax.config import BlockRun, Config, rows_per_group
from switch_jax.distributed import constrain, devices_per_group
from switch_jax.model.attention import (
    DenseAttention,
    QueryKeyValue,
    RelativePositionBias,
    attention_mask,
)
from switch_jax.model.attention_mask import SegmentMask
from switch_jax.model.feed_forward import Mlp
from switch_jax.model.layers import (
    RMSNorm,
    RowKeys,
    cast_weights,
    dropout,
    fold_keys,
    gathered_weight,
    init_kernel,
    param,
)
from switch_jax.model.moe.expert_layers import SwitchAttention, SwitchMlp
from switch_jax.model.moe.router import RouterStats, RoutingResult, RoutingSpec
from switch_jax.model.rematerialization import REMAT_POLICIES
from switch_jax.model.token_ids import check_token_ids

# Routing by sub-layer of a stack ("mlp", "self_attention"): leaves have a leading axis of sparse
# layers.
RoutingBySublayer = dict[str, RoutingResult]

RouterStatsByStack = dict[str, RouterStats]
"""Router statistics by "<stack>/<sub-layer>"; leaves have a leading axis of sparse layers."""


class Layer(nnx.Module):
    """Pre-norm transformer layer: self-attention, cross-attention (decoder only), feed-forward.

    Args:
      config: of the model.
      key: for the initial parameters.
      decoder: whether the layer has cross-attention.
      sparse: whether the sub-layers that `moe.sublayer` names have experts.
    """

    def __init__(self, config: Config, key: jax.Array, *, decoder: bool, sparse: bool):
        self.config = config
        model, expert_sublayer = config.model, config.moe.sublayer if sparse else None
        self_key, cross_key, mlp_key = jax.random.split(key, 3)
        self.self_norm = RMSNorm(model.d_model)
        self.self_attention = (
            SwitchAttention(config, self_key)
            if expert_sublayer in ("attention", "both")
            else DenseAttention(model, self_key)
        )
        self.cross_norm = RMSNorm(model.d_model) if decoder else None
        self.cross_attention = DenseAttention(model, cross_key) if decoder else None
        self.mlp_norm = RMSNorm(model.d_model)
        self.mlp = (
            SwitchMlp(config, mlp_key) if expert_sublayer in ("ff", "both") else Mlp(model, mlp_key)
        )

    def project(self, x, spec, keys) -> tuple[QueryKeyValue, RoutingBySublayer]:
        """Returns queries, keys and values of self-attention at positions `x` [B, L, D].

        The second result is their routing, empty where self-attention has no experts.
        """
        normed = self.self_norm(x)
        if isinstance(self.self_attention, SwitchAttention):
            projected, result = self.self_attention.project(normed, spec, fold_keys(keys, 6))
            return projected, {"self_attention": result}
        attention = self.self_attention
        return (attention.queries(normed), attention.keys_values(normed)), {}

    def attend(self, x, query, kv, mask, bias, keys):
        """Returns [B, L, D]: self-attention over the keys and values `kv`, plus `x`."""
        y = self.self_attention(query, kv, mask, bias, fold_keys(keys, 0))
        return x + dropout(y, self.config.model.dropout_rate, fold_keys(keys, 1))

    def attend_encoder(self, x, kv, mask, keys):
        """Returns [B, L, D]: cross-attention over the encoder's keys and values, plus `x`."""
        assert self.cross_norm is not None and self.cross_attention is not None
        query = self.cross_attention.queries(self.cross_norm(x))
        y = self.cross_attention(query, kv, mask, None, fold_keys(keys, 2))
        return x + dropout(y, self.config.model.dropout_rate, fold_keys(keys, 3))

    def feed_forward(self, x, spec, keys) -> tuple[jax.Array, RoutingBySublayer]:
        """Returns [B, L, D], the feed-forward layer plus the residual `x`, and its routing.

        A dropped token has the residual alone.
        """
        normed, mlp_keys, routing = self.mlp_norm(x), fold_keys(keys, 4), {}
        if isinstance(self.mlp, SwitchMlp):
            y, routing["mlp"] = self.mlp(normed, spec, mlp_keys)
        else:
            y = self.mlp(normed, mlp_keys)
        return x + dropout(y, self.config.model.dropout_rate, fold_keys(keys, 5)), routing


class Block(nnx.Module):
    """Block of a `BlockRun`: consecutive layers, of which the last may be sparse."""

    def __init__(self, config: Config, key: jax.Array, run: BlockRun, *, decoder: bool):
        self.layers = nnx.List(
            Layer(config, k, decoder=decoder, sparse=run.sparse and i == run.layers - 1)
            for i, k in enumerate(jax.random.split(key, run.layers))
        )


class Stack(nnx.Module):
    """Encoder or decoder: runs of blocks, then the final norm."""

    def __init__(self, config: Config, key: jax.Array, *, decoder: bool):
        self.config = config
        self.block_runs = config.block_runs("decoder" if decoder else "encoder")
        bias_key, blocks_key = jax.random.split(key)
        self.relative_bias = RelativePositionBias(config.model, bias_key, bidirectional=not decoder)
        self.runs = nnx.List(
            jax.vmap(lambda k, run=run: Block(config, k, run, decoder=decoder))(
                jax.random.split(run_key, run.blocks)
            )
            for run, run_key in zip(
                self.block_runs, jax.random.split(blocks_key, len(self.block_runs))
            )
        )
        self.final_norm = RMSNorm(config.model.d_model)

    def __call__(
        self,
        x_BxLxD: jax.Array,
        spec: RoutingSpec,
        mask: SegmentMask,
        encoded_BxSxD: jax.Array | None,
        cross_mask: SegmentMask | None,
        keys: RowKeys,
    ) -> tuple[jax.Array, RoutingBySublayer]:
        """Computes normed states [B, L, D] and the routing of the sparse layers.

        Args:
          x_BxLxD: embedded tokens.
          spec: routing of the expert layers.
          mask: of self-attention.
          encoded_BxSxD: encoder states, for a decoder.
          cross_mask: of cross-attention, for a decoder.
          keys: one per row for dropout and exploration; None: deterministic.
        """
        model = self.config.model
        self_mask = attention_mask(model, mask)
        encoder_mask = None if cross_mask is None else attention_mask(model, cross_mask)
        position_L = jnp.arange(x_BxLxD.shape[1])
        bias_HxLxL = self.relative_bias(position_L, position_L)

        def run_block(x, numbered_block):
            number, block = numbered_block
            routing: RoutingBySublayer = {}
            for i, layer in enumerate(block.layers):
                layer_keys = fold_keys(keys, 2 + number + i)
                (query, kv), layer_routing = layer.project(x, spec, layer_keys)
                routing |= layer_routing
                x = layer.attend(x, query, kv, self_mask, bias_HxLxL, layer_keys)
                if encoded_BxSxD is not None:
                    kv = layer.cross_attention.keys_values(encoded_BxSxD)
                    x = layer.attend_encoder(x, kv, encoder_mask, layer_keys)
                x, layer_routing = layer.feed_forward(x, spec, layer_keys)
                routing |= layer_routing
            return constrain(x, "batch", None, "activation"), routing

        policy = REMAT_POLICIES[model.remat]
        run_block = jax.checkpoint(run_block, prevent_cse=False, policy=policy)
        x = dropout(x_BxLxD, model.dropout_rate, fold_keys(keys, 0))
        routing: RoutingBySublayer = {}
        first = 0
        for run, blocks in zip(self.block_runs, self.runs):
            numbers = first + run.layers * jnp.arange(run.blocks)
            numbered_blocks = numbers, cast_weights(blocks, x.dtype)
            x, run_routing = jax.lax.scan(run_block, x, numbered_blocks)
            routing |= run_routing
            first += run.layers * run.blocks
        return dropout(self.final_norm(x), model.dropout_rate, fold_keys(keys, 1)), routing


class SwitchTransformer(nnx.Module):
    """Switch Transformer, or T5 where `moe.num_experts` is 0.

    It is a pytree whose leaves are exactly the parameters, float32.
    """

    def __init__(self, config: Config, key: jax.Array):
        self.config = config
        model = config.model
        embed_key, encoder_key, decoder_key, head_key = jax.random.split(key, 4)
        V, D = model.vocab_size, model.d_model
        self.embedding = param(
            jax.random.normal(embed_key, (V, D)), "vocab", "embed", kind="embedding"
        )
        self.encoder = Stack(config, encoder_key, decoder=False)
        self.decoder = Stack(config, decoder_key, decoder=True)
        self.head = (
            None
            if model.tied_embeddings
            else param(
                init_kernel(head_key, (D, V), model.init_scale), "embed", "vocab", kind="head"
            )
        )

    def __call__(
        self, encoder_input_tokens: jax.Array, decoder_input_tokens: jax.Array
    ) -> jax.Array:
        """Computes logits without dropout, at the evaluation capacity factor.

        Args:
          encoder_input_tokens: [B, S] int32; `model.pad_id` is padding.
          decoder_input_tokens: [B, T] int32; targets shifted right, after `model.start_id`.

        Returns [B, T, V] float32. Raises `UserError` for ids outside the vocabulary, except where
        the call is traced, as in `jax.jit`: there the values are not known.
        """
        for name, tokens in (
            ("encoder_input_tokens", encoder_input_tokens),
            ("decoder_input_tokens", decoder_input_tokens),
        ):
            check_token_ids(name, tokens, self.config.model.vocab_size)
        batch = {
            "encoder_input_tokens": encoder_input_tokens,
            "decoder_input_tokens": decoder_input_tokens,
        }
        return self.forward(batch, capacity_factor=self.config.moe.eval_capacity_factor)[0]

    def forward(
        self,
        batch: Mapping[str, jax.Array],
        *,
        capacity_factor: float | None,
        keys: RowKeys = None,
        batch_size: int | None = None,
    ) -> tuple[jax.Array, RouterStatsByStack]:
        """Computes logits [B, T, V] float32 and router statistics of a batch, packed or not.

        Args:
          batch: features as in `switch_jax.data.batch`; targets are not needed.
          capacity_factor: of the expert layers; None: dropless.
          keys: one per row for dropout and exploration; None: deterministic.
          batch_size: rows of the global batch, where `batch` is a microbatch.
        """
        decoded, routing = self.route(
            batch, capacity_factor=capacity_factor, keys=keys, batch_size=batch_size
        )
        return self.logits(decoded), collect_router_stats(routing)

    def route(
        self,
        batch: Mapping[str, jax.Array],
        *,
        capacity_factor: float | None,
        keys: RowKeys = None,
        batch_size: int | None = None,
    ) -> tuple[jax.Array, dict[str, RoutingBySublayer]]:
        """Computes decoder states [B, T, D] and the routing of both stacks.

        The arguments are the same as those of `forward`.
        """
        encoder_mask, decoder_mask = token_masks(batch, self.config)
        encoder_ids = batch.get("encoder_segment_ids", encoder_mask.astype(jnp.int32))
        decoder_ids = batch.get("decoder_segment_ids", jnp.ones(decoder_mask.shape, jnp.int32))
        rows = batch_size or encoder_mask.shape[0]
        encoded, encoder_routing = self.encode(
            batch["encoder_input_tokens"], encoder_ids, capacity_factor, fold_keys(keys, 0), rows
        )
        tokens = batch["decoder_input_tokens"]
        decoded, decoder_routing = self.decoder(
            self.embed(tokens),
            self._routing_spec(tokens, decoder_mask, rows, capacity_factor),
            SegmentMask(decoder_ids, decoder_ids, causal=True),
            encoded,
            SegmentMask(decoder_ids, encoder_ids, causal=False),
            fold_keys(keys, 1),
        )
        return decoded, {"encoder": encoder_routing, "decoder": decoder_routing}

    def encode(
        self,
        tokens_BxS: jax.Array,
        segment_ids_BxS: jax.Array,
        capacity_factor: float | None,
        keys: RowKeys = None,
        batch_size: int | None = None,
    ) -> tuple[jax.Array, RoutingBySublayer]:
        """Computes encoder states [B, S, D] and the routing of the encoder's expert layers.

        Args:
          tokens_BxS: int32.
          segment_ids_BxS: int32, 0 for padding; positions attend within their segment.
          capacity_factor: of the expert layers; None: dropless.
          keys: one per row for dropout and exploration; None: deterministic.
          batch_size: rows of the global batch, where the tokens are a part; it sets the groups.
        """
        rows = batch_size or tokens_BxS.shape[0]
        return self.encoder(
            self.embed(tokens_BxS),
            self._routing_spec(tokens_BxS, segment_ids_BxS > 0, rows, capacity_factor),
            SegmentMask(segment_ids_BxS, segment_ids_BxS, causal=False),
            None,
            None,
            keys,
        )

    def embed(self, tokens_BxL: jax.Array) -> jax.Array:
        """Returns embeddings [B, L, D] in the activation dtype."""
        dtype = jnp.dtype(self.config.model.dtype)
        x_BxLxD = gathered_weight(self.embedding, dtype)[tokens_BxL]
        return constrain(x_BxLxD, "batch", None, "activation")

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        """Computes logits [B, T, V] float32 of decoder states."""
        logits = jnp.dot(*self.logit_factors(x_BxTxD), preferred_element_type=jnp.float32)
        return constrain(logits, "batch", None, "vocab")

    def logit_factors(self, x_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns states [B, T, D] and head [D, V]; the logits are their product.

        With a tied head the states are scaled by D^-0.5.
        """
        if self.head is not None:
            return x_BxTxD, gathered_weight(self.head, x_BxTxD.dtype)
        return x_BxTxD * self.config.model.d_model**-0.5, gathered_weight(
            self.embedding, x_BxTxD.dtype
        ).T

    def _routing_spec(
        self, token_BxL, mask_BxL, batch_size: int, capacity_factor: float | None
    ) -> RoutingSpec:
        """Returns how a batch is routed; `mask_BxL` is false at padding."""
        rows = rows_per_group(self.config.moe, batch_size, token_BxL.shape[1])
        mask_BxL = routed_mask(mask_BxL, self.config)
        return RoutingSpec(
            token_BxL, mask_BxL, rows, capacity_factor, devices_per_group(rows, token_BxL.shape[0])
        )


def collect_router_stats(routing: Mapping[str, RoutingBySublayer]) -> RouterStatsByStack:
    """Returns the router statistics in the routing that `SwitchTransformer.route` returns."""
    return {
        f"{stack}/{sublayer}": result.stats
        for stack, by_sublayer in routing.items()
        for sublayer, result in by_sublayer.items()
    }


def token_masks(batch: Mapping[str, Any], config: Config) -> tuple[Any, Any]:
    """Returns bool masks [B, S] and [B, T] of the positions that are not padding.

    In a decoder, padding is a property of the position, not of the token id: the start token may
    have the id of padding and is no padding. So its mask comes from segment ids or loss weights.
    """
    if "encoder_segment_ids" in batch:
        return batch["encoder_segment_ids"] > 0, batch["decoder_segment_ids"] > 0
    encoder = batch["encoder_input_tokens"] != config.model.pad_id
    if "decoder_loss_weights" in batch:
        return encoder, batch["decoder_loss_weights"] > 0
    return encoder, batch["decoder_input_tokens"] >= 0


def routed_mask(mask_BxL: jax.Array, config: Config) -> jax.Array:
    """Returns the bool mask [B, L] of routed positions, from the mask without padding."""
    return jnp.ones_like(mask_BxL) if config.moe.padding == "routed" else mask_BxL
