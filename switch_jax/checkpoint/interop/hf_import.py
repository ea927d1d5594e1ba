"""Import of Hugging Face folders: T5, mT5 and Switch Transformers."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from switch_jax.checkpoint.interop.foreign_checkpoint import (
    ForeignCheckpoint,
    SliceIndex,
    stacked_shapes,
)
from switch_jax.checkpoint.interop.hf_config import MODEL_TYPES, config_from_hugging_face
from switch_jax.checkpoint.interop.hf_config_keys import CONFIG, GENERATION_CONFIG
from switch_jax.checkpoint.interop.hf_names import (
    ALIASES,
    HEAD,
    SHARED,
    UNUSED,
    NameTable,
    infer_structure,
    name_table,
)
from switch_jax.checkpoint.interop.hf_tensors import TensorFolder, import_safetensors
from switch_jax.config import Config, check_value, read_json
from switch_jax.data import BYT5, HUGGING_FACE_VOCABULARY_FILES
from switch_jax.errors import UserError
from switch_jax.files import path_within

# Folder in a WORKDIR with the other files of a Hugging Face folder, which an export writes again.
COMPANION_FOLDER = "huggingface"
DTYPE_RECORD = "tensors.json"  # dtype of each tensor
UNUSED_FILE = "unused.safetensors"  # the tensor `UNUSED`
TOKENIZER_CONFIG = "tokenizer_config.json"
_COMPANIONS = (
    GENERATION_CONFIG,
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
)


def is_hugging_face(path: Path) -> bool:
    """Whether a folder has a config.json of Hugging Face."""
    try:
        raw = read_json(path / CONFIG)
    except UserError:
        return False
    return isinstance(raw, dict) and "model_type" in raw


def read_hugging_face(path: Path) -> ForeignCheckpoint:
    """Opens a Hugging Face folder.

    Raises `UserError` for a folder that is incomplete, damaged, or of another model.
    """
    raw, generation = _read_config(path), _read_group(path, GENERATION_CONFIG)
    tensors = TensorFolder(path)
    stored_names = _stored_names(path, tensors)
    try:
        config, notes = config_from_hugging_face(raw, infer_structure(stored_names), generation)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    table = name_table(config, stacked_shapes(config))
    _check_tensors(path, config, table, tensors, stored_names)
    return ForeignCheckpoint(
        config,
        functools.partial(_read_slice, tensors, table, stored_names),
        vocabulary=_vocabulary(path),
        companion_files=_companion_files(path, tensors),
        notes=notes,
    )


def _vocabulary(path: Path) -> bytes | None:
    """Returns the content of the vocabulary's file; ByT5's has none and is `byt5`."""
    for name in HUGGING_FACE_VOCABULARY_FILES:
        content = _content(path, name)
        if content is not None:
            return content
    settings = _read_group(path, TOKENIZER_CONFIG)
    return BYT5.encode() if settings.get("tokenizer_class") == "ByT5Tokenizer" else None


def _read_config(path: Path) -> dict[str, Any]:
    raw = _read_group(path, CONFIG)
    if "model_type" not in raw:
        raise UserError(f"{path} has no {CONFIG} with a model_type; name a Hugging Face folder.")
    if raw["model_type"] not in MODEL_TYPES:
        raise UserError(
            f"{path} is a model of the type {raw['model_type']!r}; types that can be converted are"
            f" {', '.join(MODEL_TYPES)}."
        )
    return raw


def _read_group(folder: Path, name: str) -> dict[str, Any]:
    """Returns the content of a JSON file of keys; {} where there is none."""
    path = path_within(folder, name)
    if not path.exists():
        return {}
    return check_value("the whole", read_json(path), dict[str, Any], str(path))


def _stored_names(path: Path, tensors: TensorFolder) -> dict[str, str]:
    """Returns the name that a tensor is stored under, by its name without aliases.

    A head that is equal to the embedding is left out. Raises `UserError` where two names of one
    tensor have different values.
    """
    stored = {name: name for name in tensors.specs if name not in ALIASES and name != UNUSED}
    for alias in sorted(ALIASES.keys() & tensors.specs.keys(), reverse=True):
        first = stored.setdefault(ALIASES[alias], alias)
        if first != alias and not _equal(tensors, first, alias):
            raise UserError(
                f"{path} has {first} and {alias} with different values, and they are one tensor;"
                " remove the wrong one."
            )
    if HEAD in stored and SHARED in stored and _equal(tensors, stored[HEAD], stored[SHARED]):
        del stored[HEAD]
    return stored


def _equal(tensors: TensorFolder, first: str, second: str) -> bool:
    if tensors.specs[first] != tensors.specs[second]:
        return False
    return tensors.read(first).tobytes() == tensors.read(second).tobytes()


def _check_tensors(
    path: Path,
    config: Config,
    table: NameTable,
    tensors: TensorFolder,
    stored_names: dict[str, str],
) -> None:
    """Raises `UserError` where a tensor is missing, has another shape, or is unknown."""
    shapes = stacked_shapes(config)
    for (parameter, _), (name, transposed) in table.items():
        shape = shapes[parameter].slice_shape
        expected = shape[::-1] if transposed else shape
        if name == HEAD and HEAD not in stored_names:
            continue  # equal to the embedding, which is checked under its own name
        if name not in stored_names:
            raise UserError(f"{path} has no {name}, which its config.json requires; copy it there.")
        actual = tensors.specs[stored_names[name]].shape
        if actual != expected:
            raise UserError(
                f"{name} in {path} has the shape {list(actual)}, and by config.json it is"
                f" {list(expected)}; take the config.json of these weights."
            )
    unknown = stored_names.keys() - {source.name for source in table.values()}
    if unknown:
        raise UserError(
            f"{path} has {min(unknown)}, which the model in its config.json does not have;"
            " take the config.json of these weights."
        )


def _read_slice(
    tensors: TensorFolder,
    table: NameTable,
    stored_names: Mapping[str, str],
    path: str,
    index: SliceIndex,
) -> np.ndarray:
    name, transposed = table[path, index]
    value = tensors.read(stored_names.get(name, stored_names[SHARED])).astype(np.float32)
    return value.T if transposed else value


def _content(folder: Path, name: str) -> bytes | None:
    path = path_within(folder, name)
    return path.read_bytes() if path.is_file() else None


def _companion_files(path: Path, tensors: TensorFolder) -> dict[str, bytes]:
    """Returns the files that an export needs to write the same folder, by path in a WORKDIR."""
    files = {name: _content(path, name) for name in (CONFIG, *_COMPANIONS)}
    dtypes = {name: spec.dtype for name, spec in tensors.specs.items()}
    files[DTYPE_RECORD] = json.dumps(dtypes, indent=0).encode()
    if UNUSED in tensors.specs:
        save = import_safetensors().numpy.save
        files[UNUSED_FILE] = save({UNUSED: tensors.read(UNUSED)})
    return {
        f"{COMPANION_FOLDER}/{name}": content
        for name, content in files.items()
        if content is not None
    }
