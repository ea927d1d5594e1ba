"""Distillation of the quickstart's model into its dense counterpart: minutes on two CPU cores.

    bash scripts/quickstart.sh
    switch-jax train --config configs/distill/mini.py --workdir runs/distilled

Steps and data are those of `configs/switch_mini.py:num_experts=0`, for comparison.
"""

from ml_collections import ConfigDict

from switch_jax.config import parse_arg, read_config_file


def get_config(arg: str = "") -> ConfigDict:
    """`teacher` ('runs/quickstart'): a WORKDIR, or one of its checkpoints."""
    args = parse_arg(arg, teacher="runs/quickstart")
    config = read_config_file("switch_mini:num_experts=0")
    config.init_from = config.distill.teacher = args.teacher
    return config
