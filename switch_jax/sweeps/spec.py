"""What a sweep is: runs on the same data, and the tables and figures that compare them.

`configs/sweeps/*.py` define `get_sweep(arg="")`, which returns a `Sweep`; `load()` runs such a
file. Runs are named, tables and figures refer to them by name, and every run is trained once for
each seed, which sets `train.seed` and `data.seed`: runs of a seed see the same rows in the same
order.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from switch_jax.checkpoint import QUALITY
from switch_jax.config import Config, call_config_function, flatten_config, load_config
from switch_jax.errors import UserError

_REFERENCE = re.compile(r"\{run:([^{}]*)\}")


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A config to train.

    `{run:NAME}` in the text of an override stands for what run NAME with the same seed comes to,
    which is trained first: `{"init_from": "{run:teacher}"}`. That is its best checkpoint where it
    has `train.keep_best`, as its own quality is of that one, and its last one elsewhere.
    """

    config: str  # as `--config` takes it: path/to/file.py or path/to/file.py:name=value,…
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # by dotted key

    def but(self, overrides: Mapping[str, Any]) -> "SweepRun":
        """This run with other values for some keys."""
        return SweepRun(self.config, {**self.overrides, **overrides})

    @property
    def teacher(self) -> str | None:
        """Name of the run that it is distilled from."""
        named = _REFERENCE.match(str(self.overrides.get("distill.teacher", "")))
        return named and named[1]

    def needs(self) -> set[str]:
        """Names of the runs whose checkpoints it reads."""
        return {name for v in self.overrides.values() for name in _REFERENCE.findall(str(v))}

    def texts(self, models: Mapping[str, str] | None = None) -> dict[str, str]:
        """Overrides as on the command line; references as they are, or as paths, by name."""

        def filled(text: str) -> str:
            return _REFERENCE.sub(lambda m: m[0] if models is None else models[m[1]], text)

        return {key: filled(str(value)) for key, value in self.overrides.items()}


@dataclasses.dataclass(frozen=True)
class Table:
    """Runs side by side; the first row is the one that the others are compared with."""

    title: str
    claim: str  # what the paper finds
    rows: Mapping[str, str]  # what a row is called → name of its run
    paper: Mapping[str, str] = dataclasses.field(default_factory=dict)  # row → as printed there
    metric: str = QUALITY  # of evaluations; more is better
    # Row → run of its teacher: adds how much of the teacher's gain over the first row it has, and
    # how many fewer parameters.
    teachers: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Curves:
    """Quality of runs in the course of training, and speed-ups over the first of them."""

    title: str
    claim: str
    runs: Mapping[str, str]  # what a curve is called → name of its run
    x: Literal["steps", "seconds"] = "steps"


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Final loss against size on logarithmic axes, with the power law that fits best."""

    title: str
    claim: str
    runs: Mapping[str, str]
    x: Literal["params", "experts"] = "params"
    published: str | None = None  # name in `paper.SERIES` of points to draw beside ours


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Score of fine-tuned runs against the quality of what they started from."""

    title: str
    claim: str
    # What a line is called → its points: upstream run, fine-tuned run.
    pairs: Mapping[str, tuple[tuple[str, str], ...]]
    metric: str


@dataclasses.dataclass(frozen=True)
class Sources:
    """Final quality and speed-up by source of the mixture, as for the paper's 101 languages."""

    title: str
    claim: str
    baseline: str
    run: str


