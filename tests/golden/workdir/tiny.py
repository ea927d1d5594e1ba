"""Tiny: the config of the golden WORKDIR beside it, read from the folder that this file is in."""

from ml_collections import ConfigDict

from switch_jax.config import defaults


def get_config(arg: str = "") -> ConfigDict:
    config = defaults()
    config.model.update(
        vocab_size=640,
        d_model=8,
        d_ff=16,
        num_heads=2,
        head_dim=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
        dropout_rate=0.1,
        dtype="float32",
        init_scale=1.0,
    )
    config.moe.update(num_experts=4, every=1, min_capacity=1, group_size=32, jitter=0.01)
    config.data.update(
        mixture="text", data_dir="store", inputs_length=32, targets_length=11, batch_size=4
    )
    config.optimizer.update(warmup_steps=10)
    config.train.update(
        steps=4, log_every=1, eval_every=2, eval_batches=2, checkpoint_every=2, keep_checkpoints=1
    )
    config.mesh.data = 1
    return config
