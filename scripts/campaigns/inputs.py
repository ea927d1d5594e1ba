"""Bad inputs: wrong values, files, paths, flags and environments, over all verbs.

Each must be refused in a sentence, or be without effect, or work as it stands; a traceback, a hang,
and a wrong input that is accepted are faults.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from scripts.campaigns import input_values
from scripts.campaigns.mutations import WRONG_FILES, wrong_values
from scripts.campaigns.outcomes import Kind, Outcome, failure_in
from scripts.campaigns.processes import Ended, run
from scripts.campaigns.results import first_difference, same_text
from scripts.campaigns.world import COMMANDS, Command

# told: must be refused. same: refused, or the result of the command without the bad input.
# any: refused or accepted, but neither a traceback nor a hang.
Expected = Literal["told", "same", "any"]
_TIMEOUT = 60.0
_SAMPLE = 70  # mutations of each JSON file


@dataclass(frozen=True)
class BadInput:
    """A case: a command with bad arguments, files or environment."""

    category: str
    label: str
    command: Command
    expected: Expected
    change: Callable[[Path], object] = field(default=lambda folder: None, repr=False)
    environment: Mapping[str, str] = field(default_factory=dict)
    renamed: str = "new"  # path in place of `new`

    @property
    def name(self) -> str:
        return f"inputs/{self.category}/{self.command.verb}/{self.label}"

    @property
    def verb(self) -> str:
        return self.command.verb

    @property
    def reference(self) -> str:
        return self.verb if self.expected == "same" else ""

    def run_undisturbed(self, folder: Path) -> Ended:
        command = COMMANDS[self.verb]
        return run(command.arguments, folder, results=command.results)

    def check(self, folder: Path, undisturbed: Ended | None) -> Outcome:
        self.change(folder)
        written = [self.renamed] if self.command.results else []
        ended = run(
            self.command.arguments,
            folder,
            timeout=_TIMEOUT,
            results=written if undisturbed else None,
            environment=self.environment,
        )

        def outcome(kind: Kind, detail: str = "") -> Outcome:
            arguments = tuple(map(str, self.command.arguments))
            return Outcome(self.name, self.verb, kind, detail, arguments)

        if ended.code != 0:
            return outcome(*failure_in(folder, ended))
        if self.expected == "told":
            return outcome("silent", f"accepted; it printed {ended.out[-200:]!r}")
        if undisturbed:
            length = len(str(Path(self.renamed)))
            results = {
                "new" + name[length:]: digest for name, digest in (ended.results or {}).items()
            }
            if difference := first_difference(results, undisturbed.results):
                return outcome("silent", f"another result: {difference}")
            if self.command.prints and not same_text(ended.out, undisturbed.out):
                return outcome("silent", "another output")
        return outcome("right")


def cases(world: Path, seed: int) -> Iterator[BadInput]:
    """Yields the cases, the same for the same seed."""
    yield from _config_values()
    yield from _flags()
    yield from _duplicates()
    yield from _config_files()
    yield from _json_files(world, random.Random(seed))
    yield from _data()
    yield from _paths()
    yield from _environments()


def _with(verb: str, *more: str | bytes, replace: Mapping[str, str] | None = None) -> Command:
    """Returns a verb's command with more arguments, or with others in their place."""
    command = COMMANDS[verb]
    arguments = tuple((replace or {}).get(argument, argument) for argument in command.arguments)
    return Command(verb, (*arguments, *more), command.results, command.prints)


def _config_values() -> Iterator[BadInput]:
    """Values of config keys: alternately in `inspect`, which only validates, and in `train`.

    Keys that name data, devices, parameters or metrics are only understood by `train`.
    """
    for i, (key, value) in enumerate(input_values.config_values()):
        verb = ("inspect", "train")[i % 2 or key.startswith(input_values.NEED_TRAINING)]
        command = Command(verb, (*_config_arguments(verb), f"--config.{key}={value}"))
        yield BadInput("config value", f"{key}={value[:40]}", command, "told")
    for key, value in input_values.ODD_CONFIG_VALUES:
        for verb in ("inspect", "train"):
            command = Command(verb, (*_config_arguments(verb), f"--config.{key}={value}"))
            yield BadInput("odd config value", f"{key}={value[:40]}", command, "any")
    for spec in input_values.CONFIG_SPECS:
        for verb in ("inspect", "train", "data pack", "bench"):
            command = _with(verb, replace={"tiny.py": spec, "text.py": spec})
            if verb == "inspect":
                command = Command(verb, ("inspect", "--config", spec))
            yield BadInput("config argument", spec[:40], command, "told")


def _config_arguments(verb: str) -> tuple[str, ...]:
    return (verb, "--config", "tiny.py", *(("--workdir", "new") if verb == "train" else ()))


def _flags() -> Iterator[BadInput]:
    for verb, flag, values in input_values.FLAGS:
        for value in values:
            yield BadInput("flag", f"{flag}={value!r}", _with(verb, *_flag(flag, value)), "told")


def _flag(flag: str, value: str | bytes) -> tuple[str | bytes, ...]:
    return (f"{flag}={value}",) if isinstance(value, str) else (flag, value)


