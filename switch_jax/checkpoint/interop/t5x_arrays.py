"""Parameter arrays of a T5X checkpoint, in both of T5X's layouts.

*Legacy*: a msgpack index named `checkpoint`. Its leaves are small arrays, or references to a folder
with one zarr array each. *Orbax*: a folder `state` with all arrays in one OCDBT database, or in one
folder per array. Arrays are opened here; slices of them are read on demand.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import serialization

from switch_jax.errors import UserError
from switch_jax.files import check_expansion, folder_size, path_within, plain_path

INDEX, STATE, MANIFEST = "checkpoint", "state", "manifest.ocdbt"
_PARAMETERS = "target."
_PLACEHOLDER = "PLACEHOLDER://"  # prefix of a reference in indices of Orbax before OCDBT
_MAX_INDEX_BYTES = 2**30  # an index of all optimizer states has some megabytes
_CACHE_BYTES = 256 * 2**20  # of chunks, which consecutive slices share

ArrayIndex = tuple[int | slice, ...]  # index of an array, one entry for each dimension


class T5XArray(NamedTuple):
    """An array of a checkpoint.

    read: function of an index that returns this part of the array, float32; raises `UserError`
      where the files are damaged.
    """

    shape: tuple[int, ...]
    read: Callable[[ArrayIndex], np.ndarray]


class T5XArrays(NamedTuple):
    """The arrays of a checkpoint."""

    parameters: dict[str, T5XArray]  # by path, such as `encoder/layers_0/mlp/wi/kernel`
    num_optimizer_arrays: int


def find_t5x_checkpoint(path: Path) -> Path | None:
    """Returns the folder of a checkpoint: `path`, or the newest `checkpoint_N` in it, or None."""
    if _is_checkpoint(path):
        return path
    numbered = {
        int(match[1]): folder
        for folder in (path.iterdir() if path.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint_(\d+)", folder.name)) and _is_checkpoint(folder)
    }
    return numbered[max(numbered)] if numbered else None


def _is_checkpoint(path: Path) -> bool:
    return _is_index(path / INDEX) or _is_state(path) or _is_state(path / STATE)


def _is_index(path: Path) -> bool:
    """Whether a file has a msgpack map; TensorFlow's file of the same name has text."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first_byte = file.read(1)
    return bool(first_byte) and (0x80 <= first_byte[0] <= 0x8F or first_byte[0] in (0xDE, 0xDF))


def _is_state(path: Path) -> bool:
    return (path / MANIFEST).is_file() or any(path.glob(f"{_PARAMETERS}*/.zarray"))


def open_arrays(checkpoint: Path) -> T5XArrays:
    """Opens the arrays of a checkpoint from `find_t5x_checkpoint`.

    Raises `UserError` for an array that is missing, damaged or outside of the checkpoint's folder.
    """
    folder = (
        checkpoint if _is_state(checkpoint) or _is_index(checkpoint / INDEX) else checkpoint / STATE
    )
    if (folder / MANIFEST).is_file():
        return _from_store(folder, {"driver": "ocdbt", "base": _file_store(folder)})
    if _is_index(folder / INDEX):
        return _from_index(folder)
    return _from_store(folder, _file_store(folder))


def _from_store(folder: Path, base: dict[str, Any]) -> T5XArrays:
    """Opens all arrays of a key-value store."""
    context = _context()
    stored = folder_size(folder)  # an upper limit for each array: a database is no folder per array
    try:
        keys = ts.KvStore.open(base, context=context).result().list().result()
    except ValueError as error:
        raise _damaged(folder, error) from error
    suffix = "/.zarray"
    paths = (key.decode() for key in keys)
    names = sorted(path.removesuffix(suffix) for path in paths if path.endswith(suffix))
    parameter_names = [name for name in names if name.startswith(_PARAMETERS)]
    arrays = {}
    for name in parameter_names:
        store = base | {"path": f"{base.get('path', '')}{name}/"}
        path = name.removeprefix(_PARAMETERS).replace(".", "/")
        arrays[path] = _open_zarr(folder / name, store, context, stored)
    return T5XArrays(arrays, len(names) - len(parameter_names))


