"""Rows of Parquet and Arrow files, read in batches with pyarrow."""

import io
import types
from collections.abc import Iterator
from typing import Any

from switch_jax.data.sources.bad_records import DAMAGED, NOT_UTF8
from switch_jax.data.sources.compression import DamagedFile, import_package

_BLOCK_BYTES = 2**16  # read at once
_BATCH_ROWS = 64  # decoded at once
_FILE_FORMAT = b"ARROW1"  # begins Arrow's file format; its stream format has no such bytes
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(
    file: Any, path: str, field: str | None
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields the number of each row from 1, and its fields or the kind of a bad record.

    A row group is read up to a damaged batch of rows; the next row group follows. Raises
    `DamagedFile` if nothing can be read.
    """
    pyarrow = import_package("pyarrow", path)
    damage = (pyarrow.ArrowException, OSError, ValueError)
    try:
        # Without a buffer, pyarrow would hold a column of a row group, perhaps of the whole file.
        table = import_package("pyarrow.parquet", path).ParquetFile(
            _handle(file),
            buffer_size=_BLOCK_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )
    except damage:
        raise DamagedFile from None
    columns = None if field is None else [field]
    end = 0  # of the row group
    for group in range(table.num_row_groups):
        number, end = end, end + table.metadata.row_group(group).num_rows
        try:
            for batch in table.iter_batches(_BATCH_ROWS, [group], columns):
                for row in _rows(batch):
                    number += 1
                    yield number, row
        except damage:
            yield number + 1, DAMAGED


def read_arrow(
    file: Any, path: str, field: str | None
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields the number of each row from 1, and its fields or the kind of a bad record.

    Reads Arrow's stream format, which the library `datasets` writes, and its file format. Raises
    `DamagedFile` at the damage, and at the end of a stream without an end marker.
    """
    pyarrow = import_package("pyarrow", path)
    ipc = import_package("pyarrow.ipc", path)
    is_stream = file.read(len(_FILE_FORMAT)) != _FILE_FORMAT
    end = file.seek(0, io.SEEK_END)
    file.seek(max(0, end - len(_STREAM_END)))
    has_end = not is_stream or file.read() == _STREAM_END
    file.seek(0)
    try:
        reader = ipc.open_stream(_handle(file)) if is_stream else ipc.open_file(_handle(file))
        batches = reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
        number = 0
        for batch in batches:
            names = batch.schema.names
            chosen = (
                batch if field is None else batch.select([*map(names.index, {field} & {*names})])
            )
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                for row in _rows(chosen.slice(start, _BATCH_ROWS)):
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError):
        raise DamagedFile from None
    if not has_end:
        raise DamagedFile


def _handle(file: Any) -> Any:
    """Returns an open file for pyarrow; TensorFlow's files for buckets lack `closed`."""
    return types.SimpleNamespace(
        read=file.read, seek=file.seek, tell=file.tell, close=lambda: None, closed=False
    )


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yields the rows of a pyarrow.RecordBatch, or the kind of a bad record."""
    try:
        yield from batch.to_pylist()
    except (UnicodeDecodeError, OverflowError):
        for i in range(batch.num_rows):
            try:
                yield from batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError:
                yield NOT_UTF8
            except OverflowError:  # a time that Python has no value for
                yield DAMAGED
