"""Trackers: what receives the metrics of a run besides metrics.jsonl (`train.trackers`).

| name            | receives                                      | a continued run          |
|-----------------|-----------------------------------------------|--------------------------|
| `tensorboard`   | metrics                                       | adds a file of events    |
| `wandb`         | metrics, config, predictions, figures         | continues the same run   |
| `mlflow`        | metrics, config, predictions, figures         | continues the same run   |
| `trackio`       | metrics, config, figures                      | continues the same run   |
| `FILE.py:CLASS` | what its methods make of it                   | is told its first step   |

Projects, servers and offline modes are set as the packages document: WANDB_PROJECT and WANDB_MODE,
MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME, TRACKIO_DIR. Without them, the project or
experiment is `switch_jax`, and the run is called as WORKDIR's folder.
"""

import functools
import importlib
import importlib.util
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from switch_jax.checkpoint import Workdir
from switch_jax.config import Config, flatten_config, is_own_code, load_own_code
from switch_jax.errors import UserError
from switch_jax.files import write_atomically

_PROJECT = "switch_jax"
_MLFLOW_BATCH = 100  # values that MLflow takes at once


class Tracker(Protocol):
    """Receiver of metrics; only the first process has any.

    A class of one's own is called with WORKDIR (a path), the config (values by dotted key), and the
    number of steps done before.
    """

    def log(self, step: int, values: Mapping[str, float], files: Sequence[Path]) -> None:
        """Receives finite values by name, such as `train/loss`, and files below WORKDIR.

        The files are predictions, with an evaluation, and figures (PNG), at the end of a run.
        """

    def close(self) -> None:
        """Ends the record of the run, which a later start may continue."""


