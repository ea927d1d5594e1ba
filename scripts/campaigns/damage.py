"""Damage: every file of checkpoints, token stores and folders of models, damaged in five ways.

A verb that reads a damaged file must give the result that it gives without the damage, or say what
is wrong. Another result is a fault, except where the format has no checksum of ours to find it by.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.campaigns.outcomes import Kind, Outcome, failure_in
from scripts.campaigns.processes import Ended, run
from scripts.campaigns.results import first_difference, same_text
from scripts.campaigns.world import COMMANDS, Command

_TIMEOUT = 120.0


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: len(content) // 2]


def _empty(content: bytes, rng: random.Random) -> bytes:
    return b""


def _flip(content: bytes, rng: random.Random) -> bytes:
    """Flips a bit in each of 16 neighbouring bytes in the middle half."""
    changed = bytearray(content)
    start = len(changed) // 4 + rng.randrange(max(1, len(changed) // 2))
    for position in range(start, min(start + 16, len(changed))):
        changed[position] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _replace(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(max(1, len(content)))


# None: the file is removed.
DAMAGES: dict[str, Callable[[bytes, random.Random], bytes] | None] = {
    "truncated": _truncate,
    "emptied": _empty,
    "removed": None,
    "flipped": _flip,
    "replaced": _replace,
}


@dataclass(frozen=True)
class Target:
    """A folder of the world whose files are damaged.

    Attributes:
      folder: path in the world.
      always: commands that read every damaged file.
      one_of: commands of which each damaged file is read by the next.
      files: which files, as a pattern.
      at_most: number of files.
      without_checksums: files in the folder, as patterns, whose changes cannot be detected.
    """

    folder: str
    always: tuple[str, ...]
    one_of: tuple[str, ...] = ()
    files: str = "**/*"
    at_most: int = 100
    without_checksums: tuple[str, ...] = ()


def _reader(verb: str, *arguments: str, results: str = "", prints: bool = False) -> Command:
    return Command(verb, arguments, tuple(results.split()), prints)


_RUN = ("--workdir", "stopped")
READERS = {
    "train": _reader("train", "train", "--config", "tiny.py", *_RUN, results="stopped"),
    "eval": _reader("eval", "eval", *_RUN, "--json", prints=True),
    "generate": _reader(
        "generate", "generate", *_RUN, "--text", "import ___ as np", "--max_length=8", prints=True
    ),
    "convert to-hf": _reader("convert to-hf", "convert", "to-hf", "stopped", "new", results="new"),
    "export": _reader("export", "export", *_RUN, "--output", "new", results="new"),
    "experts": _reader("experts", "experts", *_RUN, "--output", "new", results="new"),
    "inspect": _reader("inspect", "inspect", *_RUN, "--json", prints=True),
    "plot": _reader("plot", "plot", *_RUN, "--output", "new", results="new"),
    "fine-tune": _reader(
        "fine-tune", *COMMANDS["fine-tune"].arguments, "--config.init_from=stopped", results="new"
    ),
    "distil": _reader(
        "distil", *COMMANDS["distil"].arguments, "--config.distill.teacher=stopped", results="new"
    ),
    "from a store: train": COMMANDS["train"],
    "from a store: data peek": COMMANDS["data peek"],
    "from a store: eval": _reader("eval", "eval", "--workdir", "run", "--json", prints=True),
    "from a folder: convert from-hf": COMMANDS["convert from-hf"],
    "from a folder: fine-tune": _reader(
        "fine-tune", *COMMANDS["fine-tune"].arguments, "--config.init_from=hf", results="new"
    ),
    "convert from-t5x": COMMANDS["convert from-t5x"],
    "sweep": COMMANDS["sweep"],
}
TARGETS = {
    "checkpoint": Target(
        "stopped/checkpoints/6",
        ("train", "convert to-hf"),
        ("eval", "generate", "export", "experts", "fine-tune", "distil"),
    ),
    "store": Target(
        "store", ("from a store: data peek",), ("from a store: train", "from a store: eval")
    ),
    "workdir": Target(
        "stopped",
        ("train", "plot", "inspect", "eval", "generate", "convert to-hf", "export"),
        ("experts", "fine-tune", "distil"),
        files="*",
        # A changed value of the right type is a value, and lost lines cannot be restored.
        without_checksums=("config.json", "metrics.jsonl"),
    ),
    # Neither program writes checksums of its arrays.
    "hf": Target(
        "hf",
        ("from a folder: convert from-hf", "from a folder: fine-tune"),
        without_checksums=("*",),
    ),
    "t5x": Target("t5x", ("convert from-t5x",), at_most=16, without_checksums=("*",)),
}


@dataclass(frozen=True)
class Damage:
    """A case: a file, how it is damaged, and the command that reads it."""

    target: str
    file: int  # in the order of `_files`
    how: str
    reader: str

    @property
    def name(self) -> str:
        return f"damage/{self.target}/{self.file}/{self.how}/{self.reader}"

    @property
    def verb(self) -> str:
        return READERS[self.reader].verb

    @property
    def reference(self) -> str:
        return self.reader

    def run_undisturbed(self, folder: Path) -> Ended:
        reader = READERS[self.reader]
        return run(reader.arguments, folder, results=reader.results)

    def check(self, folder: Path, undisturbed: Ended) -> Outcome:
        target, reader = TARGETS[self.target], READERS[self.reader]
        path = _files(folder, target)[self.file]
        inside = path.relative_to(folder / target.folder)
        self._damage(path)
        ended = run(reader.arguments, folder, timeout=_TIMEOUT, results=reader.results)

        def outcome(kind: Kind, detail: str = "") -> Outcome:
            where = f"{target.folder}/{inside} {self.how}; {detail}"
            return Outcome(self.name, self.verb, kind, where, reader.arguments)

        if ended.code != 0:
            return outcome(*failure_in(folder, ended))
        difference = first_difference(ended.results, undisturbed.results)
        if reader.prints and not same_text(ended.out, undisturbed.out):
            difference = "its output"
        if difference is None:
            return outcome("right")
        if any(inside.match(pattern) for pattern in target.without_checksums):
            return outcome("undetectable", difference)
        return outcome("silent", f"another result: {difference}; stderr: {ended.err[-200:]!r}")

    def _damage(self, path: Path) -> None:
        change = DAMAGES[self.how]
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes(), random.Random(self.name)))


def cases(world: Path, seed: int) -> Iterator[Damage]:
    """Yields the cases of a world."""
    for name, target in TARGETS.items():
        for file in range(len(_files(world, target))):
            for i, how in enumerate(DAMAGES):
                readers = list(target.always)
                if target.one_of:
                    readers.append(target.one_of[(file * len(DAMAGES) + i) % len(target.one_of)])
                for reader in readers:
                    yield Damage(name, file, how, reader)


def _files(world: Path, target: Target) -> list[Path]:
    """Returns the files of a target; those whose names are random are in the order of sizes."""
    files = [path for path in (world / target.folder).glob(target.files) if path.is_file()]
    files.sort(key=lambda path: (path.parent, path.stat().st_size, path.name))
    return files[:: -(-len(files) // target.at_most)]
