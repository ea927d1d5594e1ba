"""TFRecord files and the tf.train.Examples in them, without TensorFlow."""

import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from switch_jax.data.sources.compression import DamagedFile, import_package

MAX_RECORD_BYTES = 2**28  # bytes
_BLOCK = 2**16


def verified_records(
    file: io.BufferedReader, path: str, damaged: Callable[[int, bool], None]
) -> Iterator[tuple[int, bytes]]:
    """The records of a file whose checksums are right, with their numbers from 1.

    Args:
      damaged: is told the number of every other one, and whether it is too long to be read.

    Raises `Damaged` where nothing behind can be read, and `UserError` where google-crc32c is not
    installed.
    """
    crc32c = import_package("google_crc32c", path).value

    def right(data: bytes, masked: bytes) -> bool:
        crc = crc32c(data)
        expected = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        return masked == expected.to_bytes(4, "little")

    number = 0
    while header := file.read(12):
        if not right(header[:8], header[8:]):
            raise DamagedFile
        length = int.from_bytes(header[:8], "little")
        if length > MAX_RECORD_BYTES:
            _skip(file, length + 4)
            number += 1
            damaged(number, True)
            continue
        data, masked = file.read(length), file.read(4)
        if len(masked) < 4:
            raise DamagedFile
        number += 1
        if right(data, masked):
            yield number, data
        else:
            damaged(number, False)


def _skip(file: io.BufferedReader, size: int) -> None:
    while size:
        skipped = len(file.read(min(size, _BLOCK)))
        if not skipped:
            raise DamagedFile
        size -= skipped


def tfrecord_texts(example: bytes, name: str) -> list[bytes] | None:
    """The values of a bytes feature; None where there is no such feature.

    Raises `ValueError` for bytes that are no tf.train.Example.
    """
    values = [entry.value.bytes_list.value for entry in _entries(example) if entry.key == name]
    return list(values[-1]) if values else None


def tfrecord_fields(example: bytes) -> dict[str, list]:
    """All features; bytes are read as UTF-8. Raises `ValueError`, as `texts` does."""
    found: dict[str, list] = {}
    for entry in _entries(example):
        feature = entry.value
        found[entry.key] = [
            *(value.decode() for value in feature.bytes_list.value),
            *feature.float_list.value,
            *feature.int64_list.value,
        ]
    return found


def _entries(example: bytes) -> Any:
    try:
        return _example_class().FromString(example).features.feature
    except message.DecodeError as error:
        raise ValueError("no tf.train.Example") from error


@functools.cache
def _example_class() -> Any:
    """A class like tf.train.Example; TensorFlow, if it is there, has its own."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="text.proto", package="text", syntax="proto3")
    for owner, *members in (
        ("Example", ("features", "Features")),
        ("Features", ("feature", ["Entry"])),  # on the wire, a map is a list of entries
        ("Entry", ("key", field.TYPE_STRING), ("value", "Feature")),
        ("Feature", ("bytes_list", "Bytes"), ("float_list", "Floats"), ("int64_list", "Int64s")),
        ("Bytes", ("value", [field.TYPE_BYTES])),
        ("Floats", ("value", [field.TYPE_FLOAT])),
        ("Int64s", ("value", [field.TYPE_INT64])),
    ):
        added = file.message_type.add(name=owner).field
        for number, (name, kind) in enumerate(members, 1):
            label = field.LABEL_REPEATED if isinstance(kind, list) else field.LABEL_OPTIONAL
            kind = kind[0] if isinstance(kind, list) else kind
            of = kind if isinstance(kind, str) else None
            type_ = field.TYPE_MESSAGE if of else kind
            added.add(name=name, number=number, label=label, type=type_, type_name=of)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("text.Example"))
