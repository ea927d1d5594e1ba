"""Processes of `switch-jax`: forked from a warm process, or started as new interpreters.

A warm process has imported the package but not started JAX, so a verb that is forked from it starts
in milliseconds and still is a process of its own, with its own memory, session and exit code.
"""

import atexit
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_PRELOADED = (
    *("switch_jax.cli.main", "switch_jax.training", "switch_jax.analysis", "switch_jax.sweeps"),
    *("switch_jax.performance", "switch_jax.inference", "switch_jax.evaluation"),
    *("matplotlib.pyplot", "safetensors.numpy", "scripts.campaigns.results"),
)
_MEMORY = 8 << 30  # bytes a process may allocate: absurd sizes must not take the machine's memory
_MARKER = "SWITCH_JAX_CAMPAIGN_PROCESS"  # environment variable by which descendants are found
_XLA_FLAGS = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(_PRELOADED))


@dataclass(frozen=True)
class Ended:
    """What is known of a process that has ended or was ended."""

    code: int | None  # None: it did not end in time; negative: a signal ended it
    out: str
    err: str
    seconds: float
    results: dict[str, str] | None = None  # digests, where they were asked for and the code is 0


def set_environment(cache: Path) -> None:
    """Sets the environment of all processes: CPU, quick compilation, shared compiled programs."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=" ".join(_XLA_FLAGS),
        JAX_COMPILATION_CACHE_DIR=str(cache / "xla"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        MPLBACKEND="agg",
        PYTHONPATH=str(ROOT),
    )


class Process:
    """A running `switch-jax`, in a session of its own.

    Args:
      arguments: those of the command line.
      folder: current folder; output and digests are written beside it.
      warm: forked from the warm process; otherwise a new interpreter.
      environment: changes of the environment.
      results: paths in `folder` whose digests are taken after exit code 0; warm processes only.
      number: of the process, where several share the folder.
    """

    def __init__(
        self,
        arguments: Sequence[str | bytes],
        folder: Path,
        *,
        warm: bool = True,
        environment: Mapping[str, str] | None = None,
        results: Sequence[str] | None = None,
        number: int = 0,
    ):
        self._folder = folder
        self._files = {
            name: folder.with_name(f".{folder.name}-{number}.{name}")
            for name in ("out", "err", "results")
        }
        self._files["results"].unlink(missing_ok=True)
        self._marker = uuid.uuid4().hex
        changes = {"SWITCH_JAX_CACHE": str(folder / ".cache"), _MARKER: self._marker}
        changes |= environment or {}
        self._start = time.monotonic()
        self._process: Any
        if warm:
            arguments_of_child = (list(arguments), folder, changes, self._files, results)
            self._process = _context.Process(target=_run_forked, args=arguments_of_child)
            self._process.start()
        else:
            with self._files["out"].open("wb") as out, self._files["err"].open("wb") as err:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "switch_jax", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    cwd=folder,
                    env=os.environ | changes,
                    start_new_session=True,
                )

    def send_signal(self, number: signal.Signals) -> bool:
        """Sends a signal to the process alone; returns whether it was still running."""
        if self._code() is not None:
            return False
        os.kill(self._process.pid, number)
        return True

    def wait(self, timeout: float) -> Ended:
        """Waits until the process ends; kills it, and all that it started, after `timeout`."""
        code = self._wait(timeout)
        if code is None:
            self._process.kill()
            self._wait(30)
        seconds = time.monotonic() - self._start
        results = None
        if code == 0 and self._files["results"].exists():
            results = json.loads(self._files["results"].read_text())
        out, err = (self._printed(name) for name in ("out", "err"))
        return Ended(code, out, err, seconds, results)

    def _printed(self, name: str) -> str:
        """Returns what was printed, with "." for the folder."""
        file = self._files[name]
        text = file.read_text(errors="replace") if file.exists() else ""
        return text.replace(str(self._folder), ".")

    def end_descendants(self, grace: float = 10.0) -> int:
        """Returns how many processes that this one started still run after `grace`, and kills them.

        0 where the system has no /proc.
        """
        deadline = time.monotonic() + grace
        while (left := _find_marked(self._marker)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return len(left)

    def _code(self) -> int | None:
        process = self._process
        return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode

    def _wait(self, timeout: float) -> int | None:
        if isinstance(self._process, subprocess.Popen):
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                return None
        else:
            self._process.join(timeout)
        return self._code()


def run(
    arguments: Sequence[str | bytes], folder: Path, timeout: float = 120, **settings: Any
) -> Ended:
    """Runs `switch-jax ARGUMENTS`; settings as those of `Process`."""
    process = Process(arguments, folder, **settings)
    try:
        return process.wait(timeout)
    finally:
        process.end_descendants(grace=0)


def _run_forked(
    arguments: list[str | bytes],
    folder: Path,
    environment: dict[str, str],
    files: dict[str, Path],
    results: Sequence[str] | None,
) -> None:
    """Runs the command line in this process, as `python -m switch_jax` does, and exits."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(files[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(folder)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["switch-jax", *map(os.fsdecode, arguments)]
    code: Any = 1
    try:
        from switch_jax.__main__ import main

        code = main()
    except SystemExit as exit_request:
        code = exit_request.code or 0
    except BaseException:  # as the interpreter reports it
        traceback.print_exc()
    if code == 0 and results is not None:
        from scripts.campaigns.results import digests

        files["results"].write_text(json.dumps(digests(folder, results)))
    atexit._run_exitfuncs()  # a forked process of multiprocessing leaves them out
    sys.exit(code)


def _find_marked(marker: str) -> list[int]:
    """Returns the processes whose environment has the marker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # ended, or another user's
            continue
    return found
