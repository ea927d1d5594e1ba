"""Tables 6, 7 and 8: share of a sparse model's gain that a distilled dense model keeps.

    switch-jax sweep --config configs/sweeps/distill.py:size=mini,table=6 --workdir runs/table6

Table 8 has a fine-tuned teacher. With size=mini and size=gpu, its task is written first by
`python scripts/data/keyword_task.py`. With size=paper add --config.data.data_dir=DIR, the folder of
C4 and, for table=8, of SuperGLUE as TFDS prepares it.

In the paper, teacher and students train for the same number of steps. Runs with size=mini and
size=gpu are so short that a student which begins with the teacher's weights is soon better than the
teacher: with these sizes, dense models train for a quarter of the teacher's steps.
"""

from switch_jax.config import flatten_config, load_config, parse_arg
from switch_jax.errors import UserError
from switch_jax.sweeps import Sweep, SweepRun, Table

from _paper_numbers import TABLE_7
from _sizes import Size, find_size, finetuned_run

SCALED = ("train.steps", "optimizer.warmup_steps", "optimizer.cooldown_steps")
TAUGHT, INIT = {"distill.teacher": "{run:teacher}"}, {"init_from": "{run:teacher}"}
ALONE = {"distill.soft_weight": 1.0}  # learn from the teacher's probabilities only

PAPER_7 = {point.experts: f"{point.quality:.3f}" for point in TABLE_7.points}
STUDENTS = {
    16: "-1.587 (37 %)",
    32: "-1.585 (32 %)",
    64: "-1.579 (30 %)",
    128: "-1.582 (27 %)",
    256: "-1.578 (28 %)",
}


def get_sweep(arg: str = "") -> Sweep:
    """Returns the sweep. Arguments: `size` ('mini', 'gpu' or 'paper'), `table` (6, 7 or 8)."""
    args = parse_arg(arg, size="mini", table=6)
    makers = {6: techniques, 7: compression, 8: fine_tuned}
    if args.table not in makers:
        raise UserError(f"There is no table {args.table} here; use table=6, table=7 or table=8.")
    size = find_size(args.size)
    if args.size == "paper":
        return makers[args.table](size, size.dense, size.switch(64))
    full = flatten_config(load_config(size.dense.config, size.dense.override_texts()))
    dense = size.dense.but({key: full[key] // 4 for key in SCALED})
    return makers[args.table](size, dense, size.switch())


def techniques(size: Size, dense: SweepRun, switch: SweepRun) -> Sweep:
    """Returns the sweep of Table 6: techniques of distillation."""
    rows = {
        "T5-Base": "dense",
        "Switch-Base": "teacher",
        "distillation": "taught",
        "+ non-expert weights": "begun_and_taught",
        "+ 0.75 mix with the data's targets": "mixed",
        "non-expert weights alone": "begun",
    }
    # The paper does not state the mix of its first two rows with a teacher.
    runs = {
        "dense": dense,
        "teacher": switch,
        "taught": dense.but({**TAUGHT, **ALONE}),
        "begun_and_taught": dense.but({**TAUGHT, **ALONE, **INIT}),
        "mixed": dense.but({**TAUGHT, **INIT}),
        "begun": dense.but(INIT),
    }
    printed = (PAPER_7[1], PAPER_7[64], "-1.631 (3 %)", "-1.598 (20 %)", "-1.580 (29 %)", "-1.639")
    table = Table(
        "Table 6: techniques of distillation",
        "With the teacher's non-expert weights and a quarter of its probabilities, 29 % is kept.",
        rows,
        dict(zip(rows, printed)),
        teachers=dict.fromkeys(list(rows)[2:], "teacher"),
    )
    seeds = size.seeds if len(size.seeds) == 1 else (0, 1, 2)
    return Sweep("Distillation (Table 6)", runs, seeds, {"table_6": table})


def compression(size: Size, dense: SweepRun, _: SweepRun) -> Sweep:
    """Returns the sweep of Table 7: the same student with teachers of several sizes."""
    runs, rows, printed, teachers = {"dense": dense}, {"T5-Base": "dense"}, {}, {}
    for n in STUDENTS if set(STUDENTS) <= set(size.experts) else size.experts[-3:]:
        teacher, reference = f"experts_{n}", f"{{run:experts_{n}}}"
        runs[teacher] = size.switch(n)
        runs[f"of_{n}"] = dense.but({"distill.teacher": reference, "init_from": reference})
        pair = {f"{n} experts": teacher, f"student of {n} experts": f"of_{n}"}
        rows |= pair
        teachers[f"student of {n} experts"] = teacher
        if n in STUDENTS:
            printed |= dict(zip(pair, (PAPER_7[n], STUDENTS[n])))
    table = Table(
        "Table 7: compression",
        "A student keeps 27 to 37 % of the gain of teachers that it is 82 to 99 % smaller than.",
        rows,
        printed | {"T5-Base": PAPER_7[1]},
        teachers=teachers,
    )
    return Sweep("Distillation (Table 7)", runs, size.seeds, {"table_7": table})


def fine_tuned(size: Size, dense: SweepRun, switch: SweepRun) -> Sweep:
    """Returns the sweep of Table 8: a fine-tuned teacher, and a student fine-tuned with it."""
    task = "superglue" if "superglue" in size.tasks else size.tasks[0]
    upstream = {"dense": dense, "switch": switch}
    alone = finetuned_run("dense", dense, size, task)
    runs = upstream | {
        "dense_tuned": alone,
        "teacher": finetuned_run("switch", switch, size, task),
        "student": alone.but(TAUGHT),
    }
    rows = {"T5-Base": "dense_tuned", "Switch-Base": "teacher", "distilled": "student"}
    table = Table(
        f"Table 8: {'the keyword task' if task == 'pairs' else task}",
        "A student of a fine-tuned teacher keeps 30 % of its gain on SuperGLUE.",
        rows,
        dict(zip(rows, ("74.6", "81.3", "76.6 (30 %)"))) if task == "superglue" else {},
        metric="average",
        teachers={"distilled": "teacher"},
    )
    return Sweep(
        "Distillation of a fine-tuned model (Table 8)", runs, size.seeds, {"table_8": table}
    )
