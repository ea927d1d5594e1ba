"""Experts that receive nothing: who, and for how long."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from switch_jax.config import Config
from switch_jax.model import sparse_layer_names

Arrays = Mapping[str, jax.Array]  # [layers, E], by `Stats` key


class IdleExperts:
    """Counts, on the device, the steps since each expert last received a token of the batch.

    It begins anew when a run is continued: a warning may then come later, or again.
    """

    def __init__(self, config: Config):
        self._config = config
        self._limit = config.train.idle_expert_steps
        self._steps: Mapping[str, jax.Array | np.ndarray] = {}
        self._longest: Mapping[str, jax.Array | np.ndarray] = {}
        self._told: set[tuple[str, int]] = set()

    def update(self, load: Mapping[str, jax.Array]) -> None:
        """After a step, with the assignments of every expert: by `Stats` key, [layers, E]."""
        if not self._steps:
            # NumPy's, which any mesh and any number of processes takes.
            self._steps = {key: np.zeros(x.shape, np.int32) for key, x in load.items()}
            self._longest = dict(self._steps)
        self._steps, self._longest = _counted(self._steps, self._longest, load)

    def news(self) -> list[str]:
        """A sentence for every layer with experts that have become idle; each is told once."""
        sentences = []
        for key, steps_xE in jax.device_get(self._longest).items():
            for layer, steps_E in zip(sparse_layer_names(key, self._config), steps_xE):
                experts = [int(e) for e in np.flatnonzero(steps_E >= self._limit)]
                fresh = [e for e in experts if (layer, e) not in self._told]
                self._told |= {(layer, e) for e in fresh}
                if fresh:
                    names = ", ".join(map(str, fresh))
                    sentences.append(
                        f"{layer}: expert {names} received no token for {self._limit} steps"
                    )
        return sentences


@jax.jit
def _counted(steps: Arrays, longest: Arrays, load: Arrays) -> tuple[Arrays, Arrays]:
    """Steps without a token up to now, and the most there have been."""
    steps = jax.tree.map(lambda n, x: jnp.where(x > 0, 0, n + 1), steps, load)
    return steps, jax.tree.map(jnp.maximum, longest, steps)
