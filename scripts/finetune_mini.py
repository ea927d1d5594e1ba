"""Fine-tunes the quickstart's model on a task made of its text, against the same from scratch.

    bash scripts/quickstart.sh
    .venv/bin/python scripts/finetune_mini.py [--output runs/finetune_mini]

A line of the standard library lost a Python keyword, and the model writes which one: 3,000 examples
for training and 600 for validation, these from documents that pretraining held out.
Draws docs/images/finetune_mini.png. About 6 minutes on two CPU cores.
"""

import argparse
import json
import keyword
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from switch_jax import cli
from switch_jax.data import python_docs

ROOT = Path(__file__).parent.parent
FIGURE = ROOT / "docs" / "images" / "finetune_mini.png"
QUICKSTART = ROOT / "runs" / "quickstart"

EXAMPLES = {"train": 3000, "validation": 600}
LETTERS = 80  # of context on either side

COMMON = {
    "data.inputs_length": 64,
    "data.targets_length": 8,
    "data.batch_size": 32,
    "model.dropout_rate": 0.1,
    "moe.expert_dropout_rate": 0.4,
    "train.steps": 300,
    "train.eval_every": 50,
    "train.checkpoint_every": 50,
    "train.keep_checkpoints": 1,
    "train.keep_best": "pairs.keyword/score",
}
# The quickstart's model has seen more steps than these; from scratch, it may learn as fast as in
# pretraining, or as slowly as in fine-tuning.
FINE_TUNING = {
    "optimizer.schedule": "constant",
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 0,
    "optimizer.cooldown_steps": 0,
}
PRETRAINING = {"optimizer.cooldown_steps": 100}
RUNS = {
    "pretrained": {**FINE_TUNING, "init_from": QUICKSTART},
    "from_scratch": PRETRAINING,
    "from_scratch_slowly": FINE_TUNING,
}


def gaps(text: str) -> Iterator[dict[str, str]]:
    """Every keyword of a text, cut out of its surroundings."""
    for found in re.finditer(rf"\b({'|'.join(keyword.kwlist)})\b", text):
        begin, end = found.span()
        before, after = text[max(0, begin - LETTERS) : begin], text[end : end + LETTERS]
        yield {"inputs": f"{before}<extra_id_0>{after}", "targets": f"<extra_id_0> {found[0]}"}


def write_examples(folder: Path) -> dict[str, Counter]:
    """Examples of either split, in which a keyword is at most a tenth; their counts by keyword."""
    rng = random.Random(0)
    counts = {}
    for split, number in EXAMPLES.items():
        pool = [
            gap
            for document in python_docs.documents()
            if python_docs.held_out(document.path) == (split == "validation")
            for gap in gaps(document.text)
        ]
        rng.shuffle(pool)
        taken: Counter = Counter()
        lines = []
        for gap in pool:
            if len(lines) < number and taken[gap["targets"]] < number // 10:
                taken[gap["targets"]] += 1
                lines.append(json.dumps(gap) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.jsonl").write_text("".join(lines))
        counts[split] = taken
    return counts


def run(*arguments: object) -> None:
    code = cli.main([*map(str, arguments)])
    if code:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "finetune_mini")
    output = parser.parse_args().output
    counts = write_examples(output / "keyword")
    data = {
        "data.mixture": f"pairs:{output}/keyword/{{split}}.jsonl",
        "data.vocabulary": QUICKSTART / "vocabulary.model",
    }
    mini = ROOT / "configs" / "switch_mini.py"
    for name, own in RUNS.items():
        settings = [f"--config.{k}={v}" for k, v in (COMMON | data | own).items()]
        run("train", "--config", mini, *settings, "--workdir", output / name)
    share = max(counts["validation"].values()) / sum(counts["validation"].values())
    print(f"The commonest keyword is {share:.1%} of the validation examples.")
    run("plot", "--workdir", *(output / name for name in RUNS), "--output", output / "figures")
    shutil.copy(output / "figures" / "tasks.png", FIGURE)


if __name__ == "__main__":
    main()
