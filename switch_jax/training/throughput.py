"""ThroughputMeter: tokens per second, seconds per step, share of waiting for data, and MFU."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from switch_jax.training.goodput import Goodput


class ThroughputMeter:
    """Measures throughput between two readings.

    It takes the metrics of a train step while they are still being computed; reading their values
    waits for the step.
    """

    def __init__(self, mfu: Callable[[float], float | None], goodput: Goodput):
        """Makes a meter.

        Args:
          mfu: returns MFU (from 0 to 1) for seconds per step; None where it is not known.
          goodput: of the run, to which waiting for data is added.
        """
        self._mfu, self._goodput = mfu, goodput

    def restart(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Waits for `step`, whose metrics are given, and starts to measure after it."""
        self._step, self._tokens = step, _token_count(metrics)
        self._wait_seconds, self._start = 0.0, time.perf_counter()

    @contextmanager
    def loading_batch(self, metrics: Mapping[str, Any]) -> Iterator[None]:
        """Context manager for loading the next batch during the step with these metrics.

        Counts its time as waiting if the step is done before the batch is there, because then the
        device may have been idle.
        """
        start = time.perf_counter()
        yield
        if metrics["loss"].is_ready():
            seconds = time.perf_counter() - start
            self._wait_seconds += seconds
            self._goodput.add("waiting_for_data", seconds)

    def read_metrics(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Returns the metrics as numbers, with throughput since the last reading; restarts.

        Adds `tokens_per_second` (target tokens), `step_seconds`, `data_wait_fraction`, the shares
        `goodput/…` of the time since the start and, where it is known, `mfu`.
        """
        others = ("tokens", "finite")  # no float32, or for `FiniteGuard`
        values = {name: float(value) for name, value in metrics.items() if name not in others}
        values["tokens"] = _token_count(metrics)
        seconds, steps = time.perf_counter() - self._start, step - self._step
        if steps:
            values |= {
                "tokens_per_second": (values["tokens"] - self._tokens) / seconds,
                "step_seconds": seconds / steps,
                "data_wait_fraction": self._wait_seconds / seconds,
            }
            mfu = self._mfu(seconds / steps)
            if mfu is not None:
                values["mfu"] = mfu
        self.restart(step, metrics)
        return values | self._goodput.metrics()


def _token_count(metrics: Mapping[str, Any]) -> int:
    """Returns the 64-bit count of target tokens from its low and high word."""
    low, high = (int(word) for word in metrics["tokens"])
    return low + (high << 32)
