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

from switch_jax.layers import (
    DenseAttention,
    Keys,
    Mlp,
    Projected,
    RelativeBias,
    RMSNorm,
    dropout,
    fold,
    kernel,
    param,
    weight,
)
from switch_jax.moe import SwitchAttention, SwitchMlp
from switch_jax.router import Plan, Routed, RouterSums
from switch_jax.schema import Config, Run
from switch_jax.sharding import constrain, span

# By sub-layer of a stack ("mlp", "self_attention"): leaves with a leading axis of sparse layers.
Routes = dict[str, Routed]
# Router sums of a whole model, by "<stack>/<sub-layer>".
Stats = dict[str, RouterSums]

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

    def project(self, x, plan, keys) -> tuple[Projected, Routes]:
        """What self-attention asks for, and offers, at the positions `x`."""
        normed = self.self_norm(x)
        if isinstance(self.self_attention, SwitchAttention):
            projected, routed = self.self_attention.project(normed, plan, fold(keys, 6))
            return projected, {"self_attention": routed}
        attention = self.self_attention
        return (attention.queries(normed), attention.keys_values(normed)), {}

    def attend(self, x, query, kv, mask, bias, keys):
        """Self-attention over the keys and values `kv`, with its residual."""
        y = self.self_attention(query, kv, mask, bias, fold(keys, 0))
        return x + dropout(y, self.config.model.dropout_rate, fold(keys, 1))

    def attend_encoder(self, x, kv, mask, keys):
        """Cross-attention over the encoder's keys and values, with its residual."""
        assert self.cross_norm is not None and self.cross_attention is not None
        query = self.cross_attention.queries(self.cross_norm(x))
        y = self.cross_attention(query, kv, mask, None, fold(keys, 2))
        return x + dropout(y, self.config.model.dropout_rate, fold(keys, 3))

    def feed_forward(self, x, plan, keys) -> tuple[jax.Array, Routes]:
        """The feed-forward layer with its residual, which is all a dropped token gets."""
        normed, mlp_keys, routes = self.mlp_norm(x), fold(keys, 4), {}
        if isinstance(self.mlp, SwitchMlp):
            y, routes["mlp"] = self.mlp(normed, plan, mlp_keys)
        else:
            y = self.mlp(normed, mlp_keys)
        return x + dropout(y, self.config.model.dropout_rate, fold(keys, 5)), routes


class Block(nnx.Module):
    """The layers of a `Run`'s block, of which the last may be sparse."""

    def __init__(self, config: Config, key: jax.Array, run: Run, *, decoder: bool):
        self.layers = nnx.List(
            Layer(config, k, decoder=decoder, sparse=run.sparse and i == run.layers - 1)
            for i, k in enumerate(jax.random.split(key, run.layers))
        )


class Stack(nnx.Module):
    """Encoder or decoder: runs of blocks over embedded tokens, then the final norm."""

    def __init__(self, config: Config, key: jax.Array, *, decoder: bool):
        self.config = config
        self.layer_runs = config.runs("decoder" if decoder else "encoder")
        bias_key, blocks_key = jax.random.split(key)
        self.relative_bias = RelativeBias(config.model, bias_key, bidirectional=not decoder)
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
        plan: Plan,
        mask_BxLxL: jax.Array,
        encoded_BxSxD: jax.Array | None,
        cross_mask_BxLxS: jax.Array | None,
        keys: Keys,
    ) -> tuple[jax.Array, Routes]:
        """[B, L, D] normed states, and the routing of the sparse layers."""
        rate = self.config.model.dropout_rate
        position_L = jnp.arange(x_BxLxD.shape[1])
        bias_HxLxL = self.relative_bias(position_L, position_L)

        def body(x, numbered_block):
            number, block = numbered_block
            routes: Routes = {}
            for i, layer in enumerate(block.layers):
                layer_keys = fold(keys, 2 + number + i)
                (query, kv), routed = layer.project(x, plan, layer_keys)
                routes |= routed
                x = layer.attend(x, query, kv, mask_BxLxL, bias_HxLxL, layer_keys)
                if encoded_BxSxD is not None:
                    kv = layer.cross_attention.keys_values(encoded_BxSxD)
                    x = layer.attend_encoder(x, kv, cross_mask_BxLxS, layer_keys)
                x, routed = layer.feed_forward(x, plan, layer_keys)
                routes |= routed
            return constrain(x, "batch", None, "activation"), routes

        if self.config.model.remat != "none":
            policy = REMAT_POLICIES[self.config.model.remat]
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        x = dropout(x_BxLxD, rate, fold(keys, 0))
        routes: Routes = {}
        first = 0
        for run, blocks in zip(self.layer_runs, self.runs):
            numbers = first + run.layers * jnp.arange(run.blocks)
            x, routed = jax.lax.scan(body, x, (numbers, blocks))
            routes |= routed
            first += run.layers * run.blocks
        return dropout(self.final_norm(x), rate, fold(keys, 1)), routes


