"""Table 9: the paper's models, dense and sparse, on the same tokens.

    switch-jax sweep --config configs/sweeps/models.py:size=mini --workdir runs/models

size=mini and size=gpu have Base and Large. size=paper has all seven models: add
--config.data.data_dir=DIR, the folder of C4, and --config.mesh.KEY=N; `switch-jax compile` computes
the memory that each model needs.
"""

from switch_jax.config import parse_arg
from switch_jax.sweeps import Scaling, Sweep, SweepRun, Table

from _paper_numbers import TABLE_9_DENSE, TABLE_9_SPARSE
from _sizes import find_size

CLAIM = "At the same FLOPs a token, experts are better than dense at every size."
PAPER = {
    point.name: f"{point.quality:.3f}"
    for series in (TABLE_9_DENSE, TABLE_9_SPARSE)
    for point in series.points
}
LARGEST = {
    "T5-XXL": "t5_xxl",
    "Switch-XXL": "switch_xxl",
    "Switch-C": "switch_c",
}


def get_sweep(arg: str = "") -> Sweep:
    """Returns the sweep. Arguments: `size` ('mini', 'gpu' or 'paper')."""
    args = parse_arg(arg, size="mini")
    size = find_size(args.size)
    runs = {
        "T5-Base": size.dense,
        "T5-Large": size.large,
        "Switch-Base": size.switch(),
        "Switch-Large": size.large_switch,
    }
    if args.size == "paper":
        runs |= {name: SweepRun(config) for name, config in LARGEST.items()}
        runs = {name: run.but({"train.steps": 500_000}) for name, run in runs.items()}
    named = {name: name for name in runs}
    dense = [name for name in named if name.startswith("T5")]
    return Sweep(
        title="Dense and sparse models (Table 9)",
        runs=runs,
        seeds=size.seeds,
        tables={
            "table_9": Table(
                "Table 9: Dense and sparse models",
                CLAIM,
                named,
                {name: PAPER[name] for name in named},
            )
        },
        figures={
            "dense": Scaling(
                "Loss of dense models against their size",
                "The loss falls with parameters and with FLOPs at once.",
                {name: name for name in dense},
                published=TABLE_9_DENSE,
            ),
        },
    )
