"""Distillation of a pretrained Switch-Base into T5-Base during pretraining (paper, Tables 6 and 7).

    switch-jax train --config configs/distill/switch_to_t5_base.py:teacher=runs/switch_base \\
        --workdir runs/distilled --config.data.data_dir=DIR

The student is initialised with the teacher's non-expert weights: all parameters except the
feed-forward layers that have experts in the teacher. A quarter of its loss comes from the teacher's
probabilities. `init_from=none` initialises it randomly; `distill.soft_weight=0` trains without the
teacher. Table 6 is `configs/sweeps/distill.py`.
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
