"""Sweep specification: runs on the same data, and the tables and figures that compare them.

`configs/sweeps/*.py` define `get_sweep(arg="")`, which returns a `Sweep`; `load_sweep` calls it.
Runs have names, and tables and figures refer to runs by name. Every run is trained once for each
seed, which sets `train.seed` and `data.seed`: runs with the same seed see the same rows in the same
order.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from switch_jax.checkpoint import QUALITY, find_pretrained
from switch_jax.config import (
    Config,
    call_config_function,
    check_value,
    flatten_config,
    load_config,
    split_config_spec,
)
from switch_jax.errors import UserError

_RUN_REFERENCE = re.compile(r"\{run:([^{}]*)\}")


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A config to train.

    `{run:NAME}` in the text of an override refers to run NAME with the same seed, which is trained
    first: `{"init_from": "{run:teacher}"}`. The reference becomes the path of that run's best
    checkpoint if it sets `train.keep_best` (its quality is that checkpoint's), else the path of its
    WORKDIR, which stands for its newest checkpoint.
    """

    config: str  # as for `--config`: path/to/file.py or path/to/file.py:name=value,…
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # by dotted key

    def but(self, overrides: Mapping[str, Any]) -> "SweepRun":
        """Returns this run with other values for some keys."""
        return SweepRun(self.config, {**self.overrides, **overrides})

    @property
    def teacher(self) -> str | None:
        """Name of the run that this run is distilled from."""
        reference = _RUN_REFERENCE.match(str(self.overrides.get("distill.teacher", "")))
        return reference and reference[1]

    def required_runs(self) -> set[str]:
        """Returns the names of the runs whose checkpoints this run reads."""
        return {name for v in self.overrides.values() for name in _RUN_REFERENCE.findall(str(v))}

    def override_texts(self, paths: Mapping[str, str] | None = None) -> dict[str, str]:
        """Returns the overrides as on the command line, by dotted key.

        Args:
          paths: by name of a run, the path that replaces a reference to it; None: references stay.
        """

        def resolve(text: str) -> str:
            return _RUN_REFERENCE.sub(lambda m: m[0] if paths is None else paths[m[1]], text)

        return {key: resolve(str(value)) for key, value in self.overrides.items()}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of runs; its other rows are compared with its first row."""

    title: str
    claim: str  # what the paper finds
    rows: Mapping[str, str]  # label of a row → name of its run
    paper: Mapping[str, str] = dataclasses.field(default_factory=dict)  # label → the paper's result
    metric: str = QUALITY  # of evaluations; more is better
    # Label of a row → run of its teacher. Adds two columns: the share of the teacher's gain over
    # the first row that this row has, and the share of the teacher's parameters that it saves.
    teachers: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Curves:
    """A figure of quality in the course of training, with speed-ups over the first run."""

    title: str
    claim: str
    runs: Mapping[str, str]  # label of a curve → name of its run
    x: Literal["steps", "seconds"] = "steps"


class PaperPoint(NamedTuple):
    """A model of the paper: its size and its printed quality."""

    name: str
    experts: int  # 1: dense
    params: float
    quality: float  # negative log perplexity, nats per target token

    @property
    def loss(self) -> float:
        """Cross-entropy, nats per target token."""
        return -self.quality


class PaperSeries(NamedTuple):
    """Points of one series of the paper, and where the paper prints them."""

    source: str
    points: tuple[PaperPoint, ...]


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A figure of final loss against size on logarithmic axes, with the best power law."""

    title: str
    claim: str
    runs: Mapping[str, str]  # label of a point → name of its run
    x: Literal["params", "experts"] = "params"
    published: PaperSeries | None = None  # to draw beside ours


@dataclasses.dataclass(frozen=True)
class Advantage:
    """A figure of the gain over the first run against the tokens an expert has been trained on."""

    title: str
    claim: str
    runs: Mapping[str, str]  # label of a curve → name of its run; the first is the baseline


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A figure of fine-tuned runs: their scores against the quality of their upstream runs."""

    title: str
    claim: str
    # Label of a line → its points: upstream run, fine-tuned run.
    pairs: Mapping[str, tuple[tuple[str, str], ...]]
    metric: str


@dataclasses.dataclass(frozen=True)
class Sources:
    """A figure of two runs: final quality and speed-up by source of the mixture.

    As in the paper for 101 languages.
    """

    title: str
    claim: str
    baseline: str
    run: str


Figure = Curves | Scaling | Advantage | Transfer | Sources


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs, and the tables and figures that compare them.

    The name of a table or figure is also the name of its image files.
    """

    title: str
    runs: Mapping[str, SweepRun]
    seeds: tuple[int, ...] = (0,)
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)

    def but(self, overrides: Mapping[str, Any]) -> "Sweep":
        """Returns this sweep with other values for some keys of all runs."""
        return dataclasses.replace(
            self, runs={name: run.but(overrides) for name, run in self.runs.items()}
        )

    def load_configs(self) -> dict[str, Config]:
        """Returns the config of every run by name, with unresolved references and without a seed.

        Raises `UserError`, which names the run, for a config that is invalid.
        """
        return {name: self.load_run(name) for name in self.runs}

    def load_run(self, name: str, overrides: Mapping[str, str] | None = None) -> Config:
        """Returns the config of a run as `train` resolves it, apart from references.

        Args:
          name: of the run.
          overrides: further overrides, text by dotted key.

        Raises `UserError`, which names the run, for a config that is invalid.
        """

        def find_model(path: str) -> Config:
            reference = _RUN_REFERENCE.search(path)
            return (
                find_pretrained(path).config if reference is None else self.load_run(reference[1])
            )

        run, further = self.runs[name], dict(overrides or {})
        try:
            return load_config(run.config, run.override_texts() | further, find_model)
        except UserError as error:
            raise UserError(f"Run {name!r} of the sweep: {error}") from error

    def check_comparable(self, configs: Mapping[str, Config]) -> None:
        """Raises `UserError` if runs of one table or figure differ in their data or steps.

        A table's teachers may have other numbers of steps: the table compares the student with the
        teacher as it is.
        """
        teachers = {name for table in self.tables.values() for name in table.teachers.values()}
        compared = {f"table {name!r}": list(t.rows.values()) for name, t in self.tables.items()}
        for figure_name, figure in self.figures.items():
            if not isinstance(figure, Transfer):
                compared[f"figure {figure_name!r}"] = figure_runs(figure)
        for where, names in compared.items():
            first, *rest = ((name, _comparable_settings(configs[name])) for name in names)
            for name, values in rest:
                for key, value in values.items():
                    may_differ = key == "train.steps" and name in teachers
                    if value != first[1][key] and not may_differ:
                        raise UserError(
                            f"In {where} of the sweep, {key} is {value!r} in run {name!r} and"
                            f" {first[1][key]!r} in {first[0]!r}; compare runs of the same data"
                            " and steps."
                        )


