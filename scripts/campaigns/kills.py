"""Kills: every verb, ended by a signal at a random moment and started again.

The second start must succeed with the results of an undisturbed run, and leave no partial file and
no process.
"""

import random
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.campaigns.outcomes import Kind, Outcome, failure, partial_files
from scripts.campaigns.processes import Ended, Process
from scripts.campaigns.results import digests, first_difference, same_text
from scripts.campaigns.world import COMMANDS, Command

# Number of kills by verb.
COUNTS = {
    "train": 26,
    "train on two processes": 6,
    "fine-tune": 8,
    "distil": 8,
    "data vocab": 4,
    "data pack": 12,
    "data peek": 2,
    "convert from-hf": 6,
    "convert to-hf": 6,
    "convert from-t5x": 6,
    "convert upcycle": 4,
    "export": 5,
    "sweep": 5,
    "experts": 4,
    "eval": 3,
    "generate": 3,
    "plot": 3,
    "inspect": 2,
    "compile": 2,
    "bench": 2,
}
_TWO = "train on two processes"
_SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGTERM, signal.SIGINT)
_TIMEOUT = 300.0
# A process that was signalled ends at once; a training run, or one whose peer was killed, later.
_STOP_TIMEOUT = 120.0


@dataclass(frozen=True)
class Kill:
    """A case: the signal, its moment as a share of the undisturbed run's time, and who gets it."""

    number: int
    verb: str
    signal: signal.Signals
    moment: float
    warm: bool
    victims: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        return f"kills/{self.verb}/{self.number}"

    @property
    def command(self) -> Command:
        """The command line that is killed."""
        return COMMANDS["train" if self.verb == _TWO else self.verb]

    @property
    def reference(self) -> str:
        return self.verb

    def run_undisturbed(self, folder: Path) -> Ended:
        return self._wait(self._start(folder))[0]

    def check(self, folder: Path, undisturbed: Ended) -> Outcome:
        def outcome(kind: Kind, detail: str = "") -> Outcome:
            told = f"{self.signal.name} at {self.moment:.2f} of the run; {detail}"
            return Outcome(self.name, self.verb, kind, told, self.command.arguments)

        started = self._start(folder, self.warm)
        # A new interpreter takes a few seconds more, and is to be killed in these as well.
        time.sleep(self.moment * (undisturbed.seconds + (0 if self.warm else 3)))
        for victim in self.victims:
            started[victim].send_signal(self.signal)
        for process in started:
            killed = process.wait(_STOP_TIMEOUT)
            if killed.code is None:
                return outcome("hang", "no end after the signal")
            if self.signal == signal.SIGINT and (fault := _fault_at_interrupt(killed)):
                return outcome(*fault)

        again = self._start(folder)
        ended = self._wait(again)
        left = sum(process.end_descendants() for process in (*started, *again))
        for one in ended:
            if one.code != 0:
                if " exists; " in one.err and self._is_complete(folder, undisturbed):
                    return outcome("right", "was complete before the signal")
                kind, detail = failure(one)
                return outcome("unclear" if kind == "told" else kind, f"started again: {detail}")
        if difference := first_difference(ended[0].results, undisturbed.results):
            return outcome("silent", f"another result than undisturbed: {difference}")
        if self.command.prints and not same_text(ended[0].out, undisturbed.out):
            return outcome("silent", "prints something else than undisturbed")
        if partial := partial_files(folder):
            return outcome("left over", f"partial files: {', '.join(partial[:3])}")
        if left:
            return outcome("left over", f"{left} processes")
        return outcome("right")

    def _start(self, folder: Path, warm: bool = True) -> list[Process]:
        arguments, results = self.command.arguments, self.command.results
        if self.verb != _TWO:
            return [Process(arguments, folder, warm=warm, results=results)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flags = ("--config.mesh.data=2", f"--coordinator=localhost:{port}", "--num_processes=2")
        return [
            Process(
                (*arguments, *flags, f"--process_id={number}"),
                folder,
                warm=warm,
                results=results if number == 0 else None,
                number=number,
            )
            for number in range(2)
        ]

    def _is_complete(self, folder: Path, undisturbed: Ended) -> bool:
        """Whether the results are there, and are those of an undisturbed run."""
        found = digests(folder, self.command.results)
        return first_difference(found, undisturbed.results) is None

    @staticmethod
    def _wait(processes: Sequence[Process]) -> list[Ended]:
        return [process.wait(_TIMEOUT) for process in processes]


def cases(world: Path, seed: int) -> Iterator[Kill]:
    """Yields the cases, the same for the same seed."""
    for verb, count in COUNTS.items():
        rng = random.Random(f"{seed} {verb}")
        for number in range(count):
            victims = ((0,), (1,), (0, 1))[number % 3] if verb == _TWO else (0,)
            yield Kill(
                number,
                verb,
                rng.choice(_SIGNALS),
                (number + rng.random()) / count,  # one in each part of the run
                warm=number % 4 != 1,
                victims=victims,
            )


def _fault_at_interrupt(ended: Ended) -> tuple[Kind, str] | None:
    """Returns the fault of a process that got Ctrl-C: only exit code 130 (or 0) is right."""
    if "Traceback" in ended.err:
        return "traceback", f"at Ctrl-C: {ended.err[-200:]!r}"
    if ended.code not in (0, 128 + signal.SIGINT):
        return "unclear", f"exit code {ended.code} at Ctrl-C"
    return None
