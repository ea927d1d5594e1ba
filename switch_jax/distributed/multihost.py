"""Multi-process runs: connecting, barriers, sums over processes, and failing together.

All functions are no-ops, or act on one process, where there is only one.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from switch_jax.distributed.cluster import Launch, detect_launch
from switch_jax.distributed.rendezvous import wait_for_processes
from switch_jax.errors import UserError

# Environment variable: seconds that processes wait for each other at the start.
_START_TIMEOUT = "SWITCH_JAX_START_TIMEOUT"
_MAX_START_TIMEOUT = 7 * 24 * 60 * 60

# A process without a heartbeat for this long counts as dead, and JAX ends the other processes. A
# thread of JAX sends heartbeats, so that a long compilation does not delay them.
_HEARTBEAT_SECONDS = 60
_BARRIER_MILLISECONDS = 24 * 60 * 60 * 1000


def connect(flags: Launch | None, facts: Mapping[str, Any]) -> None:
    """Connects the processes of a run; does nothing for a single process.

    Args:
      flags: the launch that flags describe; None: JAX detects it.
      facts: JSON values that must be equal in all processes, by name.

    Raises `UserError` where processes are missing, or differ in their facts.
    """
    seconds = _start_timeout()
    launch = flags or detect_launch(seconds)
    if launch is None or launch.count == 1:
        return
    wait_for_processes(launch, facts, seconds)
    # Gloo, which connects CPUs, logs to file descriptor 1. Its lines go to stderr, because stdout
    # is for results only.
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", 1, sys.stdout.encoding, sys.stdout.errors)
    os.dup2(2, 1)
    # JAX's preemption service replaces the SIGTERM handler, also in programs that do not use it,
    # and does not distinguish the steps of training from those of Orbax's threads.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        launch.coordinator,
        launch.count,
        launch.index,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )


def _start_timeout() -> float:
    """Returns the seconds of `$SWITCH_JAX_START_TIMEOUT`; raises `UserError` for other values."""
    text = os.environ.get(_START_TIMEOUT) or "120"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _MAX_START_TIMEOUT:  # neither is NaN
        raise UserError(
            f"{_START_TIMEOUT} is {text!r}; set it to seconds, at most {_MAX_START_TIMEOUT}."
        )
    return seconds


def barrier() -> None:
    """Waits until all processes call it, for up to a day. All processes must call it.

    Necessary before a first collective: Gloo, which connects CPUs, fails after 30 seconds, and one
    process may take minutes to build what another one reads from a cache.
    """
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp  # the only public barrier that runs no computation

        ocp.multihost.get_barrier_sync_fn()(key="switch_jax", timeout_ms=_BARRIER_MILLISECONDS)


def all_gather_int(value: int) -> list[int]:
    """Returns the int32 values of all processes, by index. All processes must call it."""
    barrier()
    return multihost_utils.process_allgather(np.int32(value)).reshape(-1).tolist()


def sum_over_processes(counts: np.ndarray) -> np.ndarray:
    """Sums int32 arrays of one shape over the processes, in int64. All processes must call it."""
    barrier()
    return multihost_utils.process_allgather(counts.astype(np.int32)).sum(0, dtype=np.int64)


def raise_if_any_failed(failure: Exception | None) -> None:
    """Raises in all processes if one of them passes a failure. All processes must call it.

    A process with a failure raises it; the other processes raise `UserError`.
    """
    failed = [index for index, bad in enumerate(all_gather_int(failure is not None)) if bad]
    if not failed:
        return
    if jax.process_count() > 1:
        jax.distributed.shutdown()  # while all processes are here, so that each can exit alone
    raise failure or UserError(f"Process {failed[0]} cannot go on; its own message says why.")


@contextmanager
def fail_together() -> Iterator[None]:
    """Context manager for work of each process by itself: if it fails in one, it fails in all.

    Nothing inside may wait for other processes. All processes must enter it.
    """
    try:
        yield
    except Exception as failure:
        raise_if_any_failed(failure)
    else:
        raise_if_any_failed(None)


def exit_after_failure(code: int) -> None:
    """Exits at once after a failure in one of several processes; does nothing for a single one.

    A normal exit waits for the other processes, which may be waiting for this one.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
