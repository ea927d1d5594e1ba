"""Several processes as one run: how they start, agree, stop and end together."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from switch_jax import launch, rendezvous, signals
from switch_jax.errors import UserError

# Seconds that processes wait for each other at the start.
_START = "SWITCH_JAX_START_TIMEOUT"
# Seconds without a sign of life after which a process counts as dead and JAX ends the others. They
# come from a thread of JAX's own, so that a long compilation does not keep them up.
_HEARTBEAT = 60
_DAY = 24 * 60 * 60 * 1000  # milliseconds


def join(flags: launch.Launch | None, facts: Mapping[str, Any]) -> None:
    """Connects this process with the others of its run; does nothing where it is alone.

    Args:
      flags: what the command line says; None asks the launcher.
      facts: what must be the same in all of them.

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
    # It would take SIGTERM over, also from programs that never ask it, and is not told which
    # steps are ours and which Orbax asks about in its threads.
    jax.config.update("jax_enable_preemption_service", False)
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
def stop_requests() -> Iterator[Callable[[], signal.Signals | None]]:
    """Yields a function to call after every step: the signal to stop for, None to go on.

    The first SIGTERM or SIGINT asks to stop, a second one acts as it usually does. Of several
    processes one that is asked is enough: a step later all know of it, and stop; those that had
    no signal of their own stop for SIGTERM.

    Outside the main thread, signals are left alone.
    """
    with signals.received() as received:
        ask = _asked() if jax.process_count() > 1 else None
        known: jax.Array | None = None  # whether any process had been asked a step ago

        def stop() -> signal.Signals | None:
            nonlocal known
            if ask is None:
                return received[0] if received else None
            # Read a step later, for by then the devices have long answered.
            before, known = known, ask(bool(received))
            if before is None or not before:
                return None
            return received[0] if received else signal.SIGTERM

        yield stop


def _asked() -> Callable[[bool], jax.Array]:
    """A function that tells from one process whether it is so in any; its value may come later."""
    shape = jax.process_count(), jax.local_device_count()
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("process", "device"))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("process",), ()))
    combine = jax.jit(jnp.any, out_shardings=whole)

    def ask(mine: bool) -> jax.Array:
        flags = np.array([mine])
        return combine(jax.make_array_from_process_local_data(split, flags, shape[:1]))

    return ask


def leave(code: int) -> None:
    """Ends a process that has failed among others that have not; does nothing where it is alone.

    At its end, a process waits for the others; they may be waiting for this one by then.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
