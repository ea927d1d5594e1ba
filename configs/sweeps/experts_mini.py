"""The sweep over experts on two CPU cores.

    switch-jax sweep --config configs/sweeps/experts_mini.py --workdir runs/experts_mini

Started twice, with one core each, it took 56 minutes: docs/results.md has the commands.
"""

from switch_jax.config import parse_arg
from switch_jax.sweeps import Sweep, load_sweep


def get_sweep(arg: str = "") -> Sweep:
    """Returns the sweep; takes no arguments."""
    parse_arg(arg)
    return load_sweep("sweeps/experts:size=mini")