def _from_index(checkpoint: Path) -> T5XArrays:
    """Opens all arrays of a legacy index."""
    index = path_within(checkpoint, INDEX)
    if (size := index.stat().st_size) > _MAX_INDEX_BYTES:
        raise UserError(f"{index} has {size:,} bytes, which no index needs; do not use it.")
    try:
        content = serialization.msgpack_restore(index.read_bytes())
        state = content.get("optimizer", content)
        leaves = dict(_leaves(state["target"], ()))
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # msgpack has no common class
        raise _damaged(index, error) from error
    context = _context()
    arrays = {name: _from_leaf(checkpoint, leaf, context) for name, leaf in leaves.items()}
    return T5XArrays(arrays, sum(1 for _ in _leaves(state.get("state", {}), ())))


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yields path and value of each leaf of an index."""
    if isinstance(tree, dict) and not _is_reference(tree):
        for key, child in tree.items():
            yield from _leaves(child, (*path, str(key)))
    else:
        yield "/".join(path), tree


def _is_reference(tree: dict) -> bool:
    """Whether a node of the index refers to an array in a folder."""
    return {"driver", "kvstore"} <= tree.keys()


def _from_leaf(checkpoint: Path, leaf: Any, context: ts.Context) -> T5XArray:
    """Returns the array of a leaf of the index, which may be a reference to a folder."""
    # Only the folder's name is used of a reference; shape and dtype come from the folder.
    if isinstance(leaf, dict):
        name = str(leaf["kvstore"].get("path", leaf.get("path", ""))).rstrip("/")
    elif isinstance(leaf, str):
        name = leaf.removeprefix(_PLACEHOLDER)
    else:
        value = np.asarray(leaf)
        return T5XArray(value.shape, lambda index: np.asarray(value[index], np.float32))
    folder = path_within(checkpoint, name).resolve()
    if folder == checkpoint.resolve():
        raise UserError(f"{checkpoint / INDEX} has an array without a name; copy it again.")
    if not (folder / ".zarray").is_file():
        raise UserError(f"{checkpoint} lacks the array {name}; copy its folder there.")
    return _open_zarr(folder, _file_store(folder), context, folder_size(folder), check=True)


def _file_store(folder: Path) -> dict[str, Any]:
    """Returns TensorStore's description of a folder."""
    return {"driver": "file", "path": f"{plain_path(folder)}/"}


def _context() -> ts.Context:
    return ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})


def _open_zarr(
    path: Path, store: dict[str, Any], context: ts.Context, stored: int, check: bool = False
) -> T5XArray:
    """Opens a zarr array.

    Args:
      stored: bytes of its files; the array and each chunk of it may only be so much larger.
      check: whether a missing chunk is an error; TensorStore reads it as zeros.
    """
    spec = {"driver": "zarr", "kvstore": store, "recheck_cached_data": False}
    try:
        array = ts.open(spec, open=True, read=True, context=context).result()
        if not jnp.issubdtype(array.dtype.numpy_dtype, jnp.floating):
            raise ValueError(f"its numbers are {array.dtype.name}")
        chunk_shape: Any = array.chunk_layout.read_chunk.shape
        numbers = max(math.prod(array.shape), math.prod(chunk_shape))
        check_expansion(str(path), numbers * array.dtype.numpy_dtype.itemsize, stored)
        chunks = np.prod(-(-np.array(array.shape) // chunk_shape))
        files = ts.KvStore.open(store, context=context).result().list() if check else None
        if files is not None and (existing := len(files.result()) - 1) < chunks:
            raise ValueError(f"{existing} of {chunks:.0f} chunks are there")
    except ValueError as error:
        raise _damaged(path, error) from error

    def read(index: ArrayIndex) -> np.ndarray:
        try:
            return np.asarray(array[index].read().result()).astype(np.float32)
        except ValueError as error:
            raise _damaged(path, error) from error

    return T5XArray(tuple(array.shape), read)


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0][:200]
    return UserError(f"{path} cannot be read ({reason}); copy it again from where it comes from.")
