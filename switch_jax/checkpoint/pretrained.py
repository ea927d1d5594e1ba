"""Models that exist already, of this program or another: what `load` and `init_from` begin with."""

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from switch_jax.checkpoint.checkpointer import (
    find_checkpoint,
    find_checkpoint_together,
    parameter_shapes,
    restore_opt_state,
    restore_params,
)
from switch_jax.checkpoint.interop.detect import read_foreign
from switch_jax.config import Config
from switch_jax.model import SwitchTransformer, merge_adapters, with_parameters


class PretrainedModel(NamedTuple):
    """A model's parameters, wherever they lie.

    config: what it was made with.
    shapes: of its parameters (and adapters), by path.
    restore: those that are named, with the shapes and shardings given; raises `UserError`.
    vocabulary: content of its `vocabulary.model`, where there is one.
    restore_optimizer: as `checkpoint.restore_opt_state`, where there is an optimizer of ours.
    notes: what was repaired or assumed when it was read, for the user.
    """

    config: Config
    shapes: Mapping[str, tuple[int, ...]]
    restore: Callable[[Mapping[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]]
    vocabulary: bytes | None = None
    restore_optimizer: Callable[[Any], Any] | None = None
    notes: tuple[str, ...] = ()

    def say_notes(self) -> None:
        """Prints them on stderr; of several processes, the first does."""
        for note in self.notes if jax.process_index() == 0 else ():
            print(note, file=sys.stderr)


def find_pretrained(path: str | Path, *, together: bool = False) -> PretrainedModel:
    """The model of a WORKDIR (its newest checkpoint), a checkpoint, or a foreign one's folder.

    `together`: several processes call this, and the choice of process 0 holds. Raises `UserError`
    where there is none.
    """
    foreign = read_foreign(Path(path).expanduser())
    if foreign is not None:
        return PretrainedModel(
            foreign.config,
            foreign.shapes,
            foreign.place,
            foreign.vocabulary,
            notes=foreign.notes,
        )
    workdir, folder = (find_checkpoint_together if together else find_checkpoint)(path)
    return PretrainedModel(
        workdir.config(),
        parameter_shapes(folder),
        functools.partial(restore_params, folder),
        workdir.vocabulary.read_bytes() if workdir.vocabulary.is_file() else None,
        functools.partial(restore_opt_state, folder),
    )


def load(path: str | Path) -> SwitchTransformer:
    """The model of a WORKDIR, of a checkpoint or of a Hugging Face folder, on one device.

    Raises `UserError` where there is nothing to load.
    """
    found = find_pretrained(path)
    found.say_notes()
    config = found.config
    model: Any = jax.eval_shape(lambda: SwitchTransformer(config, jax.random.key(0)))
    where = SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        for name, shape in found.shapes.items()
    }
    return with_parameters(model, merge_adapters(found.restore(abstract), config))