def _duplicates() -> Iterator[BadInput]:
    """An argument that is given twice, with two values: which one is meant?"""
    for verb, command in COMMANDS.items():
        for i, argument in enumerate(command.arguments):
            if argument.startswith("--") and i + 1 < len(command.arguments):
                twice = _with(verb, argument, command.arguments[i + 1] + "2")
                yield BadInput("given twice", argument, twice, "told")


def _config_files() -> Iterator[BadInput]:
    for label, content in input_values.CONFIG_FILES.items():
        for verb in ("train", "data pack", "inspect", "compile", "bench", "sweep"):
            command = _with(verb, replace={n: "bad.py" for n in ("tiny.py", "text.py", "sweep.py")})
            if verb == "inspect":
                command = Command(verb, ("inspect", "--config", "bad.py"))
            change = partial(_write, "bad.py", content)
            yield BadInput("config file", label, command, "told", change)
    for label, content in input_values.SWEEP_FILES.items():
        change = partial(_write, "sweep.py", content.encode())
        yield BadInput("sweep file", label, COMMANDS["sweep"], "told", change)


def _json_files(world: Path, rng: random.Random) -> Iterator[BadInput]:
    """JSON of strangers' making, of other types, depths and sizes."""
    for path, verbs in input_values.JSON_FILES.items():
        for i, (label, content) in enumerate(WRONG_FILES.items()):
            verb = verbs[i % len(verbs)]
            change = partial(_write, path, content)
            expected: Expected = "any" if path.endswith(".jsonl") else "same"
            yield BadInput(path, label, COMMANDS[verb], expected, change)
        text = (world / path).read_text()
        # Of JSON lines, the last one is changed.
        before, last = text.splitlines()[:-1], text.splitlines()[-1]
        if not path.endswith(".jsonl"):
            before, last = [], text
        kept = "".join(line + "\n" for line in before).encode()
        mutations = list(wrong_values(json.loads(last)))
        for i, (label, content, other_type) in enumerate(
            rng.sample(mutations, min(_SAMPLE, len(mutations)))
        ):
            verb = verbs[i % len(verbs)]
            change = partial(_write, path, kept + content + b"\n")
            # What a bad line of metrics has is left out.
            expected = "same" if other_type and not kept else "any"
            yield BadInput(path, label, COMMANDS[verb], expected, change)


def _data() -> Iterator[BadInput]:
    """Text and pairs that are empty, broken or not UTF-8."""
    for path, verbs in (
        ("text-train.jsonl", ("data pack", "data vocab")),
        ("pairs-train.jsonl", ("fine-tune",)),
        ("vocabulary.model", ("data pack", "fine-tune")),
        ("store/vocabulary.model", ("train", "data peek")),
    ):
        for label, content in input_values.BAD_DATA.items():
            for verb in verbs:
                change = partial(_write, path, content)
                yield BadInput(f"data {path}", label, COMMANDS[verb], "told", change)
    for label, content in input_values.BAD_TEXTS.items():
        command = Command("generate", ("generate", "--workdir", "run", "--input", "bad.txt"))
        change = partial(_write, "bad.txt", content)
        yield BadInput("text", label, command, "any", change)
        command = _with("experts", "--input", "bad.txt")
        yield BadInput("text", label, command, "any", change)


def _paths() -> Iterator[BadInput]:
    """Output paths with odd names must work; those that cannot be written are refused."""
    for verb in input_values.WRITING_VERBS:
        for odd in input_values.ODD_PATHS:
            command = _with(verb, replace={"new": odd})
            change = partial(_make_parent, odd)
            yield BadInput("odd path", odd[:40], command, "same", change, renamed=odd)
        for bad in input_values.BAD_PATHS:
            command = _with(verb, replace={"new": bad})
            change = partial(_write, "a_file", b"x")
            yield BadInput("bad path", bad[:40], command, "told", change)
    for verb in input_values.READING_VERBS:
        for odd in input_values.ODD_PATHS:
            command = _with(verb, replace={"run": odd, "hf": odd, "t5x": odd})
            moved = {"convert from-hf": "hf", "convert from-t5x": "t5x"}.get(verb, "run")
            # A figure has the name of its run.
            expected: Expected = "any" if verb == "plot" else "same"
            yield BadInput("odd source", odd[:40], command, expected, partial(_move, moved, odd))
        for bad in input_values.BAD_PATHS:
            command = _with(verb, replace={"run": bad, "hf": bad, "t5x": bad})
            change = partial(_write, "a_file", b"x")
            yield BadInput("bad source", bad[:40], command, "told", change)


def _environments() -> Iterator[BadInput]:
    for i, (name, value) in enumerate(input_values.ENVIRONMENT):
        verb = ("train", "eval", "data pack", "generate")[i % 4]
        label = f"{name}={value}"
        yield BadInput("environment", label, COMMANDS[verb], "same", environment={name: value})


def _write(path: str, content: bytes, folder: Path) -> None:
    (folder / path).write_bytes(content)


def _make_parent(path: str, folder: Path) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)


def _move(source: str, path: str, folder: Path) -> None:
    _make_parent(path, folder)
    shutil.move(folder / source, folder / path)
