"""Tables 4 and 5: dropout within experts in fine-tuning, and fine-tuned models on tasks.

    python scripts/data/keyword_task.py
    switch-jax sweep --config configs/sweeps/finetune.py:size=mini,table=4 --workdir runs/table4

With size=mini and size=gpu, the task is the one that the first command writes. size=paper has the
paper's tasks: omit that command, and add --config.data.data_dir=DIR, the folder of C4 and of the
tasks as TFDS prepares them.
"""

from switch_jax.config import parse_arg
from switch_jax.errors import UserError
from switch_jax.sweeps import Sweep, SweepRun, Table

from _sizes import Size, find_size, finetuned_run

DROPOUT = {  # model.dropout_rate, moe.expert_dropout_rate
    "T5-Base d=.1": ("dense", 0.1, 0.0),
    "Switch-Base d=.1": ("switch", 0.1, 0.1),
    "Switch-Base d=.2": ("switch", 0.2, 0.2),
    "Switch-Base d=.3": ("switch", 0.3, 0.3),
    "Switch-Base d=.1, ed=.4": ("switch", 0.1, 0.4),
}
CLAIMS = {
    4: "A small dropout with a larger one in experts is best on small tasks.",
    5: "FLOP-matched, Switch is better than T5 on most tasks, in reasoning and in knowledge.",
}
# As printed, in the order of the rows.
PAPER_4 = {
    "glue": (82.9, 84.7, 84.4, 83.9, 85.2),
    "cnn_dailymail": (19.6, 19.1, 19.2, 19.6, 19.6),
    "squad": (83.5, 83.7, 83.9, 83.4, 83.7),
    "superglue": (72.4, 73.0, 73.2, 70.7, 73.0),
}
PAPER_5 = {
    "glue": (84.3, 86.7, 87.8, 88.5),
    "squad": (85.5, 87.2, 88.1, 88.6),
    "superglue": (75.1, 79.5, 82.7, 84.7),
    "winogrande": (66.6, 73.3, 79.1, 83.0),
    "xsum": (18.7, 20.3, 20.9, 22.3),
    "anli": (51.8, 54.0, 56.6, 58.6),
    "arc": ("56.7, 35.5", "61.3, 32.8", "68.8, 35.5", "66.0, 35.5"),
    "closed_book_qa": (
        *("26.6, 25.8, 24.5", "27.4, 26.8, 30.7"),
        *("27.7, 27.6, 29.5", "31.3, 29.5, 36.9"),
    ),
}


def get_sweep(arg: str = "") -> Sweep:
    """Returns the sweep. Arguments: `size` ('mini', 'gpu' or 'paper'), `table` (4 or 5)."""
    args = parse_arg(arg, size="mini", table=4)
    if args.table not in CLAIMS:
        raise UserError(f"There is no table {args.table} here; use table=4 or table=5.")
    size = find_size(args.size)
    if args.table == 4:
        upstream, rows, paper = *dropout(size, args.size), PAPER_4
    else:
        upstream, rows, paper = *models(size), PAPER_5
    runs, tables = dict(upstream), {}
    for task in size.tasks:
        if args.size == "paper" and task not in paper:
            continue
        names = {}
        for label, (base, overrides) in rows.items():
            names[label] = f"{task}_{len(names)}"
            runs[names[label]] = finetuned_run(base, upstream[base], size, task).but(overrides)
        tables[f"table_{args.table}_{task}"] = Table(
            f"Table {args.table}: {'the keyword task' if task == 'pairs' else task}",
            CLAIMS[args.table],
            names,
            dict(zip(names, map(str, paper.get(task, ())))),
            metric="average",
        )
    return Sweep(f"Fine-tuning (Table {args.table})", runs, size.seeds, tables)


Rows = dict[str, tuple[str, dict[str, float]]]  # label → upstream run, overrides


def dropout(size: Size, name: str) -> tuple[dict[str, SweepRun], Rows]:
    """Returns the upstream runs by name and the rows of Table 4."""
    # The paper pretrained these on 34B tokens, 2^15 batches of 2^20.
    upstream = {"train.steps": 2**15} if name == "paper" else size.short
    rows: Rows = {
        label: (base, {"model.dropout_rate": rate, "moe.expert_dropout_rate": in_experts})
        for label, (base, rate, in_experts) in DROPOUT.items()
    }
    return {"dense": size.dense.but(upstream), "switch": size.switch().but(upstream)}, rows


def models(size: Size) -> tuple[dict[str, SweepRun], Rows]:
    """Returns the upstream runs by name and the rows of Table 5."""
    named = {
        "T5-Base": ("dense", size.dense),
        "Switch-Base": ("switch", size.switch()),
        "T5-Large": ("large", size.large),
        "Switch-Large": ("large_switch", size.large_switch),
    }
    upstream = {name: run.but(size.short) for name, run in named.values()}
    return upstream, {label: (name, {}) for label, (name, _) in named.items()}
