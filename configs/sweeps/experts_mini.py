"""The sweep over experts on two CPU cores.

switch-jax sweep --config configs/sweeps/experts_mini.py --workdir runs/experts_mini
"""

from pathlib import Path

from switch_jax import sweep
from switch_jax.config import parse_arg


def get_sweep(arg: str = "") -> sweep.Sweep:
    """Takes no arguments."""
    parse_arg(arg)
    return sweep.load(f"{Path(__file__).parent / 'experts.py'}:size=mini")
