"""Layout: the names of the files in which a publisher gives a data set, and their records."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping

from etils import epath

from switch_jax.data.sources.bad_records import BadRecord
from switch_jax.data.sources.record_files import Fields, Record, file_format, read_records
from switch_jax.data.sources.source import File, files_in, newest_version

VERSION = "{version}"  # in a folder's name: the newest version that TFDS prepared

# A record of a file -> records with the fields of `Task.schema`.
Adapt = Callable[[Fields], list[Fields]]


def unchanged(fields: Fields) -> list[Fields]:
    """Returns the record itself."""
    return [fields]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Files of a task below `data.data_dir`.

    Attributes:
      name: of the publisher or the archive.
      folders: alternatives; the first one with files is read.
      stems: split of the data set → the file names up to `-00000-of-00002` and the suffix;
        by default the name of the split.
      suffix: of the file names, such as "tsv"; empty: any that can be read.
      columns, items: arguments of `read_records`.
      adapt: raises a `LookupError`, `TypeError`, `ValueError` or `AttributeError` for a record that
        is not as the publisher writes it.
    """

    name: str
    folders: tuple[str, ...]
    stems: Mapping[str, str] = dataclasses.field(default_factory=dict)
    suffix: str = ""
    columns: tuple[str, ...] | None = None
    items: str | None = None
    adapt: Adapt = unchanged

    def find(self, root: epath.Path, split: str) -> list[File]:
        """Returns the files of a split, in order; empty if there are none."""
        for folder in self.folders:
            if folder.endswith(VERSION):
                path = newest_version(root / folder.removesuffix(VERSION))
            else:
                path = root / folder
            if path is not None and (files := self._find_in(path, self.stem(split))):
                return files
        return []

    def read(self, path: str) -> Iterator[Record | BadRecord]:
        """Yields the records of a file in order, with the fields of the task's schema."""
        for record in read_records(path, columns=self.columns, items=self.items):
            if isinstance(record, BadRecord):
                yield record
                continue
            try:
                adapted = self.adapt(record.fields)
            except (LookupError, TypeError, ValueError, AttributeError):
                yield BadRecord(f"not a record of {self.name}", record.place)
            else:
                yield from (Record(record.place, fields) for fields in adapted)

    def example(self, split: str) -> str:
        """Returns the pattern of the files of a split, relative to `data.data_dir`."""
        return os.path.join(self.folders[0], f"{self.stem(split)}.{self.suffix or '*'}")

    def stem(self, split: str) -> str:
        """Returns what the files of a split are named after."""
        return self.stems.get(split, split)

    def _find_in(self, folder: epath.Path, stem: str) -> list[File]:
        """Returns the files that are named after the stem, or in a folder that is."""
        name = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?(\.\w+)+(-\d+-of-\d+)?(\.\w+)?")
        named = [
            f for f in files_in(folder, f"{stem}*") if name.fullmatch(os.path.basename(f.path))
        ]
        files = named or files_in(folder, f"{stem}/*")
        return [file for file in files if self._is_readable(file.path)]

    def _is_readable(self, path: str) -> bool:
        return file_format(path) == self.suffix if self.suffix else is_task_file(path)


def is_task_file(path: str) -> bool:
    """Whether a file of this name may hold records of a task."""
    return file_format(path) not in (None, "txt")
