"""Being asked to stop: the first SIGTERM or SIGINT is noted, a second one acts as usual."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np


@contextmanager
def record_signals() -> Iterator[list[signal.Signals]]:
    """Yields a list to which the first SIGTERM and the first SIGINT are added when they come.

    Outside the main thread, signals are left alone.
    """
    found: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield found
        return

    def handle(number, frame):
        found.append(signal.Signals(number))
        signal.signal(number, previous[number])

    previous = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield found
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_requests() -> Iterator[Callable[[], signal.Signals | None]]:
    """Yields a function to call after every step: the signal to stop for, None to go on.

    The first SIGTERM or SIGINT asks to stop, a second one acts as it usually does. Of several
    processes one that is asked is enough: a step later all know of it, and stop; those that had
    no signal of their own stop for SIGTERM.

    Outside the main thread, signals are left alone.
    """
    with record_signals() as received:
        ask = _any_process() if jax.process_count() > 1 else None
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


def _any_process() -> Callable[[bool], jax.Array]:
    """A function that tells from one process whether it is so in any; its value may come later."""
    shape = jax.process_count(), jax.local_device_count()
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("process", "device"))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("process",), ()))
    combine = jax.jit(jnp.any, out_shardings=whole)

    def ask(mine: bool) -> jax.Array:
        flags = np.array([mine])
        return combine(jax.make_array_from_process_local_data(split, flags, shape[:1]))

    return ask
