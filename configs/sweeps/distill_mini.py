"""Table 6 on two CPU cores.

switch-jax sweep --config configs/sweeps/distill_mini.py --workdir runs/distill_mini
"""

from switch_jax.config import parse_arg
from switch_jax.sweeps import Sweep, load_sweep


def get_sweep(arg: str = "") -> Sweep:
    """Returns the sweep; takes no arguments."""
    parse_arg(arg)
    return load_sweep("sweeps/distill:size=mini,table=6")
