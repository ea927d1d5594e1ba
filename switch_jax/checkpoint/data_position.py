"""Data position in a checkpoint: its files, their checksums, and Orbax's handler of them.

data/…                    files of the `DataPosition`
data/checksums-N.json     CRC-32 of the files that process N wrote, and of the checkpoint's arrays
"""

import dataclasses
import json
import shutil
import zlib
from pathlib import Path
from typing import Protocol

import jax
import orbax.checkpoint as ocp


class DataPosition(Protocol):
    """An object, such as a batch iterator, with a position that can be saved and restored."""

    def save(self, folder: Path) -> None:
        """Writes the position to a folder."""

    def restore(self, folder: Path) -> None:
        """Sets the position to the one in a folder."""


class _PositionHandler(ocp.CheckpointHandler):
    """Orbax handler of a `DataPosition`.

    It is not asynchronous: the position is written before `Checkpointer.save` returns, because it
    changes afterwards.
    """

    def save(self, directory, args):
        folder, process = Path(directory), jax.process_index()
        own_files = folder / f"process-{process}"
        own_files.mkdir(parents=True)
        args.item.save(own_files)
        files = {}
        for file in (path for path in own_files.rglob("*") if path.is_file()):
            name = file.relative_to(own_files)
            files[name.as_posix()] = _crc32(file)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            file.replace(folder / name)
        shutil.rmtree(own_files)
        if files:
            content = json.dumps({"arrays": args.arrays_crc32, "files": files})
            (folder / f"checksums-{process}.json").write_text(content)

    def restore(self, directory, args):
        folder = Path(directory)
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


def _crc32(file: Path) -> int:
    return zlib.crc32(file.read_bytes())
