"""ARC, easy and challenge: questions with choices.

    switch-jax train --config configs/finetune/arc.py:num_experts=64 \\
        --workdir runs/arc \\
        --config.init_from=runs/switch_base --config.data.data_dir=DIR

DIR has the data as TFDS prepares it, or in files: see docs/finetune.md. The model is Switch-Base;
change model.* and moe.* to what init_from was trained with.
"""

from ml_collections import ConfigDict

from switch_jax.config import fine_tuning, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """`num_experts` (128; 0 for T5-Base)."""
    config = fine_tuning(parse_arg(arg, num_experts=128).num_experts)
    config.data.update(mixture="arc", inputs_length=512, targets_length=128, batch_size=2048)
    return config
