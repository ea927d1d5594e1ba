"""Configs and batches of tiny models."""

from typing import Any

import numpy as np

from switch_jax.config import Config, config_from_dict, defaults
from switch_jax.data.batch import ProcessRows, shift_right

TINY_MODEL = {
    "model.d_model": 16,
    "model.d_ff": 32,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "model.num_encoder_layers": 2,
    "model.num_decoder_layers": 2,
    "model.dtype": "float32",
    "moe.num_experts": 4,
}
_TINY = {
    **TINY_MODEL,
    "model.vocab_size": 32,
    "moe.min_capacity": 1,
    "moe.group_size": 16,
    "data.inputs_length": 16,
    "data.targets_length": 8,
    "data.batch_size": 16,
    "optimizer.learning_rate": 0.1,
    "optimizer.warmup_steps": 4,
    "train.steps": 100,
}


def tiny(**overrides: Any) -> Config:
    """Returns the config of a model of a few thousand parameters; `overrides` by dotted key."""
    raw = defaults().to_dict()
    for key, value in (_TINY | overrides).items():
        group, name = key.split(".")
        assert name in raw[group], key
        raw[group][name] = value
    return config_from_dict(raw)


def share(index: int, count: int) -> ProcessRows:
    """Returns the rows of process `index` where `count` processes split a batch equally."""
    return ProcessRows(count, (index,), index, count)


def make_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a global batch of random tokens, with padding in most rows.

    With `data.pack` a row has two documents of random lengths, then padding.
    """
    rng = np.random.default_rng(seed)
    data, B = config.data, config.data.batch_size
    batch, tokens, masks = {}, {}, {}
    for stack, L in (("encoder", data.inputs_length), ("decoder", data.targets_length)):
        length_B = rng.integers(L // 2, L, B, endpoint=True)
        start_B = length_B // 2  # first position of the second document
        position_L = np.arange(L)
        masks[stack] = position_L < length_B[:, None]
        second_BxL = position_L >= start_B[:, None]
        tokens[stack] = rng.integers(1, config.model.vocab_size, (B, L), dtype=np.int32)
        tokens[stack] *= masks[stack]
        if data.pack:
            ids = np.where(masks[stack], 1 + second_BxL, 0)
            positions = np.where(masks[stack], position_L - second_BxL * start_B[:, None], 0)
            batch[f"{stack}_segment_ids"] = ids.astype(np.int32)
            batch[f"{stack}_positions"] = positions.astype(np.int32)
    return batch | {
        "encoder_input_tokens": tokens["encoder"],
        "decoder_input_tokens": shift_right(tokens["decoder"], 0, batch.get("decoder_positions")),
        "decoder_target_tokens": tokens["decoder"],
        "decoder_loss_weights": masks["decoder"].astype(np.float32),
    }
