"""Writes the files that `torch.save` of a state_dict writes, without PyTorch."""

import collections
import io
import pickle
import sys
import types
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


class _Tensor:
    """An object that pickles as a PyTorch tensor does; several may share a storage."""

    def __init__(self, key: str, value: np.ndarray):
        self.key, self.value = key, value

    def __reduce__(self):
        value = self.value
        strides = tuple(s // value.itemsize for s in value.strides)
        torch = sys.modules["torch"]
        size = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, strides))
        storage = _Storage(getattr(torch, _STORAGES[value.dtype.name]), self.key, size)
        arguments = (storage, 0, value.shape, strides, False, collections.OrderedDict())
        return sys.modules["torch._utils"]._rebuild_tensor_v2, arguments


class _Storage:
    def __init__(self, kind: type, key: str, size: int):
        self.kind, self.key, self.size = kind, key, size


class _Pickler(pickle.Pickler):
    legacy = False

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        view = (None,) if self.legacy else ()
        return ("storage", obj.kind, obj.key, "cpu", obj.size, *view)


@contextmanager
def _torch_modules() -> Iterator[None]:
    """Provides modules with PyTorch's names while an object is pickled."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in _STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*_: Any) -> None: ...

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    original = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        yield
    finally:
        for name, module in original.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _state(arrays: Mapping[str, np.ndarray]) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns tensors by name, and their storages; equal objects share a storage."""
    keys: dict[int, str] = {}
    state, storages = collections.OrderedDict(), {}
    for name, value in arrays.items():
        key = keys.setdefault(id(value), str(len(keys)))
        state[name], storages[key] = _Tensor(key, value), value
    state._metadata = {"": {"version": 1}}  # as state_dict() of a module adds it
    return state, storages


def write_zip(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file in the format of PyTorch 1.6 and later."""
    write_archive(path, *describe(arrays))


def describe(arrays: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, np.ndarray]]:
    """Returns the pickle that describes tensors, and their storages by key."""
    state, storages = _state(arrays)
    content = io.BytesIO()
    with _torch_modules():
        _Pickler(content, 2).dump(state)
    return content.getvalue(), storages


def write_archive(
    path: Path, pickled: bytes, storages: Mapping[str, np.ndarray], **entries: bytes
) -> None:
    """Writes an archive with a pickle, storages, and further entries by name."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pytorch_model/data.pkl", pickled)
        archive.writestr("pytorch_model/byteorder", "little")
        for key, value in storages.items():
            archive.writestr(f"pytorch_model/data/{key}", _in_memory_order(value))
        archive.writestr("pytorch_model/version", "3\n")
        for name, content in entries.items():
            archive.writestr(name, content)


def write_legacy(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file in the format of PyTorch before 1.6."""
    state, storages = _state(arrays)
    with path.open("wb") as file, _torch_modules():
        for constant in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(constant, file, 2)
        pickler = _Pickler(file, 2)
        pickler.legacy = True
        pickler.dump(state)
        pickle.dump(sorted(storages), file, 2)
        for _, value in sorted(storages.items()):
            file.write(value.size.to_bytes(8, "little"))
            file.write(_in_memory_order(value))


def _in_memory_order(value: np.ndarray) -> bytes:
    """Returns the bytes of a contiguous or a transposed array in the order of its memory."""
    return (value if value.flags.c_contiguous else value.T).tobytes()
