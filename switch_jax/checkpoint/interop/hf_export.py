"""Export of a checkpoint as a Hugging Face folder, one parameter at a time."""

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from switch_jax.checkpoint.checkpoint_reader import find_checkpoint
from switch_jax.checkpoint.finite import all_finite
from switch_jax.checkpoint.interop.foreign_checkpoint import stacked_shapes
from switch_jax.checkpoint.interop.hf_config import (
    config_to_hugging_face,
    dropless_capacity,
    special_ids_to_hugging_face,
)
from switch_jax.checkpoint.interop.hf_config_keys import CONFIG, GENERATION_CONFIG
from switch_jax.checkpoint.interop.hf_import import (
    COMPANION_FOLDER,
    DTYPE_RECORD,
    TOKENIZER_CONFIG,
    UNUSED_FILE,
)
from switch_jax.checkpoint.interop.hf_names import ALIASES, HEAD, SHARED, name_table
from switch_jax.checkpoint.interop.hf_tensors import DTYPES, INDEX, import_safetensors
from switch_jax.checkpoint.interop.model_card import CARD, ExportedModel, model_card
from switch_jax.checkpoint.pretrained import PretrainedModel, find_pretrained
from switch_jax.checkpoint.workdir import Workdir
from switch_jax.config import Config, check_value, parse_json, read_json
from switch_jax.data import (
    HUGGING_FACE_VOCABULARY_FILES,
    hugging_face_file_name,
    parse_vocabulary,
)
from switch_jax.errors import UserError
from switch_jax.files import create_folder, path_within
from switch_jax.model import params_by_group

_TOKENIZER_FILES = (*HUGGING_FACE_VOCABULARY_FILES, TOKENIZER_CONFIG)
_DtypeName = Literal["F32", "F16", "BF16"]  # the keys of `DTYPES`
FILE_BYTES = 4 * 10**9  # largest size of a weights file, and of the tensors kept in memory


class _Source(NamedTuple):
    """Data in a WORKDIR from the Hugging Face folder it was imported from; empty without one."""

    config: dict[str, Any]  # content of config.json
    dtypes: dict[str, str]  # key of `DTYPES` by tensor name
    unused: dict[str, np.ndarray]  # tensors that no model uses
    companions: dict[str, bytes]  # content of other files, by name


def export_hugging_face(path: str | Path, output: Path) -> tuple[str, ...]:
    """Writes a checkpoint as a Hugging Face folder, and returns notes for the user.

    A model imported from Hugging Face keeps its tensor names, dtypes and tokenizer. The folder has
    a model card of what the run has recorded (`model_card.py`). After an error
    nothing is left of `output`.

    Args:
      path: a checkpoint, or a WORKDIR, whose newest checkpoint is written.
      output: the folder to create.

    Raises `UserError` where `output` exists, or Hugging Face's classes do not have the model.
    """
    workdir, checkpoint = find_checkpoint(path)
    model, source = find_pretrained(checkpoint), _source(workdir)
    raw = config_to_hugging_face(model.config, source.config)
    with create_folder(output) as partial:
        for name, content in source.companions.items():
            (partial / name).write_bytes(content)
        if GENERATION_CONFIG in source.companions:
            ids = special_ids_to_hugging_face(model.config)
            _replace_values(partial / GENERATION_CONFIG, ids)
        (partial / CONFIG).write_text(json.dumps(raw, indent=2) + "\n")
        exported = ExportedModel(
            model.config,
            step=int(checkpoint.name),
            num_parameters=sum(params_by_group(model.config).values()),
            hugging_face=raw,
            has_tokenizer=not source.companions.keys().isdisjoint(_TOKENIZER_FILES),
        )
        (partial / CARD).write_text(model_card(workdir, exported))
        tensors = itertools.chain(_tensors(model, source), source.unused.items())
        _write_tensors(tensors, partial)
    return _notes(model.config)


def _replace_values(path: Path, values: Mapping[str, Any]) -> None:
    """Writes other values for the keys that a JSON file has, where they differ."""
    content = read_json(path)
    changed = {k: v for k, v in values.items() if content.get(k) not in (None, v, [v])}
    if changed:
        path.write_text(json.dumps(content | changed, indent=2) + "\n")


def _notes(config: Config) -> tuple[str, ...]:
    if not config.sparse or config.moe.expert_capacity is not None:
        return ()
    return (
        f"In Hugging Face's model, expert_capacity is {dropless_capacity(config)} per sequence in"
        " any batch: no token of a sequence up to that length is dropped.",
    )


