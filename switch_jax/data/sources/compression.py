"""Decompression of gzip, bzip2, xz and Zstandard files, which detects truncation and damage.

Unlike Python's gzip and zstandard's reader: the one raises the same error for damage as for a file
that cannot be read, the other ends at a truncation without an error.
"""

import bz2
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from switch_jax.errors import UserError
from switch_jax.files import check_expansion

_BLOCK_BYTES = 2**16  # read at once
_PIECE_BYTES = 2**10  # decompressed at once, to at most 32 MiB (Zstandard's highest ratio)
SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


class DamagedFile(Exception):
    """The file is truncated or damaged behind what has been read of it."""


def open_stream(file: Any, suffix: str | None, path: str) -> io.BufferedReader:
    """Returns the content of the open file `path`, decompressed if `suffix` is one of `SUFFIXES`.

    Reading raises `DamagedFile` at a truncation, and up to 1 KiB of compressed data before other
    damage, and `UserError` where the content is absurdly longer than the file. Raises `UserError`
    if a package is missing.
    """
    match suffix:
        case ".gz":
            chunks = _decompress(file, path, lambda: zlib.decompressobj(wbits=31), zlib.error)
        case ".bz2":
            chunks = _decompress(file, path, bz2.BZ2Decompressor, OSError)
        case ".xz":
            chunks = _decompress(file, path, lzma.LZMADecompressor, lzma.LZMAError)
        case ".zst":
            zstandard = import_package("zstandard", path)
            # Windows as large as `zstd --long=31` writes.
            frames = zstandard.ZstdDecompressor(max_window_size=2**31)
            chunks = _decompress(file, path, frames.decompressobj, zstandard.ZstdError)
        case _:
            chunks = _read_blocks(file)
    return io.BufferedReader(_ChunkStream(chunks), _BLOCK_BYTES)


def import_package(name: str, path: str, extra: str = "data") -> Any:
    """Imports a package of an extra that reading `path` needs; raises `UserError` without it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'{path} needs {name}: pip install "switch_jax[{extra}]".') from error


class _ChunkStream(io.RawIOBase):
    """Byte stream over an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        data = self._rest[: len(buffer)]
        buffer[: len(data)] = data
        self._rest = self._rest[len(data) :]
        return len(data)


def _read_blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _decompress(
    file: Any, path: str, new_decompressor: Callable[[], Any], failure: type[Exception]
) -> Iterator[bytes]:
    """Yields the content of all gzip members or Zstandard frames of a file."""
    decompressor = new_decompressor()
    read, written = 0, 0  # bytes
    for block in _read_blocks(file):
        read += len(block)
        for begin in range(0, len(block), _PIECE_BYTES):
            piece = block[begin : begin + _PIECE_BYTES]
            while piece:
                if decompressor.eof:
                    piece = piece.lstrip(b"\0")  # padding, which may follow a member
                    if piece:
                        decompressor = new_decompressor()
                    continue
                try:
                    data = decompressor.decompress(piece)
                except failure:
                    raise DamagedFile from None
                written += len(data)
                check_expansion(path, written, read)
                yield data
                piece = decompressor.unused_data
    if not decompressor.eof:  # true of an empty file, too
        raise DamagedFile
