"""Model sizes of sweeps: `mini` (two CPU cores), `gpu` (one GPU) and `paper` (as in the paper)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from switch_jax.config import flatten_config, load_config
from switch_jax.errors import UserError
from switch_jax.sweeps import SweepRun


@dataclasses.dataclass(frozen=True)
class Size:
    """T5-Base, T5-Large, Switch-Base and Switch-Large of the paper, or small models in their place.

    `dense` has the FLOPs per token of `switch`. `large` has those of `large_switch`: three to four
    times as many.
    """

    dense: SweepRun
    large: SweepRun
    large_switch: SweepRun
    sparse: str  # preset of `switch`, without its argument
    experts: tuple[int, ...]  # numbers of experts in sweeps over this number
    usual: int  # number of experts in all other sweeps
    fewer: int  # number of experts for which the paper has 32 instead of 128
    seeds: tuple[int, ...]
    plus: Mapping[str, Any]  # overrides that widen Switch-Base to Switch-Base+
    short: Mapping[str, Any]  # overrides for sweeps of many runs, and for runs to fine-tune
    task: Mapping[str, Any]  # overrides of the fine-tuning configs
    tasks: tuple[str, ...]  # the fine-tuning configs there is data for

    def switch(self, num_experts: int | None = None) -> SweepRun:
        """Returns the sparse model with `num_experts` experts, by default `usual`."""
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
        experts=(2, 4, 8, 16, 64),
        usual=16,
        fewer=8,
        seeds=(0, 1, 2),
        plus={"model.d_model": 76},
        short={
            "train.steps": 1200,
            "train.eval_every": 100,
            "train.checkpoint_every": 1200,
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
    """Returns a size by name; raises `UserError` for an unknown name."""
    if name not in SIZES:
        raise UserError(f"There is no size {name!r}; use size={', size='.join(SIZES)}.")
    return SIZES[name]


def finetuned_run(upstream: str, run: SweepRun, size: Size, task: str) -> SweepRun:
    """Returns the fine-tuning of a run called `upstream` on a task of `finetune.py`.

    The model is that of `run`; dropout, data and schedule are the task's.
    """
    config = load_config(run.config, run.override_texts())
    spec = f"finetune:task={task},num_experts={config.moe.num_experts}"
    values, task_values = flatten_config(config), flatten_config(load_config(spec))
    model = {
        key: value
        for key, value in values.items()
        if key.startswith(("model.", "moe.")) and not key.endswith("dropout_rate")
        if value != task_values[key]
    }
    return SweepRun(spec, {**model, "init_from": f"{{run:{upstream}}}", **size.task})
