"""Figures 1, 4 and 5: numbers of experts, at the same FLOPs and tokens.

    switch-jax sweep --config configs/sweeps/experts.py:size=mini --workdir runs/experts

size=mini: two CPU cores. size=gpu: each run under 10 minutes on one GPU. With
size=paper add --config.data.data_dir=DIR, the folder of C4.
"""

from switch_jax.config import parse_arg
from switch_jax.sweeps import Advantage, Curves, Scaling, Sweep, SweepRun, Table

from _paper_numbers import TABLE_7
from _sizes import find_size


def get_sweep(arg: str = "") -> Sweep:
    """Returns the sweep. Arguments: `size` ('mini', 'gpu' or 'paper')."""
    size = find_size(parse_arg(arg, size="mini").size)
    runs: dict[str, SweepRun] = {"dense": size.dense}
    runs |= {f"experts_{n}": size.switch(n) for n in size.experts}
    named = {"dense": "dense"} | {f"{n} experts": f"experts_{n}" for n in size.experts}
    return Sweep(
        title="More experts at the same FLOPs (Figures 1, 4 and 5)",
        runs=runs,
        seeds=size.seeds,
        tables={
            "experts": Table(
                "More experts at the same FLOPs",
                "Every doubling of experts lowers the loss at the same FLOPs a token.",
                named,
            )
        },
        figures={
            "experts": Scaling(
                "Loss against sparse parameters (Figures 1 and 4, left)",
                "From 1 to 256 experts the loss falls steadily.",
                named,
                published=TABLE_7,
            ),
            "count": Scaling(
                "Loss against the number of experts",
                "From 1 to 256 experts the loss falls steadily.",
                named,
                x="experts",
                published=TABLE_7,
            ),
            "steps": Curves(
                "Quality by step (Figures 1 and 4, right)",
                "64 experts reach in 60k steps what T5-Base reaches in 450k: 7.5 times as fast.",
                named,
            ),
            "seconds": Curves(
                "Quality by time (Figure 5)",
                "64 experts need a seventh of the time of T5-Base on the same 32 cores.",
                named,
                x="seconds",
            ),
            "advantage": Advantage(
                "Gain over dense by tokens per expert",
                "Every number of experts is ahead of dense at all steps that are shown.",
                named,
            ),
        },
    )
