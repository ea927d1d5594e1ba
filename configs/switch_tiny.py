"""Switch-Tiny: the model of sweeps of size=mini, trained in minutes on one CPU core.

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
        vocab_size=1024,
        d_model=64,
        d_ff=64,
        num_heads=2,
        head_dim=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dtype="float32",
    )
    if args.large:
        config.model.update(d_model=128, d_ff=128, num_heads=4)
    # Initial router logits of standard deviation 1, so that gates do not begin at 1 / E; a z-loss,
    # without which they grow until routing no longer changes. In a decoder with five positions, two
    # fifths of the tokens are start tokens and sentinels, which share an expert: hence capacity 2.
    config.moe.update(
        num_experts=args.num_experts,
        every=1,
        capacity_factor=2.0,
        balance_scope="batch",
        router_init_std=config.model.d_model**-0.5,
        z_loss_weight=0.001,
    )
    # Rows with a single span. With several, the loss depends most on the step at which attention
    # learns to find the span of a sentinel, and that differs between seeds by hundreds of steps.
    config.data.update(
        mixture="python_docstrings", inputs_length=16, targets_length=5, batch_size=256
    )
    config.optimizer.update(warmup_steps=100)
    config.train.update(
        steps=4000,
        log_every=50,
        eval_every=200,
        eval_batches=16,
        checkpoint_every=1000,
        keep_checkpoints=1,
    )
    return config
