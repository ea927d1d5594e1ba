"""Figure 12: two, four and eight experts.

    switch-jax sweep --config configs/sweeps/few_experts.py:size=mini --workdir runs/few_experts

With size=paper add --config.data.data_dir=DIR, the folder of C4.
"""

from switch_jax.config import parse_arg
from switch_jax.sweeps import Curves, Sweep, Table

from _sizes import find_size

CLAIM = "Two experts already beat T5-Base, and more are better."


def get_sweep(arg: str = "") -> Sweep:
    """Returns the sweep. Arguments: `size` ('mini', 'gpu' or 'paper')."""
    args = parse_arg(arg, size="mini")
    size = find_size(args.size)
    named = {"T5-Base": "dense"} | {f"{n} experts": f"experts_{n}" for n in (2, 4, 8)}
    made = Sweep(
        title="Few experts (Figure 12)",
        runs={"dense": size.dense} | {f"experts_{n}": size.switch(n) for n in (2, 4, 8)},
        seeds=size.seeds,
        tables={"few_experts": Table("Few experts", CLAIM, named)},
        figures={"steps": Curves("Quality by step (Figure 12)", CLAIM, named)},
    )
    return made.but({"train.steps": 90_000}) if args.size == "paper" else made
