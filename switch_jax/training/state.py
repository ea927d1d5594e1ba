"""TrainState: parameters, optimizer state and counters; saving and restoring it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from switch_jax.checkpoint import Checkpointer, DataPosition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Arrays that training changes; an abstract state has shapes or shardings in their place."""

    step: Any  # int32 scalar: number of train steps done
    tokens: Any  # uint32 [2]: number of target tokens seen, low and high word
    params: dict[str, Any]  # float32, by path
    opt_state: Any  # of optax
    # Of `params`, written together with them, so that the next step need not read all float32
    # parameters for these; by path, and empty where that would save nothing.
    rms: dict[str, Any]  # of each matrix, for Adafactor; shape of the parameter's batch dimensions
    weights: dict[str, Any]  # matrices of the layers in the activation dtype; not stored

    def without_params(self) -> dict[str, Any]:
        """Returns the fields that a checkpoint stores beside `params`, by name."""
        stored = {"step": self.step, "tokens": self.tokens, "opt_state": self.opt_state}
        # Another program may add the squares in another order: a continued run has the same bits
        # only with the stored RMS.
        return stored | ({"rms": self.rms} if self.rms else {})


def save_state(
    checkpoints: Checkpointer,
    state: TrainState,
    position: DataPosition,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Starts to write a checkpoint of the state; other arguments as in `Checkpointer.save`."""
    checkpoints.save(int(state.step), state.params, state.without_params(), position, metrics)


def restore_state(
    checkpoints: Checkpointer, abstract: TrainState, position: DataPosition
) -> TrainState | None:
    """Returns the state of the newest readable checkpoint; None where there is no checkpoint.

    It has no `weights`, and no `rms` where an older version wrote the checkpoint:
    `TrainProgram.complete_state` adds them.

    Moves `position` (of the training data) to the position in that checkpoint. All processes must
    call it. Raises `UserError` where there are checkpoints and none can be read.
    """
    restored = checkpoints.restore(abstract.params, abstract.without_params(), position)
    if restored is None:
        return None
    params, rest = restored
    return TrainState(**{"rms": {}, **rest}, params=params, weights={})
