"""A folder of Hugging Face's, read: T5, mT5 or Switch Transformers."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from switch_jax.checkpoint.interop.foreign import ForeignCheckpoint, Index, foreign_parameters
from switch_jax.checkpoint.interop.hf_config import MODEL_TYPES, from_hugging_face
from switch_jax.checkpoint.interop.hf_names import (
    ALIASES,
    HEAD,
    SHARED,
    UNUSED,
    NameTable,
    infer_structure,
    name_table,
)
from switch_jax.checkpoint.interop.hf_tensors import Tensors, safetensors
from switch_jax.config import Config
from switch_jax.data import HUGGING_FACE_VOCABULARY_FILE
from switch_jax.errors import UserError

# Where a WORKDIR keeps what came with the weights, and is written out again.
CARRIED = "huggingface"
CONFIG, RECORD, LEFTOVER = "config.json", "tensors.json", "unused.safetensors"
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def is_hugging_face(path: Path) -> bool:
    """Whether a folder has a config.json that is Hugging Face's."""
    try:
        return "model_type" in json.loads((path / CONFIG).read_text())
    except (OSError, ValueError, TypeError):
        return False


def read_hugging_face(path: Path) -> ForeignCheckpoint:
    """Opens a folder; raises `UserError` for one that is incomplete, or of another model."""
    raw = _config(path)
    tensors = Tensors(path)
    stored = _stored(path, tensors)
    found = infer_structure(stored)
    try:
        config, notes = from_hugging_face(raw, found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    table = name_table(config, foreign_parameters(config))
    _check(path, config, table, tensors, stored)
    return ForeignCheckpoint(
        config,
        functools.partial(_slice, tensors, table, stored),
        vocabulary=_content(path / HUGGING_FACE_VOCABULARY_FILE),
        carried=_carried(path, tensors),
        notes=notes,
    )


def _config(path: Path) -> dict[str, Any]:
    if not is_hugging_face(path):
        raise UserError(
            f"{path} has no {CONFIG} with a model_type; name a folder of Hugging Face's."
        )
    raw = json.loads((path / CONFIG).read_text())
    if raw["model_type"] not in MODEL_TYPES:
        raise UserError(
            f"{path} is a model of the type {raw['model_type']!r}; what can be converted is"
            f" {', '.join(MODEL_TYPES)}."
        )
    return raw


def _stored(path: Path, tensors: Tensors) -> dict[str, str]:
    """Name that a tensor is known by → name that it is read by; tied weights are one.

    Raises `UserError` where names of one tensor have different values.
    """
    stored = {name: name for name in tensors.known if name not in ALIASES and name != UNUSED}
    for alias in sorted(ALIASES.keys() & tensors.known.keys(), reverse=True):
        first = stored.setdefault(ALIASES[alias], alias)
        if first != alias and not _equal(tensors, first, alias):
            raise UserError(
                f"{path} has {first} and {alias} with different values, and they are one tensor;"
                " remove the wrong one."
            )
    if HEAD in stored and SHARED in stored and _equal(tensors, stored[HEAD], stored[SHARED]):
        del stored[HEAD]
    return stored


def _equal(tensors: Tensors, one: str, other: str) -> bool:
    if tensors.known[one] != tensors.known[other]:
        return False
    return tensors.read(one).tobytes() == tensors.read(other).tobytes()


def _check(
    path: Path,
    config: Config,
    table: NameTable,
    tensors: Tensors,
    stored: dict[str, str],
) -> None:
    """Raises `UserError` where a tensor is missing, has another shape, or is not known."""
    shapes = foreign_parameters(config)
    for (parameter, _), (name, transposed) in table.items():
        shape = shapes[parameter].slice_shape
        wanted = shape[::-1] if transposed else shape
        if name == HEAD and HEAD not in stored:
            continue  # the embedding, which is checked as itself
        if name not in stored:
            raise UserError(f"{path} has no {name}, which its config.json asks for; copy it there.")
        given = tensors.known[stored[name]].shape
        if given != wanted:
            raise UserError(
                f"{name} in {path} has the shape {list(given)}, and by config.json it is"
                f" {list(wanted)}; take the config.json of these weights."
            )
    unknown = stored.keys() - {source.name for source in table.values()}
    if unknown:
        raise UserError(
            f"{path} has {min(unknown)}, which the model that its config.json describes has not;"
            " take the config.json of these weights."
        )


def _slice(
    tensors: Tensors, table: NameTable, stored: Mapping[str, str], path: str, index: Index
) -> np.ndarray:
    name, transposed = table[path, index]
    value = tensors.read(stored.get(name, stored[SHARED])).astype(np.float32)
    return value.T if transposed else value


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _carried(path: Path, tensors: Tensors) -> dict[str, bytes]:
    """What a WORKDIR keeps: companions, and which tensors there were of what type."""
    companions = {name: _content(path / name) for name in (CONFIG, *_COMPANIONS)}
    types = {name: tensor.dtype for name, tensor in tensors.known.items()}
    companions[RECORD] = json.dumps(types, indent=0).encode()
    if UNUSED in tensors.known:
        save = safetensors().numpy.save
        companions[LEFTOVER] = save({UNUSED: tensors.read(UNUSED)})
    return {f"{CARRIED}/{n}": c for n, c in companions.items() if c is not None}
