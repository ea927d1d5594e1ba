"""GLUE: eight tasks in proportion to their examples, without WNLI.

    switch-jax train --config configs/finetune/glue.py:num_experts=64 \\
        --workdir runs/glue \\
        --config.init_from=runs/switch_base --config.data.data_dir=DIR

DIR has the data as TFDS prepares it, or in files: see docs/finetune.md. The model is Switch-Base;
change model.* and moe.* to what init_from was trained with.
"""

from ml_collections import ConfigDict

from switch_jax.config import defaults, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """`num_experts` (128; 0 for T5-Base)."""
    args = parse_arg(arg, num_experts=128)
    config = defaults()
    config.data.update(
        mixture="glue", pack=True, inputs_length=512, targets_length=84, batch_size=2048
    )
    # The paper's recipe: 2^20 tokens a batch for 16k steps, evaluated every 200; more dropout in
    # experts than elsewhere.
    config.model.dropout_rate = 0.1
    config.moe.update(
        num_experts=args.num_experts, expert_dropout_rate=0.4 * (args.num_experts > 0)
    )
    config.optimizer.update(schedule="constant", learning_rate=1e-3, warmup_steps=0)
    config.train.update(steps=16_000, eval_every=200, checkpoint_every=200, keep_best="average")
    return config
