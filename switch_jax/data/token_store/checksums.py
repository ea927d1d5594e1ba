"""Checksums of a shard of tokens: written with it, and checked block by block as it is read.

A file of uint32 holds the CRC-32 of the offsets and of every block of tokens. Rows are read at
random, so that a block is checked when a row of it is first read: nothing is read for its checksum
only, however large the store is.
"""

import zlib
from pathlib import Path

import numpy as np

from switch_jax.data.token_store.manifest import damaged

_BLOCK_BYTES = 8192


def checksums_path(directory: Path, shard: int) -> Path:
    """Returns the file of a shard's checksums."""
    return directory / f"{shard:05d}.checksums"


def write_checksums(path: Path, offsets: np.ndarray, tokens: np.ndarray) -> None:
    """Writes the checksums of a shard."""
    blocks = np.split(tokens, range(_block_length(tokens), len(tokens), _block_length(tokens)))
    blocks = [block for block in blocks if len(block)]
    np.array([_crc32(offsets), *map(_crc32, blocks)], "<u4").tofile(path)


class ShardChecksums:
    """The checksums of a shard, and which of its blocks have been checked.

    Args:
      path: of the checksums.
      tokens: [tokens] of the shard.
      tokens_file: of the tokens, for errors.

    Raises `UserError` if the file is missing or has another size.
    """

    def __init__(self, path: Path, tokens: np.ndarray, tokens_file: Path):
        self._tokens, self._tokens_file = tokens, tokens_file
        self._length = _block_length(tokens)
        count = -(-len(tokens) // self._length)
        if not path.is_file() or path.stat().st_size != 4 * (1 + count):
            raise damaged(path)
        self._expected = np.fromfile(path, "<u4")
        self._is_checked = np.zeros(count, bool)

    def check_offsets(self, offsets: np.ndarray, path: Path) -> None:
        """Raises `UserError` if the offsets, read from `path`, have another checksum."""
        if _crc32(offsets) != self._expected[0]:
            raise damaged(path)

    def check(self, begins: np.ndarray, length: int) -> None:
        """Checks the blocks that have the `length` tokens from each of `begins` on.

        Raises `UserError` for a block with another checksum.
        """
        steps = np.arange(0, length + self._length - 1, self._length)
        steps[-1] = length - 1
        blocks = (begins[:, None] + steps) // self._length
        for block in set(blocks[~self._is_checked[blocks]].tolist()):
            content = self._tokens[block * self._length : (block + 1) * self._length]
            if _crc32(content) != self._expected[1 + block]:
                raise damaged(self._tokens_file)
            self._is_checked[block] = True


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).data)


def _block_length(tokens: np.ndarray) -> int:
    return _BLOCK_BYTES // tokens.itemsize
