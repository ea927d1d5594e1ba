"""Table 6 on two CPU cores, in under 30 minutes.

switch-jax sweep --config configs/sweeps/distill_mini.py --workdir runs/distill_mini
"""

from pathlib import Path

from switch_jax import sweep
from switch_jax.config import parse_arg


def get_sweep(arg: str = "") -> sweep.Sweep:
    """Takes no arguments."""
    parse_arg(arg)
    return sweep.load(f"{Path(__file__).parent / 'distill.py'}:size=mini,table=6")
