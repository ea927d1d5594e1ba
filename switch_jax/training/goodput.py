"""Goodput: shares of a run's wall time in train steps and in everything else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

# What a run does besides steps. The first step counts as compiling.
ACTIVITIES = ("starting", "compiling", "waiting_for_data", "evaluating", "saving")


class Goodput:
    """Wall time of this process, by activity; whatever is not measured is steps."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)

    def add(self, activity: str, seconds: float) -> None:
        """Counts seconds of one of `ACTIVITIES`."""
        self._seconds[activity] += seconds

    def add_time_so_far(self, activity: str) -> None:
        """Counts all time that is not yet counted as one of `ACTIVITIES`."""
        counted = sum(self._seconds.values())
        self.add(activity, time.perf_counter() - self._start - counted)

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Context manager whose time counts as one of `ACTIVITIES`."""
        start = time.perf_counter()
        yield
        self.add(activity, time.perf_counter() - start)

    def shares(self) -> dict[str, float]:
        """Returns the share of the time so far in `steps` and in each activity; their sum is 1."""
        total = time.perf_counter() - self._start
        steps = max(0.0, total - sum(self._seconds.values()))
        seconds = {"steps": steps, **self._seconds}
        return {activity: value / total for activity, value in seconds.items()}

    def metrics(self) -> dict[str, float]:
        """Returns the shares as metrics, `goodput/…`."""
        return {f"goodput/{activity}": share for activity, share in self.shares().items()}

    def summary(self) -> str:
        """Returns the shares of at least one per cent as a sentence, the largest first."""
        shares = sorted(self.shares().items(), key=lambda item: -item[1])
        parts = [f"{share:.0%} {name.replace('_', ' ')}" for name, share in shares if share >= 0.01]
        return f"Wall time: {', '.join(parts)}."
