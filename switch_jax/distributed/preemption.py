"""Preemption: records SIGTERM and SIGINT; a second SIGINT has its default effect."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np


@contextmanager
def record_signals() -> Iterator[list[signal.Signals]]:
    """Yields a list to which the first SIGTERM and the first SIGINT are added on arrival.

    A second SIGINT has its default effect. Later SIGTERMs have none, because a scheduler may repeat
    it, as Slurm does when it preempts a job; it ends what takes too long with SIGKILL.

    Outside the main thread no handler is installed, and the list stays empty.
    """
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number, frame):
        if number not in received:
            received.append(signal.Signals(number))
        elif number == signal.SIGINT:
            if callable(earlier := previous[number]):
                earlier(number, frame)
            else:
                signal.signal(number, earlier)
                signal.raise_signal(number)

    previous = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_requests() -> Iterator[Callable[[], signal.Signals | None]]:
    """Yields a function to call after every step: returns the signal to stop for, None to go on.

    Signals are recorded as in `record_signals`. With several processes, a signal to one of them
    stops all, one step later; a process without a signal of its own stops for SIGTERM. All
    processes must call the function after every step.
    """
    with record_signals() as received:
        any_process = _make_any_process() if jax.process_count() > 1 else None
        pending: jax.Array | None = None  # whether any process had a signal one step ago

        def stop_request() -> signal.Signals | None:
            nonlocal pending
            if any_process is None:
                return received[0] if received else None
            # The value is read one step later, when it has been computed, so as not to wait.
            previous, pending = pending, any_process(bool(received))
            if previous is None or not previous:
                return None
            return received[0] if received else signal.SIGTERM

        yield stop_request


def _make_any_process() -> Callable[[bool], jax.Array]:
    """Returns a function that computes, asynchronously, whether a flag is set in any process."""
    shape = jax.process_count(), jax.local_device_count()
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("process", "device"))
    per_process, replicated = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("process",), ()))
    reduce_any = jax.jit(jnp.any, out_shardings=replicated)

    def any_process(flag: bool) -> jax.Array:
        local = np.array([flag])
        return reduce_any(jax.make_array_from_process_local_data(per_process, local, shape[:1]))

    return any_process
