"""The quickstart's dense model, taught by its sparse one: minutes on two CPU cores.

    bash scripts/quickstart.sh
    switch-jax train --config configs/distill/mini.py --workdir runs/distilled

As long, and on the same data, as `configs/switch_mini.py:num_experts=0`, to compare with.
"""

from ml_collections import ConfigDict

from switch_jax.config import parse_arg, read_config_file


def get_config(arg: str = "") -> ConfigDict:
    """`teacher` ('runs/quickstart'): a WORKDIR, or one of its checkpoints."""
    args = parse_arg(arg, teacher="runs/quickstart")
    config = read_config_file("switch_mini:num_experts=0")
    config.init_from = config.distill.teacher = args.teacher
    return config
