"""Loss terms and router metrics, as sums that add up over microbatches.

Every denominator (`LossDenominators`) is computed from the global batch before the first
microbatch, so that loss and metrics do not change with gradient accumulation.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from switch_jax.config import STACKS, Config, rows_per_group
from switch_jax.distributed import (
    BATCH_AXES,
    axis_index,
    axis_size,
    partition_spec,
    pmax,
    psum,
    pvary,
    shard_map,
)
from switch_jax.model.moe.router import RouterStats
from switch_jax.model.transformer import RouterStatsByStack, routed_mask, token_masks

LOGITS_BYTES = 2**29
"""Logits above this size in bytes are computed in chunks of tokens."""


class LossDenominators(NamedTuple):
    """Denominators of the loss terms of a global batch; float32 scalars."""

    targets: jax.Array  # Σ of loss weights
    tokens: dict[str, jax.Array]  # routed tokens, by stack
    groups: dict[str, jax.Array]  # groups with at least one routed token, by stack


class LossSums(NamedTuple):
    """Sums over the target tokens of a batch, weighted by loss weights; float32 scalars."""

    cross_entropy: jax.Array  # nats
    z: jax.Array  # logsumexp(logits)²
    correct: jax.Array  # 1 where the target has the largest logit
    soft: jax.Array | None = None  # cross-entropy with the teacher's distribution, nats
    uniform: jax.Array | None = None  # cross-entropy with the uniform distribution, nats


def loss_denominators(batch: Mapping[str, jax.Array], config: Config) -> LossDenominators:
    """Computes the denominators of a global batch."""
    groups, tokens = {}, {}
    for stack, token_mask_BxL in zip(STACKS, token_masks(batch, config)):
        mask_BxL = routed_mask(token_mask_BxL, config)
        B, L = mask_BxL.shape
        rows = rows_per_group(config.moe, B, L)
        tokens[stack] = jnp.sum(mask_BxL, dtype=jnp.float32)
        routed_B = mask_BxL.any(-1)
        groups[stack] = jnp.sum(routed_B.reshape(B // rows, rows).any(-1), dtype=jnp.float32)
    targets = jnp.sum(batch["decoder_loss_weights"], dtype=jnp.float32)
    return LossDenominators(targets, tokens, groups)


@jax.named_scope("loss")
def token_losses(
    states_BxTxD: jax.Array,
    head_DxV: jax.Array,
    batch: Mapping[str, jax.Array],
    teacher: tuple[jax.Array, jax.Array] | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> LossSums:
    """Computes cross-entropy, z and accuracy of the targets, weighted by their loss weights.

    The logits are states @ head, in float32. A device computes the logits of its rows and its part
    of the vocabulary, in chunks of tokens that take at most LOGITS_BYTES. The backward pass
    computes them again.

    Args:
      states_BxTxD: decoder states.
      head_DxV: output projection.
      batch: has decoder_target_tokens and decoder_loss_weights, [B, T].
      teacher: states and head of the teacher, of any width, for the soft cross-entropy; it has no
        gradient.
      temperature: of both models' probabilities in the soft cross-entropy,
        softmax(logits / temperature).
      label_smoothing: above 0, `LossSums.uniform` is computed.
    """
    models = [(states_BxTxD, head_DxV), *([teacher] if teacher else [])]

    def device_losses(states, heads, target_BxT, weight_BxT):
        # One axis N of tokens instead of B and T: XLA's CPU compiler would transpose the gradient
        # of logits [B, T, V], and this function would take two to three times as long.
        states = [pvary(x.reshape(-1, x.shape[-1]), "model") for x in states]
        target_N, weight_N = target_BxT.reshape(-1), weight_BxT.reshape(-1)
        N, V = target_N.size, heads[0].shape[1]
        chunks = min(math.ceil(len(states) * N * V * 4 / LOGITS_BYTES), N)
        # pvary is outside the loop, so that the gradient is summed over devices once.
        heads = [pvary(head_DxV, BATCH_AXES) for head_DxV in heads]

        def chunk_sums(states, target_N, weight_N) -> LossSums:
            logits = [
                jnp.dot(states_NxD, head_DxV, preferred_element_type=jnp.float32)
                for states_NxD, head_DxV in zip(states, heads)
            ]
            sums = _device_sums(logits[0], target_N, weight_N, label_smoothing > 0)
            if teacher is None:
                return sums
            soft_N = _soft_cross_entropy(*(logits_NxV / temperature for logits_NxV in logits))
            return sums._replace(soft=jnp.sum(weight_N * soft_N))

        def add_chunk(total: LossSums, arrays: tuple) -> tuple[LossSums, None]:
            return jax.tree.map(jnp.add, total, chunk_sums(*arrays)), None

        if chunks == 1:
            sums = chunk_sums(states, target_N, weight_N)
        else:
            zero = pvary(jnp.zeros(()), BATCH_AXES)
            zeros = LossSums(
                *(zero, zero, zero),
                soft=None if teacher is None else zero,
                uniform=zero if label_smoothing > 0 else None,
            )
            parts = jax.tree.map(lambda x: _split_chunks(x, chunks), (states, target_N, weight_N))
            sums, _ = jax.lax.scan(jax.checkpoint(add_chunk, prevent_cse=False), zeros, parts)
        return jax.tree.map(lambda x: psum(x, BATCH_AXES), sums)

    rows, replicated = partition_spec(("batch",)), partition_spec(())
    in_specs = (rows, partition_spec((None, "vocab")), rows, rows)
    targets = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    states, heads = zip(*models)
    return shard_map(device_losses, in_specs=in_specs, out_specs=replicated)(
        states, heads, *targets
    )


def row_cross_entropy(
    states_BxTxD: jax.Array, head_DxV: jax.Array, batch: Mapping[str, jax.Array]
) -> jax.Array:
    """[B] float32, nats: sum of each row's cross-entropy, weighted by loss weights."""

    def device_losses(states_BxTxD, head_DxV, target_BxT, weight_BxT):
        states_NxD = pvary(states_BxTxD.reshape(-1, states_BxTxD.shape[-1]), "model")
        head_DxV = pvary(head_DxV, BATCH_AXES)
        logits_NxV = jnp.dot(states_NxD, head_DxV, preferred_element_type=jnp.float32)
        log_z_N, _, target_logit_N = _logit_terms(logits_NxV, target_BxT.reshape(-1))
        loss_BxT = (log_z_N - target_logit_N).reshape(target_BxT.shape)
        return jnp.sum(weight_BxT * loss_BxT, -1)

    rows = partition_spec(("batch",))
    in_specs = (rows, partition_spec((None, "vocab")), rows, rows)
    targets = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    return shard_map(device_losses, in_specs=in_specs, out_specs=rows)(
        states_BxTxD, head_DxV, *targets
    )


