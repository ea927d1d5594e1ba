"""throughput: to be written."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class ThroughputMeter:
    """Speed between two readings, from the metrics of a train step."""

    def __init__(self, mfu: Callable[[float], float | None]):
        """`mfu`: share of the devices' peak from seconds a step, None where it is not known."""
        self._mfu = mfu

    def restart(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Begins to measure after `step`; waits for it first."""
        self._step, self._tokens = step, _tokens(metrics)
        self._wait, self._began = 0.0, time.perf_counter()

    @contextmanager
    def waiting(self, metrics: Mapping[str, Any]) -> Iterator[None]:
        """Around drawing a batch: counts the time if the step was done before the batch was
        there, so that the device may have had nothing to do.
        """
        began = time.perf_counter()
        yield
        if metrics["loss"].is_ready():
            self._wait += time.perf_counter() - began

    def read(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The metrics as numbers, with the speed since the last reading; restarts."""
        values = {name: float(value) for name, value in metrics.items() if name != "tokens"}
        values["tokens"] = _tokens(metrics)
        seconds, steps = time.perf_counter() - self._began, step - self._step
        if steps:
            values |= {
                "tokens_per_second": (values["tokens"] - self._tokens) / seconds,
                "step_seconds": seconds / steps,
                "data_wait_fraction": self._wait / seconds,
            }
            share = self._mfu(seconds / steps)
            if share is not None:
                values["mfu"] = share
        self.restart(step, metrics)
        return values


def _tokens(metrics: Mapping[str, Any]) -> int:
    low, high = (int(word) for word in metrics["tokens"])
    return low + (high << 32)
