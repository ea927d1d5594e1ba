"""Winogrande XL: which of two nouns fills a gap.

    switch-jax train --config configs/finetune/winogrande.py:num_experts=64 \\
        --workdir runs/winogrande \\
        --config.init_from=runs/switch_base --config.data.data_dir=DIR

DIR has the data as TFDS prepares it, or in files: see docs/finetune.md. The model is Switch-Base;
change model.* and moe.* to what init_from was trained with.
"""

from ml_collections import ConfigDict

from switch_jax.config import fine_tuning, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """`num_experts` (128; 0 for T5-Base)."""
    config = fine_tuning(parse_arg(arg, num_experts=128).num_experts)
    config.data.update(
        mixture="winogrande.xl", inputs_length=128, targets_length=32, batch_size=8192
    )
    return config
