"""Switch-Small: T5-Small with experts, the model of sweeps of size=gpu on one GPU.

python scripts/data/package_text.py
switch-jax train --config configs/switch_small.py:num_experts=16 --workdir runs/small

The first line packs the text of the installed Python packages.
"""

from ml_collections import ConfigDict

from switch_jax.config import defaults, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """`num_experts` (32; 0 for the FLOP-matched dense model), `large` (0; 1: about 3.5 times the
    FLOPs a token, as T5-Large compared with T5-Base)."""
    args = parse_arg(arg, num_experts=32, large=0)
    config = defaults()
    config.model.update(
        vocab_size=8192,
        d_model=512,
        d_ff=2048,
        num_heads=8,
        num_encoder_layers=6,
        num_decoder_layers=6,
    )
    if args.large:
        config.model.update(
            d_model=768, d_ff=3072, num_heads=12, num_encoder_layers=10, num_decoder_layers=10
        )
    # As in switch_tiny: initial router logits of standard deviation 1.
    config.moe.update(
        num_experts=args.num_experts,
        balance_scope="batch",
        router_init_std=config.model.d_model**-0.5,
    )
    config.data.update(
        mixture="python,c,stubs,cython,english",
        data_dir="runs/packages",
        inputs_length=256,
        targets_length=58,
        batch_size=128,
    )
    config.optimizer.update(warmup_steps=1000, cooldown_steps=1000)
    config.train.update(
        steps=4000,
        log_every=50,
        eval_every=200,
        eval_batches=16,
        checkpoint_every=1000,
        keep_checkpoints=1,
    )
    return config
