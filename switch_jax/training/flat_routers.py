"""Detection of flat routers: routers whose probabilities stay nearly uniform."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from switch_jax.config import Config, MoEConfig

# A router is flat while its largest probability, a mean over tokens, is below that of an expert
# which is this many times as probable as every other one: 0.6 of 2 experts, 0.18 of 8, and about
# 1.5 / E of many. Entropy would not do for many experts: of 2048, one may have a probability of
# 0.04, 82 / E, at more than 0.98 ln E nats.
_FLAT_RATIO = 1.5

Steps = Mapping[str, jax.Array | np.ndarray]  # by layer


class FlatRouters:
    """Counts, on the device, the steps in a row for which each router has been flat.

    Checkpoints do not hold the counts: after a restart they begin at 0, and a warning may come
    later or a second time.

    Attributes:
      min_steps: number of steps in a row after which a router is reported.
    """

    def __init__(self, config: Config):
        # A router gets as much time as an expert; a quarter of a short run, so that a router which
        # is flat at the end is always reported.
        self.min_steps = max(1, min(config.train.idle_expert_steps, config.train.steps // 4))
        self._moe = config.moe
        self._steps: Steps = {}
        self._warned: set[str] = set()  # layers

    def update(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Counts a step, of which `metrics` are as from `TrainProgram.train_step`."""
        if step <= self.min_steps:
            return  # routers begin nearly uniform, and need these steps to become anything else
        if not self._steps:
            matches = [re.fullmatch(r"router/(.+/.+)/confidence", name) for name in metrics]
            # NumPy arrays: jit accepts them on any mesh and with any number of processes.
            self._steps = {match[1]: np.zeros((), np.int32) for match in matches if match}
        confidence = {layer: metrics[f"router/{layer}/confidence"] for layer in self._steps}
        threshold = _FLAT_RATIO / (_FLAT_RATIO + self._moe.num_experts - 1)
        self._steps = _count_flat_steps(self._steps, confidence, threshold)

    def new_warnings(self, metrics: Mapping[str, float]) -> list[str]:
        """Returns a sentence for every router that is flat now, and has not been reported.

        Args:
          metrics: of the step that was counted last.
        """
        steps = jax.device_get(self._steps)
        flat = [layer for layer, n in steps.items() if n >= self.min_steps]
        new = [layer for layer in flat if layer not in self._warned]
        self._warned |= set(new)
        E, advice = self._moe.num_experts, _advice(self._moe)
        # The gates of a token sum to 1 if they are renormalized, whatever the probabilities are.
        effect = "" if self._moe.renormalize else f", so that gates are about 1/{E}"
        return [
            f"{layer}: the router has been nearly uniform for {steps[layer]} steps (largest"
            f" probability {metrics[f'router/{layer}/confidence']:.3f}, uniform {1 / E:.3f};"
            f" entropy {metrics[f'router/{layer}/entropy']:.3f} of at most {np.log(E):.3f} nats)"
            f"{effect}; try {advice}"
            for layer in new
        ]


@jax.jit
def _count_flat_steps(steps: Steps, confidence: Steps, threshold: float) -> Steps:
    """Returns the number of steps in a row with a largest probability below the threshold."""
    return jax.tree.map(lambda n, p: jnp.where(p < threshold, n + 1, 0), steps, confidence)


def _advice(moe: MoEConfig) -> str:
    """Returns changes of the config that make routers less uniform."""
    changes = ["a larger data.batch_size"]
    # The balance loss draws routers towards uniform; expert choice has none.
    if moe.aux_loss_weight and moe.router != "expert_choice":
        changes.insert(0, "a smaller moe.aux_loss_weight")
        if moe.balance_scope == "group":
            changes.insert(0, "moe.balance_scope=batch")
    return ", ".join(changes[:-1]) + " or " + changes[-1] if changes[1:] else changes[0]
