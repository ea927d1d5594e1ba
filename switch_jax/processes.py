"""Several processes as one run: how they start, agree, stop and end together."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from switch_jax import launch, rendezvous
from switch_jax.errors import UserError

# Seconds that processes wait for each other at the start.
_START = "SWITCH_JAX_START_TIMEOUT"
# Seconds without a sign of life after which a process counts as dead and JAX ends the others. They
# come from a thread of JAX's own, so that a long compilation does not keep them up.
_HEARTBEAT = 60
_DAY = 24 * 60 * 60 * 1000  # milliseconds


def join(flags: launch.Launch | None, facts: Mapping[str, Any], *, stoppable: bool) -> None:
    """Connects this process with the others of its run; does nothing where it is alone.

    Args:
      flags: what the command line says; None asks the launcher.
      facts: what must be the same in all of them.
      stoppable: the program asks `stop_requests` after every step, so that SIGTERM may wait.

    Raises `UserError` where processes are missing, or do not fit together.
    """
    seconds = float(os.environ.get(_START, "120"))
    found = flags or launch.detect(seconds)
    if found is None or found.count == 1:
        return
    rendezvous.meet(found, facts, seconds)
    # Gloo, which connects CPUs, tells of itself on stdout, where only results belong.
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", 1, sys.stdout.encoding)
    os.dup2(2, 1)
    # JAX takes over SIGTERM for this, also in programs that never ask.
    jax.config.update("jax_enable_preemption_service", stoppable)
    jax.distributed.initialize(
        found.coordinator, found.count, found.index, heartbeat_timeout_seconds=_HEARTBEAT
    )


def wait() -> None:
    """Returns when all processes are here, however long that takes. All must call it.

    For before they first compute together: Gloo, which connects CPUs, gives up after 30 seconds,
    and one process may have found in a cache what another takes minutes to make.
    """
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp  # the only public way to a barrier that is no computation

        ocp.multihost.get_barrier_sync_fn()(key="switch_jax", timeout_ms=_DAY)


def gather(value: int) -> list[int]:
    """The values of all processes, in order. All must call it."""
    wait()
    return multihost_utils.process_allgather(np.int32(value)).reshape(-1).tolist()


def total(counts: np.ndarray) -> np.ndarray:
    """The sum of the processes' integers, of one shape. All must call it."""
    wait()
    return multihost_utils.process_allgather(counts.astype(np.int32)).sum(0, dtype=np.int64)


def agree(failure: Exception | None) -> None:
    """Raises in all processes where one of them comes with a failure. All must call it."""
    failed = [index for index, bad in enumerate(gather(failure is not None)) if bad]
    if not failed:
        return
    if jax.process_count() > 1:
        jax.distributed.shutdown()  # all are here: each may end by itself now
    raise failure or UserError(f"Process {failed[0]} cannot go on; its own message says why.")


@contextmanager
def together() -> Iterator[None]:
    """Around what each process does by itself: where it fails in one, it fails in all.

    Nothing in it may wait for other processes.
    """
    try:
        yield
    except Exception as failure:
        agree(failure)
    else:
        agree(None)


@contextmanager
def stop_requests(first_step: int) -> Iterator[Callable[[int], signal.Signals | None]]:
    """Yields a function of the step just done: the signal to stop for, None to go on.

    `first_step` steps are done already, and it must be called after each of those that follow.
    The first SIGTERM or SIGINT asks to stop, a second one acts as it usually does. Of several
    processes one is enough: all get to know, and stop after the same step a second or so later.
    There, SIGTERM is JAX's and a second one does nothing; the processes that had no signal of
    their own stop for SIGTERM.

    Outside the main thread, signals are left alone.
    """
    received: list[signal.Signals] = []
    several = jax.process_count() > 1
    reached = multihost_utils.reached_preemption_sync_point
    # After a signal, JAX says yes once: to the number after the largest that a process has asked
    # for. So none may be left out, for one that came during the start has a small one.
    early = several and any([reached(step) for step in range(1, first_step + 1)])

    def stop(step: int) -> signal.Signals | None:
        if not several:
            return received[0] if received else None
        if reached(step) or early:
            return received[0] if received else signal.SIGTERM
        return None

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number, frame):
        received.append(signal.Signals(number))
        signal.signal(number, previous[number])
        if several:
            signal.raise_signal(signal.SIGTERM)

    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    previous = {n: signal.signal(n, handle) for n in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave(code: int) -> None:
    """Ends a process that has failed among others that have not; does nothing where it is alone.

    At its end, a process waits for the others; they may be waiting for this one by then.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
