"""Trains the runs of a sweep, each in a process of its own, and keeps track of them in a folder.

runs/NAME-SEED/    their WORKDIRs; a run is finished when its last checkpoint is there
jobs/NAME-SEED.*   .txt: what the process printed; .lock: held by who trains it

Several sweeps may share the folder, on several devices or hosts: each takes the next run that is
not locked. The lock is one of the file system (flock) and passes to the training process, so that
it holds as long as that lives and no longer, whatever ends this one. Runs may as well be trained
by other means, with the commands that they have here.
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

from switch_jax.checkpoint import Workdir, last_logged_step
from switch_jax.config import Config, change_effect, config_differences, load_config
from switch_jax.distributed import record_signals
from switch_jax.errors import UserError
from switch_jax.model import train_flops
from switch_jax.sweeps.progress import SweepDisplay
from switch_jax.sweeps.results import checkpoint_for_reuse
from switch_jax.sweeps.spec import Sweep, SweepRun

_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    """A run with a seed."""

    name: str
    seed: int
    run: SweepRun
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
    def lock(self) -> Path:
        return self.folder / "jobs" / f"{self.key}.lock"

    @property
    def finished(self) -> bool:
        """Whether it is trained; `train` evaluates before it saves."""
        return (self.workdir.checkpoints / str(self.config.train.steps)).exists()

    @property
    def needs(self) -> set[str]:
        """Keys of the jobs that must be finished first."""
        return {f"{name}-{self.seed}" for name in self.run.needs()}

    @property
    def share(self) -> float:
        """How much of its training is done."""
        return last_logged_step(self.workdir) / self.config.train.steps

    @property
    def step_flops(self) -> float:
        """Of a train step, a teacher's work included."""
        return train_flops(self.config, self.teacher)

    def command(self) -> list[str]:
        """`switch-jax train` with everything that the run says; what it needs must be finished."""
        needed = {name: self.folder / "runs" / f"{name}-{self.seed}" for name in self.run.needs()}
        models = {name: str(checkpoint_for_reuse(Workdir(path))) for name, path in needed.items()}
        texts = self.run.texts(models) | _seeds(self.seed)
        return [
            *(sys.executable, "-m", "switch_jax", "train", "--config", self.run.config),
            *(f"--config.{key}={text}" for key, text in texts.items()),
            *("--workdir", str(self.workdir.path)),
        ]


@dataclasses.dataclass
class JobProgress:
    """How far a sweep came."""

    finished: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)  # keys
    blocked: list[str] = dataclasses.field(default_factory=list)  # what needs those
    stopped_by: signal.Signals | None = None


def sweep_jobs(sweep: Sweep, folder: Path) -> list[Job]:
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
            load_config(run.config, run.texts() | _seeds(seed)),
            folder,
            teacher=configs.get(run.teacher or ""),
        )
        for seed in sweep.seeds
        for name, run in sweep.runs.items()
    ]


def prepare_sweep(made: list[Job], folder: Path) -> None:
    """Makes the folder, or checks that it is of this sweep; raises `UserError`.

    Runs may be added to a sweep and taken from it, but those that have begun may not be changed.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "jobs").is_dir():
        raise UserError(f"{folder} is no sweep's folder and not empty; use another --workdir.")
    begun = {file.parent.name for file in folder.glob("runs/*/config.json")}
    if begun and not begun & {job.key for job in made}:
        raise UserError(
            f"{folder} holds another sweep (of {', '.join(sorted(begun))}); use another --workdir."
        )
    for job in made:
        if job.key in begun and (changes := _changes(job.workdir.config(), job.config)):
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


def ready_jobs(made: list[Job], failed: Collection[str] = ()) -> list[Job]:
    """What can be trained now: not finished, not failed, and nothing that it needs is missing."""
    done = {job.key for job in made if job.finished}
    return [job for job in made if job.key not in done | set(failed) and job.needs <= done]


def run_sweep(made: list[Job]) -> JobProgress:
    """Trains what is not finished, in order, and goes on where a run fails.

    What other processes train is waited for, and taken over where they die. SIGTERM and SIGINT are
    passed on to the run, which saves a checkpoint, and end the sweep.
    """
    progress = JobProgress()
    work = {job.key: job.step_flops * job.config.train.steps for job in made}
    display = SweepDisplay(work, {job.key for job in made if job.finished})
    with record_signals() as received, display:
        while not received and (jobs := ready_jobs(made, progress.failed)):
            with _claim(jobs) as claimed:
                if claimed is None:
                    display.show_waiting(len(jobs))
                    time.sleep(_POLL_SECONDS)
                elif not claimed[0].finished:
                    _train(*claimed, display, received, progress)
            display.end_run({job.key for job in made if job.finished})
    left = [job.key for job in made if not job.finished]
    progress.finished = len(made) - len(left)
    progress.blocked = [key for key in left if key not in progress.failed]
    progress.stopped_by = received[0] if received else None
    return progress


@contextmanager
def _claim(jobs: list[Job]) -> Iterator[tuple[Job, int] | None]:
    """The first that no other process holds, with the descriptor of its lock; None: all are."""
    for job in jobs:
        with open(job.lock, "a") as file:
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
    progress: JobProgress,
) -> None:
    """Trains a job to its end, to its failure, or until a signal is received."""
    display.start_run(job.key, job.share)
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
                display.print_line("stopping after a checkpoint …")
                # Who ends a whole group of processes has sent it SIGTERM already, and a second one
                # would not wait for the checkpoint.
                process.send_signal(signal.SIGINT)
                told = True
            display.update_run(job.share)
            time.sleep(_POLL_SECONDS)
    if not job.finished and not received:
        progress.failed.append(job.key)
        display.print_line(f"{job.key} failed, see {job.output}: {_last_line(job.output)}")


def _last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _seeds(seed: int) -> dict[str, str]:
    return {"train.seed": str(seed), "data.seed": str(seed)}


def _changes(old: Config, new: Config) -> list[str]:
    """Returns up to three changes that affect the results of a run that has begun.

    Paths of other runs may differ.
    """
    return [
        text
        for key, text in config_differences(old, new).items()
        if change_effect(key) != "none" and "{run:" not in text
    ][:3]
