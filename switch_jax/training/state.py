"""Training state, and its form in a checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from switch_jax.checkpoint import Checkpointer, DataPosition


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes during training.

    Its leaves are arrays or, in their place, shapes or shardings.
    """

    step: Any  # int32: train steps done
    tokens: Any  # uint32 [2]: target tokens seen, low and high word
    params: dict[str, Any]  # by path, float32
    opt_state: Any

    def without_params(self) -> dict[str, Any]:
        """Returns the other fields by name, as a checkpoint stores them."""
        return {"step": self.step, "tokens": self.tokens, "opt_state": self.opt_state}


def save_state(
    checkpoints: Checkpointer,
    state: TrainState,
    position: DataPosition,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Starts writing a checkpoint; arguments as of `Checkpointer.save`."""
    checkpoints.save(int(state.step), state.params, state.without_params(), position, metrics)


def restore_state(
    checkpoints: Checkpointer, abstract: TrainState, position: DataPosition
) -> TrainState | None:
    """Returns the state in the newest good checkpoint, and moves `position` to the data's there.

    All processes must call it. Returns None where there is no checkpoint; raises `UserError` where
    none can be read.
    """
    restored = checkpoints.restore(abstract.params, abstract.without_params(), position)
    return None if restored is None else TrainState(params=restored[0], **restored[1])
