"""Tensors in a Hugging Face folder: safetensors or PyTorch `.bin` files, one or several.

A tensor is read on demand.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from switch_jax.checkpoint.interop.torch_bin import TorchFile
from switch_jax.config import build_dataclass, read_json
from switch_jax.errors import UserError
from switch_jax.files import path_within

# Dtypes of weights, by their names in safetensors.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Files that a folder may have, in order of preference. An index has the file of each tensor.
INDEX = "model.safetensors.index.json"
_INDICES = (INDEX, "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor, from a file's header."""

    shape: tuple[int, ...]
    dtype: str  # a key of `DTYPES`


@dataclasses.dataclass(frozen=True)
class _Index:
    """Keys of an index that are read."""

    weight_map: dict[str, str]  # file by name of the tensor


class _TensorFile(Protocol):
    specs: dict[str, TensorSpec]

    def read(self, name: str) -> np.ndarray: ...
    def close(self) -> None: ...


class TensorFolder:
    """The tensors of a folder.

    specs: shape and dtype of each tensor, by name.

    Raises `UserError` where a file is missing or damaged.
    """

    def __init__(self, folder: Path):
        self._files: dict[str, _TensorFile] = {}
        self._open_file: _TensorFile | None = None
        self._folder = folder
        self._weight_map = self._find_files()
        self.specs: dict[str, TensorSpec] = {}
        for name, file in self._weight_map.items():
            try:
                self.specs[name] = self._file(file).specs[name]
            except KeyError:
                raise UserError(
                    f"{folder / file} has no {name}, which the index lists for it; copy the file"
                    " again."
                ) from None

    def read(self, name: str) -> np.ndarray:
        """Returns the values of a tensor, in its own dtype; keeps one file at a time open."""
        file = self._file(self._weight_map[name])
        if file is not self._open_file:
            if self._open_file is not None:
                self._open_file.close()
            self._open_file = file
        return file.read(name)

    def _find_files(self) -> dict[str, str]:
        """Returns the name of the file of each tensor, by tensor name."""
        for index in _INDICES:
            if (self._folder / index).is_file():
                return self._read_index(index)
        for file in _SINGLE:
            if (self._folder / file).is_file():
                return dict.fromkeys(self._file(file).specs, file)
        raise UserError(
            f"{self._folder} has neither {_SINGLE[0]} nor {_SINGLE[1]}, nor an index of several;"
            " copy the weights there."
        )

    def _read_index(self, index: str) -> dict[str, str]:
        path = path_within(self._folder, index)
        files = build_dataclass(_Index, read_json(path), str(path), ignore_unknown=True).weight_map
        for file in sorted(set(files.values())):
            if Path(file).name != file or "\\" in file:
                raise UserError(
                    f"{path} names {file!r}, which is not a file of that folder; do not use it."
                )
            if not (self._folder / file).is_file():
                raise UserError(f"{self._folder / file}, named by {index}, is missing; copy it.")
        return files

    def _file(self, file: str) -> _TensorFile:
        if file not in self._files:
            path = path_within(self._folder, file)
            open_file = _BinFile if file.endswith(".bin") else _SafetensorsFile
            self._files[file] = open_file(path)
        return self._files[file]


class _BinFile:
    def __init__(self, path: Path):
        self._file = TorchFile(path)
        self.specs = {
            name: TensorSpec(tensor.shape, _NAMES[tensor.dtype])
            for name, tensor in self._file.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        return self._file.read(name)

    def close(self) -> None:
        """Does nothing: `read` closes the file."""


class _SafetensorsFile:
    def __init__(self, path: Path):
        self._path = path
        self._mapped: Any = None  # the memory-mapped file; None while it is closed
        file = self._open()
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        self.specs = {
            name: TensorSpec(tuple(tensor.get_shape()), tensor.get_dtype())
            for name, tensor in slices.items()
        }
        for name, spec in self.specs.items():
            if spec.dtype not in DTYPES:
                raise UserError(
                    f"{name} in {path} is {spec.dtype}, and weights can be"
                    f" {', '.join(DTYPES)}; save it in one of these."
                )

    def read(self, name: str) -> np.ndarray:
        if self._mapped is None:
            self._mapped = self._open()
        return self._mapped.get_tensor(name)

    def close(self) -> None:
        self._mapped = None

    def _open(self) -> Any:
        library = import_safetensors()
        try:
            return library.safe_open(self._path, "numpy")
        except (OSError, library.SafetensorError) as error:
            raise UserError(f"{self._path} cannot be read ({error}); copy it again.") from error


def import_safetensors() -> Any:
    """Imports and returns `safetensors`; raises `UserError` where it is not installed."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UserError(
            "Hugging Face files are read and written with safetensors, which is missing: pip"
            " install 'switch_jax[interop]'."
        ) from error
    return safetensors
