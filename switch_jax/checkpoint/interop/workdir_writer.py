"""A foreign checkpoint as a WORKDIR, written slice by slice.

Orbax would want whole arrays. Its own extension point for other kinds of leaves, a
`TypeHandler`, gives each slice to TensorStore as a chunk instead; what lies on disk afterwards
is read as any other checkpoint.
"""

import asyncio
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from switch_jax.checkpoint.interop.foreign import ForeignCheckpoint, Index, Stacked
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.files import create_folder_atomically

_BYTES_AT_ONCE = 128 * 2**20  # of slices that are being written


def write_workdir(imported: ForeignCheckpoint, output: Path) -> None:
    """Writes a WORKDIR whose only checkpoint, 0, has the parameters of `imported`.

    Made beside `output`, which it becomes when it is complete; what fails leaves nothing behind.
    Raises `UserError` where `output` exists or cannot be written.
    """
    with create_folder_atomically(output) as partial:
        workdir = Workdir(partial)
        config = imported.config
        if imported.vocabulary is not None:  # what is evaluated later must be read with it
            vocabulary = str(Workdir(output.absolute()).vocabulary)
            data = dataclasses.replace(config.data, vocabulary=vocabulary)
            config = dataclasses.replace(config, data=data)
        workdir.prepare(config, imported.vocabulary)
        for name, content in imported.carried.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        _write_parameters(imported, workdir.checkpoints / "0" / "params")


def _write_parameters(imported: ForeignCheckpoint, folder: Path) -> None:
    leaves = {
        name: _Slices(stacked, functools.partial(imported.read, name))
        for name, stacked in imported.parameters.items()
    }
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Slices, _SliceHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # without it, Orbax warns
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as writer:
        writer.save(folder, args=ocp.args.PyTreeSave(leaves))


@dataclasses.dataclass(frozen=True)
class _Slices:
    """A parameter, as a leaf of what Orbax saves."""

    stacked: Stacked
    read: Callable[[Index], np.ndarray]


class _SliceHandler(ocp.type_handlers.TypeHandler):
    """Writes `_Slices` where Orbax would have written an array with a slice as its chunk."""

    def typestr(self) -> str:
        return "np.ndarray"  # what it is to those who read it

    async def serialize(self, values: Sequence[_Slices], infos: Sequence[Any], args=None):
        for slices, info in zip(values, infos):
            await _write(slices, info)
        return []

    async def deserialize(self, infos, args=None):
        raise NotImplementedError("Read as arrays.")

    async def metadata(self, infos):
        raise NotImplementedError("Read as arrays.")


async def _write(slices: _Slices, info: Any) -> None:
    shape, batch = slices.stacked
    chunk = [1] * batch + list(slices.stacked.slice_shape)
    array = await ts.open(
        {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": f"file://{info.parent_dir}/ocdbt.process_0",
                "path": f"{info.name}/",
            },
            "metadata": {
                "shape": list(shape),
                "chunks": chunk,
                "dtype": "<f4",
                "compressor": {"id": "zstd"},
            },
            "store_data_equal_to_fill_value": True,
        },
        create=True,
        context=info.ts_context,
    )
    at_once = max(1, _BYTES_AT_ONCE // (4 * int(np.prod(slices.stacked.slice_shape))))
    waiting = slices.stacked.indices()
    while indices := tuple(itertools.islice(waiting, at_once)):
        await asyncio.gather(*(array[index].write(slices.read(index)) for index in indices))
