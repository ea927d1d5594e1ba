"""What cannot be read is counted by kind, with the first place of each, or refused at once."""

import atexit
import sys
import threading
from typing import Literal

from switch_jax.errors import UserError

BadRecordAction = Literal["skip", "error"]

# Each kind completes both «PLACE is …» and «3 records were left out: 3 …».
EMPTY = "empty"
NOT_UTF8 = "not UTF-8"
NOT_JSON = "not a JSON object"
NO_TEXT = "without a text"
TOO_LONG = "too long"
DAMAGED = "cut short or damaged"  # mostly with all that is behind it in the file
MISSING = "missing or unreadable"  # a file, or what of it is not read yet


class BadRecords:
    """Bad records by kind; `add` may be called from any thread.

    Attributes:
      counts: how many there are of each kind.
      first: where the first of each kind is, such as "/data/a.json.gz, line 17".
    """

    def __init__(self, action: BadRecordAction):
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}
        self._action = action
        self._lock = threading.Lock()

    def add(self, kind: str, where: str) -> None:
        """Counts one; raises `UserError` instead where the action is "error"."""
        if self._action == "error":
            raise UserError(
                f"{where} is {kind}; repair or remove it, or set data.on_bad_record=skip to leave"
                " such records out."
            )
        self.merge({kind: 1}, {kind: where})

    def merge(self, counts: dict[str, int], first: dict[str, str]) -> None:
        """Adds what was counted elsewhere, as in another process; first places here stay."""
        with self._lock:
            for kind, count in counts.items():
                self.counts[kind] = self.counts.get(kind, 0) + count
                self.first.setdefault(kind, first[kind])

    def summary(self) -> str | None:
        """One sentence with every kind, the most frequent first; None where nothing is bad."""
        with self._lock:
            if not self.counts:
                return None
            kinds = sorted(self.counts, key=lambda kind: (-self.counts[kind], kind))
            total = sum(self.counts.values())
            listed = ", ".join(f"{self.counts[k]} {k} (first: {self.first[k]})" for k in kinds)
        return f"{total} {'record was' if total == 1 else 'records were'} left out: {listed}."


class ReportedBadRecords(BadRecords):
    """Bad records of a stream: told on stderr when the first is met, and again at the end of the
    process where others followed.
    """

    def __init__(self, action: BadRecordAction):
        super().__init__(action)
        self._told: str | None = None
        self._places: set[tuple[str, str]] = set()  # an epoch meets what the one before met
        atexit.register(self._tell)

    def add(self, kind: str, where: str) -> None:
        if (kind, where) not in self._places:
            self._places.add((kind, where))
            super().add(kind, where)

    def print_once(self) -> None:
        """Says what there is, unless something was said before."""
        if self._told is None:
            self._tell()

    def _tell(self) -> None:
        summary = self.summary()
        if summary != self._told:
            self._told = summary
            print(summary, file=sys.stderr, flush=True)
