"""Switch-Mini: the model of the quickstart, trained in minutes on two CPU cores.

switch-jax train --config configs/switch_mini.py --workdir runs/mini
"""

from ml_collections import ConfigDict

from switch_jax.config import defaults, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """`num_experts` (8; 0 for the FLOP-matched dense model)."""
    arg = parse_arg(arg, num_experts=8)
    config = defaults()
    config.model.update(
        vocab_size=4096,
        d_model=128,
        d_ff=512,
        num_heads=4,
        head_dim=32,
        num_encoder_layers=4,
        num_decoder_layers=4,
        dtype="float32",
    )
    config.moe.update(num_experts=arg.num_experts, group_size=128)
    config.data.update(inputs_length=128, targets_length=29, batch_size=16)
    config.optimizer.update(warmup_steps=100, cooldown_steps=250)
    config.train.update(
        steps=600, log_every=10, eval_every=200, eval_batches=8, checkpoint_every=200
    )
    return config