def _device_sums(
    logits_NxV: jax.Array, target_N: jax.Array, weight_N: jax.Array, with_uniform: bool
) -> LossSums:
    """Computes sums over N tokens of a device; V is its part of the vocabulary."""
    log_z_N, largest_N, target_logit_N = _logit_terms(logits_NxV, target_N)
    uniform = None
    if with_uniform:
        vocabulary_size = logits_NxV.shape[-1] * axis_size("model")
        mean_logit_N = psum(logits_NxV.sum(-1), "model") / vocabulary_size
        uniform = jnp.sum(weight_N * (log_z_N - mean_logit_N))
    return LossSums(
        cross_entropy=jnp.sum(weight_N * (log_z_N - target_logit_N)),
        z=jnp.sum(weight_N * log_z_N**2),
        correct=jnp.sum(weight_N * (target_logit_N >= largest_N)),
        uniform=uniform,
    )


def _logit_terms(
    logits_NxV: jax.Array, target_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns logsumexp of the logits, the largest logit and the target's logit, [N] each."""
    V = logits_NxV.shape[-1]
    _, z_N, largest_N = _shifted_exp(logits_NxV)
    log_z_N = jnp.log(z_N) + largest_N
    # A masked sum instead of an index, because only one device has the target's logit.
    vocabulary_V = V * axis_index("model") + jnp.arange(V, dtype=target_N.dtype)
    at_target = vocabulary_V == target_N[..., None]
    target_logit_N = psum(jnp.sum(jnp.where(at_target, logits_NxV, 0), -1), "model")
    return log_z_N, largest_N, target_logit_N


def _soft_cross_entropy(student_NxV: jax.Array, teacher_NxV: jax.Array) -> jax.Array:
    """[N] nats: -Σ p log q over the vocabulary, p = softmax(teacher), q = softmax(student).

    The gradient is with respect to the student's logits only.
    """
    p_NxV, p_z_N, _ = _shifted_exp(jax.lax.stop_gradient(teacher_NxV))
    _, q_z_N, q_largest_N = _shifted_exp(student_NxV)
    # log q = logit - log z, and Σ p = 1.
    mean_logit_N = psum(jnp.sum(p_NxV * student_NxV, -1), "model") / p_z_N
    return jnp.log(q_z_N) + q_largest_N - mean_logit_N


def _shifted_exp(logits_NxV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns exp(logits - largest), its sum over the whole vocabulary, and the largest logit."""
    largest_N = pmax(jax.lax.stop_gradient(logits_NxV.max(-1)), "model")
    exp_NxV = jnp.exp(logits_NxV - largest_N[..., None])
    return exp_NxV, psum(exp_NxV.sum(-1), "model"), largest_N


def _split_chunks(x_N: jax.Array, chunks: int) -> jax.Array:
    """[N, ..] → [chunks, ⌈N / chunks⌉, ..], padded with zeros."""
    N, *rest = x_N.shape
    padding = [(0, -N % chunks), *[(0, 0)] * len(rest)]
    return jnp.pad(x_N, padding).reshape(chunks, -1, *rest)


def loss_terms(
    sums: LossSums,
    stats: RouterStatsByStack,
    denominators: LossDenominators,
    config: Config,
    soft_weight: jax.Array | float = 0.0,
    first_choices: Mapping[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """Computes the terms of the training loss, weights included; their sum is the loss.

    Args:
      sums: of a batch or a microbatch.
      stats: of the same tokens.
      denominators: of the global batch.
      config: of the run.
      soft_weight: of the teacher's probabilities.
      first_choices: first choices of every expert in the global batch, [layers, E] by key of
        `stats`, which `moe.balance_scope=batch` uses; None: those of `stats`.

    `distillation` is soft_weight · T² · soft cross-entropy (T: temperature), and `cross_entropy`
    has the weight 1 - soft_weight. The gradient of the soft cross-entropy shrinks as 1 / T²; the
    factor T² compensates it, so that the temperature does not change the balance of the two terms
    (Hinton et al. 2015, §2, and `StudentTeacher` of Mesh TensorFlow).

    With `train.label_smoothing` ε, a target has the probability 1 - ε + ε / V instead of 1, and
    every other piece ε / V (Szegedy et al. 2016, §7).

    `aux_loss` is α · mean over groups of N Σ f·P, summed over layers (paper, eq. 4); with
    `moe.balance_scope=batch`, f and P are shares of the global batch (Qiu et al. 2025). It is 0 for
    expert choice, which is balanced by construction, and for hash routing, which is not trained.
    """
    moe, targets = config.moe, jnp.maximum(denominators.targets, 1)
    cross_entropy = sums.cross_entropy
    if sums.uniform is not None:
        smoothing = config.train.label_smoothing
        cross_entropy = (1 - smoothing) * cross_entropy + smoothing * sums.uniform
    terms = {
        "cross_entropy": cross_entropy / targets,
        "z_loss": config.train.z_loss_weight * sums.z / targets,
    }
    if sums.soft is not None:
        terms["cross_entropy"] *= 1 - soft_weight
        terms["distillation"] = soft_weight * config.distill.temperature**2 * sums.soft / targets
    if not stats:
        return terms
    layers = sum(s.tokens.shape[0] for s in stats.values())
    scale = 1 / layers if moe.aux_loss_reduction == "mean" else 1.0
    alpha = 0.0 if moe.router in ("expert_choice", "hash") else moe.aux_loss_weight

    def over_layers(sums: dict[str, jax.Array], by_stack: dict[str, jax.Array]) -> jax.Array:
        parts = [
            jnp.sum(x) / jnp.maximum(by_stack[key.split("/")[0]], 1) for key, x in sums.items()
        ]
        return jnp.sum(jnp.stack(parts))

    z_loss = over_layers({key: s.z_loss for key, s in stats.items()}, denominators.tokens)
    if moe.balance_scope == "group":
        balance = {key: s.balance_loss for key, s in stats.items()}
        balance_loss = over_layers(balance, denominators.groups)
    else:
        balance = _batch_balance(stats, first_choices or first_choice_counts(stats))
        balance_loss = over_layers(balance, denominators.tokens)
    terms["aux_loss"] = scale * alpha * balance_loss
    terms["router_z_loss"] = scale * moe.z_loss_weight * z_loss
    return terms


def first_choice_counts(stats: RouterStatsByStack) -> dict[str, jax.Array]:
    """Returns the first choices of every expert, [layers, E] by key of `stats`."""
    return {key: s.first_choices_E for key, s in stats.items()}


def _batch_balance(
    stats: RouterStatsByStack, first_choices: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """[layers] by key of `stats`: Σ over tokens of N Σ f·p, f over the global batch.

    It is linear in p, so that the sums of microbatches add up, and f has no gradient.
    """
    sums = {}
    for key, s in stats.items():
        count_xE = first_choices[key]
        share_xE = count_xE / jnp.maximum(count_xE.sum(-1, keepdims=True), 1)
        sums[key] = share_xE.shape[-1] * jnp.sum(share_xE * s.probs_E, -1)
    return sums


def router_metrics(stats: RouterStatsByStack, config: Config) -> dict[str, jax.Array]:
    """Computes metrics of every sparse layer and their means over layers.

    In `router/<stack>/<layer>/<name>` all layers of the stack are counted from 0; experts in
    self-attention have `router/<stack>/<layer>/attention/<name>`. `router/<stack>/<name>` are means
    over the layers of a stack, and `router/<name>` over all layers. Loads are in units of a fair
    share: 1 everywhere is perfect balance.
    """
    metrics: dict[str, jax.Array] = {}
    values_of_mean: dict[str, list[jax.Array]] = {}
    for key, stacked in stats.items():
        stack = key.split("/")[0]
        for i, layer in enumerate(sparse_layer_names(key, config)):
            for name, value in _layer_metrics(jax.tree.map(lambda x: x[i], stacked)).items():  # noqa: B023
                metrics[f"router/{layer}/{name}"] = value
                for mean in (f"router/{name}", f"router/{stack}/{name}"):
                    values_of_mean.setdefault(mean, []).append(value)
    return metrics | {name: jnp.mean(jnp.stack(values)) for name, values in values_of_mean.items()}


def sparse_layer_names(key: str, config: Config) -> list[str]:
    """Returns the names of the layers that are stacked under a key of `RouterStatsByStack`.

    A name is `<stack>/<layer>`, or `<stack>/<layer>/attention` for experts in self-attention.
    """
    stack, sublayer = key.split("/")
    suffix = {"mlp": "", "self_attention": "/attention"}[sublayer]
    return [f"{stack}/{layer}{suffix}" for layer in config.sparse_layers(stack)]


def _layer_metrics(stats: RouterStats) -> dict[str, jax.Array]:
    """Computes the metrics of one layer: means over its tokens, and its loads."""
    tokens = jnp.maximum(stats.tokens, 1)
    load_E = stats.load_E * stats.load_E.shape[0] / jnp.maximum(stats.load_E.sum(), 1)
    return {
        "load_max": load_E.max(),
        "load_min": load_E.min(),
        "load_cv": load_E.std(),  # coefficient of variation: the mean is 1
        "dropped_fraction": stats.dropped / tokens,
        "entropy": stats.entropy / tokens,
        "confidence": stats.confidence / tokens,
        "z": stats.z_loss / tokens,
    }
