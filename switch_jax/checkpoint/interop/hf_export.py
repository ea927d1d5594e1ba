"""A checkpoint of ours as a folder of Hugging Face's, one parameter after the other."""

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from switch_jax.checkpoint.checkpointer import find_checkpoint, parameter_shapes, restore_params
from switch_jax.checkpoint.interop.foreign import Stacked, foreign_parameters
from switch_jax.checkpoint.interop.hf_config import to_hugging_face, widest
from switch_jax.checkpoint.interop.hf_import import CARRIED, CONFIG, LEFTOVER, RECORD
from switch_jax.checkpoint.interop.hf_names import ALIASES, HEAD, SHARED, name_table
from switch_jax.checkpoint.interop.hf_tensors import DTYPES, INDEX, safetensors
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.config import Config
from switch_jax.data import BYTES, HUGGING_FACE_VOCABULARY_FILE
from switch_jax.files import create_folder_atomically
from switch_jax.model import is_adapter, merge_adapters

FILE_BYTES = 4 * 10**9  # of a file of weights, at the most; so much is kept in memory


class _Source(NamedTuple):
    """What a WORKDIR keeps of the folder that it was read from; empty where it was not."""

    config: dict[str, Any]
    types: dict[str, str]  # of its tensors, by name
    leftover: dict[str, np.ndarray]  # tensors that no model uses
    companions: dict[str, bytes]  # other files, by name


def export_hugging_face(path: str | Path, output: Path) -> tuple[str, ...]:
    """Writes a WORKDIR's newest checkpoint, or the one that `path` is, as Hugging Face's.

    What was read from there is written as it was: names, types, tokenizer. `output` is complete or
    not there. Returns notes for the user. Raises `UserError` where `output` exists, or theirs have
    no such model.
    """
    workdir, folder = find_checkpoint(path)
    config, source = workdir.config(), _source(workdir)
    raw = to_hugging_face(config, source.config)
    with create_folder_atomically(output) as partial:
        for name, content in source.companions.items():
            (partial / name).write_bytes(content)
        (partial / CONFIG).write_text(json.dumps(raw, indent=2) + "\n")
        tensors = itertools.chain(_tensors(config, folder, source), source.leftover.items())
        _write(tensors, partial)
    return _notes(config)


def _notes(config: Config) -> tuple[str, ...]:
    if not config.sparse or config.moe.expert_capacity is not None:
        return ()
    return (
        f"There, expert_capacity is {widest(config)} for each sequence, whatever the"
        " batch: up to that length, no token is dropped.",
    )


def _source(workdir: Workdir) -> _Source:
    files = {file.name: file.read_bytes() for file in (workdir.path / CARRIED).glob("*")}
    leftover = files.pop(LEFTOVER, None)
    config, types = (json.loads(files.pop(name, b"{}")) for name in (CONFIG, RECORD))
    if workdir.vocabulary.is_file() and workdir.vocabulary.read_bytes() != BYTES.encode():
        files[HUGGING_FACE_VOCABULARY_FILE] = workdir.vocabulary.read_bytes()
    unused = {} if leftover is None else safetensors().numpy.load(leftover)
    return _Source(config, types, unused, files)


def _tensors(config: Config, folder: Path, source: _Source) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor to be written, with its name."""
    known = foreign_parameters(config)
    table = name_table(config, known)
    embedding = np.empty(0)
    for path, value in _values(config, folder, known):
        if path == "embedding":
            embedding = value
        for index in known[path].indices():
            name, transposed = table[path, index]
            own = value[index].T if transposed else value[index]
            types = _names(name, config, source)
            if not types and not np.array_equal(own, embedding):
                types = {name: source.types[SHARED]}  # was the embedding, and is no longer
            for each, kind in types.items():
                yield each, np.ascontiguousarray(own, DTYPES[kind])


def _names(name: str, config: Config, source: _Source) -> dict[str, str]:
    """Under which names a tensor is written and as what types; under aliases if it came so."""
    if not source.types:
        return {name: "F32"}
    same = {name}
    if name == SHARED and config.model.tied_embeddings:
        same.add(HEAD)
    same |= {alias for alias, other in ALIASES.items() if other in same}
    return {each: kind for each, kind in source.types.items() if each in same}


def _values(
    config: Config, folder: Path, known: Mapping[str, Stacked]
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters in the host's memory, one at a time, with what adapters add."""
    shapes = parameter_shapes(folder)
    where = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    for path in known:
        wanted = {
            name: jax.ShapeDtypeStruct(shape, np.float32, sharding=where)
            for name, shape in shapes.items()
            if name == path or (is_adapter(name) and name.startswith(f"{path}."))
        }
        restored = restore_params(folder, wanted)
        yield path, np.asarray(merge_adapters(restored, config)[path])


def _write(tensors: Iterable[tuple[str, np.ndarray]], folder: Path) -> None:
    """Writes tensors to one file, or where they are large to several and an index."""
    total, contents = 0, []
    for number, part in enumerate(_parts(tensors)):
        # transformers does not read a file without this.
        safetensors().numpy.save_file(part, folder / f"{number}", {"format": "pt"})
        shutil.copymode(folder / CONFIG, folder / f"{number}")  # or no one else could read it
        contents.append(list(part))
        total += sum(value.nbytes for value in part.values())
    if len(contents) == 1:
        (folder / "0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, written in enumerate(contents):
        name = f"model-{number + 1:05}-of-{len(contents):05}.safetensors"
        (folder / f"{number}").rename(folder / name)
        weight_map |= dict.fromkeys(written, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _parts(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The same tensors, as many at a time as fit a file."""
    part: dict[str, np.ndarray] = {}
    for name, value in tensors:
        if part and sum(v.nbytes for v in part.values()) + value.nbytes > FILE_BYTES:
            yield part
            part = {}
        part[name] = value
    yield part
