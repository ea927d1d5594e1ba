"""Reader of PyTorch `.bin` files, without PyTorch and without executing code in them.

A file has a pickle that describes tensors, and the bytes of their storages: in a zip archive, or
before PyTorch 1.6 one after the other. A pickle can call any function that it names. This reader
accepts only the names of tensors, storages and ordered dictionaries, and replaces the first two by
harmless functions and classes of its own. What it reads into memory is bounded beforehand.
"""

import collections
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from switch_jax.errors import UserError

_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}

# Exceptions that a damaged pickle or archive raises.
_DAMAGE_ERRORS = (
    *(OSError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError, MemoryError, OverflowError),
    *(ValueError, TypeError, AttributeError, LookupError, struct.error),
)
_MAX_PICKLE_BYTES = 2**25  # the description of a hundred thousand tensors is smaller
_MAX_WORD_BYTES = 16  # of a file with one word
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int  # elements


class TorchTensor(NamedTuple):
    """A tensor as a file describes it: a view of a storage."""

    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements

    @property
    def dtype(self) -> np.dtype:
        """NumPy dtype."""
        return self.storage.dtype


class TorchFile:
    """A `.bin` file.

    tensors: descriptions of its tensors, by name.

    Raises `UserError` where the file is damaged or has anything but tensors.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            if zipfile.is_zipfile(path):
                content, self._offsets = _open_zip(path)
            else:
                content, self._offsets = _open_legacy(path)
        except _DAMAGE_ERRORS as error:
            raise _damaged(path, error) from error
        if not isinstance(content, dict):
            raise UserError(f"{path} has no dictionary of tensors; take another file.")
        self.tensors: dict[str, TorchTensor] = {}
        for name, value in content.items():
            if not isinstance(name, str) or not isinstance(value, TorchTensor):
                raise UserError(f"{path} has {name!r}, which is no tensor; take another file.")
            self._check(name, value)
            self.tensors[name] = value

    def read(self, name: str) -> np.ndarray:
        """Returns the values of a tensor; raises `UserError` where the file was truncated."""
        storage, offset, shape, strides = self.tensors[name]
        try:
            values = np.fromfile(
                self._path, storage.dtype, storage.size, offset=self._offsets[storage.key]
            )
            if len(values) < storage.size:
                raise EOFError("it has become shorter")
            flat = values[offset:]
            bytes_apart = [stride * storage.dtype.itemsize for stride in strides]
            return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, shape, bytes_apart))
        except (OSError, EOFError, ValueError) as error:
            raise _damaged(self._path, error) from error

    def _check(self, name: str, tensor: TorchTensor) -> None:
        """Raises `UserError` for a tensor outside of its storage, or a storage outside the file."""
        storage, offset, shape, strides = tensor
        numbers: tuple[Any, ...] = (storage.size, offset, *shape, *strides)
        valid = all(type(n) is int and n >= 0 for n in numbers) and len(shape) == len(strides)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides)) if valid else 0
        expanded = valid and math.prod(shape) > storage.size  # by strides of 0
        end = self._offsets.get(storage.key, math.inf) + storage.size * storage.dtype.itemsize
        if (
            not valid
            or expanded
            or (0 not in shape and last >= storage.size)
            or end > self._path.stat().st_size
        ):
            raise UserError(
                f"{self._path} is damaged: the values of {name} are not in it; copy it again."
            )


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    return UserError(f"{path} cannot be read as a PyTorch file ({reason}); copy it again.")


def _open_zip(path: Path) -> tuple[Any, dict[str, int]]:
    """Returns the description in an archive, and the byte offset of each storage by its key."""
    offsets = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        pickle_entry = None
        for entry in archive.infolist():
            parts = entry.filename.split("/")
            if entry.filename.startswith("/") or ".." in parts or "\\" in entry.filename:
                raise UserError(
                    f"{path} has an entry {entry.filename!r}, which points outside of it; do not"
                    " use that file."
                )
            if parts[1:] == ["data.pkl"]:
                pickle_entry = entry
            if parts[1:] == ["byteorder"]:
                with archive.open(entry) as stream:
                    if stream.read(_MAX_WORD_BYTES) != b"little":
                        raise UserError(f"{path} is big-endian; save it on another computer.")
            if len(parts) == 3 and parts[1] == "data":
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise UserError(f"{path} is compressed; save it with PyTorch.")
                offsets[parts[2]] = _data_offset(file, entry)
        if pickle_entry is None:
            raise UserError(f"{path} is an archive without a data.pkl; name a PyTorch file.")
        with archive.open(pickle_entry) as stream:
            return _SafeUnpickler(stream, path).load(), offsets


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Returns the byte offset of an entry's data, behind a header of variable length."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no header for {entry.filename}")
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return entry.header_offset + 30 + name + extra


def _open_legacy(path: Path) -> tuple[Any, dict[str, int]]:
    """Returns the same as `_open_zip` for a file of five pickles and the storages behind them."""
    with path.open("rb") as file:
        if _SafeUnpickler(file, path).load() != _LEGACY_MAGIC:
            raise pickle.UnpicklingError("its first pickle is another")
        _, system = _SafeUnpickler(file, path).load(), _SafeUnpickler(file, path).load()
        if not system["little_endian"]:
            raise UserError(f"{path} is big-endian; save it on another computer.")
        unpickler = _SafeUnpickler(file, path)
        content, keys = unpickler.load(), _SafeUnpickler(file, path).load()
        offsets = {}
        for key in keys:
            size = int.from_bytes(file.read(8), "little")
            if key not in unpickler.storages or size != unpickler.storages[key].size:
                raise pickle.UnpicklingError(f"storage {key} is not as described")
            offsets[key] = file.tell()
            file.seek(size * unpickler.storages[key].dtype.itemsize, 1)
        return content, offsets


class _SafeUnpickler(pickle._Unpickler):
    """Unpickles descriptions of tensors; raises `UserError` for any other name in the pickle.

    The base class is the one in Python: that in C allocates a table as long as the largest number
    in the pickle.

    storages: all storages so far, by key.
    """

    def __init__(self, file: Any, path: Path):
        super().__init__(_BoundedReader(file, path), encoding="utf-8")
        self._path = path
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Returns the object for a name in the pickle, which can use no other objects."""
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == "torch" and name in _DTYPES:
            return _StorageType(name)
        raise UserError(
            f"{self._path} names {module}.{name}, which is not needed to describe the tensors of a"
            " model; do not use that file, or save its state_dict() as safetensors."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """Returns the storage that the pickle refers to."""
        kind, storage_type, key, _, size, *_ = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError("a reference to an object that is no storage")
        storage = _Storage(str(key), _DTYPES[storage_type.name], size)
        return self.storages.setdefault(storage.key, storage)

    # Methods, not functions: a pickle may set attributes of the objects that it uses.

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TorchTensor:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        return TorchTensor(storage, offset, tuple(shape), tuple(strides))

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data


class _BoundedReader:
    """A file of which at most `_MAX_PICKLE_BYTES` are read, then `UserError` is raised."""

    def __init__(self, file: Any, path: Path):
        self._file, self._path, self._left = file, path, _MAX_PICKLE_BYTES

    def read(self, size: int) -> bytes:
        return self._file.read(self._claim(size))

    def readline(self) -> bytes:
        line = self._file.readline(self._left + 1)
        self._claim(len(line))
        return line

    def _claim(self, size: int) -> int:
        if not 0 <= size <= self._left:
            raise UserError(
                f"{self._path} describes its tensors in more than {_MAX_PICKLE_BYTES:,} bytes,"
                " which no model needs; do not use that file."
            )
        self._left -= size
        return size


class _StorageType(NamedTuple):
    """Replaces one of PyTorch's storage classes."""

    name: str
