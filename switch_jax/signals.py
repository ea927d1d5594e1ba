"""Being asked to stop: the first SIGTERM or SIGINT is noted, a second one acts as usual."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def received() -> Iterator[list[signal.Signals]]:
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
