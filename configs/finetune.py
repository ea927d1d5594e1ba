"""Fine-tuning on a task, with the recipe of the paper (§4.1, §5.6).

    switch-jax train --config configs/finetune.py:task=glue --workdir runs/glue \\
        --config.init_from=runs/switch_base --config.data.data_dir=DIR

DIR has the data as it is downloaded: see docs/finetune.md. The model is that of init_from. Your own
pairs of inputs and targets:

    switch-jax train --config configs/finetune.py:task=pairs --workdir runs/mine \\
        --config.init_from=runs/switch_base --config.data.mixture='pairs:/mine/{split}.jsonl'
"""

from ml_collections import ConfigDict

from switch_jax.config import defaults, parse_arg
from switch_jax.errors import UserError

# By task: mixture, tokens of inputs and targets, sequences per batch (2^20 input tokens).
TASKS = {
    "glue": ("glue", 512, 84, 2048),  # eight tasks in proportion to their examples, without WNLI
    "superglue": ("super_glue", 512, 62, 2048),  # and Definite Pronoun Resolution for WSC
    "squad": ("squad", 512, 97, 2048),  # SQuAD 1.1
    "cnn_dailymail": ("cnn_dailymail", 512, 512, 2048),
    "xsum": ("xsum", 512, 128, 2048),
    "wmt_ende": ("wmt.ende", 512, 512, 2048),  # T5's translations from English
    "wmt_enfr": ("wmt.enfr", 512, 512, 2048),
    "wmt_enro": ("wmt.enro", 512, 512, 2048),
    "winogrande": ("winogrande.xl", 128, 32, 8192),
    "anli": ("anli", 512, 84, 2048),  # three rounds; the paper reports the third
    "arc": ("arc", 512, 128, 2048),  # easy and challenge
    # Natural Questions, WebQuestions and TriviaQA without a context.
    "closed_book_qa": ("closed_book", 128, 32, 8192),
    "pairs": ("pairs:./{split}.jsonl", 512, 114, 2048),
}


def get_config(arg: str = "") -> ConfigDict:
    """`task` (glue), `num_experts` (0: those of init_from; else of a dense one, upcycled)."""
    args = parse_arg(arg, task="glue", num_experts=0)
    if args.task not in TASKS:
        raise UserError(f"There is no task {args.task!r}; use one of {', '.join(TASKS)}.")
    mixture, inputs_length, targets_length, batch_size = TASKS[args.task]
    config = defaults()
    config.init_model = "checkpoint"
    config.model.dropout_rate = 0.1
    config.moe.update(num_experts=args.num_experts, expert_dropout_rate=0.4)
    config.data.update(
        mixture=mixture,
        inputs_length=inputs_length,
        targets_length=targets_length,
        batch_size=batch_size,
        pack=True,
    )
    config.optimizer.update(schedule="constant", learning_rate=1e-3, warmup_steps=0)
    config.train.update(steps=16_000, eval_every=200, checkpoint_every=200, keep_best="average")
    return config
