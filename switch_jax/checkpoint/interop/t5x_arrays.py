"""The parameter arrays of a T5X checkpoint, in either of the layouts that T5X wrote.

*Legacy*: a msgpack index named `checkpoint`, whose leaves are small arrays themselves or point to a
folder with one zarr array each. *Orbax*: a folder `state` with all arrays in one OCDBT database, or
in a folder each. Arrays are opened, not read: a slice of one is read when it is asked for.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import serialization

from switch_jax.errors import UserError

INDEX, STATE, MANIFEST = "checkpoint", "state", "manifest.ocdbt"
_PARAMETERS = "target."
_PLACEHOLDER = "PLACEHOLDER://"  # what Orbax had in an index, before it had databases
_CACHE = 256 * 2**20  # bytes of chunks that are kept: slices that follow each other share them

# What an array is cut with.
Cut = tuple[int | slice, ...]


class T5XArray(NamedTuple):
    """An array of a checkpoint.

    read: what a cut gives, float32; raises `UserError` where the files are damaged.
    """

    shape: tuple[int, ...]
    read: Callable[[Cut], np.ndarray]


class Arrays(NamedTuple):
    """The arrays of a checkpoint, by path such as `encoder/layers_0/mlp/wi/kernel`."""

    parameters: dict[str, T5XArray]
    others: int  # of the optimizer


def find_arrays(path: Path) -> Path | None:
    """The checkpoint in a folder: itself, or the newest `checkpoint_N` in it."""
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
    """Whether this is a msgpack map; TensorFlow has text in a file of that name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.read(1)
    return bool(first) and (0x80 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))


def _is_state(path: Path) -> bool:
    return (path / MANIFEST).is_file() or any(path.glob(f"{_PARAMETERS}*/.zarray"))


def open_arrays(checkpoint: Path) -> Arrays:
    """Opens what `find` found; raises `UserError` for what is missing, damaged or elsewhere."""
    folder = (
        checkpoint if _is_state(checkpoint) or _is_index(checkpoint / INDEX) else checkpoint / STATE
    )
    if (folder / MANIFEST).is_file():
        return _from_store(folder, {"driver": "ocdbt", "base": f"file://{folder.absolute()}/"})
    if _is_index(folder / INDEX):
        return _from_index(folder)
    return _from_store(folder, {"driver": "file", "path": f"{folder.absolute()}/"})


def _from_store(folder: Path, base: dict[str, Any]) -> Arrays:
    """All arrays of a key-value store."""
    context = _context()
    try:
        keys = ts.KvStore.open(base, context=context).result().list().result()
    except ValueError as error:
        raise _damaged(folder, error) from error
    ends = "/.zarray"
    names = sorted(key.decode().removesuffix(ends) for key in keys if key.decode().endswith(ends))
    mine = [name for name in names if name.startswith(_PARAMETERS)]
    arrays = {}
    for name in mine:
        store = base | {"path": f"{base.get('path', '')}{name}/"}
        path = name.removeprefix(_PARAMETERS).replace(".", "/")
        arrays[path] = _opened(folder / name, store, context)
    return Arrays(arrays, len(names) - len(mine))


def _from_index(checkpoint: Path) -> Arrays:
    try:
        content = serialization.msgpack_restore((checkpoint / INDEX).read_bytes())
        state = content.get("optimizer", content)
        leaves = dict(_leaves(state["target"], ()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # msgpack has no one class
        raise _damaged(checkpoint / INDEX, error) from error
    context = _context()
    arrays = {name: _from_leaf(checkpoint, leaf, context) for name, leaf in leaves.items()}
    return Arrays(arrays, sum(1 for _ in _leaves(state.get("state", {}), ())))


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and not _points(tree):
        for key, child in tree.items():
            yield from _leaves(child, (*path, str(key)))
    else:
        yield "/".join(path), tree


def _points(tree: dict) -> bool:
    """Whether a node of the index stands for an array in a folder."""
    return {"driver", "kvstore"} <= tree.keys()


def _from_leaf(checkpoint: Path, leaf: Any, context: ts.Context) -> T5XArray:
    # Of what the index says of an array elsewhere, only the name of its folder counts.
    if isinstance(leaf, dict):
        name = str(leaf["kvstore"].get("path", leaf.get("path", ""))).rstrip("/")
    elif isinstance(leaf, str):
        name = leaf.removeprefix(_PLACEHOLDER)
    else:
        value = np.asarray(leaf)
        return T5XArray(value.shape, lambda cut: np.asarray(value[cut], np.float32))
    folder = (checkpoint / name).resolve()
    if not folder.is_relative_to(checkpoint.resolve()) or not name:
        raise UserError(
            f"{checkpoint / INDEX} points to {name!r}, which is outside of its folder; take the"
            " checkpoint from where it comes from."
        )
    if not (folder / ".zarray").is_file():
        raise UserError(f"{checkpoint} lacks the array {name}; copy its folder there.")
    return _opened(folder, {"driver": "file", "path": f"{folder}/"}, context, check=True)


def _context() -> ts.Context:
    return ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})


def _opened(
    where: Path, store: dict[str, Any], context: ts.Context, check: bool = False
) -> T5XArray:
    """A zarr array; with `check`, one that lacks no chunk, which would be read as zeros."""
    spec = {"driver": "zarr", "kvstore": store, "recheck_cached_data": False}
    try:
        array = ts.open(spec, open=True, read=True, context=context).result()
        if not jnp.issubdtype(array.dtype.numpy_dtype, jnp.floating):
            raise ValueError(f"its numbers are {array.dtype.name}")
        chunks = np.prod(-(-np.array(array.shape) // array.chunk_layout.read_chunk.shape))
        files = ts.KvStore.open(store, context=context).result().list() if check else None
        if files is not None and (there := len(files.result()) - 1) < chunks:
            raise ValueError(f"{there} of {chunks:.0f} chunks are there")
    except ValueError as error:
        raise _damaged(where, error) from error

    def read(cut: Cut) -> np.ndarray:
        try:
            return np.asarray(array[cut].read().result()).astype(np.float32)
        except ValueError as error:
            raise _damaged(where, error) from error

    return T5XArray(tuple(array.shape), read)


def _damaged(where: Path, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0][:200]
    return UserError(f"{where} cannot be read ({reason}); copy it again from where it comes from.")
