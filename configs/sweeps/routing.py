"""Tables 1, 2, 3, 10 and 11: routing, precision, scale of initial weights, and exploration.

    switch-jax sweep --config configs/sweeps/routing.py:size=mini --workdir runs/routing
    switch-jax sweep --config configs/sweeps/routing.py:table=1 --workdir runs/table1

Rows that tables share are trained once. With size=paper, each table has runs of its own, since
tables differ in the number of steps; add --config.data.data_dir=DIR, the folder of C4.
"""

import dataclasses

from switch_jax.config import parse_arg
from switch_jax.errors import UserError
from switch_jax.sweeps import Sweep, SweepRun, Table

from _sizes import Size, find_size

# Mesh TensorFlow's top-2, the paper's baseline.
MOE = {
    "moe.router": "top_k",
    "moe.top_k": 2,
    "moe.renormalize": True,
    "moe.second_policy": "random",
    "moe.capacity_rounding": "floor",
}
FLOAT32 = {"model.dtype": "float32"}
BFLOAT16 = {"model.dtype": "bfloat16"}

TABLES = {
    1: Table(
        "Table 1: Switch, mixture of two experts, and dense",
        "Switch is faster than MoE at equal quality, and better at low capacity factors. Printed:"
        " quality after 100k steps, examples a second, and hours to -1.50.",
        {
            "T5-Base": "dense",
            "T5-Large": "large",
            "MoE-Base, CF 2.0": "moe_2.0",
            "Switch-Base, CF 2.0": "switch_2.0",
            "MoE-Base, CF 1.25": "moe_1.25",
            "Switch-Base, CF 1.25": "switch_1.25",
            "MoE-Base, CF 1.0": "moe_1.0",
            "Switch-Base, CF 1.0": "switch_1.0",
            "Switch-Base+, CF 1.0": "switch_plus",
        },
        {
            "T5-Base": "-1.731, 1600/s, never",
            "T5-Large": "-1.550, 470/s, 131.1 h",
            "MoE-Base, CF 2.0": "-1.547, 840/s, 68.7 h",
            "Switch-Base, CF 2.0": "-1.554, 860/s, 72.8 h",
            "MoE-Base, CF 1.25": "-1.559, 790/s, 80.7 h",
            "Switch-Base, CF 1.25": "-1.553, 910/s, 65.0 h",
            "MoE-Base, CF 1.0": "-1.572, 860/s, 80.1 h",
            "Switch-Base, CF 1.0": "-1.561, 1000/s, 62.8 h",
            "Switch-Base+, CF 1.0": "-1.534, 780/s, 67.6 h",
        },
    ),
    2: Table(
        "Table 2: Precision",
        "All bfloat16 diverges; selective precision is as good as float32 and as fast as bfloat16.",
        {"float32": "float32", "bfloat16": "bfloat16", "selective": "selective"},
        {
            "float32": "-1.718, 1160/s",
            "bfloat16": "-3.780 (diverged), 1390/s",
            "selective": "-1.716, 1390/s",
        },
    ),
    3: Table(
        "Table 3: Scale of the initial weights",
        "The smaller scale is better, and seeds differ less.",
        {"0.1": "float32", "1.0": "init_1.0"},
        {"0.1": "-2.72 ± 0.01", "1.0": "-3.60 ± 0.68"},
    ),
    10: Table(
        "Table 10: Experts in self-attention",
        "Experts in attention help a step's quality, cost speed, and diverge in bfloat16.",
        {
            "Experts FF, float32": "float32",
            "Expert attention, float32": "attention_float32",
            "Expert attention, bfloat16": "attention_bfloat16",
            "Experts FF + attention, float32": "both_float32",
            "Experts FF + attention, bfloat16": "both_bfloat16",
        },
        {
            "Experts FF, float32": "-1.548, 1480/s",
            "Expert attention, float32": "-1.524, 1330/s",
            "Expert attention, bfloat16": "diverges",
            "Experts FF + attention, float32": "-1.513, 1240/s",
            "Experts FF + attention, bfloat16": "diverges",
        },
    ),
    11: Table(
        "Table 11: Exploration",
        "Input jitter is best by a little, sampling from the softmax clearly worst.",
        {
            "Argmax": "switch",
            "Sample softmax": "sampling",
            "Input dropout": "input_dropout",
            "Input jitter": "jitter",
        },
        {
            "Argmax": "-1.471",
            "Sample softmax": "-1.570",
            "Input dropout": "-1.480",
            "Input jitter": "-1.468",
        },
    ),
}

# The paper's settings for the rows of a table. It gives Table 2 no number of steps but "early", and
# Table 11 none: both have the steps of Table 1 here.
PAPER: dict[int, dict[str, int]] = {
    1: {"train.steps": 100_000},
    2: {"train.steps": 100_000},
    3: {"train.steps": 3_500},
    10: {"train.steps": 100_000, "data.batch_size": 1024},  # 2^19 tokens
    11: {"train.steps": 100_000},
}


def all_runs(size: Size) -> dict[str, SweepRun]:
    """Returns all runs of the tables by name."""
    switch, fewer = size.switch(), size.switch(size.fewer)
    runs = {"dense": size.dense, "large": size.large, "switch": switch}
    for factor in (2.0, 1.25, 1.0):
        runs[f"moe_{factor}"] = switch.but(MOE | {"moe.capacity_factor": factor})
        runs[f"switch_{factor}"] = switch.but({"moe.capacity_factor": factor})
    runs["switch_plus"] = switch.but({"moe.capacity_factor": 1.0} | size.plus)
    runs["float32"] = fewer.but(FLOAT32)
    runs["bfloat16"] = fewer.but(BFLOAT16 | {"moe.router_dtype": "bfloat16"})
    runs["selective"] = fewer.but(BFLOAT16)
    runs["init_1.0"] = fewer.but(FLOAT32 | {"model.init_scale": 1.0})
    for name, dtype in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
        runs[f"attention_{name}"] = fewer.but(dtype | {"moe.sublayer": "attention"})
        runs[f"both_{name}"] = fewer.but(dtype | {"moe.sublayer": "both"})
    runs["sampling"] = switch.but({"moe.sampling_temperature": 1.0})
    runs["input_dropout"] = switch.but({"moe.input_dropout_rate": 0.1})
    runs["jitter"] = switch.but({"moe.jitter": 0.01})
    return runs


def get_sweep(arg: str = "") -> Sweep:
    """Returns the sweep.

    Arguments: `size` ('mini', 'gpu' or 'paper'), `table` (1, 2, 3, 10 or 11; 0: all).
    """
    args = parse_arg(arg, size="mini", table=0)
    if args.table and args.table not in TABLES:
        raise UserError(
            f"There is no table {args.table} here; use table={', '.join(map(str, TABLES))} or 0."
        )
    size, sweep_runs = find_size(args.size), {}
    tables = {n: table for n, table in TABLES.items() if args.table in (0, n)}
    for n, table in tables.items():
        suffix, settings = (f"_{n}", PAPER[n]) if args.size == "paper" else ("", size.short)
        runs, rows = (
            all_runs(size),
            {label: f"{name}{suffix}" for label, name in table.rows.items()},
        )
        sweep_runs |= {rows[label]: runs[name].but(settings) for label, name in table.rows.items()}
        tables[n] = dataclasses.replace(table, rows=rows)
    return Sweep(
        title="Routing, precision, initial weights and exploration",
        runs=sweep_runs,
        # Table 3 is about the differences of seeds.
        seeds=(0, 1, 2) if args.table == 3 else size.seeds[:2],
        tables={f"table_{n}": table for n, table in tables.items()},
    )
