"""T5-Base, taught SuperGLUE by a Switch-Base that was fine-tuned on it (the paper's Table 8).

    switch-jax train --workdir runs/superglue_distilled --config.data.data_dir=DIR \\
        --config configs/distill/superglue_to_t5_base.py:teacher=runs/superglue/checkpoints/9800

The teacher is the checkpoint that `configs/finetune/superglue.py` ends by naming as its best one.
The student begins as a pretrained T5-Base, `student`; of how it began in the paper nothing is told.
"""

from ml_collections import ConfigDict

from switch_jax.config import fine_tuning, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """`teacher` ('runs/superglue'), `student` ('runs/t5_base'): WORKDIRs, or checkpoints."""
    args = parse_arg(arg, teacher="runs/superglue", student="runs/t5_base")
    config = fine_tuning(num_experts=0)
    config.init_from, config.distill.teacher = args.student, args.teacher
    config.data.update(mixture="super_glue", inputs_length=512, targets_length=62, batch_size=2048)
    return config
