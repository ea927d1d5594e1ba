"""Outcomes of cases: what counts as right, as told, and as a fault; tables and lists of them."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from scripts.campaigns.processes import Ended

# right: the result of an undisturbed run. told: exit code 2 or 3 and one sentence.
# undetectable: another result, from a file of a format without checksums.
Kind = Literal[
    "right", "told", "undetectable", "traceback", "hang", "silent", "unclear", "left over"
]
FAULTS: tuple[Kind, ...] = ("traceback", "hang", "silent", "unclear", "left over")
_PREFIX = "switch-jax"
_TRACEBACK = "Traceback (most recent call last)"
PARTIAL_NAMES = (".partial", "orbax-checkpoint-tmp", ".tmp")


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    case: str
    verb: str
    kind: Kind
    detail: str = ""
    command: tuple[str, ...] = ()

    @property
    def fault(self) -> bool:
        """Whether the product is at fault."""
        return self.kind in FAULTS


class Case(Protocol):
    """A case of a campaign, in a copy of the world."""

    @property
    def name(self) -> str:
        """Identifies the case."""

    @property
    def verb(self) -> str:
        """The row of the table in which it is counted."""

    @property
    def reference(self) -> str:
        """Identifies the undisturbed run that it is compared with; "": none."""

    def run_undisturbed(self, folder: Path) -> Ended:
        """Runs the same command undisturbed, in a copy of the world."""

    def check(self, folder: Path, undisturbed: Ended | None) -> Outcome:
        """Runs the case in a copy of the world."""


def failure(ended: Ended) -> tuple[Kind, str]:
    """Classifies a process that did not succeed: told, or a fault; with its last words."""
    lines = [line for line in ended.err.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if ended.code is None:
        return "hang", f"no end after {ended.seconds:.0f} s; {last}"
    if _TRACEBACK in ended.err or _TRACEBACK in ended.out:
        return "traceback", last
    if ended.code not in (2, 3) or not _is_sentence(last, lines):
        return "unclear", f"exit code {ended.code}; {ended.err[-300:]!r}"
    return "told", last


def failure_in(folder: Path, ended: Ended) -> tuple[Kind, str]:
    """Returns the same as `failure`; a refusal that leaves partial files is a fault, too."""
    kind, detail = failure(ended)
    if kind == "told" and (partial := partial_files(folder)):
        return "left over", f"partial files: {', '.join(partial[:3])}"
    return kind, detail


def _is_sentence(last: str, lines: Sequence[str]) -> bool:
    """Whether the command line reports one error, and that last; argparse prints usage before."""
    reports = [line for line in lines if line.startswith(_PREFIX) and ": " in line]
    return len(reports) == 1 and reports[0] == last


def partial_files(folder: Path) -> list[str]:
    """Returns the paths in a folder that only a verb at work may have."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if any(part in path.name for part in PARTIAL_NAMES)
    )


def table(outcomes: Iterable[Outcome]) -> str:
    """Returns counts by verb and kind, as a table of Markdown."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        for row in (outcome.verb, "all"):
            counts.setdefault(row, Counter())[_column(outcome)] += 1
    rows = [*(verb for verb in sorted(counts) if verb != "all"), *(("all",) if counts else ())]
    shown = [name for name in _COLUMNS if name == "faults" or (counts and counts["all"][name])]
    header = ["verb", "cases", *shown]
    lines = [[verb, sum(counts[verb].values()), *(counts[verb][c] for c in shown)] for verb in rows]
    return "\n".join(
        "| " + " | ".join(map(str, line)) + " |"
        for line in (header, ["---", *["---:"] * (len(header) - 1)], *lines)
    )


_COLUMNS = ("right", "told", "undetectable", "faults")


def _column(outcome: Outcome) -> str:
    return "faults" if outcome.fault else outcome.kind


def write_faults(outcomes: Iterable[Outcome], path: Path) -> None:
    """Writes the faults as JSON lines."""
    lines = (
        json.dumps(
            {
                "case": o.case,
                "verb": o.verb,
                "kind": o.kind,
                "detail": o.detail,
                "command": shlex.join(("switch-jax", *o.command)),
            }
        )
        for o in outcomes
        if o.fault
    )
    path.write_text("".join(line + "\n" for line in lines))