class Trackers:
    """The trackers of a run. One that fails is reported, and receives nothing more.

    Args:
      workdir: the run's folder, which exists.
      first_step: number of steps done before.
      active: False in all processes but one, which then have no trackers.

    Raises `UserError` if a tracker cannot begin.
    """

    def __init__(self, config: Config, workdir: Workdir, first_step: int, *, active: bool = True):
        self._trackers: dict[str, Tracker] = {}
        values = flatten_config(config)
        for name, new in find_trackers(config).items() if active else ():
            try:
                self._trackers[name] = new(workdir.path, values, first_step)
            except Exception as error:  # of services and of one's own code: any
                self.close()
                raise UserError(
                    f"train.trackers: {name} cannot begin ({_one_line(error)}); correct that, or"
                    " leave it out."
                ) from error

    def log(self, step: int, values: Mapping[str, float], files: Sequence[Path]) -> None:
        """Gives values and files to every tracker."""
        for name, tracker in list(self._trackers.items()):
            self._call(name, functools.partial(tracker.log, step, values, files))

    def log_figures(self, step: int, draw: Callable[[], Sequence[Path]]) -> None:
        """Gives figures to every tracker; they are drawn only where a tracker takes them."""
        if self._trackers.keys() <= {"tensorboard"}:
            return
        try:
            files = draw()
        except Exception as error:  # a run that is finished does not fail because of its figures
            print(f"no figures for trackers ({_one_line(error)})", file=sys.stderr, flush=True)
        else:
            self.log(step, {}, files)

    def close(self) -> None:
        """Closes every tracker."""
        for name, tracker in list(self._trackers.items()):
            self._call(name, tracker.close)
        self._trackers.clear()

    def _call(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a run does not end because a service does
            del self._trackers[name]
            print(
                f"tracker {name} failed ({_one_line(error)}) and receives nothing more;"
                " metrics.jsonl has all metrics",
                file=sys.stderr,
                flush=True,
            )


def find_trackers(config: Config) -> dict[str, Callable[..., Tracker]]:
    """Returns what makes the trackers of a config, by name.

    Raises `UserError` for an unknown name, a package that is missing, and a class that is not
    found.
    """
    found: dict[str, Callable[..., Tracker]] = {}
    for name in filter(None, map(str.strip, config.train.trackers.split(","))):
        if is_own_code(name):
            found[name] = load_own_code("train.trackers", name)
        elif name in _TRACKERS:
            package, found[name] = _TRACKERS[name]
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise UserError(
                    f'train.trackers={name} needs {package}: pip install "switch_jax[trackers]".'
                ) from error
        else:
            raise UserError(
                f"train.trackers: there is no tracker {name!r}; use {', '.join(_TRACKERS)} or"
                " FILE.py:CLASS."
            )
    return found


class TensorBoardTracker:
    """Events in WORKDIR/tensorboard."""

    def __init__(self, workdir: Path, config: Mapping[str, Any], first_step: int):
        # Not by a SummaryWriter: its thread ends where the disk is full, and then waits for ever.
        folder = Workdir(workdir).tensorboard
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        purge = SessionLog(status=SessionLog.START)  # what was logged from this step on is void
        self._writer.write_event(Event(step=first_step + 1, session_log=purge))

    def log(self, step: int, values: Mapping[str, float], files: Sequence[Path]) -> None:
        now = time.time()
        for name, value in values.items():
            event = Event(wall_time=now, step=step, summary=scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases. Steps that it has are not logged again: they are the same."""

    def __init__(self, workdir: Path, config: Mapping[str, Any], first_step: int):
        import wandb

        self._image = wandb.Image
        self._workdir = workdir
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=workdir.name,
            id=_record_id(workdir, "wandb", lambda: secrets.token_hex(4)),
            resume="allow",
            dir=workdir,
            config=dict(config),
        )

    def log(self, step: int, values: Mapping[str, float], files: Sequence[Path]) -> None:
        self._run.log({**values, **_images(files, self._image)}, step=step)
        for file in files:
            if not _is_figure(file):
                self._run.save(file, base_path=self._workdir, policy="now")

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of MLflow.

    Raises `UserError` where its store is a database, which mlflow-skinny cannot open.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any], first_step: int):
        import mlflow
        from mlflow.entities import Metric, Param

        is_database = mlflow.get_tracking_uri().startswith("sqlite:")
        if is_database and importlib.util.find_spec("sqlalchemy") is None:
            raise UserError(
                "set MLFLOW_TRACKING_URI to a server, or pip install mlflow, which keeps runs in"
                " a database on this machine"
            )
        self._metric = Metric
        self._workdir = workdir
        self._client = client = mlflow.MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)

        def create() -> str:
            known = client.get_experiment_by_name(experiment)
            number = known.experiment_id if known else client.create_experiment(experiment)
            run = client.create_run(number, run_name=workdir.name).info.run_id
            params = [Param(key, str(value)) for key, value in config.items()]
            for start in range(0, len(params), _MLFLOW_BATCH):
                client.log_batch(run, params=params[start : start + _MLFLOW_BATCH])
            return run

        self._run = _record_id(workdir, "mlflow", create)
        client.update_run(self._run, status="RUNNING")

    def log(self, step: int, values: Mapping[str, float], files: Sequence[Path]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), _MLFLOW_BATCH):
            self._client.log_batch(self._run, metrics=metrics[start : start + _MLFLOW_BATCH])
        for file in files:
            folder = file.parent.relative_to(self._workdir).as_posix()
            self._client.log_artifact(self._run, str(file), folder)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class TrackioTracker:
    """A run of trackio, in a database on this machine or in a Space."""

    def __init__(self, workdir: Path, config: Mapping[str, Any], first_step: int):
        import trackio

        self._trackio = trackio
        trackio.init(
            project=_PROJECT,
            name=_record_id(workdir, "trackio", lambda: f"{workdir.name}-{int(time.time())}"),
            config=dict(config),
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, float], files: Sequence[Path]) -> None:
        self._trackio.log({**values, **_images(files, self._trackio.Image)}, step=step)

    def close(self) -> None:
        self._trackio.finish()


# Name → package and class.
_TRACKERS: dict[str, tuple[str, Callable[..., Tracker]]] = {
    "tensorboard": ("tensorboardX", TensorBoardTracker),
    "wandb": ("wandb", WandbTracker),
    "mlflow": ("mlflow", MlflowTracker),
    "trackio": ("trackio", TrackioTracker),
}


def _is_figure(file: Path) -> bool:
    return file.suffix == ".png"


def _images(files: Sequence[Path], image: Callable[[str], Any]) -> dict[str, Any]:
    """Returns a service's images of the figures among files, by name."""
    return {f"figures/{file.stem}": image(str(file)) for file in files if _is_figure(file)}


def _record_id(workdir: Path, tracker: str, create: Callable[[], str]) -> str:
    """Returns the id of the run's record with a tracker: that in WORKDIR, or a new one."""
    file = Workdir(workdir).trackers_file
    known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    if tracker not in known:
        known[tracker] = create()
        write_atomically(file, json.dumps(known).encode())
    return known[tracker]


def _one_line(error: Exception) -> str:
    return (str(error) or repr(error)).strip().split("\n")[0].rstrip(".")
