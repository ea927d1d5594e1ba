"""Foreign checkpoints: a config, and a function that reads one slice of a parameter.

In this program's parameters, the blocks of a run of layers and the experts are leading dimensions.
Files of other programs have an array for each layer or expert. A checkpoint is therefore read slice
by slice, and only the slices in use are in memory.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switch_jax.checkpoint.finite import check_finite
from switch_jax.config import Config
from switch_jax.data import parse_vocabulary, read_vocabulary
from switch_jax.errors import UserError
from switch_jax.model import abstract_model, named_parameters, parameter_metadata

SliceIndex = tuple[int, ...]  # along the stacked dimensions of a parameter


class StackedShape(NamedTuple):
    """Shape of a parameter, and the number of its leading dimensions that are stacked."""

    shape: tuple[int, ...]
    num_stacked: int

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape of one slice."""
        return self.shape[self.num_stacked :]

    def indices(self) -> Iterator[SliceIndex]:
        """Yields the index of every slice, in order; only `()` where no dimension is stacked."""
        return itertools.product(*map(range, self.shape[: self.num_stacked]))


def stacked_shapes(config: Config) -> dict[str, StackedShape]:
    """Returns the shapes of a model's parameters, by path."""
    model = abstract_model(config)
    metadata = parameter_metadata(model)
    return {
        name: StackedShape(tuple(leaf.shape), metadata[name].num_batch_dims)
        for name, leaf in named_parameters(model).items()
    }


@dataclasses.dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of another program, or a model computed slice by slice.

    config: validated config; its model has exactly the parameters of the checkpoint.
    read_slice: function (path, index) → one slice of a parameter, float32, of shape
      `StackedShape.slice_shape`. Shapes were checked when the checkpoint was opened; raises
      `UserError` for damaged data. Values may be NaN or infinite; `read_finite_slice` refuses them.
    vocabulary: content of its `vocabulary.model`, where there is one.
    companion_files: other files of the model, by their path in a WORKDIR.
    notes: a sentence for each repair or assumption, for the user.
    eos_is_assumed: the checkpoint does not say which id ends a text; the config has T5's.
    """

    config: Config
    read_slice: Callable[[str, SliceIndex], np.ndarray]
    vocabulary: bytes | None = None
    companion_files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    eos_is_assumed: bool = False

    @functools.cached_property
    def parameters(self) -> dict[str, StackedShape]:
        """Shapes of all parameters with their stacked dimensions, by path."""
        return stacked_shapes(self.config)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters, by path."""
        return {name: stacked.shape for name, stacked in self.parameters.items()}

    def with_vocabulary(self, file: str | None) -> "ForeignCheckpoint":
        """Returns the checkpoint with the vocabulary in a file, or with its own if `file` is None.

        Raises `UserError` where the file has no vocabulary, where the checkpoint has another one,
        and where the vocabulary does not fit the model.
        """
        config, content = self.config, self.vocabulary
        if file is not None:
            vocabulary = read_vocabulary(file)
            content = vocabulary.content
            if self.vocabulary not in (None, content):
                raise UserError(
                    f"The checkpoint has a vocabulary of its own, other than {file}; leave"
                    " --vocabulary out."
                )
            if self.eos_is_assumed and vocabulary.eos is not None:
                model = dataclasses.replace(config.model, eos_id=vocabulary.eos)
                config = dataclasses.replace(config, model=model)
        if content is None:
            note = (
                "There is no vocabulary: set --vocabulary FILE, or data.vocabulary=FILE where the"
                " model is used with text."
            )
            return dataclasses.replace(self, notes=(*self.notes, note))
        parse_vocabulary(file or "of the checkpoint", content, config.model)
        return dataclasses.replace(self, config=config, vocabulary=content)

    def read_finite_slice(self, name: str, index: SliceIndex) -> np.ndarray:
        """Returns a slice as `read_slice` does; raises `UserError` for NaN and infinity in it."""
        values = self.read_slice(name, index)
        check_finite(values, "/".join([name, *map(str, index)]), "the checkpoint")
        return values

    def restore(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Returns the parameters whose paths are in `abstract`, with its shardings, float32.

        A process reads only the shards of its own devices, one parameter after the other.
        """
        return {
            name: jax.make_array_from_callback(
                leaf.shape,
                leaf.sharding,
                functools.partial(self._read_shard, name),
                dtype=jnp.float32,
            )
            for name, leaf in abstract.items()
        }

    def _read_shard(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """Returns the part of a parameter that `slices` select, one slice for each dimension."""
        shape, num_stacked = self.parameters[name]
        ranges = [range(size)[selected] for size, selected in zip(shape, slices)]
        shard = np.empty([len(r) for r in ranges], np.float32)
        for position in itertools.product(*(range(len(r)) for r in ranges[:num_stacked])):
            index = tuple(r[i] for r, i in zip(ranges, position))
            shard[position] = self.read_slice(name, index)[slices[num_stacked:]]
        return shard
