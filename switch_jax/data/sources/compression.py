"""Compressed files as streams that give all that can be had of them, however damaged they are.

Python's own gzip and zstandard's reader lose up to a buffer of good text in front of damage, or
end there as if the file did.
"""

import contextlib
import importlib
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from switch_jax.errors import UserError

_BLOCK = 2**16  # bytes read at once
_PIECE = 2**10  # bytes decompressed at once, to 32 MiB where it is zstd at its densest


class DamagedFile(Exception):
    """Nothing behind what has been read can be read."""


def open_stream(file: Any, suffix: str | None, path: str) -> io.BufferedReader:
    """The bytes of an open file `path`, decompressed where `suffix` is `.gz` or `.zst`.

    Raises `Damaged`, once all that is in front of the damage has been read, and `UserError` where
    a package is missing.
    """
    match suffix:
        case ".gz":  # any number of members, one after the other
            pieces = _decompressed(file, lambda: zlib.decompressobj(wbits=31), zlib.error)
        case ".zst":
            zstandard = import_package("zstandard", path)
            # Windows as large as `zstd --long=31` writes.
            frames = zstandard.ZstdDecompressor(max_window_size=2**31)
            pieces = _decompressed(file, frames.decompressobj, zstandard.ZstdError)
        case _:
            pieces = _blocks(file)
    return io.BufferedReader(_Pieces(pieces), _BLOCK)


def import_package(name: str, path: str) -> Any:
    """A module that reading `path` needs; raises `UserError` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'{path} needs {name}: pip install "switch_jax[data]".') from error


class _Pieces(io.RawIOBase):
    """Bytes that come in pieces, as a file."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        data = self._rest[: len(buffer)]
        buffer[: len(data)] = data
        self._rest = self._rest[len(data) :]
        return len(data)


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _decompressed(file: Any, new: Callable[[], Any], failure: type[Exception]) -> Iterator[bytes]:
    decompressor = new()  # of a member or frame, of which there may be several
    for block in _blocks(file):
        for begin in range(0, len(block), _PIECE):
            piece = block[begin : begin + _PIECE]
            while piece:
                if decompressor.eof:
                    piece = piece.lstrip(b"\0")  # they may stand behind a member
                    if piece:
                        decompressor = new()
                    continue
                # A call that fails loses what came before; of zlib's, it can be had once more.
                saved = decompressor.copy() if hasattr(decompressor, "copy") else None
                try:
                    data = decompressor.decompress(piece)
                except failure:
                    if saved:
                        yield from _bytewise(saved, piece, failure)
                    raise DamagedFile from None
                yield data
                piece = decompressor.unused_data
    if not decompressor.eof:  # nor has an empty file an end
        raise DamagedFile


def _bytewise(decompressor: Any, piece: bytes, failure: type[Exception]) -> Iterator[bytes]:
    with contextlib.suppress(failure):
        for i in range(len(piece)):
            yield decompressor.decompress(piece[i : i + 1])
