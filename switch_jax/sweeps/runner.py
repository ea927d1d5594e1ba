"""Sweep runner: trains the runs of a sweep, each in its own process, in one folder.

runs/NAME-SEED/    WORKDIR of a run; the run is finished when its last checkpoint exists
jobs/NAME-SEED.*   .txt: output of the training process; .lock: held while the run is trained

Several sweep processes may share the folder, on several devices or hosts: each trains the next run
whose lock is free. The lock is a file lock (flock) that the training process inherits: it is held
exactly as long as the run is trained, even if the sweep process is killed. Runs may also be trained
without a sweep process, by the commands of their jobs.
"""

import dataclasses
import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from switch_jax.checkpoint import Workdir, has_diverged, last_logged_step
from switch_jax.config import Config
from switch_jax.data import data_of_position
from switch_jax.distributed import record_signals
from switch_jax.errors import UserError
from switch_jax.model import train_flops
from switch_jax.sweeps.progress import SweepDisplay
from switch_jax.sweeps.results import checkpoint_for_reuse
from switch_jax.sweeps.spec import Sweep, SweepRun

_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    """Training of one run with one seed."""

    name: str
    seed: int
    run: SweepRun
    config: Config  # with the seed, and with unresolved references
    folder: Path  # of the sweep
    teacher: Config | None = None  # config of the run that this run is distilled from

    @property
    def key(self) -> str:
        """NAME-SEED."""
        return f"{self.name}-{self.seed}"

    @property
    def workdir(self) -> Workdir:
        """WORKDIR of the run."""
        return Workdir(self._run_folder(self.name))

    @property
    def output_file(self) -> Path:
        """Output of the training process."""
        return self.folder / "jobs" / f"{self.key}.txt"

    @property
    def lock_file(self) -> Path:
        """File that is locked while the run is trained."""
        return self.folder / "jobs" / f"{self.key}.lock"

    @property
    def finished(self) -> bool:
        """Whether the run is trained and evaluated: `train` evaluates before it saves."""
        return (self.workdir.checkpoints / str(self.config.train.steps)).exists()

    @property
    def diverged(self) -> bool:
        """Whether training has stopped because it diverged; that is a result, too."""
        return not self.finished and has_diverged(self.workdir)

    @property
    def required_jobs(self) -> set[str]:
        """Keys of the jobs that must be finished before this one begins."""
        return {f"{name}-{self.seed}" for name in self.run.required_runs()}

    @property
    def trained_fraction(self) -> float:
        """Last logged step / number of steps."""
        return last_logged_step(self.workdir) / self.config.train.steps

    @property
    def step_flops(self) -> float:
        """FLOPs of a train step, a teacher's included."""
        return train_flops(self.config, self.teacher)

    def command(self) -> list[str]:
        """Returns the `switch-jax train` command; the required jobs must be finished."""
        required = {name: Workdir(self._run_folder(name)) for name in self.run.required_runs()}
        paths = {name: str(checkpoint_for_reuse(workdir)) for name, workdir in required.items()}
        overrides = self.run.override_texts(paths) | _seed_overrides(self.seed)
        return [
            *(sys.executable, "-m", "switch_jax", "train", "--config", self.run.config),
            *(f"--config.{key}={text}" for key, text in overrides.items()),
            *("--workdir", str(self.workdir.path)),
        ]

    def _run_folder(self, name: str) -> Path:
        return self.folder / "runs" / f"{name}-{self.seed}"


@dataclasses.dataclass
class SweepState:
    """State of a sweep when `run_sweep` returns."""

    finished: int = 0  # number of jobs
    failed: list[str] = dataclasses.field(default_factory=list)  # keys of jobs
    diverged: list[str] = dataclasses.field(default_factory=list)  # keys of jobs
    blocked: list[str] = dataclasses.field(default_factory=list)  # keys of other unfinished jobs
    stopped_by: signal.Signals | None = None


def sweep_jobs(sweep: Sweep, folder: Path) -> list[Job]:
    """Returns the jobs of a sweep; all runs of a seed come before the next seed.

    Raises `UserError` for an invalid config, and if runs that are compared differ in their data.
    """
    configs = sweep.load_configs()
    sweep.check_comparable(configs)
    return [
        Job(
            name,
            seed,
            run,
            sweep.load_run(name, _seed_overrides(seed)),
            folder,
            teacher=configs.get(run.teacher or ""),
        )
        for seed in sweep.seeds
        for name, run in sweep.runs.items()
    ]


