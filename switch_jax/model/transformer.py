"""The encoder-decoder: T5 layers, some of them with experts.

Layers come in blocks of `moe.every`, of which the last is sparse; the blocks of a run are alike,
so their parameters are stacked and the run is one `lax.scan`: compile time does not grow with
depth. Axis letters: see `routing.py`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax.config import BlockRun, Config
from switch_jax.distributed import constrain, devices_per_group
from switch_jax.model.attention import DenseAttention, QueryKeyValue, RelativePositionBias
from switch_jax.model.feed_forward import Mlp
from switch_jax.model.layers import (
    RMSNorm,
    RowKeys,
    dropout,
    fold_keys,
    gathered_weight,
    init_kernel,
    param,
)
from switch_jax.model.moe.layers import SwitchAttention, SwitchMlp
from switch_jax.model.moe.router import RouterStats, RoutingResult, RoutingSpec

# By sub-layer of a stack ("mlp", "self_attention"): leaves with a leading axis of sparse layers.
RoutingBySublayer = dict[str, RoutingResult]

# Router sums of a whole model, by "<stack>/<sub-layer>".
RouterStatsByStack = dict[str, RouterStats]
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Layer(nnx.Module):
    """Pre-norm sub-layers: self-attention, cross-attention (decoder only), feed-forward."""

    def __init__(self, config: Config, key: jax.Array, *, decoder: bool, sparse: bool):
        self.config = config
        model, where = config.model, config.moe.sublayer if sparse else None
        self_key, cross_key, mlp_key = jax.random.split(key, 3)
        self.self_norm = RMSNorm(model.d_model)
        self.self_attention = (
            SwitchAttention(config, self_key)
            if where in ("attention", "both")
            else DenseAttention(model, self_key)
        )
        self.cross_norm = RMSNorm(model.d_model) if decoder else None
        self.cross_attention = DenseAttention(model, cross_key) if decoder else None
        self.mlp_norm = RMSNorm(model.d_model)
        self.mlp = SwitchMlp(config, mlp_key) if where in ("ff", "both") else Mlp(model, mlp_key)

    def project(self, x, spec, keys) -> tuple[QueryKeyValue, RoutingBySublayer]:
        """What self-attention asks for, and offers, at the positions `x`."""
        normed = self.self_norm(x)
        if isinstance(self.self_attention, SwitchAttention):
            projected, routed = self.self_attention.project(normed, spec, fold_keys(keys, 6))
            return projected, {"self_attention": routed}
        attention = self.self_attention
        return (attention.queries(normed), attention.keys_values(normed)), {}

    def attend(self, x, query, kv, mask, bias, keys):
        """Self-attention over the keys and values `kv`, with its residual."""
        y = self.self_attention(query, kv, mask, bias, fold_keys(keys, 0))
        return x + dropout(y, self.config.model.dropout_rate, fold_keys(keys, 1))

    def attend_encoder(self, x, kv, mask, keys):
        """Cross-attention over the encoder's keys and values, with its residual."""
        assert self.cross_norm is not None and self.cross_attention is not None
        query = self.cross_attention.queries(self.cross_norm(x))
        y = self.cross_attention(query, kv, mask, None, fold_keys(keys, 2))
        return x + dropout(y, self.config.model.dropout_rate, fold_keys(keys, 3))

    def feed_forward(self, x, spec, keys) -> tuple[jax.Array, RoutingBySublayer]:
        """The feed-forward layer with its residual, which is all a dropped token gets."""
        normed, mlp_keys, routes = self.mlp_norm(x), fold_keys(keys, 4), {}
        if isinstance(self.mlp, SwitchMlp):
            y, routes["mlp"] = self.mlp(normed, spec, mlp_keys)
        else:
            y = self.mlp(normed, mlp_keys)
        return x + dropout(y, self.config.model.dropout_rate, fold_keys(keys, 5)), routes


class Block(nnx.Module):
    """The layers of a `Run`'s block, of which the last may be sparse."""

    def __init__(self, config: Config, key: jax.Array, run: BlockRun, *, decoder: bool):
        self.layers = nnx.List(
            Layer(config, k, decoder=decoder, sparse=run.sparse and i == run.layers - 1)
            for i, k in enumerate(jax.random.split(key, run.layers))
        )


