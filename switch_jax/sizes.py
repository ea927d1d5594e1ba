"""The three sizes that sweeps come in, from two CPU cores to the paper's own settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from switch_jax.errors import UserError
from switch_jax.sweep import Run


@dataclasses.dataclass(frozen=True)
class Size:
    """Models of one size: T5-Base, T5-Large and Switch-Base of the paper, or what stands for them.

    `dense` is FLOP-matched to `switch`; `large` costs three to four times as much.
    """

    dense: Run
    large: Run
    sparse: str  # config of `switch`, without its argument
    experts: tuple[int, ...]  # numbers of them that a curve over experts has
    usual: int  # experts where a sweep does not vary them
    seeds: tuple[int, ...]
    plus: Mapping[str, Any]  # overrides that widen Switch-Base to Switch-Base+

    def switch(self, num_experts: int | None = None) -> Run:
        """The sparse model with so many experts, or as many as usual."""
        return Run(f"{self.sparse}:num_experts={num_experts or self.usual}")


SIZES = {
    "mini": Size(
        dense=Run("configs/switch_tiny.py:num_experts=0"),
        large=Run("configs/switch_tiny.py:num_experts=0,large=1"),
        sparse="configs/switch_tiny.py",
        experts=(4, 16, 64),
        usual=16,
        seeds=(0, 1),
        plus={"model.d_model": 75, "model.num_heads": 5},
    ),
    "gpu": Size(
        dense=Run("configs/switch_small.py:num_experts=0"),
        large=Run("configs/switch_small.py:num_experts=0,large=1"),
        sparse="configs/switch_small.py",
        experts=(4, 16, 64, 256),
        usual=32,
        seeds=(0, 1),
        plus={"model.d_model": 600, "model.num_heads": 9},
    ),
    "paper": Size(
        dense=Run("configs/t5_base.py"),
        large=Run("configs/t5_large.py"),
        sparse="configs/switch_base.py",
        experts=(2, 4, 8, 16, 32, 64, 128, 256),
        usual=128,
        seeds=(0,),
        plus={"model.d_model": 896, "model.num_heads": 14},
    ),
}


def find(name: str) -> Size:
    """A size by name; raises `UserError` for one that there is not."""
    if name not in SIZES:
        raise UserError(f"There is no size {name!r}; use size={', size='.join(SIZES)}.")
    return SIZES[name]
