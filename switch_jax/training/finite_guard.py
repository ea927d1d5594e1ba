"""FiniteGuard: stops a run that has diverged, and counts the steps whose update was skipped."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from switch_jax.errors import NotFiniteError

# With `train.on_nonfinite=skip`, a run stops after so many skipped updates in a row: bad batches
# are few, and a model that has diverged has no finite gradient any more.
MAX_SKIPPED_IN_A_ROW = 10

Metrics = Mapping[str, Any]  # of a train step, on the device


class Divergence(NamedTuple):
    """A step at which a run must stop."""

    step: int
    metrics: Metrics  # of that step
    error: NotFiniteError


class FiniteGuard:
    """Checks for every step, in order, that its loss, gradients and parameters are finite.

    Whether they are is `finite` among the step's metrics, which is equal in all processes. The
    guard may be one step behind the device, so as not to delay it.

    Attributes:
      skipped_steps: number of skipped updates since the attribute was last set to 0.
    """

    def __init__(self, on_nonfinite: str):
        """`on_nonfinite`: the config's `train.on_nonfinite`."""
        self.skipped_steps = 0
        self._skip = on_nonfinite == "skip"
        self._skipped_in_a_row = 0
        self._pending: list[tuple[int, Metrics]] = []  # steps that are not checked, in order

    def check(self, step: int, metrics: Metrics, *, wait: bool) -> Divergence | None:
        """Waits for the step before and, if `wait`, for this one; checks what it has waited for.

        Returns the first step at which the run must stop, None to go on.
        """
        self._pending.append((step, metrics))
        while len(self._pending) > (not wait):
            divergence = self._check_one(*self._pending.pop(0))
            if divergence is not None:
                return divergence
        return None

    def _check_one(self, step: int, metrics: Metrics) -> Divergence | None:
        if metrics["finite"]:
            self._skipped_in_a_row = 0
            return None
        reason = _reason(step, metrics)
        if not self._skip:
            advice = (
                "lower optimizer.learning_rate or set optimizer.max_grad_norm, or skip such steps"
                " with train.on_nonfinite=skip"
            )
            return Divergence(step, metrics, _error(reason, advice))
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            return None
        reason += f", and the updates of the {MAX_SKIPPED_IN_A_ROW - 1} steps before were skipped"
        return Divergence(
            step,
            metrics,
            _error(reason, "lower optimizer.learning_rate or set optimizer.max_grad_norm"),
        )


def _reason(step: int, metrics: Metrics) -> str:
    """Returns which value of a step is not finite."""
    for name, key in (("loss", "loss"), ("norm of the gradients", "grad_norm")):
        if not abs(value := float(metrics[key])) < float("inf"):
            return f"The {name} is {value} at step {step}"
    return f"Step {step} makes parameters that are not finite"


def _error(reason: str, advice: str) -> NotFiniteError:
    return NotFiniteError(
        f"{reason}; {advice}: the same command goes on from the newest checkpoint, which is finite"
        " (remove that one to go back to the one before)."
    )
