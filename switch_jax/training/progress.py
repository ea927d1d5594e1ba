"""Progress display: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from switch_jax.errors import printable


class ProgressDisplay:
    """A progress bar on stderr with a description, a status and the time left.

    The clock starts at the first `update`, so that compilation does not count. The time left is
    the work left at the mean speed of this process since then. Where stderr is no terminal, only
    updates with `line=True` and `print_line` show anything.
    """

    def __init__(
        self, total: float, done: float = 0.0, *, status: str = "", active: bool = True
    ) -> None:
        """`total`, `done`: amounts of work in one unit; one process of several is `active`."""
        # All texts are shown as they are: names of tasks and messages may look like markup.
        self._console = Console(stderr=True, quiet=not active, markup=False, emoji=False)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %  {task.fields[status]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, status=status)
        self._bar.update(self._task, completed=done)
        self._total, self._done = total, done
        self._base: float | None = None  # `done`, less what this process did since `_start`
        self._start = 0.0
        self._description, self._status = "", status

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(
        self,
        done: float,
        description: str | None = None,
        status: str | None = None,
        *,
        elsewhere: bool = False,
        line: bool = False,
    ) -> None:
        """Moves the bar; texts that are None stay as they are.

        Args:
          done: amount of work done so far, in all.
          description: text before the bar.
          status: text behind the bar, before the time left.
          elsewhere: whether the work since the last update was not done by this process, so that
            it does not count for its speed.
          line: whether to print all that as a line where there is no terminal.
        """
        if self._base is None:
            self._base, self._start = done, time.monotonic()
        elif elsewhere:
            self._base += done - self._done
        self._done = done
        self._description = self._description if description is None else description
        self._status = self._status if status is None else status
        texts = [text for text in (self._status, self._time_left()) if text]
        self._bar.update(
            self._task,
            completed=done,
            description=printable(self._description),
            status=printable("  ".join(texts)),
        )
        if line and not self._console.is_terminal:
            self.print_line("  ".join([self._description, *texts]))

    def print_line(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(printable(text), highlight=False, soft_wrap=True)

    def _time_left(self) -> str:
        done_here = self._done - (self._base or 0.0)
        if done_here <= 0:
            return ""
        seconds = (time.monotonic() - self._start) / done_here * (self._total - self._done)
        return f"about {format_duration(seconds)} left"


def train_status(metrics: Mapping[str, float]) -> str:
    """Returns loss and speed of a train step as a short text."""
    speed = metrics.get("tokens_per_second", 0)
    return f"loss {metrics['loss']:.3f}  {speed:,.0f} target tokens/s"


def evaluation_summary(metrics: Mapping[str, float]) -> str:
    """Returns the loss of an evaluation and, where tasks were scored, their scores as a text."""
    text = f"validation cross-entropy {metrics['cross_entropy']:.4f}"
    scores = [name for name in metrics if name.endswith("/score")]
    for name in ["average"] if "average" in metrics else scores:
        text += f"  {name.removesuffix('/score')} {metrics[name]:.2f}"
    return text


def format_duration(seconds: float) -> str:
    """Returns seconds in the largest unit of which there are at least two, such as "5 min"."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
