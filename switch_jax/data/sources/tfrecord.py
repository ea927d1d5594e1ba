"""TFRecord files and their tf.train.Examples, without TensorFlow."""

import functools
import io
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from switch_jax.data.sources.bad_records import DAMAGED, TOO_LONG
from switch_jax.data.sources.compression import DamagedFile, import_package

MAX_RECORD_BYTES = 2**28  # longer records are TOO_LONG
_BLOCK_BYTES = 2**16  # skipped at once


def read_tfrecords(file: io.BufferedReader, path: str) -> Iterator[bytes | str]:
    """Yields every record whose checksum is right, and the kind of every bad record.

    Raises `DamagedFile` if the rest of the file cannot be read, and `UserError` if google-crc32c is
    not installed.
    """
    crc32c = import_package("google_crc32c", path).value

    def is_intact(data: bytes, masked: bytes) -> bool:
        crc = crc32c(data)
        expected = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        return masked == expected.to_bytes(4, "little")

    while header := file.read(12):
        if not is_intact(header[:8], header[8:]):
            raise DamagedFile
        length = int.from_bytes(header[:8], "little")
        if length > MAX_RECORD_BYTES:
            _skip(file, length + 4)
            yield TOO_LONG
            continue
        data, masked = file.read(length), file.read(4)
        if len(masked) < 4:
            raise DamagedFile
        yield data if is_intact(data, masked) else DAMAGED


def _skip(file: io.BufferedReader, size: int) -> None:
    while size:
        skipped = len(file.read(min(size, _BLOCK_BYTES)))
        if not skipped:
            raise DamagedFile
        size -= skipped


def parse_example(example: bytes, name: str | None = None) -> dict[str, list]:
    """Returns the features of a tf.train.Example, or only the one called `name`.

    Bytes are decoded as UTF-8. Raises `UnicodeDecodeError` if they are not, and another
    `ValueError` if `example` is no tf.train.Example.
    """
    try:
        entries = _example_class().FromString(example).features.feature
    except message.DecodeError as error:
        raise ValueError("no tf.train.Example") from error
    return {
        entry.key: [
            *(value.decode() for value in entry.value.bytes_list.value),
            *entry.value.float_list.value,
            *entry.value.int64_list.value,
        ]
        for entry in entries
        if name is None or entry.key == name
    }


@functools.cache
def _example_class() -> Any:
    """Returns a message class with the wire format of TensorFlow's tf.train.Example."""
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
        fields = file.message_type.add(name=owner).field
        for number, (name, kind) in enumerate(members, 1):
            label = field.LABEL_REPEATED if isinstance(kind, list) else field.LABEL_OPTIONAL
            kind = kind[0] if isinstance(kind, list) else kind
            message_name = kind if isinstance(kind, str) else None
            type_ = field.TYPE_MESSAGE if message_name else kind
            fields.add(name=name, number=number, label=label, type=type_, type_name=message_name)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("text.Example"))
