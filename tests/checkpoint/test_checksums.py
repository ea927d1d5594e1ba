"""Checksums: equal however an array is divided, and changed by every change of an element."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from switch_jax.checkpoint import checksums
from switch_jax.checkpoint.checksums import array_checksums, sum_part


def array(shape, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(0).integers(-100, 100, shape).astype(dtype)


@pytest.mark.parametrize("shape", [(), (7,), (4, 6), (2, 40, 50), (3, 2, 8, 5)])
def test_the_checksum_of_an_array_is_that_of_its_elements(shape):
    """Against the definition, in Python's integers."""
    values = array(shape)
    weights = [checksums._weights(np, axis, 0, size).tolist() for axis, size in enumerate(shape)]
    assert all(weight % 2 for axis in weights for weight in axis)
    total = 0
    for index, word in np.ndenumerate(values.view(np.uint32)):
        product = int(word)
        for axis, i in enumerate(index):
            product *= weights[axis][i]
        total += product
    assert array_checksums({"x": jax.numpy.asarray(values)}) == {"x": total % 2**32}


@pytest.mark.parametrize(
    "axes", [(None, None), ("x", None), (None, "y"), ("y", "x"), (("x", "y"),)]
)
def test_the_checksum_does_not_depend_on_the_mesh(axes):
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    values = array((8, 16))
    divided = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*axes)))
    assert array_checksums({"x": divided}) == {"x": sum_part(values, (0, 0))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "bool"])
def test_accelerators_sum_like_hosts(dtype, monkeypatch):
    values = {"x": jax.numpy.asarray(array((3, 5, 9)), dtype)}
    on_host = array_checksums(values)
    monkeypatch.setattr(checksums, "_is_on_host", lambda array: False)
    assert array_checksums(values) == on_host


def test_every_flipped_bit_and_exchanged_rows_change_the_checksum():
    values = array((6, 40))
    right = sum_part(values, (0, 0))
    words = values.view(np.uint32)
    for index in np.ndindex(*values.shape):
        for bit in (0, 13, 31):
            words[index] ^= np.uint32(1 << bit)
            assert sum_part(values, (0, 0)) != right
            words[index] ^= np.uint32(1 << bit)
    assert sum_part(values[::-1], (0, 0)) != right
    assert sum_part(values, (1, 0)) != right
