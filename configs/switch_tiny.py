"""Switch-Tiny: the model of sweeps of size=mini, trained in a minute or two on two CPU cores.

switch-jax train --config configs/switch_tiny.py:num_experts=4 --workdir runs/tiny
"""

from ml_collections import ConfigDict

from switch_jax.config import defaults, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """`num_experts` (16; 0 for the FLOP-matched dense model), `large` (0; 1: about 3.5 times the
    FLOPs a token, as T5-Large compared with T5-Base)."""
    args = parse_arg(arg, num_experts=16, large=0)
    config = defaults()
    config.model.update(
        vocab_size=4096,
        d_model=64,
        d_ff=256,
        num_heads=4,
        head_dim=16,
        num_encoder_layers=2,
        num_decoder_layers=2,
        dtype="float32",
    )
    if args.large:
        config.model.update(d_model=128, d_ff=512, num_heads=8)
    config.moe.update(num_experts=args.num_experts, group_size=1024)
    config.data.update(inputs_length=128, targets_length=29, batch_size=16)
    config.optimizer.update(warmup_steps=100, cooldown_steps=200)
    config.train.update(
        steps=800,
        log_every=20,
        eval_every=50,
        eval_batches=16,
        checkpoint_every=200,
        keep_checkpoints=1,
    )
    return config