def prepare_sweep(jobs: list[Job], folder: Path) -> None:
    """Makes the folder of a sweep, or checks that an existing folder is of the same sweep.

    Runs may be added to a sweep and removed from it; a run that has begun may not be changed.

    Raises `UserError` for another sweep's folder, and for one that cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "jobs").is_dir():
        raise UserError(f"{folder} is no sweep's folder and not empty; use another --workdir.")
    begun = {file.parent.name for file in folder.glob("runs/*/config.json")}
    if begun and not begun & {job.key for job in jobs}:
        raise UserError(
            f"{folder} holds another sweep (of {', '.join(sorted(begun))}); use another --workdir."
        )
    for job in jobs:
        if job.key in begun and (changes := _changes(job)):
            raise UserError(
                f"{folder} holds another sweep ({'; '.join(changes)} in {job.key}); use another"
                " --workdir."
            )
    try:
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); use another --workdir."
        ) from error


def check_same_text(jobs: list[Job]) -> None:
    """Raises `UserError` if finished runs of a seed were trained on different text.

    Their configs are the same in `data.*`, but what these name may change while a sweep is trained:
    files, and with `python_docstrings` the installed packages. The identity of tokens is another
    one with each vocabulary, of which the config may have the size only.
    """
    first: dict[tuple[Any, ...], tuple[str, str]] = {}  # data of a run → its identity and its key
    for job in jobs:
        position = job.workdir.checkpoints / str(job.config.train.steps) / "data"
        identity = data_of_position(position)
        if identity is None:
            continue
        data = dataclasses.replace(job.config.data, vocabulary=None)
        text = (*dataclasses.astuple(data), job.config.model.vocab_size)
        known, other = first.setdefault(text, (identity, job.key))
        if known != identity:
            raise UserError(
                f"{job.key} and {other} in {job.folder} were trained on different text, although"
                f" both have data.mixture={data.mixture}: it has changed between them; remove the"
                f" folder of one, and what was trained with it, from {job.folder / 'runs'}, or use"
                " another --workdir."
            )


def ready_jobs(jobs: list[Job], failed: Collection[str] = ()) -> list[Job]:
    """Returns the jobs that can be trained now, in order.

    They are not finished, not diverged and not failed, and all required jobs are finished.
    """
    done = {job.key for job in jobs if job.finished}
    return [
        job
        for job in jobs
        if job.key not in done | set(failed) and job.required_jobs <= done and not job.diverged
    ]


def run_sweep(jobs: list[Job]) -> SweepState:
    """Trains the unfinished jobs in order, and continues with the next job if one fails.

    Waits for jobs that other sweep processes train, and trains them itself if those processes end
    early. SIGTERM and SIGINT stop the job, which saves a checkpoint, and then the sweep.
    """
    state = SweepState()
    work = {job.key: job.step_flops * job.config.train.steps for job in jobs}
    display = SweepDisplay(work, {job.key for job in jobs if job.finished})
    with record_signals() as received, display:
        while not received and (ready := ready_jobs(jobs, state.failed)):
            with _lock_first(ready) as locked:
                if locked is None:
                    display.show_waiting(len(ready))
                    time.sleep(_POLL_SECONDS)
                elif not (locked[0].finished or locked[0].diverged):
                    _train(*locked, display, received, state)
            display.end_run({job.key for job in jobs if job.finished})
    unfinished = [job.key for job in jobs if not job.finished]
    state.finished = len(jobs) - len(unfinished)
    state.diverged = [job.key for job in jobs if job.diverged]
    state.blocked = [key for key in unfinished if key not in state.failed + state.diverged]
    state.stopped_by = received[0] if received else None
    return state


@contextmanager
def _lock_first(jobs: list[Job]) -> Iterator[tuple[Job, int] | None]:
    """Locks the first job that no other process has locked.

    Yields the job and the file descriptor of its lock, or None if all jobs are locked.
    """
    for job in jobs:
        with open(job.lock_file, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield job, file.fileno()
            return
    yield None


def _train(
    job: Job,
    lock: int,
    display: SweepDisplay,
    received: list[signal.Signals],
    state: SweepState,
) -> None:
    """Trains a job to its end, to its failure, or until a signal is received."""
    display.start_run(job.key, job.trained_fraction)
    with job.output_file.open("a") as output:
        process = subprocess.Popen(
            job.command(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[lock],
            start_new_session=True,  # a terminal's Ctrl-C then reaches only this process
        )
        interrupted = False
        while process.poll() is None:
            if received and not interrupted:
                display.print_line("stopping after a checkpoint …")
                # Not SIGTERM: a scheduler may have sent SIGTERM to all processes, and a second
                # SIGTERM ends the run before its checkpoint.
                process.send_signal(signal.SIGINT)
                interrupted = True
            display.update_run(job.trained_fraction)
            time.sleep(_POLL_SECONDS)
    if not job.finished and not received:
        outcome = "diverged" if job.diverged else "failed"
        if outcome == "failed":
            state.failed.append(job.key)
        reason = _last_line(job.output_file)
        display.print_line(f"{job.key} {outcome}, see {job.output_file}: {reason}")


def _last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _seed_overrides(seed: int) -> dict[str, str]:
    return {"train.seed": str(seed), "data.seed": str(seed)}


def _changes(job: Job) -> list[str]:
    """Returns up to three changes that affect the results of a run that has begun.

    Paths of other runs may differ.
    """
    changes = job.workdir.changes(job.config, "checkpoint", "results")
    return [text for text in changes if "{run:" not in text][:3]
