"""The tensors of a model's folder: in safetensors or PyTorch's files, in one or in several.

Nothing is read but what is asked for.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from switch_jax.checkpoint.interop.torch_bin import TorchFile
from switch_jax.errors import UserError

# The types that weights come in, by the names that safetensors has for them.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What a folder may hold, the best first; an index says which tensor is in which file.
INDEX = "model.safetensors.index.json"
_INDICES = (INDEX, "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


class Tensor(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str  # a key of `DTYPES`


class _File(Protocol):
    tensors: dict[str, Tensor]

    def read(self, name: str) -> np.ndarray: ...
    def close(self) -> None: ...


class Tensors:
    """The tensors of a folder, by name.

    known: shape and type of each.
    """

    def __init__(self, folder: Path):
        self._files: dict[str, _File] = {}
        self._reading: _File | None = None
        self._folder = folder
        self._file_of = self._weight_map()
        self.known: dict[str, Tensor] = {}
        for name, file in self._file_of.items():
            try:
                self.known[name] = self._open(file).tensors[name]
            except KeyError:
                raise UserError(
                    f"{folder / file} has no {name}, which the index says is in it; copy the file"
                    " again."
                ) from None

    def read(self, name: str) -> np.ndarray:
        """Values of a tensor, in its own type; one file at a time is held in memory."""
        file = self._open(self._file_of[name])
        if file is not self._reading:
            if self._reading is not None:
                self._reading.close()
            self._reading = file
        return file.read(name)

    def _weight_map(self) -> dict[str, str]:
        """Tensor → name of its file."""
        for index in _INDICES:
            if (self._folder / index).is_file():
                return self._indexed(index)
        for file in _SINGLE:
            if (self._folder / file).is_file():
                return dict.fromkeys(self._open(file).tensors, file)
        raise UserError(
            f"{self._folder} has neither {_SINGLE[0]} nor {_SINGLE[1]}, nor an index of several;"
            " copy the weights there."
        )

    def _indexed(self, index: str) -> dict[str, str]:
        path = self._folder / index
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error!r}); copy it again.") from error
        for file in sorted(set(files.values())):
            if Path(file).name != file or "\\" in file:
                raise UserError(
                    f"{path} names {file!r}, which is not a file of that folder; do not use it."
                )
            if not (self._folder / file).is_file():
                raise UserError(f"{self._folder / file}, named by {index}, is missing; copy it.")
        return files

    def _open(self, file: str) -> _File:
        if file not in self._files:
            path = self._folder / file
            self._files[file] = _Torch(path) if file.endswith(".bin") else _Safetensors(path)
        return self._files[file]


class _Torch:
    def __init__(self, path: Path):
        self._file = TorchFile(path)
        self.tensors = {
            name: Tensor(tensor.shape, _NAMES[tensor.dtype])
            for name, tensor in self._file.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        return self._file.read(name)

    def close(self) -> None:
        """Nothing is kept open."""


class _Safetensors:
    def __init__(self, path: Path):
        self._path = path
        self._mapped: Any = None  # while tensors of this file are read
        file = self._open()
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        self.tensors = {n: Tensor(tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
        for name, tensor in self.tensors.items():
            if tensor.dtype not in DTYPES:
                raise UserError(
                    f"{name} in {path} is {tensor.dtype}, and weights can be"
                    f" {', '.join(DTYPES)}; save it in one of these."
                )

    def read(self, name: str) -> np.ndarray:
        if self._mapped is None:
            self._mapped = self._open()
        return self._mapped.get_tensor(name)

    def close(self) -> None:
        self._mapped = None

    def _open(self) -> Any:
        library = safetensors()
        try:
            return library.safe_open(self._path, "numpy")
        except (OSError, library.SafetensorError) as error:
            raise UserError(f"{self._path} cannot be read ({error}); copy it again.") from error


def safetensors() -> Any:
    """The library; raises `UserError` where it is missing."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise UserError(
            "Files of Hugging Face are read and written with safetensors, which is missing: pip"
            " install 'switch_jax[interop]'."
        ) from error
    return safetensors
