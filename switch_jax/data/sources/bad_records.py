"""Bad records and missing files: counted by kind, with the first of each, or refused."""

import atexit
import sys
import threading
from typing import Literal, NamedTuple

from switch_jax.errors import UserError

BadRecordAction = Literal["skip", "error"]

# Each kind completes both «PLACE is …» and «3 records were left out: 3 …».
EMPTY = "empty"
NOT_UTF8 = "not UTF-8"
NOT_JSON = "not a JSON object"
NOT_EXAMPLE = "not a tf.train.Example"
NO_TEXT = "without a text"
TOO_LONG = "too long"
UNEVEN = "a row with another number of fields than the first"
DAMAGED = "cut short or damaged"  # mostly with everything behind it in the file
MISSING = "missing or unreadable"  # a file, or its part that is not read yet


class BadRecord(NamedTuple):
    """A record that cannot be read.

    Attributes:
      kind: one of the constants above.
      place: such as "/data/a.json.gz, line 17".
    """

    kind: str
    place: str


class UnusableRecord(Exception):
    """A record was read but cannot be used.

    Attributes:
      kind: as the constants above.
      detail: what is wrong in this record, such as "'label' is 'maybe'".
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind} ({detail})" if detail else kind)
        self.kind = kind
        self.detail = detail

    def at(self, place: str) -> BadRecord:
        """Returns the bad record at a place, such as "/data/a.tsv, record 3"."""
        return BadRecord(self.kind, f"{place} ({self.detail})" if self.detail else place)


class BadRecords:
    """Counter of bad records by kind; thread-safe.

    Attributes:
      counts: number of bad records of each kind.
      first: place of the first bad record of each kind.
    """

    def __init__(self, action: BadRecordAction):
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}
        self._action = action
        self._lock = threading.Lock()

    def add(self, kind: str, place: str) -> None:
        """Counts a bad record; raises `UserError` instead if the action is "error"."""
        if self._action == "error":
            remedy = (
                "add it, or set data.on_bad_record=skip to read the other files"
                if kind == MISSING
                else "repair or remove it, or set data.on_bad_record=skip to leave such records out"
            )
            raise UserError(f"{place} is {kind}; {remedy}.")
        self.merge({kind: 1}, {kind: place})

    def merge(self, counts: dict[str, int], first: dict[str, str]) -> None:
        """Adds the counts of another counter; places that are known here stay the first."""
        with self._lock:
            for kind, count in counts.items():
                self.counts[kind] = self.counts.get(kind, 0) + count
                self.first.setdefault(kind, first[kind])

    def summary(self) -> str | None:
        """Returns a sentence with every kind, the most frequent first; None if nothing is bad."""
        with self._lock:
            counts, first = dict(self.counts), dict(self.first)
        parts = []
        num_files = counts.pop(MISSING, 0)
        if counts:
            kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))
            listed = ", ".join(f"{counts[k]} {k} (first: {first[k]})" for k in kinds)
            parts.append(f"{_count(sum(counts.values()), 'record', 'was')} left out: {listed}")
        if num_files:
            is_missing = f"{_count(num_files, 'file', 'is')} {MISSING}"
            parts.append(f"{is_missing} (first: {first[MISSING]})")
        return f"{'; '.join(parts)}." if parts else None


def _count(number: int, noun: str, verb: str) -> str:
    """Returns "1 record was", "2 records were" or, for files, "1 file is", "2 files are"."""
    plural = {"was": "were", "is": "are"}[verb]
    return f"1 {noun} {verb}" if number == 1 else f"{number} {noun}s {plural}"


class ReportedBadRecords(BadRecords):
    """Bad records of a stream, with their summary on stderr.

    `print_once` prints the summary. It is printed again at the end of the process if further bad
    records were added. A place counts once, though every epoch reads it.
    """

    def __init__(self, action: BadRecordAction):
        super().__init__(action)
        self._printed: str | None = None
        self._places: set[BadRecord] = set()
        atexit.register(self._print_if_changed)

    def add(self, kind: str, place: str) -> None:
        bad_record = BadRecord(kind, place)
        if bad_record not in self._places:
            self._places.add(bad_record)
            super().add(kind, place)

    def print_once(self) -> None:
        """Prints the summary if there are bad records and none has been printed."""
        if self._printed is None:
            self._print_if_changed()

    def _print_if_changed(self) -> None:
        summary = self.summary()
        if summary != self._printed:
            self._printed = summary
            print(summary, file=sys.stderr, flush=True)
