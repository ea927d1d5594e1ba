"""Checksums of a checkpoint's arrays, which do not depend on their division among devices.

A checksum is the sum of an array's elements, as 32-bit words mod 2³², each multiplied by an odd
pseudo-random weight that depends on its index. Every change of one element changes the sum, and
other damage does with probability 1 - 2⁻³², except that changes of the top bits of two elements
cancel. Each process sums what it holds, so nothing is copied between devices.

The weight is a product of one weight for each axis, so that a sum runs at the speed of memory.
"""

import functools
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

RECORD_ITEM = "checksums"  # item of a checkpoint; absent from those of older versions
_RECORD_FILE = "metadata"  # Orbax's name of the file of a JSON item
_MIN_ROW = 1024  # elements that one step of a sum takes at least, where the array has them


def make_record(
    items: Mapping[str, Any], metrics: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Returns the record of a checkpoint, JSON values: checksums of its arrays, and its metrics.

    Args:
      items: pytrees of arrays by item of the checkpoint.
      metrics: the checkpoint's metrics.
    """
    return {"arrays": array_checksums(_flatten(items)), "metrics": metrics}


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """Returns the record of a checkpoint; None for a checkpoint of an older version.

    Raises `OSError` or `ValueError` where it cannot be read.
    """
    folder = checkpoint / RECORD_ITEM
    if not folder.exists():
        return None
    record = json.loads((folder / _RECORD_FILE).read_bytes())
    match record:
        case {"arrays": dict(), "metrics": dict() | None}:
            return record
    raise ValueError("its checksums are damaged")


def write_record(checkpoint: Path, checksums: Mapping[str, int]) -> None:
    """Writes the record of a checkpoint without metrics, as Orbax writes a JSON item."""
    folder = checkpoint / RECORD_ITEM
    folder.mkdir(parents=True)
    content = json.dumps({"arrays": checksums, "metrics": None})
    (folder / _RECORD_FILE).write_text(content)


def arrays_crc32(record: Mapping[str, Any] | None) -> int | None:
    """Returns a number that identifies the arrays of a record; None where there is none."""
    if record is None:
        return None
    return zlib.crc32(json.dumps(record["arrays"], sort_keys=True).encode())


def check_arrays(items: Mapping[str, Any], record: Mapping[str, Any] | None) -> None:
    """Raises `ValueError` where an array read from a checkpoint has not its checksum.

    All processes must call it if an array is divided among processes.

    Args:
      items: pytrees of arrays, or of some of them, by item of the checkpoint.
      record: of the checkpoint; None: it has no checksums, and nothing is checked.
    """
    if record is None:
        return
    for name, checksum in array_checksums(_flatten(items)).items():
        if record["arrays"].get(name) != checksum:
            raise ValueError(f"{name} is damaged: its checksum differs")


def _flatten(items: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {"/".join(path): array for path, array in ocp.tree.to_flat_dict(dict(items)).items()}


def array_checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Returns the checksum of each array by name.

    All processes must call it with the same names if an array is divided among processes.
    """
    on_host = {name: array for name, array in arrays.items() if _is_on_host(array)}
    sums = np.array([_sum_on_host(array) for array in on_host.values()], np.uint32)
    if not all(array.is_fully_addressable for array in on_host.values()):
        sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    on_devices = {name: _sum_on_devices(arrays[name]) for name in arrays if name not in on_host}
    checksums = jax.device_get(on_devices) | dict(zip(on_host, sums))
    return {name: int(checksums[name]) for name in arrays}


def _is_on_host(array: jax.Array) -> bool:
    device: Any = next(iter(array.sharding.device_set))
    return device.platform == "cpu" or (array.sharding.memory_kind or "").endswith("host")


def _sum_on_host(array: jax.Array) -> int:
    """Sums what this process holds, each element once over all processes."""
    total = 0
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            starts = [part.start or 0 for part in shard.index]
            total += sum_part(np.asarray(shard.data), starts)
    return total % 2**32


def sum_part(part: np.ndarray, starts: Sequence[int]) -> int:
    """Sums a part of an array that begins at the indices `starts` of the array."""
    weights = [
        _weights_on_host(axis, start, start + size)
        for axis, (start, size) in enumerate(zip(starts, part.shape))
    ]
    axis = max(part.ndim - 1, 0)
    while axis > 0 and math.prod(part.shape[axis:]) < _MIN_ROW:
        axis -= 1
    row_weights, weights_in_row = _outer(weights[:axis]), _outer(weights[axis:])
    words = np.ascontiguousarray(part).view(_word_type(part)).astype(np.uint32, copy=False)
    rows = np.einsum("ij,j->i", words.reshape(len(row_weights), -1), weights_in_row)
    return int(np.einsum("i,i->", rows, row_weights))


def _outer(weights: Sequence[np.ndarray]) -> np.ndarray:
    product = np.ones((), np.uint32)
    for factor in weights:
        product = np.multiply.outer(product, factor)
    return product.reshape(-1)


@functools.lru_cache(maxsize=1024)
def _weights_on_host(axis: int, start: int, stop: int) -> np.ndarray:
    return _weights(np, axis, start, stop)


@jax.jit
def _sum_on_devices(array: jax.Array) -> jax.Array:
    words = array.view(_word_type(array)).astype(jnp.uint32)
    for axis in reversed(range(array.ndim)):
        weights = _weights(jnp, axis, 0, array.shape[axis])
        words = jnp.sum(words * weights, -1, dtype=jnp.uint32)
    return words


def _word_type(array: Any) -> np.dtype:
    """Returns the unsigned integers of the size of an array's elements."""
    assert array.dtype.itemsize <= 4, array.dtype
    return np.dtype(f"uint{8 * array.dtype.itemsize}")


def _weights(xp: ModuleType, axis: int, start: int, stop: int) -> Any:
    """Returns the odd weights of an axis' indices [start, stop), as an array of `xp`.

    xp is `numpy` or `jax.numpy`. The constants are those of MurmurHash3's finaliser.
    """
    x = xp.arange(start, stop, dtype=np.uint32) + np.uint32((axis + 1) * 0x9E3779B9 % 2**32)
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)) | np.uint32(1)
