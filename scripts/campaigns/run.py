"""Test campaign: kills, damaged files and bad inputs, over all verbs, on small models.

    python scripts/campaigns/run.py [kills] [damage] [inputs] [--jobs 2] [--write-docs]

Takes about half an hour on two CPU cores. Prints the counts of outcomes by verb, writes the faults
as JSON lines, keeps their folders, and exits with code 1 if there are any. `--only PATTERN` runs
the cases with such names again: `--only 'kills/train/3'`. docs/reliability.md says what is tested.
"""

import argparse
import contextlib
import fnmatch
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from scripts.campaigns import damage, inputs, kills
from scripts.campaigns.outcomes import Case, Outcome, table, write_faults
from scripts.campaigns.processes import Ended, set_environment
from scripts.campaigns.results import first_difference
from scripts.campaigns.world import make_world

PARTS: dict[str, Callable[[Path, int], Iterable[Case]]] = {
    "kills": kills.cases,
    "damage": damage.cases,
    "inputs": inputs.cases,
}
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
MARKS = ("<!-- counts of the last campaign, by its script -->", "<!-- end of the counts -->")


class Campaign:
    """Runs cases in copies of the world.

    Args:
      folder: where the world, the copies and the compiled programs are.
      console: for progress.
    """

    def __init__(self, folder: Path, console: Console):
        self._folder = folder
        self._console = console
        self._world = folder / "world"
        self._undisturbed: dict[str, Ended] = {}  # by reference of a case
        self._unusable: dict[str, str] = {}  # why, by reference

    def prepare(self) -> Path:
        """Makes the world, unless an earlier campaign has; returns its folder."""
        made = self._folder / "world_is_complete"
        set_environment(self._folder / "cache")
        if not made.exists():
            self._console.print("making the world …")
            shutil.rmtree(self._world, ignore_errors=True)
            make_world(self._world)
            made.touch()
        return self._world

    def run(self, cases: list[Case], jobs: int) -> list[Outcome]:
        """Runs cases, `jobs` at a time; returns their outcomes in the same order."""
        references = {case.reference: case for case in cases if case.reference}
        with Progress(console=self._console) as progress, ThreadPoolExecutor(jobs) as pool:
            bar = progress.add_task("undisturbed", total=len(references))
            for _ in pool.map(self._run_undisturbed, references.values()):
                progress.advance(bar)
            bar = progress.add_task("cases", total=len(cases))
            outcomes = []
            for outcome in pool.map(self._check, cases):
                outcomes.append(outcome)
                progress.advance(bar)
                if not self._console.is_terminal and len(outcomes) % 50 == 0:
                    self._console.print(f"{len(outcomes)} of {len(cases)} cases")
                if outcome.fault:
                    text = f"{outcome.kind}: {outcome.case}: {outcome.detail[:300]}"
                    progress.print(escape(text), soft_wrap=True)
        return outcomes

    def _run_undisturbed(self, case: Case) -> None:
        """Runs a command twice: the first time compiles, and both must have the same results."""
        ended = []
        for _ in range(2):
            with self._copy() as folder:
                ended.append(case.run_undisturbed(folder))
        first, second = ended
        self._undisturbed[case.reference] = second
        if second.code != 0:
            self._unusable[case.reference] = f"undisturbed, it ends with {second}"
        elif difference := first_difference(first.results, second.results):
            self._unusable[case.reference] = f"{difference} differs in two undisturbed runs"

    def _check(self, case: Case) -> Outcome:
        if unusable := self._unusable.get(case.reference):
            return Outcome(case.name, case.verb, "silent", unusable)
        with self._copy() as folder:
            outcome = case.check(folder, self._undisturbed.get(case.reference))
            if outcome.fault:
                kept = self._folder / "faults" / case.name.replace("/", "__")
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(folder, kept, symlinks=True)
            return outcome

    @contextlib.contextmanager
    def _copy(self) -> Iterator[Path]:
        """Yields a copy of the world, at the same path for all cases of a thread."""
        folder = self._folder / f"case-{threading.get_ident()}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._world, folder)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Runs the parts; returns 1 if there are faults."""
    args = _parse_arguments()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(folder, Console(stderr=True))
    world = campaign.prepare()
    outcomes: list[Outcome] = []
    sections = []
    for part in args.parts or PARTS:
        start = time.monotonic()
        cases = [
            case for case in PARTS[part](world, args.seed) if fnmatch.fnmatch(case.name, args.only)
        ]
        if args.sample:
            cases = random.Random(args.seed).sample(cases, min(args.sample, len(cases)))
        done = campaign.run(cases, args.jobs)
        minutes = (time.monotonic() - start) / 60
        outcomes += done
        sections.append(f"{part.capitalize()}, {minutes:.0f} minutes:\n\n{table(done)}")
        print(f"\n{sections[-1]}", flush=True)
        write_faults(outcomes, folder / "faults.jsonl")
    if args.write_docs:
        write_counts(PAGE, "\n\n".join(sections))
    faults = sum(outcome.fault for outcome in outcomes)
    print(f"\n{faults} faults in {len(outcomes)} cases; {folder / 'faults.jsonl'} lists them.")
    return 1 if faults else 0


def write_counts(page: Path, counts: str) -> None:
    """Replaces the text between the marks of a page."""
    before, _, rest = page.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    page.write_text(f"{before}{MARKS[0]}\n{counts}\n{MARKS[1]}{after}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all")
    parser.add_argument("--folder", type=Path, default=Path("runs/campaign"), help="working folder")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (2)")
    parser.add_argument("--seed", type=int, default=0, help="of moments, signals and damages (0)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases by name")
    parser.add_argument("--sample", type=int, metavar="N", help="N random cases of each part")
    parser.add_argument("--write-docs", action="store_true", help=f"write counts to {PAGE.name}")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"unknown parts: {', '.join(unknown)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
