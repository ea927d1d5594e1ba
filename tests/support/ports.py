"""Ports of this machine that no process listens on."""

import contextlib
import socket
from collections.abc import Sequence


def free_ports(count: int, among: Sequence[int] = (0,)) -> list[int]:
    """Returns ports that are free now, all different.

    among: ports to try, in order, for each; 0 stands for any.
    """
    with contextlib.ExitStack() as opened:
        return [_open(among, opened).getsockname()[1] for _ in range(count)]


def free_port(among: Sequence[int] = (0,)) -> int:
    """Returns a port that is free now."""
    return free_ports(1, among)[0]


def _open(among: Sequence[int], opened: contextlib.ExitStack) -> socket.socket:
    for port in among:
        listener = opened.enter_context(socket.socket())
        with contextlib.suppress(OSError):
            listener.bind(("", port))
            return listener
    raise AssertionError("no free port")
