"""Progress display of a sweep: which run is trained, and the time left."""

import time
from collections.abc import Collection, Mapping

from switch_jax.training import ProgressDisplay, format_duration


class SweepDisplay(ProgressDisplay):
    """A progress bar over the work of all runs; without a terminal, a line per start and end."""

    def __init__(self, work: Mapping[str, float], finished: Collection[str]):
        """`work`: FLOPs, or another unit, of each run by key; `finished`: keys of finished runs."""
        super().__init__(sum(work.values()))
        self._work, self._finished = work, set(finished)
        self._run, self._first_share, self._run_start = "", 0.0, 0.0
        self._waiting = False

    def start_run(self, key: str, share: float) -> None:
        """Shows that this process trains a run, of which a share was done before."""
        self._run, self._first_share, self._run_start = key, share, time.monotonic()
        self._waiting = False
        number = f"run {len(self._finished) + 1} of {len(self._work)}"
        self.update(self._work_done(share), f"{number}: {key}", elsewhere=True, line=True)

    def update_run(self, share: float) -> None:
        """Shows that a share of the current run is done."""
        self.update(self._work_done(max(share, self._first_share)))

    def end_run(self, finished: Collection[str]) -> None:
        """Shows that this process trains no run any more; `finished`: keys of all finished runs."""
        if self._run in finished:
            self.update(self._work_done(1.0))
            seconds = time.monotonic() - self._run_start
            self.print_line(f"{self._run} finished after {format_duration(seconds)}")
        self._run, self._finished = "", set(finished)
        self.update(self._work_done(0.0), elsewhere=True)

    def show_waiting(self, runs: int) -> None:
        """Shows, once, that all runs that are left are trained by other processes."""
        if not self._waiting:
            self.print_line(f"waiting for {runs} runs that other processes train")
        self._waiting = True

    def _work_done(self, share: float) -> float:
        finished = sum(self._work[key] for key in self._finished)
        current = 0.0 if self._run in self._finished else self._work.get(self._run, 0.0)
        return finished + share * current