class SwitchTransformer(nnx.Module):
    """A Switch Transformer, or with `moe.num_experts=0` a T5.

    Its leaves are exactly the parameters, float32.
    """

    def __init__(self, config: Config, key: jax.Array):
        self.config = config
        model = config.model
        embed_key, encoder_key, decoder_key, head_key = jax.random.split(key, 4)
        V, D = model.vocab_size, model.d_model
        self.embedding = param(jax.random.normal(embed_key, (V, D)), "vocab", "embed")
        self.encoder = Stack(config, encoder_key, decoder=False)
        self.decoder = Stack(config, decoder_key, decoder=True)
        self.head = (
            None
            if model.tied_embeddings
            else param(kernel(head_key, (D, V), model.init_scale), "embed", "vocab")
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
        keys: Keys = None,
        batch_size: int | None = None,
    ) -> tuple[jax.Array, Stats]:
        """Logits [B, T, V] float32 and router sums of a batch, packed or not.

        Args:
          batch: features as in `switch_jax.data.batch`; targets are not needed.
          factor: capacity factor of the expert layers; None drops nothing.
          keys: one per row for dropout and exploration; None: deterministic.
          batch_size: rows of the global batch, where `batch` is a microbatch of it.
        """
        decoded, routes = self.route(batch, factor=factor, keys=keys, batch_size=batch_size)
        return self.logits(decoded), stats_of(routes)

    def route(
        self,
        batch: Mapping[str, jax.Array],
        *,
        factor: float | None,
        keys: Keys = None,
        batch_size: int | None = None,
    ) -> tuple[jax.Array, dict[str, Routes]]:
        """Decoder states [B, T, D], and where every token of either stack went.

        Arguments as of `forward`.
        """
        encoder_mask, decoder_mask = token_masks(batch)
        encoder_ids = batch.get("encoder_segment_ids", encoder_mask.astype(jnp.int32))
        decoder_ids = batch.get("decoder_segment_ids", jnp.ones(decoder_mask.shape, jnp.int32))
        rows = batch_size or encoder_mask.shape[0]
        encoded, encoder_routes = self.encode(
            batch["encoder_input_tokens"], encoder_ids, factor, fold(keys, 0), rows
        )
        tokens = batch["decoder_input_tokens"]
        decoded, decoder_routes = self.decoder(
            self.embed(tokens),
            self._plan(tokens, decoder_mask, rows, factor),
            jnp.tril(_same_segment(decoder_ids, decoder_ids)),
            encoded,
            _same_segment(decoder_ids, encoder_ids),
            fold(keys, 1),
        )
        return decoded, {"encoder": encoder_routes, "decoder": decoder_routes}

    def encode(
        self,
        tokens_BxS: jax.Array,
        segment_ids_BxS: jax.Array,
        factor: float | None,
        keys: Keys = None,
        batch_size: int | None = None,
    ) -> tuple[jax.Array, Routes]:
        """Encoder states [B, S, D] and the routing of the encoder's expert layers."""
        rows = batch_size or tokens_BxS.shape[0]
        return self.encoder(
            self.embed(tokens_BxS),
            self._plan(tokens_BxS, segment_ids_BxS > 0, rows, factor),
            _same_segment(segment_ids_BxS, segment_ids_BxS),
            None,
            None,
            keys,
        )

    def embed(self, tokens_BxL: jax.Array) -> jax.Array:
        """[B, L, D] in the activation dtype."""
        dtype = jnp.dtype(self.config.model.dtype)
        x_BxLxD = weight(self.embedding, dtype)[tokens_BxL]
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
            return x_BxTxD, weight(self.head, x_BxTxD.dtype)
        return x_BxTxD * self.config.model.d_model**-0.5, weight(self.embedding, x_BxTxD.dtype).T

    def _plan(self, token_BxL, mask_BxL, batch_size: int, factor: float | None) -> Plan:
        rows = self.config.moe.group_rows(batch_size, token_BxL.shape[1])
        mask_BxL = routed_mask(mask_BxL, self.config)
        return Plan(token_BxL, mask_BxL, rows, factor, span(rows, token_BxL.shape[0]))


def stats_of(routes: Mapping[str, Routes]) -> Stats:
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


def named_parameters(model: SwitchTransformer) -> dict[str, nnx.Param]:
    """Every parameter by its path, such as `encoder/runs/0/layers/1/mlp/router/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda node: isinstance(node, nnx.Param)
    )
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def logical_axes(model: SwitchTransformer) -> dict[str, tuple[str, ...]]:
    """The names of each parameter's dimensions; stacked blocks have `layers` in front."""
    axes = {}
    for name, leaf in named_parameters(model).items():
        own = leaf.get_metadata()["axes"]
        axes[name] = ("layers",) * (len(leaf.shape) - len(own)) + own
    return axes


def with_parameters(model: SwitchTransformer, values: Mapping[str, Any]) -> SwitchTransformer:
    """The same model with other values (or specs, or shapes) at its leaves."""
    names = list(named_parameters(model))
    return jax.tree.unflatten(jax.tree.structure(model), [values[name] for name in names])