class Stack(nnx.Module):
    """Encoder or decoder: runs of blocks over embedded tokens, then the final norm."""

    def __init__(self, config: Config, key: jax.Array, *, decoder: bool):
        self.config = config
        self.layer_runs = config.block_runs("decoder" if decoder else "encoder")
        bias_key, blocks_key = jax.random.split(key)
        self.relative_bias = RelativePositionBias(config.model, bias_key, bidirectional=not decoder)
        self.runs = nnx.List(
            jax.vmap(lambda k, run=run: Block(config, k, run, decoder=decoder))(
                jax.random.split(run_key, run.blocks)
            )
            for run, run_key in zip(
                self.layer_runs, jax.random.split(blocks_key, len(self.layer_runs))
            )
        )
        self.final_norm = RMSNorm(config.model.d_model)

    def __call__(
        self,
        x_BxLxD: jax.Array,
        spec: RoutingSpec,
        mask_BxLxL: jax.Array,
        encoded_BxSxD: jax.Array | None,
        cross_mask_BxLxS: jax.Array | None,
        keys: RowKeys,
    ) -> tuple[jax.Array, RoutingBySublayer]:
        """[B, L, D] normed states, and the routing of the sparse layers."""
        rate = self.config.model.dropout_rate
        position_L = jnp.arange(x_BxLxD.shape[1])
        bias_HxLxL = self.relative_bias(position_L, position_L)

        def body(x, numbered_block):
            number, block = numbered_block
            routes: RoutingBySublayer = {}
            for i, layer in enumerate(block.layers):
                layer_keys = fold_keys(keys, 2 + number + i)
                (query, kv), routed = layer.project(x, spec, layer_keys)
                routes |= routed
                x = layer.attend(x, query, kv, mask_BxLxL, bias_HxLxL, layer_keys)
                if encoded_BxSxD is not None:
                    kv = layer.cross_attention.keys_values(encoded_BxSxD)
                    x = layer.attend_encoder(x, kv, cross_mask_BxLxS, layer_keys)
                x, routed = layer.feed_forward(x, spec, layer_keys)
                routes |= routed
            return constrain(x, "batch", None, "activation"), routes

        if self.config.model.remat != "none":
            policy = REMAT_POLICIES[self.config.model.remat]
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        x = dropout(x_BxLxD, rate, fold_keys(keys, 0))
        routes: RoutingBySublayer = {}
        first = 0
        for run, blocks in zip(self.layer_runs, self.runs):
            numbers = first + run.layers * jnp.arange(run.blocks)
            x, routed = jax.lax.scan(body, x, (numbers, blocks))
            routes |= routed
            first += run.layers * run.blocks
        return dropout(self.final_norm(x), rate, fold_keys(keys, 1)), routes


