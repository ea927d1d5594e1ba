"""Distillation of a fine-tuned Switch-Base into T5-Base on SuperGLUE (paper, Table 8).

    switch-jax train --workdir runs/superglue_distilled --config.data.data_dir=DIR \\
        --config configs/distill/superglue_to_t5_base.py:teacher=runs/superglue/checkpoints/9800

The teacher is the best checkpoint of `configs/finetune.py:task=superglue`, which prints its path.
The student starts from a pretrained T5-Base, `student`; the paper does not give its initialisation.
"""

from ml_collections import ConfigDict

from switch_jax.config import parse_arg, read_config_file


def get_config(arg: str = "") -> ConfigDict:
    """`teacher` (runs/superglue) and `student` (runs/t5_base): WORKDIRs or checkpoints."""
    args = parse_arg(arg, teacher="runs/superglue", student="runs/t5_base")
    config = read_config_file("finetune:task=superglue,num_experts=0")
    config.init_model = "config"  # T5-Base, wherever its parameters come from
    config.init_from, config.distill.teacher = args.student, args.teacher
    return config
