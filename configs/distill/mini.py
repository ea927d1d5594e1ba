"""The quickstart's dense model, taught by its sparse one: minutes on two CPU cores.

    bash scripts/quickstart.sh
    switch-jax train --config configs/distill/mini.py --workdir runs/distilled

As long, and on the same data, as `configs/switch_mini.py:num_experts=0`, to compare with.
"""

from ml_collections import ConfigDict

from switch_jax.config import defaults, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """`teacher` ('runs/quickstart'): a WORKDIR, or one of its checkpoints."""
    args = parse_arg(arg, teacher="runs/quickstart")
    config = defaults()
    config.init_from = config.distill.teacher = args.teacher
    # The rest is configs/switch_mini.py without experts; groups are of the teacher's tokens.
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
    config.moe.group_size = 128
    config.data.update(inputs_length=128, targets_length=29, batch_size=16)
    config.optimizer.update(warmup_steps=100, cooldown_steps=250)
    config.train.update(
        steps=600, log_every=10, eval_every=200, eval_batches=8, checkpoint_every=200
    )
    return config
