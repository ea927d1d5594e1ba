"""The encoder-decoder: T5 layers, with a Switch layer at every `moe.every`-th place.

Layers come in blocks of `moe.every`, of which the last is sparse; a stack's blocks are
alike, so their parameters are stacked and the stack is one `lax.scan`: compile time does not
grow with depth. Axis letters: see `routing.py`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from switch_jax import routing
from switch_jax.config import Config
from switch_jax.layers import (
    Attention,
    Keys,
    Mlp,
    RelativeBias,
    RMSNorm,
    dropout,
    fold,
    kernel,
    param,
    weight,
)
from switch_jax.moe import Plan, RouterSums, SwitchMlp
from switch_jax.sharding import constrain

# Router sums of a whole model: stack name → sums whose leaves have a leading axis of blocks.
Stats = dict[str, RouterSums]

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Layer(nnx.Module):
    """Pre-norm sub-layers: self-attention, cross-attention (decoder only), feed-forward."""

    def __init__(self, config: Config, key: jax.Array, *, decoder: bool, sparse: bool):
        self.config = config
        D = config.model.d_model
        self_key, cross_key, mlp_key = jax.random.split(key, 3)
        self.self_norm, self.self_attention = RMSNorm(D), Attention(config.model, self_key)
        self.cross_norm = RMSNorm(D) if decoder else None
        self.cross_attention = Attention(config.model, cross_key) if decoder else None
        self.mlp_norm = RMSNorm(D)
        self.mlp = SwitchMlp(config, mlp_key) if sparse else Mlp(config.model, mlp_key)

    def self_keys_values(self, x):
        """What self-attention offers of the positions `x`."""
        return self.self_attention.keys_values(self.self_norm(x))

    def attend(self, x, kv, mask, bias, keys):
        """Self-attention over the keys and values `kv`, with its residual."""
        y = self.self_attention(self.self_norm(x), kv, mask, bias, fold(keys, 0))
        return x + dropout(y, self.config.model.dropout_rate, fold(keys, 1))

    def attend_encoder(self, x, kv, mask, keys):
        """Cross-attention over the encoder's keys and values, with its residual."""
        assert self.cross_norm is not None and self.cross_attention is not None
        y = self.cross_attention(self.cross_norm(x), kv, mask, None, fold(keys, 2))
        return x + dropout(y, self.config.model.dropout_rate, fold(keys, 3))

    def feed_forward(self, x, token_mask, plan, keys) -> tuple[jax.Array, RouterSums | None]:
        """The feed-forward layer with its residual, which is all a dropped token gets."""
        normed, mlp_keys, stats = self.mlp_norm(x), fold(keys, 4), None
        if isinstance(self.mlp, SwitchMlp):
            y, stats = self.mlp(normed, token_mask, plan, mlp_keys)
        else:
            y = self.mlp(normed, mlp_keys)
        return x + dropout(y, self.config.model.dropout_rate, fold(keys, 5)), stats


class Block(nnx.Module):
    """`moe.every` layers, the last of them sparse; in a dense model, one layer."""

    def __init__(self, config: Config, key: jax.Array, *, decoder: bool):
        count = layers_per_block(config)
        keys = jax.random.split(key, count)
        self.layers = nnx.List(
            Layer(config, k, decoder=decoder, sparse=config.sparse and i == count - 1)
            for i, k in enumerate(keys)
        )


def layers_per_block(config: Config) -> int:
    """Layers of a scanned block."""
    return config.moe.every if config.sparse else 1


