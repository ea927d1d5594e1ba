"""The three sizes that sweeps come in, from two CPU cores to the paper's own settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from switch_jax.config import flatten_config, load_config
from switch_jax.errors import UserError
from switch_jax.sweeps import SweepRun


@dataclasses.dataclass(frozen=True)
class Size:
    """Models of one size: T5-Base, T5-Large and Switch-Base of the paper, or what stands for them.

    `dense` is FLOP-matched to `switch`, and `large` to `large_switch`, which takes three to four
    times as many FLOPs a token.
    """

    dense: SweepRun
    large: SweepRun
    large_switch: SweepRun
    sparse: str  # config of `switch`, without its argument
    experts: tuple[int, ...]  # numbers of them that a curve over experts has
    usual: int  # experts where a sweep does not vary them
    fewer: int  # where the paper has 32 in place of 128
    seeds: tuple[int, ...]
    plus: Mapping[str, Any]  # overrides that widen Switch-Base to Switch-Base+
    short: Mapping[str, Any]  # overrides for runs that are many, or fine-tuned afterwards
    task: Mapping[str, Any]  # overrides of the fine-tuning configs
    tasks: tuple[str, ...]  # the fine-tuning configs there is data for

    def switch(self, num_experts: int | None = None) -> SweepRun:
        """The sparse model with so many experts, or as many as usual."""
        return SweepRun(f"{self.sparse}:num_experts={num_experts or self.usual}")


# Replaces the paper's tasks at sizes mini and gpu; `scripts/data/keyword_task.py` writes its data.
_KEYWORD = {
    "data.mixture": "pairs:runs/keyword/{split}.jsonl",
    "data.data_dir": None,
    "data.inputs_length": 64,
    "data.targets_length": 8,
    "data.pack": False,
    "train.eval_every": 50,
    "train.checkpoint_every": 50,
    "train.keep_checkpoints": 1,
}
SIZES = {
    "mini": Size(
        dense=SweepRun("switch_tiny:num_experts=0"),
        large=SweepRun("switch_tiny:num_experts=0,large=1"),
        large_switch=SweepRun("switch_tiny:large=1"),
        sparse="switch_tiny",
        experts=(4, 16, 64),
        usual=16,
        fewer=8,
        seeds=(0, 1),
        plus={"model.d_model": 75, "model.num_heads": 5},
        short={
            "train.steps": 150,
            "train.eval_every": 25,
            "train.checkpoint_every": 150,
            "optimizer.warmup_steps": 60,
            "optimizer.cooldown_steps": 60,
        },
        task={
            **_KEYWORD,
            "data.batch_size": 32,
            "train.steps": 150,
            "optimizer.learning_rate": 1e-2,
        },
        tasks=("pairs",),
    ),
    "gpu": Size(
        dense=SweepRun("switch_small:num_experts=0"),
        large=SweepRun("switch_small:num_experts=0,large=1"),
        large_switch=SweepRun("switch_small:large=1"),
        sparse="switch_small",
        experts=(4, 16, 64, 256),
        usual=32,
        fewer=8,
        seeds=(0, 1),
        plus={"model.d_model": 600, "model.num_heads": 9},
        short={},
        task={
            **_KEYWORD,
            "data.batch_size": 128,
            "train.steps": 500,
        },
        tasks=("pairs",),
    ),
    "paper": Size(
        dense=SweepRun("t5_base"),
        large=SweepRun("t5_large"),
        large_switch=SweepRun("switch_large"),
        sparse="switch_base",
        experts=(2, 4, 8, 16, 32, 64, 128, 256),
        usual=128,
        fewer=32,
        seeds=(0,),
        plus={"model.d_model": 896, "model.num_heads": 14},
        short={},
        task={},
        tasks=(
            "glue",
            "squad",
            "superglue",
            "winogrande",
            "xsum",
            "anli",
            "arc",
            "closed_book_qa",
            "cnn_dailymail",
        ),
    ),
}


def find_size(name: str) -> Size:
    """A size by name; raises `UserError` for one that there is not."""
    if name not in SIZES:
        raise UserError(f"There is no size {name!r}; use size={', size='.join(SIZES)}.")
    return SIZES[name]


def finetuned_run(upstream: str, run: SweepRun, size: Size, task: str) -> SweepRun:
    """Returns the fine-tuning of a run called `upstream` on a task of `finetune.py`.

    The model is that of `run`; dropout, data and schedule are the task's.
    """
    made = load_config(run.config, run.override_texts())
    spec = f"finetune:task={task},num_experts={made.moe.num_experts}"
    ours, theirs = flatten_config(made), flatten_config(load_config(spec))
    model = {
        key: value
        for key, value in ours.items()
        if key.startswith(("model.", "moe.")) and not key.endswith("dropout_rate")
        if value != theirs[key]
    }
    return SweepRun(spec, {**model, "init_from": f"{{run:{upstream}}}", **size.task})
