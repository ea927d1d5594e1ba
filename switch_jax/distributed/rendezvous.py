"""Rendezvous: the processes of a run wait for each other before JAX connects them.

JAX waits minutes for a missing process and then aborts all processes without naming it. So process
0 first runs a small server on the port that JAX will use. Every other process is a client: it
connects, sends its index and facts, and waits. The server answers all clients with the same
message: no fault once all processes are there, or one sentence that says what is wrong.

A message is one line of JSON: the hello message of a client, then the server's {"fault": …}.
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

_NOTICE_SECONDS = 10.0  # after which one line names the missing processes
_MESSAGE_SECONDS = 5.0  # time limit for sending or receiving a message
_POLL_SECONDS = 0.2
_MAX_NAMES = 8  # processes named in a message
_MAX_MESSAGE_BYTES = 1 << 20
_HELLO_KEYS = {"process", "count", "host", "facts"}

_Hello = dict[str, Any]
_Client = tuple[socket.socket, _Hello]  # an open connection and the hello message from it


def wait_for_processes(launch: Launch, facts: Mapping[str, Any], seconds: float) -> None:
    """Returns once all processes have called it, with equal `facts` (JSON values by name).

    Raises `UserError`, in every process that has called it, if some are missing after `seconds`,
    and at once if two have the same index or differ in a fact. Process 0 waits `seconds`
    from its own start. Another process waits `seconds` for process 0 to start, and then as long as
    process 0 waits.
    """
    hello = {
        "process": launch.index,
        "count": launch.count,
        "host": socket.gethostname(),
        "facts": json.loads(json.dumps(facts)),
    }
    role = _serve if launch.index == 0 else _connect_to_server
    fault = role(launch, hello, seconds)
    if fault:
        raise UserError(fault)


def _serve(launch: Launch, hello: _Hello, seconds: float) -> str | None:
    """Process 0: waits for all clients and answers them; returns the fault, None without one."""
    start = time.monotonic()
    clients: dict[int, _Client] = {}  # by process index
    fault, noticed = None, False
    with _listen(launch) as server:
        while len(clients) < launch.count - 1 and fault is None:
            elapsed = time.monotonic() - start
            if elapsed > seconds:
                fault = (
                    f"{launch.count - 1 - len(clients)} of {launch.count} processes did not start"
                    f" within {seconds:.0f} s: {_missing_names(launch, clients)}; see there why,"
                    " or start fewer."
                )
                break
            if elapsed > _NOTICE_SECONDS and not noticed:
                noticed = True
                print(
                    f"Waiting for {_missing_names(launch, clients)}.", file=sys.stderr, flush=True
                )
            client = _accept(server)
            # After `_accept`: the new client may be a process that had left and started again.
            for index in _disconnected(clients):
                clients.pop(index)[0].close()
            if client:
                fault = _find_fault(launch, hello, client[1], clients)
                if fault is None:
                    clients[client[1]["process"]] = client
                else:
                    _answer(client[0], fault)
    for connection, _ in clients.values():  # after the server has freed the port for JAX
        _answer(connection, fault)
    return fault


def _connect_to_server(launch: Launch, hello: _Hello, seconds: float) -> str | None:
    """The other processes: sends `hello` to the server and returns the fault that it answers."""
    host, _, port = launch.coordinator.rpartition(":")
    start = time.monotonic()
    noticed, reason = False, ""
    while (elapsed := time.monotonic() - start) <= seconds:
        if elapsed > _NOTICE_SECONDS and not noticed:
            noticed = True
            print(f"Waiting for process 0 at {launch.coordinator}.", file=sys.stderr, flush=True)
        try:
            address = host.strip("[]"), int(port)
            with socket.create_connection(address, timeout=_MESSAGE_SECONDS) as connection:
                _send(connection, hello)
                connection.settimeout(seconds + _MESSAGE_SECONDS)  # the server answers before that
                return _receive(connection)["fault"]
        except OSError as error:
            reason = error.strerror or "no answer"
        except (ValueError, KeyError):
            reason = "something else answers"
        time.sleep(_POLL_SECONDS)
    return (
        f"Process 0 cannot be reached at {launch.coordinator} ({reason}) for {seconds:.0f} s; start"
        " it there, or correct --coordinator."
    )


def _find_fault(
    launch: Launch, server_hello: _Hello, hello: _Hello, clients: Mapping[int, _Client]
) -> str | None:
    """Returns what is wrong with the hello message of a new client, None where nothing is."""
    index, host = hello["process"], hello["host"]
    if hello["count"] != launch.count:
        return (
            f"Process {index} on {host} was started as one of {hello['count']} processes and"
            f" process 0 as one of {launch.count}; give all the same --num_processes."
        )
    hellos = {0: server_hello} | {i: client_hello for i, (_, client_hello) in clients.items()}
    if index in hellos:
        return (
            f"Two processes, on {hellos[index]['host']} and {host}, were started as process"
            f" {index}; give each its own --process_id."
        )
    server_facts, facts = server_hello["facts"], hello["facts"]
    for name in (*server_facts, *facts):
        if server_facts.get(name) != facts.get(name):
            return (
                f"Process {index} on {host} has {name} = {facts.get(name)!r} and process 0 has"
                f" {server_facts.get(name)!r}; start all processes alike."
            )
    return None


def _listen(launch: Launch) -> socket.socket:
    """Opens a server on JAX's port; raises `UserError` where the port is taken."""
    address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", launch.coordinator)
    port = int(address.rpartition(":")[2])
    # On all interfaces, as JAX does: on this host, the coordinator's name may resolve to another
    # interface than on the other hosts.
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


def _accept(server: socket.socket) -> _Client | None:
    """Returns the next client; None if there is none for a moment, or if it is no process."""
    server.settimeout(_POLL_SECONDS)
    try:
        connection = server.accept()[0]
    except OSError:
        return None
    connection.settimeout(_MESSAGE_SECONDS)
    try:
        hello = _receive(connection)
        if hello.keys() == _HELLO_KEYS and isinstance(hello["process"], int):
            return connection, hello
    except (OSError, ValueError, AttributeError):
        pass  # another protocol, or a closed connection
    connection.close()
    return None


def _disconnected(clients: Mapping[int, _Client]) -> list[int]:
    """Returns the indices of clients that closed their connection.

    A client sends nothing after its hello message, so anything to read means a closed connection.
    """
    poll = select.poll()
    index_of = {connection.fileno(): index for index, (connection, _) in clients.items()}
    for number in index_of:
        poll.register(number, select.POLLIN)
    return [index_of[number] for number, _ in poll.poll(0)]


def _answer(connection: socket.socket, fault: str | None) -> None:
    """Sends the server's answer and closes the connection."""
    with connection, contextlib.suppress(OSError):  # a lost client is reported by JAX
        _send(connection, {"fault": fault})


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Sends a message; raises `OSError` where the connection is closed."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Returns the next message; raises `ValueError` if it is none, `OSError` if none comes."""
    with connection.makefile("rb") as file:
        return json.loads(file.readline(_MAX_MESSAGE_BYTES))


def _missing_names(launch: Launch, clients: Mapping[int, _Client]) -> str:
    """Returns the names of the missing processes, the first eight of them."""
    names = [launch.name(index) for index in range(1, launch.count) if index not in clients]
    return ", ".join(names[:_MAX_NAMES]) + (" …" if len(names) > _MAX_NAMES else "")