class Stack(nnx.Module):
    """Encoder or decoder: blocks over embedded tokens, then the final norm."""

    def __init__(self, config: Config, key: jax.Array, *, decoder: bool):
        self.config = config
        bias_key, blocks_key = jax.random.split(key)
        layers = config.model.num_decoder_layers if decoder else config.model.num_encoder_layers
        self.relative_bias = RelativeBias(config.model, bias_key, bidirectional=not decoder)
        self.blocks = jax.vmap(lambda k: Block(config, k, decoder=decoder))(
            jax.random.split(blocks_key, layers // layers_per_block(config))
        )
        self.final_norm = RMSNorm(config.model.d_model)

    def __call__(
        self,
        x_BxLxD: jax.Array,
        token_mask_BxL: jax.Array,
        mask_BxLxL: jax.Array,
        encoded_BxSxD: jax.Array | None,
        cross_mask_BxLxS: jax.Array | None,
        plan: Plan,
        keys: Keys,
    ) -> tuple[jax.Array, RouterSums | None]:
        """[B, L, D] normed states, and the sums of the sparse layers, stacked by block."""
        rate = self.config.model.dropout_rate
        position_L = jnp.arange(x_BxLxD.shape[1])
        bias_HxLxL = self.relative_bias(position_L, position_L)

        def body(x, numbered_block):
            number, block = numbered_block
            stats = None
            for i, layer in enumerate(block.layers):
                layer_keys = fold(keys, 2 + number * len(block.layers) + i)
                kv = layer.self_keys_values(x)
                x = layer.attend(x, kv, mask_BxLxL, bias_HxLxL, layer_keys)
                if encoded_BxSxD is not None:
                    kv = layer.cross_attention.keys_values(encoded_BxSxD)
                    x = layer.attend_encoder(x, kv, cross_mask_BxLxS, layer_keys)
                x, stats = layer.feed_forward(x, token_mask_BxL, plan, layer_keys)
            return constrain(x, "batch", None, "activation"), stats

        if self.config.model.remat != "none":
            policy = REMAT_POLICIES[self.config.model.remat]
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        x = dropout(x_BxLxD, rate, fold(keys, 0))
        count = jax.tree.leaves(self.blocks)[0].shape[0]
        x, stats = jax.lax.scan(body, x, (jnp.arange(count), self.blocks))
        return dropout(self.final_norm(x), rate, fold(keys, 1)), stats


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
          keys: one per row for dropout and jitter; None: deterministic.
          batch_size: rows of the global batch, where `batch` is a microbatch of it.
        """
        encoder_mask, decoder_mask = token_masks(batch)
        encoder_ids = batch.get("encoder_segment_ids", encoder_mask.astype(jnp.int32))
        decoder_ids = batch.get("decoder_segment_ids", jnp.ones(decoder_mask.shape, jnp.int32))
        rows = batch_size or encoder_mask.shape[0]
        encoded, encoder_stats = self.encode(
            batch["encoder_input_tokens"], encoder_ids, factor, fold(keys, 0), rows
        )
        decoded, decoder_stats = self.decoder(
            self.embed(batch["decoder_input_tokens"]),
            decoder_mask,
            jnp.tril(_same_segment(decoder_ids, decoder_ids)),
            encoded,
            _same_segment(decoder_ids, encoder_ids),
            self._plan(rows, decoder_mask.shape[1], factor),
            fold(keys, 1),
        )
        stats = {"encoder": encoder_stats, "decoder": decoder_stats}
        return self.logits(decoded), {k: s for k, s in stats.items() if s is not None}

    def encode(
        self,
        tokens_BxS: jax.Array,
        segment_ids_BxS: jax.Array,
        factor: float | None,
        keys: Keys = None,
        batch_size: int | None = None,
    ) -> tuple[jax.Array, RouterSums | None]:
        """Encoder states [B, S, D] and the sums of the encoder's expert layers."""
        rows = batch_size or tokens_BxS.shape[0]
        return self.encoder(
            self.embed(tokens_BxS),
            segment_ids_BxS > 0,
            _same_segment(segment_ids_BxS, segment_ids_BxS),
            None,
            None,
            self._plan(rows, tokens_BxS.shape[1], factor),
            keys,
        )

    def embed(self, tokens_BxL: jax.Array) -> jax.Array:
        """[B, L, D] in the activation dtype."""
        dtype = jnp.dtype(self.config.model.dtype)
        x_BxLxD = weight(self.embedding, dtype)[tokens_BxL]
        return constrain(x_BxLxD, "batch", None, "activation")

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        """[B, T, V] float32; a tied head scales the states by D^-0.5, an untied one does not."""
        if self.head is None:
            x_BxTxD = x_BxTxD * self.config.model.d_model**-0.5
            head_DxV = weight(self.embedding, x_BxTxD.dtype).T
        else:
            head_DxV = weight(self.head, x_BxTxD.dtype)
        logits = jnp.dot(x_BxTxD, head_DxV, preferred_element_type=jnp.float32)
        return constrain(logits, "batch", None, "vocab")

    def _plan(self, batch_size: int, length: int, factor: float | None) -> Plan:
        rows = routing.group_rows(batch_size, length, self.config.moe.group_size)
        return Plan(rows, factor)


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


def _same_segment(query_BxT: jax.Array, key_BxS: jax.Array) -> jax.Array:
    """[B, T, S] bool: the key is no padding and belongs to the query's document."""
    return (query_BxT[:, :, None] == key_BxS[:, None, :]) & (key_BxS > 0)[:, None, :]


def named_parameters(model: SwitchTransformer) -> dict[str, nnx.Param]:
    """Every parameter by its path, such as `encoder/blocks/layers/1/mlp/router`."""
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