def _source(workdir: Workdir) -> _Source:
    folder = workdir.path / COMPANION_FOLDER
    names = [file.name for file in folder.glob("*")]
    files = {
        name: path_within(workdir.path, f"{COMPANION_FOLDER}/{name}").read_bytes() for name in names
    }
    stored_unused = files.pop(UNUSED_FILE, None)
    config = _parse_companion(folder / CONFIG, files, dict[str, Any])
    dtypes = _parse_companion(folder / DTYPE_RECORD, files, dict[str, _DtypeName])
    if workdir.vocabulary.is_file():
        vocabulary = workdir.vocabulary.read_bytes()
        parse_vocabulary(str(workdir.vocabulary), vocabulary, workdir.config().model)
        if (name := hugging_face_file_name(vocabulary)) is not None:
            files[name] = vocabulary
    unused = {} if stored_unused is None else import_safetensors().numpy.load(stored_unused)
    return _Source(config, dtypes, unused, files)


def _parse_companion(path: Path, files: dict[str, bytes], kind: Any) -> Any:
    """Removes a JSON file from `files`; returns its content as a `kind` of dict."""
    content = parse_json(files.pop(path.name, b"{}"), str(path))
    return check_value("the whole", content, kind, str(path))


def _tensors(model: PretrainedModel, source: _Source) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the values of every tensor to write."""
    config = model.config
    parameters = stacked_shapes(config)
    table = name_table(config, parameters)
    embedding = np.empty(0)
    for path, stacked in parameters.items():
        value = model.read_merged(path)
        if path == "embedding":
            embedding = value
        for index in stacked.indices():
            name, transposed = table[path, index]
            tensor = value[index].T if transposed else value[index]
            dtypes = _dtypes_by_name(name, config, source)
            if not dtypes and not np.array_equal(tensor, embedding):
                dtypes = {name: source.dtypes[SHARED]}  # the head was equal to the embedding before
            for written_name, dtype in dtypes.items():
                yield written_name, _cast(written_name, tensor, dtype)


def _cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    """Returns a tensor in a dtype of `DTYPES`; raises `UserError` where it cannot hold a value."""
    with np.errstate(over="ignore"):
        written = np.ascontiguousarray(tensor, DTYPES[dtype])
    if not all_finite(written):
        raise UserError(
            f"{name} has values that {dtype}, the dtype of the imported folder, does not hold; set"
            f" F32 for it in {COMPANION_FOLDER}/{DTYPE_RECORD} of the WORKDIR."
        )
    return written


def _dtypes_by_name(name: str, config: Config, source: _Source) -> dict[str, str]:
    """Returns the dtype of a tensor by each of the names to write it under.

    Aliases are among the names if the imported folder had them.
    """
    if not source.dtypes:
        return {name: "F32"}
    names = {name}
    if name == SHARED and config.model.tied_embeddings:
        names.add(HEAD)
    names |= {alias for alias, same_tensor in ALIASES.items() if same_tensor in names}
    return {written: dtype for written, dtype in source.dtypes.items() if written in names}


def _write_tensors(tensors: Iterable[tuple[str, np.ndarray]], folder: Path) -> None:
    """Writes tensors to one file, or to several files of `FILE_BYTES` and an index."""
    total, names_by_file = 0, []
    for number, tensors_in_file in enumerate(_split_into_files(tensors)):
        # transformers refuses a file without the format.
        import_safetensors().numpy.save_file(
            tensors_in_file, folder / f"{number}", {"format": "pt"}
        )
        shutil.copymode(
            folder / CONFIG, folder / f"{number}"
        )  # safetensors lets only its owner read
        names_by_file.append(list(tensors_in_file))
        total += sum(value.nbytes for value in tensors_in_file.values())
    if len(names_by_file) == 1:
        (folder / "0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(names_by_file):
        file = f"model-{number + 1:05}-of-{len(names_by_file):05}.safetensors"
        (folder / f"{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split_into_files(
    tensors: Iterable[tuple[str, np.ndarray]],
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the tensors of each file, by name."""
    in_file: dict[str, np.ndarray] = {}
    for name, value in tensors:
        if in_file and sum(v.nbytes for v in in_file.values()) + value.nbytes > FILE_BYTES:
            yield in_file
            in_file = {}
        in_file[name] = value
    yield in_file
