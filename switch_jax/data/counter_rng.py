"""Counter-based random numbers and random permutations, without generator state.

A random number is a hash of (seed, row, stream, column). So a row of a batch is the same in every
process and in any order of computation, and a run resumes without replaying earlier rows. The hash
is MurmurHash3's 64-bit finaliser over a Weyl sequence (SplitMix64).
"""

import hashlib

import numpy as np

_WEYL = 0x9E3779B97F4A7C15
_KEY_FACTOR = 0xD1B54A32D192ED03
_MASK = 2**64 - 1
_MURMUR = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)


def _mix(x: np.ndarray) -> np.ndarray:
    """[...] uint64: MurmurHash3's finaliser of [...] uint64, a bijection."""
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(_MURMUR[0])
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(_MURMUR[1])
    return x ^ (x >> np.uint64(33))


def _key(*numbers: int) -> int:
    """Returns a 64-bit hash of a sequence of integers."""
    key = 0
    for number in numbers:
        # `_mix` of a Python integer: ten times faster than with NumPy.
        key = (key * _KEY_FACTOR + number + _WEYL) & _MASK
        for factor in _MURMUR:
            key = ((key ^ (key >> 33)) * factor) & _MASK
        key ^= key >> 33
    return key


def derived_seed(seed: int, name: str) -> int:
    """Returns a 64-bit seed for one purpose, called `name`."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return _key(seed, int.from_bytes(digest, "big"))


def random_bits(seed: int, rows: np.ndarray, columns: int, stream: int) -> np.ndarray:
    """Returns independent uniform 64-bit numbers.

    Args:
      rows: [R] non-negative row numbers.
      stream: a number for each purpose; different streams are independent.

    Returns [R, columns] uint64; each row depends on (seed, its number, stream) only.
    """
    row_keys = _mix(rows.astype(np.uint64) * np.uint64(_WEYL) + np.uint64(_key(seed, stream)))
    return _mix(row_keys[:, None] + np.arange(1, columns + 1, dtype=np.uint64) * np.uint64(_WEYL))


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Applies a random permutation of range(size) to `indices`, in constant memory.

    A Feistel network permutes the smallest even number of bits that holds `size`. Results outside
    the range are permuted again until they are inside (at most four rounds on average).

    Args:
      indices: [N] integers in [0, size).

    Returns [N] int64, a bijection of [0, size) for each (seed, epoch).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = [np.uint64(_key(seed, epoch, layer)) for layer in range(4)]
    x = indices.astype(np.uint64)
    outside = np.ones(x.shape, bool)
    while outside.any():
        left, right = x[outside] >> shift, x[outside] & low
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & low)
        x[outside] = (left << shift) | right
        outside = x >= size
    return x.astype(np.int64)