def load_sweep(spec: str) -> Sweep:
    """Returns the sweep of a config file.

    Args:
      spec: `path/to/file.py` or `path/to/file.py:name=value,…`.

    Raises `UserError` for a missing file, and for a sweep that contradicts itself.
    """
    sweep = call_config_function(spec, "get_sweep", "Sweep", "sweeps")
    path, _ = split_config_spec(spec)
    if not isinstance(sweep, Sweep):
        raise UserError(
            f"get_sweep in {path!r} must return a switch_jax.sweeps.Sweep, not a"
            f" {type(sweep).__name__}."
        )
    sweep = check_value("sweep", sweep, Sweep, path)
    _check_names(sweep)
    return sweep


def figure_runs(figure: Figure) -> list[str]:
    """Returns the names of the runs in a figure."""
    if isinstance(figure, Sources):
        return [figure.baseline, figure.run]
    if isinstance(figure, Transfer):
        return [name for pairs in figure.pairs.values() for pair in pairs for name in pair]
    return list(figure.runs.values())


def _comparable_settings(config: Config) -> dict[str, Any]:
    """Returns the values that must be equal in runs that are compared, by dotted key."""
    # data.vocabulary may be the path of the upstream run's vocabulary, whose content is the same.
    return {
        key: value
        for key, value in flatten_config(config).items()
        if key == "train.steps" or (key.startswith("data.") and key != "data.vocabulary")
    }


def _check_names(sweep: Sweep) -> None:
    """Raises `UserError` for invalid or unknown names, and for circular references."""
    kinds = {"Run": sweep.runs, "Table": sweep.tables, "Figure": sweep.figures}
    for kind, name in ((kind, name) for kind, names in kinds.items() for name in names):
        if not re.fullmatch(r"[\w+-][\w.+-]{,99}", name):  # they are names of files
            raise UserError(
                f"{kind} {name!r} of the sweep must be letters, digits and . _ + -, at most 100 of"
                " them and no . first."
            )
    if not sweep.runs or not sweep.seeds:
        raise UserError("The sweep has no runs or no seeds; give it one of each.")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise UserError(f"Seeds of the sweep are there twice ({sweep.seeds}); name each once.")
    for name, run in sweep.runs.items():
        _check_runs_exist(sweep, run.required_runs(), f"run {name!r}")
    _check_no_circle(sweep)
    for name, table in sweep.tables.items():
        runs = [*table.rows.values(), *table.teachers.values()]
        _check_runs_exist(sweep, runs, f"table {name!r}")
        if not table.rows:
            raise UserError(f"Table {name!r} of the sweep has no rows; name a run.")
        _check_rows_exist(name, table)
    for name, figure in sweep.figures.items():
        runs = figure_runs(figure)
        _check_runs_exist(sweep, runs, f"figure {name!r}")
        if not runs:
            raise UserError(f"Figure {name!r} of the sweep has no runs; name one.")


def _check_runs_exist(sweep: Sweep, names: Iterable[str], where: str) -> None:
    for name in names:
        if name not in sweep.runs:
            raise UserError(
                f"In {where} of the sweep, there is no run {name!r}; use {', '.join(sweep.runs)}."
            )


def _check_rows_exist(name: str, table: Table) -> None:
    for row in (*table.paper, *table.teachers):
        if row not in table.rows:
            raise UserError(f"Table {name!r} of the sweep has no row {row!r}; add it to its rows.")


def _check_no_circle(sweep: Sweep) -> None:
    """Raises `UserError` if runs require each other in a circle."""
    done: set[str] = set()
    while len(done) < len(sweep.runs):
        ready = {
            n for n, run in sweep.runs.items() if n not in done and run.required_runs() <= done
        }
        if not ready:
            circle = ", ".join(n for n in sweep.runs if n not in done)
            raise UserError(f"Runs of the sweep need each other first: {circle}.")
        done |= ready