class SwitchTransformer(nnx.Module):
    """A Switch Transformer, or with `moe.num_experts=0` a T5.

    Its leaves are exactly the parameters, float32.
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
        """Logits without dropout, at the evaluation capacity.

        Args:
          encoder_input_tokens: [B, S] int32, 0 is padding.
          decoder_input_tokens: [B, T] int32, targets shifted right, beginning with 0.

        Returns [B, T, V] float32.
        """
        batch = {
            "encoder_input_tokens": encoder_input_tokens,
            "decoder_input_tokens": decoder_input_tokens,
        }
        return self.forward(batch, factor=self.config.moe.eval_capacity_factor)[0]

    def forward(
        self,
        batch: Mapping[str, jax.Array],
        *,
        factor: float | None,
        keys: RowKeys = None,
        batch_size: int | None = None,
    ) -> tuple[jax.Array, RouterStatsByStack]:
        """Logits [B, T, V] float32 and router sums of a batch, packed or not.

        Args:
          batch: features as in `switch_jax.data.batch`; targets are not needed.
          factor: capacity factor of the expert layers; None drops nothing.
          keys: one per row for dropout and exploration; None: deterministic.
          batch_size: rows of the global batch, where `batch` is a microbatch of it.
        """
        decoded, routes = self.route(batch, factor=factor, keys=keys, batch_size=batch_size)
        return self.logits(decoded), collect_router_stats(routes)

    def route(
        self,
        batch: Mapping[str, jax.Array],
        *,
        factor: float | None,
        keys: RowKeys = None,
        batch_size: int | None = None,
    ) -> tuple[jax.Array, dict[str, RoutingBySublayer]]:
        """Decoder states [B, T, D], and where every token of either stack went.

        Arguments as of `forward`.
        """
        encoder_mask, decoder_mask = token_masks(batch)
        encoder_ids = batch.get("encoder_segment_ids", encoder_mask.astype(jnp.int32))
        decoder_ids = batch.get("decoder_segment_ids", jnp.ones(decoder_mask.shape, jnp.int32))
        rows = batch_size or encoder_mask.shape[0]
        encoded, encoder_routes = self.encode(
            batch["encoder_input_tokens"], encoder_ids, factor, fold_keys(keys, 0), rows
        )
        tokens = batch["decoder_input_tokens"]
        decoded, decoder_routes = self.decoder(
            self.embed(tokens),
            self._routing_spec(tokens, decoder_mask, rows, factor),
            jnp.tril(_same_segment(decoder_ids, decoder_ids)),
            encoded,
            _same_segment(decoder_ids, encoder_ids),
            fold_keys(keys, 1),
        )
        return decoded, {"encoder": encoder_routes, "decoder": decoder_routes}

    def encode(
        self,
        tokens_BxS: jax.Array,
        segment_ids_BxS: jax.Array,
        factor: float | None,
        keys: RowKeys = None,
        batch_size: int | None = None,
    ) -> tuple[jax.Array, RoutingBySublayer]:
        """Encoder states [B, S, D] and the routing of the encoder's expert layers."""
        rows = batch_size or tokens_BxS.shape[0]
        return self.encoder(
            self.embed(tokens_BxS),
            self._routing_spec(tokens_BxS, segment_ids_BxS > 0, rows, factor),
            _same_segment(segment_ids_BxS, segment_ids_BxS),
            None,
            None,
            keys,
        )

    def embed(self, tokens_BxL: jax.Array) -> jax.Array:
        """[B, L, D] in the activation dtype."""
        dtype = jnp.dtype(self.config.model.dtype)
        x_BxLxD = gathered_weight(self.embedding, dtype)[tokens_BxL]
        return constrain(x_BxLxD, "batch", None, "activation")

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        """[B, T, V] float32 of decoder states."""
        logits = jnp.dot(*self.factors(x_BxTxD), preferred_element_type=jnp.float32)
        return constrain(logits, "batch", None, "vocab")

    def factors(self, x_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """States [B, T, D] and head [D, V] whose product the logits are.

        A tied head scales the states by D^-0.5, an untied one does not.
        """
        if self.head is not None:
            return x_BxTxD, gathered_weight(self.head, x_BxTxD.dtype)
        return x_BxTxD * self.config.model.d_model**-0.5, gathered_weight(
            self.embedding, x_BxTxD.dtype
        ).T

    def _routing_spec(
        self, token_BxL, mask_BxL, batch_size: int, factor: float | None
    ) -> RoutingSpec:
        rows = self.config.moe.group_rows(batch_size, token_BxL.shape[1])
        mask_BxL = routed_mask(mask_BxL, self.config)
        return RoutingSpec(
            token_BxL, mask_BxL, rows, factor, devices_per_group(rows, token_BxL.shape[0])
        )


def collect_router_stats(routes: Mapping[str, RoutingBySublayer]) -> RouterStatsByStack:
    """The router sums of what `SwitchTransformer.route` returned."""
    return {
        f"{stack}/{sublayer}": routed.sums
        for stack, of_stack in routes.items()
        for sublayer, routed in of_stack.items()
    }


def token_masks(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Which positions are real: bool [B, S] and [B, T].

    Padding is position, not token: the decoder's start token has the id of padding and is
    real, so the decoder's mask comes from segment ids or loss weights.
    """
    if "encoder_segment_ids" in batch:
        return batch["encoder_segment_ids"] > 0, batch["decoder_segment_ids"] > 0
    encoder = batch["encoder_input_tokens"] > 0
    if "decoder_loss_weights" in batch:
        return encoder, batch["decoder_loss_weights"] > 0
    return encoder, batch["decoder_input_tokens"] >= 0


def routed_mask(mask_BxL: jax.Array, config: Config) -> jax.Array:
    """Which positions go to experts: bool [B, L], from which are real."""
    return jnp.ones_like(mask_BxL) if config.moe.padding == "routed" else mask_BxL


def _same_segment(query_BxT: jax.Array, key_BxS: jax.Array) -> jax.Array:
    """[B, T, S] bool: the key is no padding and belongs to the query's document."""
    return (query_BxT[:, :, None] == key_BxS[:, None, :]) & (key_BxS > 0)[:, None, :]
