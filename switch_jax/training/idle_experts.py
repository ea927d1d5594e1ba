"""Detection of idle experts: experts that receive no token for many steps."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from switch_jax.config import Config
from switch_jax.model import sparse_layer_names

Counts = Mapping[str, jax.Array]  # [layers, E], by key of `RouterStatsByStack`


class IdleExperts:
    """Counts, on the device, the steps since each expert last received a token.

    Checkpoints do not hold the counts: after a restart they begin at 0, and a warning may come
    later or a second time.
    """

    def __init__(self, config: Config):
        self._config = config
        self._max_idle_steps = config.train.idle_expert_steps
        self._idle_steps: Mapping[str, jax.Array | np.ndarray] = {}
        self._longest_idle: Mapping[str, jax.Array | np.ndarray] = {}
        self._warned: set[tuple[str, int]] = set()  # layer, expert

    def update(self, load: Mapping[str, jax.Array]) -> None:
        """Counts a step.

        Args:
          load: number of assignments of every expert, [layers, E] by key of `RouterStatsByStack`,
            as from `TrainProgram.train_step`.
        """
        if not self._idle_steps:
            # NumPy arrays: jit accepts them on any mesh and with any number of processes.
            self._idle_steps = {key: np.zeros(x.shape, np.int32) for key, x in load.items()}
            self._longest_idle = dict(self._idle_steps)
        self._idle_steps, self._longest_idle = _count_idle_steps(
            self._idle_steps, self._longest_idle, load
        )

    def new_warnings(self) -> list[str]:
        """Returns a sentence for every layer with new idle experts; each expert is named once."""
        warnings = []
        for key, steps_xE in jax.device_get(self._longest_idle).items():
            for layer, steps_E in zip(sparse_layer_names(key, self._config), steps_xE):
                experts = [int(e) for e in np.flatnonzero(steps_E >= self._max_idle_steps)]
                new = [e for e in experts if (layer, e) not in self._warned]
                self._warned |= {(layer, e) for e in new}
                if new:
                    numbers, steps = ", ".join(map(str, new)), self._max_idle_steps
                    warnings.append(
                        f"{layer}: expert {numbers} received no token for {steps} steps"
                    )
        return warnings


@jax.jit
def _count_idle_steps(steps: Counts, longest: Counts, load: Counts) -> tuple[Counts, Counts]:
    """Returns the current number of steps without a token, and the largest one so far."""
    steps = jax.tree.map(lambda n, x: jnp.where(x > 0, 0, n + 1), steps, load)
    return steps, jax.tree.map(jnp.maximum, longest, steps)
