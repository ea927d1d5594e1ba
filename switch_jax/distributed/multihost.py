"""Several processes as one run: how they start, agree, stop and end together."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from switch_jax.distributed.cluster import Launch, detect_launch
from switch_jax.distributed.rendezvous import meet_processes
from switch_jax.errors import UserError

# Seconds that processes wait for each other at the start.
_START = "SWITCH_JAX_START_TIMEOUT"

# Seconds without a sign of life after which a process counts as dead and JAX ends the others. They
# come from a thread of JAX's own, so that a long compilation does not keep them up.
_HEARTBEAT = 60
_DAY = 24 * 60 * 60 * 1000  # milliseconds


def connect(flags: Launch | None, facts: Mapping[str, Any]) -> None:
    """Connects this process with the others of its run; does nothing where it is alone.

    Args:
      flags: what the command line says; None asks the launcher.
      facts: what must be the same in all of them.

    Raises `UserError` where processes are missing, or do not fit together.
    """
    seconds = float(os.environ.get(_START, "120"))
    found = flags or detect_launch(seconds)
    if found is None or found.count == 1:
        return
    meet_processes(found, facts, seconds)
    # Gloo, which connects CPUs, tells of itself on stdout, where only results belong.
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", 1, sys.stdout.encoding)
    os.dup2(2, 1)
    # It would take SIGTERM over, also from programs that never ask it, and is not told which
    # steps are ours and which Orbax asks about in its threads.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        found.coordinator, found.count, found.index, heartbeat_timeout_seconds=_HEARTBEAT
    )


def barrier() -> None:
    """Returns when all processes are here, however long that takes. All must call it.

    For before they first compute together: Gloo, which connects CPUs, gives up after 30 seconds,
    and one process may have found in a cache what another takes minutes to make.
    """
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp  # the only public way to a barrier that is no computation

        ocp.multihost.get_barrier_sync_fn()(key="switch_jax", timeout_ms=_DAY)


def all_gather_int(value: int) -> list[int]:
    """The values of all processes, in order. All must call it."""
    barrier()
    return multihost_utils.process_allgather(np.int32(value)).reshape(-1).tolist()


def sum_over_processes(counts: np.ndarray) -> np.ndarray:
    """The sum of the processes' integers, of one shape. All must call it."""
    barrier()
    return multihost_utils.process_allgather(counts.astype(np.int32)).sum(0, dtype=np.int64)


def raise_if_any_failed(failure: Exception | None) -> None:
    """Raises in all processes where one of them comes with a failure. All must call it."""
    failed = [index for index, bad in enumerate(all_gather_int(failure is not None)) if bad]
    if not failed:
        return
    if jax.process_count() > 1:
        jax.distributed.shutdown()  # all are here: each may end by itself now
    raise failure or UserError(f"Process {failed[0]} cannot go on; its own message says why.")


@contextmanager
def fail_together() -> Iterator[None]:
    """Around what each process does by itself: where it fails in one, it fails in all.

    Nothing in it may wait for other processes.
    """
    try:
        yield
    except Exception as failure:
        raise_if_any_failed(failure)
    else:
        raise_if_any_failed(None)


def exit_after_failure(code: int) -> None:
    """Ends a process that has failed among others that have not; does nothing where it is alone.

    At its end, a process waits for the others; they may be waiting for this one by then.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
