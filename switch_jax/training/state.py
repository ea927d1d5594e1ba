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

    def without_params(self) -> dict[str, Any]:
        """Returns the fields except `params` by name, as a checkpoint stores them."""
        return {"step": self.step, "tokens": self.tokens, "opt_state": self.opt_state}


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

    Moves `position` (of the training data) to the position in that checkpoint. All processes must
    call it. Raises `UserError` where there are checkpoints and none can be read.
    """
    restored = checkpoints.restore(abstract.params, abstract.without_params(), position)
    return None if restored is None else TrainState(params=restored[0], **restored[1])
