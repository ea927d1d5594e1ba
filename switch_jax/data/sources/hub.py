"""Data sets of the Hugging Face hub, read with the library `datasets`.

hf:allenai/c4/en           a repository and a configuration; downloaded if the cache lacks it
hf:/data/books             a folder: what `save_to_disk` wrote, or any that `load_dataset` reads
hf-stream:allenai/c4/en    read over the network while the documents are tokenised

What is in the cache or in a folder is read from its Arrow files, as other files are.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.compression import import_package
from switch_jax.data.sources.record_files import Record
from switch_jax.data.sources.source import (
    File,
    Shard,
    Source,
    Split,
    files_below,
    files_digest,
    find_files,
)
from switch_jax.data.sources.text_files import TextFormat, text_of_record
from switch_jax.errors import UserError

HUB, STREAM = "hf:", "hf-stream:"
LOCAL_PREFIXES = ("/", "./", "../", "~")
_SHARD_SIZE = 2**20  # of a streamed shard, whose bytes are unknown


def is_hub_spec(spec: str) -> bool:
    """Whether a part of a mixture names a data set for the library."""
    return spec.startswith((HUB, STREAM))


def hub_name(spec: str) -> str:
    """Returns the name of the source: of repositories without the organisation."""
    path = spec.partition(":")[2].rstrip("/")
    parts = [path.rpartition("/")[2]] if path.startswith(LOCAL_PREFIXES) else path.split("/")
    words = re.findall(r"\w+", " ".join(parts[1:] or parts))
    return "_".join(words) or "hub"


def hub_files(spec: str) -> dict[str, list[File]]:
    """Returns the Arrow files of each split; downloads what is not there.

    Raises `UserError` if the data set is not found, or the library is missing.
    """
    splits = _load(spec, streaming=False)
    return {
        split: find_files(epath.Path(file["filename"]) for file in data.cache_files)
        for split, data in splits.items()
    }


def training_splits(spec: str, splits: dict[str, Any]) -> dict[Split, Any]:
    """Returns what is for training and for validation; raises `UserError` without the former."""
    if "train" not in splits:
        raise UserError(f"{spec} has no split train, only {', '.join(splits)}; name another one.")
    chosen: dict[Split, Any] = {"train": splits["train"]}
    if "validation" in splits:
        chosen["validation"] = splits["validation"]
    return chosen


class StreamedSource(Source):
    """Documents of a data set that is not stored.

    Args:
      spec: begins with `STREAM`.

    Raises `UserError` if the data set is not found, or has no validation split: to hold documents
    out, all of them would be read.
    """

    streams = True

    def __init__(self, spec: str, text_format: TextFormat):
        self.name, self.spec = hub_name(spec), spec
        self._field = text_format.field
        splits = training_splits(spec, _open_stream(spec))
        if "validation" not in splits:
            raise UserError(f"{spec} has no split validation; use {HUB}{spec.partition(':')[2]}.")
        self._num_shards = {split: data.num_shards for split, data in splits.items()}
        folder = _local_folder(spec)
        files = [] if folder is None else [files_below(epath.Path(folder))]
        identity = (spec, self._field, sorted(self._num_shards.items()))
        self.fingerprint = self.cache_key = files_digest(files, *identity)

    def shards(self, split: Split) -> tuple[Shard, ...]:
        return tuple(
            Shard((f"{self.spec}, {split} shard {number}",), _SHARD_SIZE)
            for number in range(self._num_shards[split])
        )

    def texts(self, split: Split, shard: Shard, bad: BadRecords) -> Iterator[str]:
        [place], number = shard.paths, self.shards(split).index(shard)
        row = 0
        try:
            data = _open_stream(self.spec)[split].shard(self._num_shards[split], number)
            for row, fields in enumerate(data, start=1):
                yield from text_of_record(Record(f"{place}, row {row}", fields), self._field, bad)
        except UserError:
            raise
        except Exception as error:  # of networks, servers and files: any
            raise UserError(
                f"{place} cannot be read behind row {row} ({_reason(error)}); the same command"
                " goes on from the last checkpoint or finished shard."
            ) from error


@functools.cache
def _open_stream(spec: str) -> dict[str, Any]:
    """Returns the streamed data set of each split; asks the server once in a process."""
    return _load(spec, streaming=True)


def _local_folder(spec: str) -> str | None:
    """Returns the folder that a spec names; None where it names a repository."""
    path = spec.partition(":")[2]
    is_local = path.startswith(LOCAL_PREFIXES) or path in (".", "..")
    return os.path.expanduser(path) if is_local else None


def _load(spec: str, streaming: bool) -> dict[str, Any]:
    """Returns the data set of each split."""
    path, folder = spec.partition(":")[2].strip("/"), _local_folder(spec)
    if not path:
        raise UserError(
            f"data.mixture: {spec} names no data set; write {HUB}NAME, {HUB}NAME/CONFIG or"
            f" {HUB}/FOLDER."
        )
    if folder is not None and os.path.isfile(folder):
        raise UserError(f"data.mixture: {spec} is a file; name it without {HUB}.")
    datasets = import_package("datasets", spec, extra="hub")
    try:
        if folder is None:
            loaded = _load_repository(datasets, path, streaming)
        elif not {"dataset_dict.json", "state.json"} & set(os.listdir(folder)):
            loaded = datasets.load_dataset(folder, streaming=streaming)
        elif streaming:
            raise ValueError("what save_to_disk wrote is not streamed; write hf: before it")
        else:
            loaded = datasets.load_from_disk(folder)
    except Exception as error:  # of networks, servers, files and configurations: any
        raise UserError(
            f"{spec} cannot be loaded ({_reason(error)}); check its name and configuration, or the"
            " files of the folder."
        ) from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


def _reason(error: BaseException) -> str:
    """Returns the first line of an error, and that of what caused it."""
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    lines = [(str(one).strip() or repr(one)).split("\n")[0].rstrip(".") for one in causes]
    return ": ".join(dict.fromkeys(lines))


def _load_repository(datasets: Any, path: str, streaming: bool) -> Any:
    """Loads NAME or NAME/CONFIG, where NAME may be ORGANISATION/NAME."""
    parts = path.split("/")
    name, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    not_found = (datasets.exceptions.DatasetNotFoundError, ConnectionError)
    try:
        return datasets.load_dataset(name, config, streaming=streaming)
    except not_found as error:
        if len(parts) == 2:  # perhaps a data set without an organisation
            with contextlib.suppress(*not_found):
                return datasets.load_dataset(parts[0], parts[1], streaming=streaming)
        raise error
