"""A foreign checkpoint in the one form that everything behind it knows.

Our parameters are stacked: the layers of a run and the experts are leading dimensions. Others'
files hold them one by one, so an importer offers slices, and no more than what is asked for is
ever in memory.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switch_jax.config import Config
from switch_jax.model import BATCH_DIMS, SwitchTransformer, logical_axes, named_parameters

Index = tuple[int, ...]


class Stacked(NamedTuple):
    """Shape of one of our parameters, and how many of its leading dimensions only stack."""

    shape: tuple[int, ...]
    batch: int

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape of what one index stands for."""
        return self.shape[self.batch :]

    def indices(self) -> Iterator[Index]:
        """Every index, in order; `()` alone where nothing is stacked."""
        return itertools.product(*map(range, self.shape[: self.batch]))


def foreign_parameters(config: Config) -> dict[str, Stacked]:
    """The parameters of a model, by path."""
    model = jax.eval_shape(lambda: SwitchTransformer(config, jax.random.key(0)))
    axes = logical_axes(model)
    return {
        name: Stacked(tuple(leaf.shape), sum(axis in BATCH_DIMS for axis in axes[name]))
        for name, leaf in named_parameters(model).items()
    }


@dataclasses.dataclass(frozen=True)
class ForeignCheckpoint:
    """A foreign checkpoint.

    config: validated; its model has exactly the parameters of the checkpoint.
    read: (path of our parameter, index) → one slice, float32, of `Stacked.slice_shape`. Shapes
        were checked when the checkpoint was opened; what is damaged further in raises `UserError`.
    vocabulary: content of a `vocabulary.model`, where there is one.
    carried: other files that belong to the model, by their path in a WORKDIR.
    notes: what was repaired or assumed, a sentence each, for the user.
    """

    config: Config
    read: Callable[[str, Index], np.ndarray]
    vocabulary: bytes | None = None
    carried: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def parameters(self) -> dict[str, Stacked]:
        """Every parameter of the model, by path."""
        return foreign_parameters(self.config)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Their shapes."""
        return {name: stacked.shape for name, stacked in self.parameters.items()}

    def place(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Those parameters that `abstract` names, with its shardings.

        A process reads only what its devices hold, one parameter after the other.
        """
        return {
            name: jax.make_array_from_callback(
                wanted.shape,
                wanted.sharding,
                functools.partial(self._part, name),
                dtype=jnp.float32,
            )
            for name, wanted in abstract.items()
        }

    def _part(self, name: str, where: tuple[slice, ...]) -> np.ndarray:
        """What `where` cuts from a parameter."""
        shape, batch = self.parameters[name]
        ranges = [range(size)[cut] for size, cut in zip(shape, where)]
        part = np.empty([len(r) for r in ranges], np.float32)
        for place in itertools.product(*(range(len(r)) for r in ranges[:batch])):
            index = tuple(r[i] for r, i in zip(ranges, place))
            part[place] = self.read(name, index)[where[batch:]]
        return part
