"""progress: to be written."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressDisplay:
    """A live bar on a terminal; elsewhere, a plain line whenever there is something new."""

    def __init__(self, total_steps: int, first_step: int, *, active: bool = True):
        """Of several processes one is `active`; the others show nothing."""
        self._console = Console(stderr=True, quiet=not active)
        self._total = total_steps
        self._start = (first_step, time.time())
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            "train", total=total_steps, completed=first_step, status="compiling …"
        )

    def __enter__(self) -> "ProgressDisplay":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def step(self, step: int) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=step)

    def status(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows loss and speed."""
        speed = metrics.get("tokens_per_second", 0)
        text = f"loss {metrics['loss']:.3f}  {speed:,.0f} target tokens/s"
        self._progress.update(self._task, completed=step, status=text)
        if not self._console.is_terminal:
            first, began = self._start
            left = (time.time() - began) / max(step - first, 1) * (self._total - step)
            self.say(f"step {step}/{self._total}  {text}  {left:,.0f} s left")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the loss of an evaluation and, where tasks were scored, what is their number."""
        text = f"step {step}  validation cross-entropy {metrics['cross_entropy']:.4f}"
        scores = [name for name in metrics if name.endswith("/score")]
        for name in ["average"] if "average" in metrics else scores:
            text += f"  {name.removesuffix('/score')} {metrics[name]:.2f}"
        self.say(text)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)
