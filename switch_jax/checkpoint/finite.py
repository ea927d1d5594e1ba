"""Finiteness of parameters: NaN and infinity in a checkpoint are an error before it is used."""

from collections.abc import Mapping
from contextlib import nullcontext

import jax
import numpy as np

from switch_jax.distributed import fail_together
from switch_jax.errors import UserError


def all_finite(values: np.ndarray) -> bool:
    """Whether an array has neither NaN nor infinity; reads it once."""
    if values.dtype == np.float32:
        flat = values.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.dot(flat, flat)):  # three times as fast; may overflow
                return True
    return bool(np.isfinite(values).all())


def check_finite(values: np.ndarray, name: str, source: object) -> None:
    """Raises `UserError` where a parameter of a checkpoint is not finite."""
    if not all_finite(values):
        bad = np.count_nonzero(~np.isfinite(values))
        raise UserError(
            f"{name} in {source} has {bad:,} values that are NaN or infinite, of {values.size:,};"
            " use another checkpoint."
        )


def check_parameters_finite(
    arrays: Mapping[str, jax.Array], source: object, *, together: bool
) -> None:
    """Raises `UserError` where a parameter is not finite.

    Args:
      arrays: parameters by path; a process checks the shards of its own devices.
      source: the checkpoint, as errors call it.
      together: all processes call this, and it raises in all of them.
    """
    with fail_together() if together else nullcontext():
        for name, array in arrays.items():
            for shard in array.addressable_shards:
                if shard.replica_id == 0:
                    check_finite(np.asarray(shard.data), name, source)
