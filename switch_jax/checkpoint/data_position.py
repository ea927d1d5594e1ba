"""Data position in a checkpoint: its files, their checksums, and Orbax's handler of them.

data/…                    files of the `DataPosition`
data/checksums-N.json     CRC-32 of the files that process N wrote, and of the checkpoint's arrays
"""

import dataclasses
import json
import tempfile
import zlib
from pathlib import Path
from typing import Protocol

import jax
import orbax.checkpoint as ocp
from etils import epath


class DataPosition(Protocol):
    """An object, such as a batch iterator, with a position that can be saved and restored."""

    def save(self, folder: Path) -> None:
        """Writes the position to a folder."""

    def restore(self, folder: Path) -> None:
        """Sets the position to the one in a folder."""


class _PositionHandler(ocp.CheckpointHandler):
    """Orbax handler of a `DataPosition`.

    It is not asynchronous: the position is written before `Checkpointer.save` returns, because it
    changes afterwards. The item writes and reads local files: the folder may be in a bucket.
    """

    def save(self, directory, args):
        folder, process = epath.Path(directory), jax.process_index()
        files = {}
        with tempfile.TemporaryDirectory() as own_folder:
            args.item.save(Path(own_folder))
            for file in (path for path in Path(own_folder).rglob("*") if path.is_file()):
                name = file.relative_to(own_folder).as_posix()
                content = file.read_bytes()
                files[name] = zlib.crc32(content)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        if files:
            record = json.dumps({"arrays": args.arrays_crc32, "files": files})
            (folder / f"checksums-{process}.json").write_text(record)

    def restore(self, directory, args):
        with tempfile.TemporaryDirectory() as copy:
            self._restore(_copy_files(epath.Path(directory), Path(copy)), args)

    def _restore(self, folder: Path, args: "PositionArgs") -> None:
        records = sorted(folder.glob("checksums-*.json"))
        if args.arrays_crc32 is not None and not records:
            raise ValueError("the data position has no checksums")
        # Each process checks its share: if one of them fails, all take another checkpoint.
        for file in records[jax.process_index() :: jax.process_count()]:
            record = json.loads(file.read_bytes())
            if record["arrays"] != args.arrays_crc32 or any(
                _crc32(folder / name) != crc32 for name, crc32 in record["files"].items()
            ):
                raise ValueError("the data position is damaged: its checksum differs")
        args.item.restore(folder)


@ocp.args.register_with_handler(_PositionHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class PositionArgs(ocp.args.CheckpointArgs):
    """Arguments for saving or restoring a position.

    item: the position.
    arrays_crc32: identifies the checkpoint; None for one of an older version, without checksums.
    """

    item: DataPosition
    arrays_crc32: int | None


def _copy_files(folder: epath.Path, copy: Path) -> Path:
    """Copies all files of a folder, which may be in a bucket, and returns the copy."""
    for entry in folder.iterdir():
        if entry.is_dir():
            (copy / entry.name).mkdir()
            _copy_files(entry, copy / entry.name)
        else:
            (copy / entry.name).write_bytes(entry.read_bytes())
    return copy


def _crc32(file: Path) -> int:
    return zlib.crc32(file.read_bytes())
