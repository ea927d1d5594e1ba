"""Compares fine-tuning with training from scratch on a task made of the corpus.

    .venv/bin/python scripts/docs/finetune_mini.py [--output runs/finetune_mini]

The task is that of `scripts/data/keyword_task.py`. `configs/switch_mini.py` is pretrained for 2,400
steps, then trained on the task from these parameters and from scratch. Draws
docs/images/finetune_mini.png. Finished runs are not repeated.
"""

import argparse
import shutil
import sys
from pathlib import Path

from switch_jax.cli import main as switch_jax_main

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "data"))

from keyword_task import write_examples  # noqa: E402

CONFIG = ROOT / "configs" / "switch_mini.py"
FIGURE = ROOT / "docs" / "images" / "finetune_mini.png"

PRETRAINING = {"train.steps": 2400, "train.log_every": 50}
TASK = {
    "data.inputs_length": 64,
    "data.targets_length": 8,
    "data.batch_size": 32,
    "model.dropout_rate": 0.1,
    "moe.expert_dropout_rate": 0.4,
    "train.steps": 200,
    "train.eval_every": 25,
    "train.checkpoint_every": 25,
    "train.keep_checkpoints": 1,
    "train.keep_best": "pairs.keyword/score",
}
CONSTANT = {
    "optimizer.schedule": "constant",
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 0,
    "optimizer.cooldown_steps": 0,
}
# From scratch, a model may learn as fast as in pretraining, or as slowly as in fine-tuning.
AS_IN_PRETRAINING = {"optimizer.cooldown_steps": 100}


def run(*arguments: object) -> None:
    code = switch_jax_main([*map(str, arguments)])
    if code:
        sys.exit(code)


def train(workdir: Path, settings: dict[str, object]) -> None:
    flags = (f"--config.{key}={value}" for key, value in settings.items())
    run("train", "--config", CONFIG, *flags, "--workdir", workdir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "finetune_mini")
    output = parser.parse_args().output
    pretraining = output / "pretraining"
    train(pretraining, PRETRAINING)
    share = write_examples(output / "keyword")
    task = TASK | {
        "data.mixture": f"pairs:{output}/keyword/{{split}}.jsonl",
        "data.vocabulary": pretraining / "vocabulary.model",
    }
    runs = {
        "pretrained": task | CONSTANT | {"init_from": pretraining},
        "from_scratch": task | AS_IN_PRETRAINING,
        "from_scratch_constant_rate": task | CONSTANT,
    }
    for name, settings in runs.items():
        train(output / name, settings)
    print(f"The commonest keyword is {share:.1%} of the validation examples.")
    run("plot", "--workdir", *(output / name for name in runs), "--output", output / "figures")
    shutil.copy(output / "figures" / "tasks.png", FIGURE)


if __name__ == "__main__":
    main()