Figure = Curves | Scaling | Transfer | Sources


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs, and what compares them; tables and figures are files of these names."""

    title: str
    runs: Mapping[str, SweepRun]
    seeds: tuple[int, ...] = (0,)
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)

    def but(self, overrides: Mapping[str, Any]) -> "Sweep":
        """This sweep with other values for some keys of all runs."""
        return dataclasses.replace(
            self, runs={name: run.but(overrides) for name, run in self.runs.items()}
        )

    def configs(self) -> dict[str, Config]:
        """The config of every run by name, with references as they are and no seed set.

        Raises `UserError` for a config that cannot be, and names the run.
        """
        found = {}
        for name, run in self.runs.items():
            try:
                found[name] = load_config(run.config, run.texts())
            except UserError as error:
                raise UserError(f"Run {name!r} of the sweep: {error}") from error
        return found

    def check(self, configs: Mapping[str, Config]) -> None:
        """Raises `UserError` where runs that are compared have other data or steps.

        A table's teachers may have trained for longer, for what is asked is how much a student has
        of theirs.
        """
        teachers = {name for table in self.tables.values() for name in table.teachers.values()}
        compared = {f"table {place!r}": list(t.rows.values()) for place, t in self.tables.items()}
        for place, figure in self.figures.items():
            if not isinstance(figure, Transfer):
                compared[f"figure {place!r}"] = shown_metric(figure)
        for place, names in compared.items():
            first, *others = ((name, _same(configs[name])) for name in names)
            for name, values in others:
                for key, value in values.items():
                    longer = key == "train.steps" and name in teachers
                    if value != first[1][key] and not longer:
                        raise UserError(
                            f"In {place} of the sweep, {key} is {value!r} in run {name!r} and"
                            f" {first[1][key]!r} in {first[0]!r}; compare runs of the same data"
                            " and steps."
                        )


def load_sweep(spec: str) -> Sweep:
    """Runs a sweep file.

    Args:
      spec: `path/to/file.py` or `path/to/file.py:name=value,…`.

    Raises `UserError` for a missing file, and for a sweep that contradicts itself.
    """
    sweep = call_config_function(spec, "get_sweep", "Sweep", "sweeps")
    if not isinstance(sweep, Sweep):
        path = spec.partition(":")[0]
        raise UserError(f"get_sweep in {path!r} must return a switch_jax.sweep.Sweep.")
    _check(sweep)
    return sweep


def shown_metric(figure: Figure) -> list[str]:
    """Names of the runs that a figure compares."""
    if isinstance(figure, Sources):
        return [figure.baseline, figure.run]
    if isinstance(figure, Transfer):
        return [name for pairs in figure.pairs.values() for pair in pairs for name in pair]
    return list(figure.runs.values())


def _check(sweep: Sweep) -> None:
    """Raises `UserError` where names do not fit, or what is compared differs in its data."""
    for name, run in sweep.runs.items():
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(f"Run {name!r} of the sweep must be letters, digits and . _ + -.")
        _known(sweep, run.needs(), f"run {name!r}")
    _check_order(sweep)
    for place, table in sweep.tables.items():
        _known(sweep, [*table.rows.values(), *table.teachers.values()], f"table {place!r}")
        _known_rows(place, table)
    for place, figure in sweep.figures.items():
        _known(sweep, shown_metric(figure), f"figure {place!r}")


def _same(config: Config) -> dict[str, Any]:
    """What must be the same in runs that are compared, by dotted key."""
    values = flatten_config(config)
    # The vocabulary may be that of the run it starts from, which is the same by its content.
    return {
        key: value
        for key, value in values.items()
        if key == "train.steps" or (key.startswith("data.") and key != "data.vocabulary")
    }


def _known(sweep: Sweep, names: Iterable[str], where: str) -> None:
    for name in names:
        if name not in sweep.runs:
            raise UserError(
                f"In {where} of the sweep, there is no run {name!r}; use {', '.join(sweep.runs)}."
            )


def _known_rows(place: str, table: Table) -> None:
    for row in (*table.paper, *table.teachers):
        if row not in table.rows:
            raise UserError(f"Table {place!r} of the sweep has no row {row!r}; add it to its rows.")


def _check_order(sweep: Sweep) -> None:
    """Raises `UserError` where runs need each other in a circle."""
    done: set[str] = set()
    while len(done) < len(sweep.runs):
        ready = {n for n, run in sweep.runs.items() if n not in done and run.needs() <= done}
        if not ready:
            circle = ", ".join(n for n in sweep.runs if n not in done)
            raise UserError(f"Runs of the sweep need each other first: {circle}.")
        done |= ready
