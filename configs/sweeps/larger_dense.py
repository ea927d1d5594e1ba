"""Figure 6: experts against a dense model with 3.5 times the FLOPs per token.

    switch-jax sweep --config configs/sweeps/larger_dense.py:size=mini --workdir runs/larger_dense

With size=paper add --config.data.data_dir=DIR, the folder of C4.
"""

from switch_jax.config import parse_arg
from switch_jax.sweeps import Curves, Sweep, Table

from _sizes import find_size

CLAIM = "64 experts are as good as T5-Large in 2.5 times less time, and as T5-Base in 7 times less."


def get_sweep(arg: str = "") -> Sweep:
    """Returns the sweep. Arguments: `size` ('mini', 'gpu' or 'paper')."""
    size = find_size(parse_arg(arg, size="mini").size)
    named = {"T5-Large": "large", "T5-Base": "dense", "Switch-Base, 64 experts": "switch"}
    return Sweep(
        title="Experts against a larger dense model (Figure 6)",
        runs={"large": size.large, "dense": size.dense, "switch": size.switch(64)},
        seeds=size.seeds,
        tables={"larger_dense": Table("Experts against a larger dense model", CLAIM, named)},
        figures={
            "steps": Curves("Quality by step (Figure 6, left)", CLAIM, named),
            "seconds": Curves("Quality by time (Figure 6, right)", CLAIM, named, x="seconds"),
        },
    )
