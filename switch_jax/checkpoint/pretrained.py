"""Pretrained models: WORKDIRs, checkpoints and foreign checkpoints, for `load` and `init_from`."""

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from switch_jax.checkpoint.checkpoint_reader import (
    find_checkpoint,
    find_checkpoint_together,
    parameter_shapes,
    restore_opt_state,
    restore_params,
)
from switch_jax.checkpoint.finite import check_parameters_finite
from switch_jax.checkpoint.interop.detect_format import read_foreign
from switch_jax.config import Config
from switch_jax.files import as_path, fetch, is_bucket
from switch_jax.model import (
    SwitchTransformer,
    abstract_model,
    is_adapter,
    merge_adapters,
    with_parameters,
)


class PretrainedModel(NamedTuple):
    """A model on disk, whose parameters are read on demand.

    config: the model's config.
    shapes: shapes of its parameters and adapters, by path.
    restore: function of the shapes and shardings of some parameters by path, which returns these
      parameters, float32; raises `UserError` where they cannot be read, or are NaN or infinite.
    vocabulary: content of its `vocabulary.model`, where there is one.
    restore_optimizer: `restore_opt_state` of its checkpoint; None for a foreign checkpoint.
    notes: a sentence for each repair or assumption, for the user.
    """

    config: Config
    shapes: Mapping[str, tuple[int, ...]]
    restore: Callable[[Mapping[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]]
    vocabulary: bytes | None = None
    restore_optimizer: Callable[[Any], Any] | None = None
    notes: tuple[str, ...] = ()

    def read_merged(self, name: str) -> np.ndarray:
        """Returns a parameter with its adapters merged into it, in host memory, float32."""
        sharding = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        abstract = {
            path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
            for path, shape in self.shapes.items()
            if path == name or (is_adapter(path) and path.startswith(f"{name}."))
        }
        return np.asarray(merge_adapters(self.restore(abstract), self.config)[name])

    def print_notes(self) -> None:
        """Prints the notes on stderr, in process 0 only."""
        for note in self.notes if jax.process_index() == 0 else ():
            print(note, file=sys.stderr)


def find_pretrained(path: str | Path, *, together: bool = False) -> PretrainedModel:
    """Opens a pretrained model.

    Args:
      path: a WORKDIR (its newest checkpoint is opened), a checkpoint, or the folder of a foreign
        checkpoint.
      together: all processes call this, and use the checkpoint that process 0 finds.

    Raises `UserError` where there is no model.
    """
    location = as_path(path)
    if is_bucket(location) and not _is_own(location):
        location = fetch(location)
    foreign = None if is_bucket(location) else read_foreign(location)
    if foreign is not None:
        return PretrainedModel(
            foreign.config,
            foreign.shapes,
            functools.partial(_restore_finite, foreign.restore, path, together),
            foreign.vocabulary,
            notes=foreign.notes,
        )
    workdir, folder = (find_checkpoint_together if together else find_checkpoint)(path)
    return PretrainedModel(
        workdir.config(),
        parameter_shapes(folder),
        functools.partial(
            _restore_finite, functools.partial(restore_params, folder), folder, together
        ),
        workdir.vocabulary.read_bytes() if workdir.vocabulary.is_file() else None,
        functools.partial(restore_opt_state, folder),
    )


def _is_own(location: Path) -> bool:
    """Whether a folder in a bucket is a WORKDIR or one of its checkpoints."""
    folders = (location / "checkpoints", location / "params", location / "optimizer")
    return any(folder.is_dir() for folder in folders)


def _restore_finite(
    restore: Callable[[Mapping[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]],
    source: object,
    together: bool,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Returns what `restore` does, if it is finite; `together`: in all processes, or in none."""
    arrays = restore(abstract)
    check_parameters_finite(arrays, source, together=together)
    return arrays


def load(path: str | Path) -> SwitchTransformer:
    """Loads a model from a WORKDIR, a checkpoint or a foreign checkpoint, on one device.

    Parameters are float32; adapters are merged. Raises `UserError` where there is no model.
    """
    pretrained = find_pretrained(path)
    pretrained.print_notes()
    config = pretrained.config
    model = abstract_model(config)
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        for name, shape in pretrained.shapes.items()
    }
    return with_parameters(model, merge_adapters(pretrained.restore(abstract), config))
