"""Writes a foreign checkpoint as a WORKDIR, slice by slice.

Orbax saves whole arrays, and one expert parameter of Switch-C has 1.6 TB. Therefore a
`TypeHandler`, Orbax's extension point for other types of leaves, writes each slice as a TensorStore
chunk, and memory stays constant. The files have Orbax's layout; a test reads them with Orbax alone.
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

from switch_jax.checkpoint.checksums import sum_part, write_record
from switch_jax.checkpoint.interop.foreign_checkpoint import (
    ForeignCheckpoint,
    SliceIndex,
    StackedShape,
)
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.files import COMMIT_FILE, absolute_path, create_folder, is_bucket, plain_path

_MAX_BYTES_IN_FLIGHT = 128 * 2**20  # of slices that are being written


def write_workdir(imported: ForeignCheckpoint, output: Path) -> None:
    """Writes a WORKDIR whose only checkpoint, 0, has the parameters of `imported`.

    The folder is written under another name and renamed to `output` when it is complete; after an
    error nothing is left. Raises `UserError` where `output` exists or cannot be written.
    """
    with create_folder(output) as partial:
        workdir = Workdir(partial)
        config = imported.config
        if imported.vocabulary is not None:  # evaluation must use the model's vocabulary
            vocabulary = str(absolute_path(output) / workdir.vocabulary.name)
            data = dataclasses.replace(config.data, vocabulary=vocabulary)
            config = dataclasses.replace(config, data=data)
        workdir.prepare(config, imported.vocabulary)
        for name, content in imported.companion_files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        checkpoint = workdir.checkpoints / "0"
        checkpoint.mkdir(parents=True)
        checksums = _write_parameters(imported, plain_path(checkpoint) / "params")
        write_record(checkpoint, {f"params/{name}": checksums[name] for name in checksums})
        if is_bucket(output):
            for folder in (checkpoint, checkpoint / "params"):
                (folder / COMMIT_FILE).touch()


def _write_parameters(imported: ForeignCheckpoint, folder: Path) -> dict[str, int]:
    """Writes the parameters, and returns their checksums by name."""
    leaves = {
        name: _Slices(stacked, functools.partial(imported.read_finite_slice, name))
        for name, stacked in imported.parameters.items()
    }
    slice_handler = _SliceHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Slices, slice_handler),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # Orbax warns without it
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as writer:
        writer.save(folder, args=ocp.args.PyTreeSave(leaves))
    return slice_handler.checksums


@dataclasses.dataclass(frozen=True)
class _Slices:
    """A parameter as a leaf of the pytree that Orbax saves: its shape, and a function of slices."""

    stacked: StackedShape
    read: Callable[[SliceIndex], np.ndarray]


class _SliceHandler(ocp.type_handlers.TypeHandler):
    """Writes `_Slices` as Orbax writes an array, with one chunk for each slice.

    checksums: of the arrays written so far, by name.
    """

    def __init__(self):
        self.checksums: dict[str, int] = {}

    def typestr(self) -> str:
        return "np.ndarray"  # the type that Orbax restores

    async def serialize(self, values: Sequence[_Slices], infos: Sequence[Any], args=None):
        for slices, info in zip(values, infos):
            self.checksums[info.name] = await _write_slices(slices, info)
        return []

    async def deserialize(self, infos, args=None):
        raise NotImplementedError("Written only; Orbax reads arrays.")

    async def metadata(self, infos):
        raise NotImplementedError("Written only; Orbax reads arrays.")


async def _write_slices(slices: _Slices, info: ocp.type_handlers.ParamInfo) -> int:
    """Writes an array, and returns its checksum."""
    shape, num_stacked = slices.stacked
    chunk = [1] * num_stacked + list(slices.stacked.slice_shape)
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
    slice_bytes = 4 * int(np.prod(slices.stacked.slice_shape))
    max_in_flight = max(1, _MAX_BYTES_IN_FLIGHT // slice_bytes)
    remaining = slices.stacked.indices()
    checksum = 0
    while indices := tuple(itertools.islice(remaining, max_in_flight)):
        writes: list[Any] = []
        try:
            for index in indices:
                values = np.asarray(slices.read(index), np.float32)
                writes.append(array[index].write(values))
                starts = (*index, *(0 for _ in values.shape))
                checksum += sum_part(values.reshape([1] * num_stacked + list(values.shape)), starts)
        finally:  # a write must not go on where a failure removes the folder
            await asyncio.gather(*writes)
    return checksum % 2**32
