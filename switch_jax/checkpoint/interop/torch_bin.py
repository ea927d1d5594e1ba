"""PyTorch's `.bin` files, read without PyTorch and without running anything that they say.

Such a file is a pickle that describes tensors, and their bytes: in a zip archive, or before
PyTorch 1.6 one after the other. A pickle is a program. This one may name nothing but tensors,
their storages and ordered dictionaries, and even for these gets harmless stand-ins of our own.
"""

import collections
import math
import pickle
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

# What a damaged pickle or archive may raise.
_DAMAGE = (
    *(OSError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError, MemoryError, OverflowError),
    *(ValueError, TypeError, AttributeError, LookupError),
)
_LARGEST_PICKLE = 2**28  # of descriptions; a million tensors take less
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


class TorchTensor(NamedTuple):
    """A view of a storage, as a file describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # both in elements

    @property
    def dtype(self) -> np.dtype:
        """Its NumPy type."""
        return self.storage.dtype


class TorchFile:
    """The tensors of a `.bin` file; raises `UserError` for anything else in it.

    tensors: by name.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            if zipfile.is_zipfile(path):
                content, self._offsets = _open_zip(path)
            else:
                content, self._offsets = _open_legacy(path)
        except _DAMAGE as error:
            raise _damaged(path, error) from error
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no dictionary of tensors; take another file.")
        self.tensors: dict[str, TorchTensor] = {}
        for name, value in content.items():
            if not isinstance(name, str) or not isinstance(value, TorchTensor):
                raise UserError(f"{path} holds {name!r}, which is no tensor; take another file.")
            self._check(name, value)
            self.tensors[name] = value

    def read(self, name: str) -> np.ndarray:
        """A tensor's values; raises `UserError` where the file has become shorter."""
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
        """Nothing outside of its storage may be read, nor outside of the file."""
        storage, offset, shape, strides = tensor
        numbers: tuple[Any, ...] = (storage.size, offset, *shape, *strides)
        legal = all(type(n) is int and n >= 0 for n in numbers) and len(shape) == len(strides)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides)) if legal else 0
        end = self._offsets.get(storage.key, math.inf) + storage.size * storage.dtype.itemsize
        if (
            not legal
            or (0 not in shape and last >= storage.size)
            or end > self._path.stat().st_size
        ):
            raise UserError(
                f"{self._path} is damaged: the values of {name} are not in it; copy it again."
            )


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    return UserError(f"{path} cannot be read as a file of PyTorch's ({reason}); copy it again.")


def _open_zip(path: Path) -> tuple[Any, dict[str, int]]:
    """The description in an archive, and where in the file each storage begins."""
    offsets = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        described = None
        for entry in archive.infolist():
            parts = entry.filename.split("/")
            if entry.filename.startswith("/") or ".." in parts or "\\" in entry.filename:
                raise UserError(
                    f"{path} has an entry {entry.filename!r}, which points outside of it; do not"
                    " use that file."
                )
            if parts[1:] == ["data.pkl"]:
                described = entry
            if parts[1:] == ["byteorder"] and archive.read(entry) != b"little":
                raise UserError(f"{path} is big-endian; save it on another computer.")
            if len(parts) == 3 and parts[1] == "data":
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise UserError(f"{path} is compressed; save it with PyTorch.")
                offsets[parts[2]] = _data_offset(file, entry)
        if described is None:
            raise UserError(f"{path} is an archive without a data.pkl; name a file of PyTorch's.")
        if described.file_size > _LARGEST_PICKLE:
            raise UserError(f"{path} describes more than any model has; do not use that file.")
        with archive.open(described) as stream:
            return _Reader(stream, path).load(), offsets


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind a header that repeats its name."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no header of {entry.filename}")
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return entry.header_offset + 30 + name + extra


def _open_legacy(path: Path) -> tuple[Any, dict[str, int]]:
    """As `_open_zip`, of a file that is five pickles and the storages behind them."""
    with path.open("rb") as file:
        if _Reader(file, path).load() != _LEGACY_MAGIC:
            raise pickle.UnpicklingError("it does not begin as one")
        _, system = _Reader(file, path).load(), _Reader(file, path).load()
        if not system["little_endian"]:
            raise UserError(f"{path} is big-endian; save it on another computer.")
        reader = _Reader(file, path)
        content, keys = reader.load(), _Reader(file, path).load()
        offsets = {}
        for key in keys:
            size = int.from_bytes(file.read(8), "little")
            if key not in reader.storages or size != reader.storages[key].size:
                raise pickle.UnpicklingError(f"storage {key} is not as described")
            offsets[key] = file.tell()
            file.seek(size * reader.storages[key].dtype.itemsize, 1)
        return content, offsets


class _Reader(pickle.Unpickler):
    """Reads descriptions of tensors and refuses every other name; raises `UserError`."""

    def __init__(self, file: Any, path: Path):
        super().__init__(file, encoding="utf-8")
        self._path = path
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for; the only way for a pickle to get hold of anything."""
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _DTYPES:
            return _StorageType(name)
        raise UserError(
            f"{self._path} names {module}.{name}, which is not needed to describe the tensors of a"
            " model; do not use that file, or save its state_dict() as safetensors."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, from how the pickle refers to it."""
        kind, storage_type, key, _, size, *_ = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError("a reference to something else than a storage")
        storage = _Storage(str(key), _DTYPES[storage_type.name], size)
        return self.storages.setdefault(storage.key, storage)

    # Methods and not functions, because a pickle may set attributes of what it is given.

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TorchTensor:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        return TorchTensor(storage, offset, tuple(shape), tuple(strides))

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data


class _StorageType(NamedTuple):
    """Stands in for one of PyTorch's classes of storages."""

    name: str
