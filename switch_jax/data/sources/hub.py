"""Data sets of the Hugging Face hub, read with the library `datasets`.

hf:allenai/c4/en           a repository and a configuration; downloaded if the cache lacks it
hf:/data/books             a folder: what `save_to_disk` wrote, or any that `load_dataset` reads
hf-stream:allenai/c4/en    read over the network while the documents are tokenised

What is in the cache or in a folder is read from its Arrow files, as other files are.
"""

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from switch_jax.data.sources.bad_records import BadRecords
from switch_jax.data.sources.compression import import_package
from switch_jax.data.sources.record_files import Record
from switch_jax.data.sources.source import File, Shard, Source, Split, find_files
from switch_jax.data.sources.text_files import TextFormat, text_of_record
from switch_jax.errors import UserError

HUB, STREAM = "hf:", "hf-stream:"
_LOCAL = ("/", "./", "../", "~")
_SHARD_SIZE = 2**20  # of a streamed shard, whose bytes are unknown


def is_hub_spec(spec: str) -> bool:
    """Whether a part of a mixture names a data set for the library."""
    return spec.startswith((HUB, STREAM))


def hub_name(spec: str) -> str:
    """Returns the name of the source: of repositories without the organisation."""
    path = spec.partition(":")[2].rstrip("/")
    parts = [path.rpartition("/")[2]] if path.startswith(_LOCAL) else path.split("/")
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

    def __init__(self, spec: str, text_format: TextFormat):
        self.name, self.spec = hub_name(spec), spec
        self._field = text_format.field
        shards = {
            split: data.num_shards for split, data in training_splits(spec, self._splits).items()
        }
        if "validation" not in shards:
            raise UserError(f"{spec} has no split validation; use {HUB}{spec.partition(':')[2]}.")
        self._num_shards = shards
        identity = repr((spec, self._field, sorted(shards.items()))).encode()
        self.fingerprint = hashlib.blake2b(identity, digest_size=16).hexdigest()
        self.cache_key = self.fingerprint

    def __getstate__(self) -> dict[str, Any]:
        """Returns the attributes without open connections; another process opens its own."""
        return {key: value for key, value in vars(self).items() if key != "_splits"}

    @functools.cached_property
    def _splits(self) -> dict[str, Any]:
        return _load(self.spec, streaming=True)

    def shards(self, split: Split) -> tuple[Shard, ...]:
        return tuple(
            Shard((f"{self.spec}, {split} shard {number}",), _SHARD_SIZE)
            for number in range(self._num_shards[split])
        )

    def texts(self, split: Split, shard: Shard, bad: BadRecords) -> Iterator[str]:
        number = self.shards(split).index(shard)
        data = self._splits[split].shard(self._num_shards[split], number)
        for row, fields in enumerate(data, start=1):
            yield from text_of_record(
                Record(f"{shard.paths[0]}, row {row}", fields), self._field, bad
            )


def _load(spec: str, streaming: bool) -> dict[str, Any]:
    """Returns the data set of each split."""
    datasets = import_package("datasets", spec, extra="hub")
    path = spec.partition(":")[2]
    try:
        if not path.startswith(_LOCAL):
            loaded = _load_repository(datasets, path, streaming)
        else:
            folder = os.path.expanduser(path)
            is_saved = {"dataset_dict.json", "state.json"} & set(os.listdir(folder))
            if is_saved and streaming:
                raise ValueError("what save_to_disk wrote is not streamed; write hf: before it")
            loaded = (
                datasets.load_from_disk(folder)
                if is_saved
                else datasets.load_dataset(folder, streaming=streaming)
            )
    except Exception as error:  # of networks, servers, files and configurations: any
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"data.mixture: {spec} cannot be loaded ({reason}).") from error
    return loaded if isinstance(loaded, dict) else {"train": loaded}


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
