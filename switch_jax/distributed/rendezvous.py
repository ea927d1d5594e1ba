"""The processes of a run meet before JAX connects them.

JAX waits minutes for a process that does not come and then ends all of them without saying which.
So process 0 first listens for the others on the port that JAX will use, and tells each of them
that all are there, or what is wrong: one sentence, the same for all.
"""

import contextlib
import json
import os
import select
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from switch_jax.distributed.cluster import Launch
from switch_jax.errors import UserError

_NOTICE = 10.0  # seconds after which one line tells who is waited for
_TALK = 5.0  # seconds that a message may take
_SHOWN = 8  # processes named in a message
_LARGEST = 1 << 20  # bytes of a message
_HELLO = {"process", "count", "host", "facts"}  # keys of a first message
_Guest = tuple[socket.socket, dict[str, Any]]  # connection and first message of one that waits


def meet_processes(launch: Launch, facts: Mapping[str, Any], seconds: float) -> None:
    """Returns once all processes are there, with the same `facts` (JSON values).

    Raises `UserError`, in every process that is there, after `seconds` without some of them, and
    at once where two are the same process or differ in a fact. Process 0 counts from its own
    start, so that the others may wait twice as long.
    """
    hello = {
        "process": launch.index,
        "count": launch.count,
        "host": socket.gethostname(),
        "facts": json.loads(json.dumps(facts)),
    }
    side = _receive_all if launch.index == 0 else _visit
    fault = side(launch, hello, seconds)
    if fault:
        raise UserError(fault)


def _receive_all(launch: Launch, hello: dict[str, Any], seconds: float) -> str | None:
    """Process 0: waits for the others and tells them what it returns, the fault if any."""
    began = time.monotonic()
    guests: dict[int, _Guest] = {}
    fault, told = None, False
    with _listen(launch) as door:
        while len(guests) < launch.count - 1 and fault is None:
            passed = time.monotonic() - began
            if passed > seconds:
                fault = (
                    f"{launch.count - 1 - len(guests)} of {launch.count} processes did not start"
                    f" within {seconds:.0f} s: {_missing(launch, guests)}; see there why, or start"
                    " fewer."
                )
                break
            if passed > _NOTICE and not told:
                told = True
                print(f"Waiting for {_missing(launch, guests)}.", file=sys.stderr, flush=True)
            arrived = _welcome(door)
            # Only now: one that has left may be the one that has arrived, started again.
            for index in _gone(guests):
                guests.pop(index)[0].close()
            if arrived:
                fault = _fault(launch, hello, arrived[1], guests)
                if fault is None:
                    guests[arrived[1]["process"]] = arrived
                else:
                    _tell(arrived[0], fault)
    for guest, _ in guests.values():  # now that the port is free for JAX
        _tell(guest, fault)
    return fault


def _visit(launch: Launch, hello: dict[str, Any], seconds: float) -> str | None:
    """The other processes: what process 0 says, None if all is well."""
    host, _, port = launch.coordinator.rpartition(":")
    began = time.monotonic()
    told, why = False, ""
    while (passed := time.monotonic() - began) <= seconds:
        if passed > _NOTICE and not told:
            told = True
            print(f"Waiting for process 0 at {launch.coordinator}.", file=sys.stderr, flush=True)
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_TALK) as talk:
                _write(talk, hello)
                talk.settimeout(seconds + _TALK)  # it waits for others no longer than that
                answer = _read(talk)
            return answer["fault"]
        except OSError as error:
            why = error.strerror or "no answer"
        except (ValueError, KeyError):
            why = "something else answers"
        time.sleep(0.2)
    return (
        f"Process 0 cannot be reached at {launch.coordinator} ({why}) for {seconds:.0f} s; start it"
        " there, or correct --coordinator."
    )


def _fault(
    launch: Launch,
    hello: dict[str, Any],
    other: dict[str, Any],
    guests: Mapping[int, _Guest],
) -> str | None:
    """What is wrong with one that came."""
    index, host = other["process"], other["host"]
    if other["count"] != launch.count:
        return (
            f"Process {index} on {host} was started as one of {other['count']} processes and"
            f" process 0 as one of {launch.count}; give all the same --num_processes."
        )
    twin = hello if index == 0 else guests[index][1] if index in guests else None
    if twin:
        return (
            f"Two processes, on {twin['host']} and {host}, were started as process {index}; give"
            " each its own --process_id."
        )
    mine, theirs = hello["facts"], other["facts"]
    for name in (*mine, *theirs):
        if mine.get(name) != theirs.get(name):
            return (
                f"Process {index} on {host} has {name} = {theirs.get(name)!r} and process 0 has"
                f" {mine.get(name)!r}; start all processes alike."
            )
    return None


def _listen(launch: Launch) -> socket.socket:
    """Where JAX will listen; raises `UserError` where that is taken."""
    address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", launch.coordinator)
    port = int(address.rpartition(":")[2])
    # On every interface, as JAX does: the name of the host may be that of another one here.
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(
            ("", port), family=family, backlog=launch.count, dualstack_ipv6=both
        )
    except OSError as error:
        raise UserError(
            f"Process 0 cannot listen on port {port} ({error.strerror}); choose another port in"
            " --coordinator."
        ) from error


def _welcome(door: socket.socket) -> _Guest | None:
    """The next process of a run that comes within a moment; others are sent away."""
    door.settimeout(0.2)
    try:
        guest = door.accept()[0]
    except OSError:
        return None
    guest.settimeout(_TALK)
    try:
        hello = _read(guest)
        if hello.keys() == _HELLO and isinstance(hello["process"], int):
            return guest, hello
    except (OSError, ValueError, AttributeError):
        pass  # it speaks another language, or has gone again
    guest.close()
    return None


def _gone(guests: Mapping[int, _Guest]) -> list[int]:
    """Those who have closed their connection; as long as all is well they say nothing more."""
    poll = select.poll()
    index_of = {guest.fileno(): index for index, (guest, _) in guests.items()}
    for number in index_of:
        poll.register(number, select.POLLIN)
    return [index_of[number] for number, _ in poll.poll(0)]


def _tell(guest: socket.socket, fault: str | None) -> None:
    with guest, contextlib.suppress(OSError):  # one that has left JAX will miss
        _write(guest, {"fault": fault})


def _write(talk: socket.socket, message: Mapping[str, Any]) -> None:
    talk.sendall(json.dumps(message).encode() + b"\n")


def _read(talk: socket.socket) -> dict[str, Any]:
    """A message; `ValueError` for anything else, `OSError` where nothing comes."""
    with talk.makefile("rb") as file:
        return json.loads(file.readline(_LARGEST))


def _missing(launch: Launch, guests: Mapping[int, _Guest]) -> str:
    names = [launch.name(index) for index in range(1, launch.count) if index not in guests]
    return ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
