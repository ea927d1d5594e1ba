"""T5-Base, taught by Switch-Base while it is pretrained (the paper's Tables 6 and 7).

    switch-jax train --config configs/distill/switch_to_t5_base.py:teacher=runs/switch_base \\
        --workdir runs/distilled --config.data.data_dir=DIR

The student begins with the teacher's weights wherever it has the same ones, which is everywhere
but in the feed-forward layers that are sparse there, and a quarter of its loss is the teacher's.
`init_from=none` begins anew, `distill.soft_weight=0` begins so and learns alone. Table 6 is
`configs/sweeps/distill.py`.
"""

from ml_collections import ConfigDict

from switch_jax.config import defaults, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """`teacher` ('runs/switch_base'): a WORKDIR, one of its checkpoints, or a foreign folder."""
    args = parse_arg(arg, teacher="runs/switch_base")
    config = defaults()
    config.data.update(mixture="c4", reader="seqio")
    config.init_from = config.distill.teacher = args.teacher
    return config
