"""Tables 1, 2, 3, 10 and 11: what routing, precision, initial weights and exploration are worth.

    switch-jax sweep --config configs/sweeps/routing.py:size=mini --workdir runs/routing
    switch-jax sweep --config configs/sweeps/routing.py:table=1 --workdir runs/table1

Rows that tables share are trained once. With size=paper add --config.data.data_dir=DIR, where C4
is.
"""

from switch_jax import sizes
from switch_jax.config import parse_arg
from switch_jax.errors import UserError
from switch_jax.sizes import Size
from switch_jax.sweep import Run, Sweep, Table

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
        "Switch is faster than MoE at equal quality, and better at low capacity factors.",
        {
            "T5-Base": "dense",
            "T5-Large": "large",
            "MoE-Base, CF 2.0": "moe_2.0",
            "Switch-Base, CF 2.0": "switch_2.0",
            "MoE-Base, CF 1.25": "moe_1.25",
            "Switch-Base, CF 1.25": "switch",
            "MoE-Base, CF 1.0": "moe_1.0",
            "Switch-Base, CF 1.0": "switch_1.0",
            "Switch-Base+, CF 1.0": "switch_plus",
        },
        {
            "T5-Base": "-1.731",
            "T5-Large": "-1.550",
            "MoE-Base, CF 2.0": "-1.547",
            "Switch-Base, CF 2.0": "-1.554",
            "MoE-Base, CF 1.25": "-1.559",
            "Switch-Base, CF 1.25": "-1.553",
            "MoE-Base, CF 1.0": "-1.572",
            "Switch-Base, CF 1.0": "-1.561",
            "Switch-Base+, CF 1.0": "-1.534",
        },
    ),
    2: Table(
        "Table 2: Precision",
        "All bfloat16 diverges; selective precision is as good as float32 and as fast as bfloat16.",
        {"float32": "float32", "bfloat16": "bfloat16", "selective": "selective"},
        {"float32": "-1.718", "bfloat16": "-3.780 (diverged)", "selective": "-1.716"},
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
            "Experts FF, float32": "-1.548",
            "Expert attention, float32": "-1.524",
            "Expert attention, bfloat16": "diverges",
            "Experts FF + attention, float32": "-1.513",
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


def all_runs(size: Size) -> dict[str, Run]:
    """Every run of the tables by name."""
    switch, fewer = size.switch(), size.switch(size.fewer)
    runs = {"dense": size.dense, "large": size.large, "switch": switch}
    for factor in (2.0, 1.25, 1.0):
        capacity = {"moe.capacity_factor": factor}
        runs[f"moe_{factor}"] = switch.but(MOE | capacity)
        runs[f"switch_{factor}"] = switch.but(capacity)
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
    """`size` ('mini', 'gpu' or 'paper'), `table` (1, 2, 3, 10 or 11; 0: all)."""
    args = parse_arg(arg, size="mini", table=0)
    if args.table and args.table not in TABLES:
        raise UserError(
            f"There is no table {args.table} here; use table={', '.join(map(str, TABLES))} or 0."
        )
    size = sizes.find(args.size)
    tables = {n: table for n, table in TABLES.items() if args.table in (0, n)}
    named = {name for table in tables.values() for name in table.rows.values()}
    return Sweep(
        title="Routing, precision, initial weights and exploration",
        runs={name: run.but(size.short) for name, run in all_runs(size).items() if name in named},
        seeds=size.seeds,
        tables={f"table_{n}": table for n, table in tables.items()},
    )
