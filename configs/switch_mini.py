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
        d_model=64,
        d_ff=256,
        num_heads=2,
        head_dim=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        dtype="float32",
    )
    # Initial router logits of standard deviation 1, so that gates do not begin at 1 / E.
    config.moe.update(
        num_experts=arg.num_experts,
        balance_scope="batch",
        router_init_std=config.model.d_model**-0.5,
    )
    config.data.update(inputs_length=128, targets_length=29, batch_size=64)
    config.optimizer.update(warmup_steps=100, cooldown_steps=400)
    config.train.update(
        steps=1600, log_every=20, eval_every=200, eval_batches=8, checkpoint_every=400
    )
    return config
