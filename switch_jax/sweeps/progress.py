"""How far a sweep is: a live bar on a terminal; elsewhere, a line whenever a run begins or ends."""

import time
from collections.abc import Collection, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class SweepDisplay:
    """Shows which run of how many is trained, and the time left.

    Time goes by work: what this process has done since it began tells how fast the rest will be.
    """

    def __init__(self, work: Mapping[str, float], done: Collection[str]):
        """`work` is that of every run, in any unit; `done` are those that are finished."""
        self._work, self._done = work, set(done)
        self._began, self._done_here = time.monotonic(), 0.0
        self._key, self._first, self._share = "", 0.0, 0.0  # of the run that is trained
        self._run_began, self._waiting = self._began, False
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %  {task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("sweep", total=sum(work.values()), left="")

    def __enter__(self) -> "SweepDisplay":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def started(self, key: str, share: float) -> None:
        """A run is trained from now on, a share of which was done before."""
        self._key, self._first, self._share, self._waiting = key, share, share, False
        self._run_began = time.monotonic()
        if not self._console.is_terminal:
            self.say(f"{self._description()}  {self._left()}".rstrip())

    def reached(self, share: float) -> None:
        """The run has come so far."""
        self._share = max(share, self._first)
        self._update()

    def ended(self, done: Collection[str]) -> None:
        """No run is trained now; `done` are all that are finished."""
        if self._key in done:
            seconds = time.monotonic() - self._run_began
            self._done_here += self._work[self._key] * (1 - self._first)
            self.say(f"{self._key} finished after {_duration(seconds)}")
        self._key, self._done, self._first, self._share = "", set(done), 0.0, 0.0
        self._update()

    def waiting(self, runs: int) -> None:
        """Nothing can be trained but what other processes train."""
        if not self._waiting:
            self.say(f"waiting for {runs} runs that other processes train")
        self._waiting = True

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def _update(self) -> None:
        done = sum(self._work[key] for key in self._done) + self._current(self._share)
        self._progress.update(
            self._task, completed=done, description=self._description(), left=self._left()
        )

    def _description(self) -> str:
        number = min(len(self._done) + 1, len(self._work))
        return f"run {number} of {len(self._work)}: {self._key}"

    def _current(self, share: float) -> float:
        return share * self._work.get(self._key, 0.0) * (self._key not in self._done)

    def _left(self) -> str:
        """The time left, where something was done that tells."""
        here = self._done_here + self._current(self._share - self._first)
        if not here:
            return ""
        rest = sum(work for key, work in self._work.items() if key not in self._done)
        seconds = (time.monotonic() - self._began) / here * (rest - self._current(self._share))
        return f"about {_duration(seconds)} left"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
