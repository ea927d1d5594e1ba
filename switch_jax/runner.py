"""Trains the runs of a sweep, each in a process of its own, and keeps track of them in a folder.

sweep.json         the runs with their resolved configs
runs/NAME-SEED/    their WORKDIRs
jobs/NAME-SEED.*   .txt: what the process printed; .json: that it is finished, and its seconds;
                   .lock: held by who trains it

Several sweeps may share the folder, on several devices or hosts: each takes the next run that is
not locked. The lock is one of the file system (flock) and passes to the training process, so that
it holds as long as that lives and no longer, whatever ends this one.
"""

import dataclasses
import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from switch_jax import accounting, outcome, signals
from switch_jax import config as config_lib
from switch_jax.errors import UserError
from switch_jax.files import write_whole
from switch_jax.report import last_step
from switch_jax.schema import Config
from switch_jax.sweep import Run, Sweep
from switch_jax.sweep_display import SweepDisplay
from switch_jax.workdir import Workdir

_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    """A run with a seed."""

    name: str
    seed: int
    run: Run
    config: Config  # with the seed, and with references as they are
    folder: Path  # of the sweep
    teacher: Config | None = None  # of distillation

    @property
    def key(self) -> str:
        return f"{self.name}-{self.seed}"

    @property
    def workdir(self) -> Workdir:
        return Workdir(self.folder / "runs" / self.key)

    @property
    def output(self) -> Path:
        """What its process printed."""
        return self.folder / "jobs" / f"{self.key}.txt"

    @property
    def record(self) -> Path:
        return self.folder / "jobs" / f"{self.key}.json"

    @property
    def finished(self) -> bool:
        return self.record.exists()

    @property
    def needs(self) -> set[str]:
        """Keys of the jobs that must be finished first."""
        return {f"{name}-{self.seed}" for name in self.run.needs()}

    @property
    def share(self) -> float:
        """How much of its training is done."""
        return last_step(self.workdir) / self.config.train.steps

    @property
    def step_flops(self) -> float:
        """Of a train step, a teacher's work included."""
        return accounting.train_flops(self.config, self.teacher)

    def command(self) -> list[str]:
        """`switch-jax train` with everything that the run says."""
        needed = {name: self.folder / "runs" / f"{name}-{self.seed}" for name in self.run.needs()}
        models = {name: str(outcome.model(Workdir(path))) for name, path in needed.items()}
        texts = self.run.texts(models) | _seeds(self.seed)
        return [
            *(sys.executable, "-m", "switch_jax", "train", "--config", self.run.config),
            *(f"--config.{key}={text}" for key, text in texts.items()),
            *("--workdir", str(self.workdir.path)),
        ]


@dataclasses.dataclass
class Progress:
    """How far a sweep came."""

    finished: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)  # keys
    blocked: list[str] = dataclasses.field(default_factory=list)  # whose need is not finished
    elsewhere: list[str] = dataclasses.field(default_factory=list)  # trained by others
    stopped_by: signal.Signals | None = None


def jobs(sweep: Sweep, folder: Path) -> list[Job]:
    """Every run with every seed, seed by seed, so that all can be compared early.

    Raises `UserError` where a config cannot be, or what is compared differs in its data.
    """
    configs = sweep.configs()
    sweep.check(configs)
    return [
        Job(
            name,
            seed,
            run,
            config_lib.load(run.config, run.texts() | _seeds(seed)),
            folder,
            teacher=configs.get(run.teacher or ""),
        )
        for seed in sweep.seeds
        for name, run in sweep.runs.items()
    ]


def prepare(made: list[Job], folder: Path) -> None:
    """Makes the folder, or checks that it is of this sweep; raises `UserError`.

    Runs may be added to a sweep and taken from it, but not changed.
    """
    file = folder / "sweep.json"
    configs = {job.key: config_lib.flat(job.config) for job in made}
    known: dict[str, Any] = {}
    if file.exists():
        try:
            known = json.loads(file.read_text())["runs"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} cannot be read ({error}); restore it or use another --workdir."
            ) from error
        if not known.keys() & configs.keys():
            raise UserError(
                f"{folder} holds another sweep (of {', '.join(known)}); use another --workdir."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is no sweep's folder and not empty; use another --workdir.")
    for key in known.keys() & configs.keys():
        if changes := _changes(known[key], configs[key]):
            raise UserError(
                f"{folder} holds another sweep ({'; '.join(changes)} in {key}); use another"
                " --workdir."
            )
    try:
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
        content = json.dumps({"runs": known | configs}, indent=1)
        write_whole(file, (content + "\n").encode())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); use another --workdir."
        ) from error


def run(made: list[Job]) -> Progress:
    """Trains what is not finished, in order, and goes on where a run fails.

    SIGTERM and SIGINT are passed on to the run, which saves a checkpoint, and end the sweep.
    """
    progress, tried = Progress(), set[str]()
    done = {job.key for job in made if job.finished}
    display = SweepDisplay({job.key: job.step_flops * job.config.train.steps for job in made}, done)
    with signals.received() as received, display:
        while not received and (job := _next(made, done, tried)) is not None:
            tried.add(job.key)
            with _claimed(job) as lock:
                if lock is None:
                    progress.elsewhere.append(job.key)
                elif not job.finished:
                    _train(job, lock, display, received, progress)
            done = {job.key for job in made if job.finished}
            display.ended(done)
    left = [job for job in made if job.key not in done]
    progress.finished = len(done)
    progress.blocked = [job.key for job in left if job.key not in tried]
    progress.elsewhere = [job.key for job in left if job.key in progress.elsewhere]
    progress.stopped_by = received[0] if received else None
    return progress


def _next(made: list[Job], done: set[str], tried: set[str]) -> Job | None:
    """The first job that can be trained now."""
    ready = (job for job in made if job.key not in done | tried and job.needs <= done)
    return next(ready, None)


@contextmanager
def _claimed(job: Job) -> Iterator[int | None]:
    """The descriptor of a job's lock, None where another process holds it."""
    with open(job.record.with_suffix(".lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


def _train(
    job: Job, lock: int, display: SweepDisplay, received: list[signal.Signals], progress: Progress
) -> None:
    """Trains a job to its end, to its failure, or until a signal is received."""
    display.started(job.key, job.share)
    began = time.time()
    with job.output.open("a") as output:
        process = subprocess.Popen(
            job.command(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[lock],
            start_new_session=True,  # a terminal's Ctrl-C comes by way of us, once
        )
        told = False
        while process.poll() is None:
            if received and not told:
                display.say("stopping after a checkpoint …")
                process.terminate()
                told = True
            display.reached(job.share)
            time.sleep(_POLL_SECONDS)
    if process.returncode == 0:
        record = {"seconds": time.time() - began}
        write_whole(job.record, (json.dumps(record) + "\n").encode())
    elif not received:
        progress.failed.append(job.key)
        display.say(f"{job.key} failed, see {job.output}: {_last_line(job.output)}")


def _last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _seeds(seed: int) -> dict[str, str]:
    return {"train.seed": str(seed), "data.seed": str(seed)}


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} is {old.get(key)!r} there and {value!r} here"
        for key, value in new.items()
        if value != old.get(key)
    ][:3]
