"""Rendezvous: the processes of a run wait for each other before JAX connects them.

JAX waits minutes for a missing process and then aborts all processes without naming it. So process
0 first runs a small server on the port that JAX will use. Every other process is a client: it
connects, sends its index and facts, and waits. The server answers all clients with the same
message: no fault once all processes are there, or one sentence that says what is wrong.

A connection has three messages, of one line each: the challenge of the server, the signed hello
message of the client with a challenge of its own, and the signed {"fault": …} of the server. The
port is open to everybody: the server serves all connections at once, and ignores and counts those
that send anything else, too much or too slowly.
"""

import contextlib
import json
import os
import reprlib
import selectors
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from switch_jax.distributed.cluster import Launch
from switch_jax.distributed.rendezvous_messages import (
    MAX_MESSAGE_BYTES,
    MESSAGE_SECONDS,
    START_SECRET,
    SignatureError,
    challenge_in,
    decode,
    encode,
    new_challenge,
    receive_line,
    sign,
    verify,
)
from switch_jax.errors import UserError, printable

_NOTICE_SECONDS = 10.0  # after which one line names the missing processes
_POLL_SECONDS = 0.2
_MAX_NAMES = 8  # processes named in a message
_MAX_PROCESSES = 10**6
_MAX_TEXT = 200  # characters of another process's text in a message
_BACKLOG = 1024  # connections that the system accepts before the server does
_MAX_STRANGERS = 256  # open connections without a hello message, the oldest of which are closed
_WRONG_SECRET = "secret"  # refusal of a client, which is sent unsigned
_HELLO_TYPES = {"process": int, "count": int, "host": str, "facts": dict, "challenge": str}

_Hello = dict[str, Any]
# Of any value that another process may send, however long or deep
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = _MAX_TEXT
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 20


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
    fault, noticed = None, False
    with _Server(launch) as server:
        clients = server.clients
        while len(clients) < launch.count - 1 and fault is None:
            elapsed = time.monotonic() - start
            if elapsed > seconds:
                fault = (
                    f"{launch.count - 1 - len(clients)} of {launch.count} processes did not start"
                    f" within {seconds:.0f} s: {_missing_names(launch, clients)}; see there why,"
                    f" or start fewer.{server.ignored()}"
                )
                break
            if elapsed > _NOTICE_SECONDS and not noticed:
                noticed = True
                print(
                    f"Waiting for {_missing_names(launch, clients)}.{server.ignored()}",
                    file=sys.stderr,
                    flush=True,
                )
            for peer in server.poll():
                fault = _find_fault(launch, hello, peer.hello, clients)
                if fault is not None:
                    peer.answer(fault)
                    break
                clients[peer.hello["process"]] = peer
        if fault is None and (ignored := server.ignored()):
            print(ignored.strip(), file=sys.stderr, flush=True)
    for peer in clients.values():  # after the server has freed the port for JAX
        peer.answer(fault)
    return fault


@dataclass(eq=False)
class _Peer:
    """A connection to the server."""

    connection: socket.socket
    deadline: float  # for the whole hello message
    challenge: str = field(default_factory=new_challenge)
    received: bytearray = field(default_factory=bytearray)
    hello: _Hello = field(default_factory=dict)  # empty until it has arrived

    def answer(self, fault: str | None) -> None:
        """Sends the server's answer and closes the connection."""
        with self.connection, contextlib.suppress(OSError):  # a lost client is reported by JAX
            self.connection.settimeout(MESSAGE_SECONDS)
            self.connection.sendall(sign({"fault": fault}, self.hello["challenge"]))


class _Server:
    """The open port of process 0, until the end of the `with` statement.

    clients: processes of this run that are there, by index.
    """

    def __init__(self, launch: Launch):
        self._count = launch.count
        self._socket = _listen(launch)
        self._socket.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._strangers: list[_Peer] = []  # without a hello message yet, the oldest first
        self._ignored: Counter[str] = Counter()  # connections by reason
        self.clients: dict[int, _Peer] = {}

    def __enter__(self) -> "_Server":
        return self

    def __exit__(self, *error: object) -> None:
        for peer in self._strangers:
            peer.connection.close()
        self._selector.close()
        self._socket.close()

    def poll(self) -> Iterator[_Peer]:
        """Waits a moment, and yields peers whose hello message has arrived.

        Removes clients that have closed their connection: a process may have left and started
        again.
        """
        ready = {key.data for key, _ in self._selector.select(_POLL_SECONDS)}  # None: the port
        for index, client in list(self.clients.items()):
            if client in ready:  # it sends nothing after its hello message
                self._selector.unregister(self.clients.pop(index).connection)
                client.connection.close()
        for peer in self._strangers[:]:
            if time.monotonic() > peer.deadline:
                self._ignore(peer, "too slow")
            elif peer in ready:
                yield from self._receive(peer)
        if None in ready:
            self._accept()

    def ignored(self) -> str:
        """Returns a sentence about ignored connections, empty if there were none."""
        if not self._ignored:
            return ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self._ignored.items())
        return f" Ignored connections: {reasons}."

    def _accept(self) -> None:
        """Accepts all waiting connections."""
        while True:
            if len(self._strangers) >= _MAX_STRANGERS + self._count:
                self._ignore(self._strangers[0], "too many at once")
            try:
                connection = self._socket.accept()[0]
            except BlockingIOError:
                return
            except OSError:  # the connection is closed again, or no file descriptor is left
                if self._strangers:
                    self._ignore(self._strangers[0], "too many at once")
                return
            connection.setblocking(False)
            peer = _Peer(connection, time.monotonic() + MESSAGE_SECONDS)
            self._strangers.append(peer)
            self._selector.register(connection, selectors.EVENT_READ, peer)
            with contextlib.suppress(OSError):  # found when it is read
                connection.send(encode({"challenge": peer.challenge}))

    def _receive(self, peer: _Peer) -> Iterator[_Peer]:
        """Receives a part of a hello message; yields the peer if that was the last one."""
        try:
            block = peer.connection.recv(1 << 16)
            peer.received += block
            if not block or len(peer.received) > MAX_MESSAGE_BYTES:
                raise ValueError("no hello message")
            if not peer.received.endswith(b"\n"):
                return
            hello = verify(peer.received, peer.challenge)
            challenge_in(hello)
        except BlockingIOError:
            return
        except SignatureError:
            with contextlib.suppress(OSError):
                peer.connection.send(encode({"refused": _WRONG_SECRET}))
            self._ignore(peer, f"with another ${START_SECRET}")
        except (OSError, ValueError):
            self._ignore(peer, "of something else")
        else:
            if {key: type(value) for key, value in hello.items()} != _HELLO_TYPES:
                self._ignore(peer, "of something else")
            elif not 0 <= hello["process"] < hello["count"] <= _MAX_PROCESSES:
                self._ignore(peer, "with an impossible process index")
            else:
                self._strangers.remove(peer)
                peer.hello = hello
                yield peer

    def _ignore(self, peer: _Peer, reason: str) -> None:
        """Closes the connection of a stranger and counts it."""
        self._ignored[reason] += 1
        self._strangers.remove(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()


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
            with socket.create_connection(address, timeout=MESSAGE_SECONDS) as connection:
                return _ask_server(connection, hello, seconds)
        except OSError as error:
            reason = error.strerror or "no answer"
        except (ValueError, KeyError):
            reason = "something else answers"
        except SignatureError:
            return (
                f"Process 0 at {launch.coordinator} has another ${START_SECRET}; set the same for"
                " all processes."
            )
        time.sleep(_POLL_SECONDS)
    return (
        f"Process 0 cannot be reached at {launch.coordinator} ({reason}) for {seconds:.0f} s; start"
        " it there, or correct --coordinator."
    )


def _ask_server(connection: socket.socket, hello: _Hello, seconds: float) -> str | None:
    """Sends `hello` to the server of a connection and returns the fault that it answers.

    Raises `ValueError`, `KeyError` or `OSError` where no server of this package answers,
    `SignatureError` if its secret is another.
    """
    challenge = new_challenge()
    server_challenge = challenge_in(decode(receive_line(connection, MESSAGE_SECONDS)))
    connection.settimeout(MESSAGE_SECONDS)
    connection.sendall(sign(hello | {"challenge": challenge}, server_challenge))
    answer = receive_line(connection, seconds + MESSAGE_SECONDS)  # the server answers before that
    if decode(answer) == {"refused": _WRONG_SECRET}:
        raise SignatureError
    fault = verify(answer, challenge)["fault"]
    return None if fault is None else printable(str(fault))


def _find_fault(
    launch: Launch, server_hello: _Hello, hello: _Hello, clients: Mapping[int, _Peer]
) -> str | None:
    """Returns what is wrong with the hello message of a new client, None where nothing is."""
    index, host = hello["process"], _shortened(hello["host"])
    if hello["count"] != launch.count:
        return (
            f"Process {index} on {host} was started as one of {hello['count']} processes and"
            f" process 0 as one of {launch.count}; give all the same --num_processes."
        )
    hosts = {0: server_hello["host"]} | {i: peer.hello["host"] for i, peer in clients.items()}
    if index in hosts:
        return (
            f"Two processes, on {_shortened(hosts[index])} and {host}, were started as process"
            f" {index}; give each its own --process_id."
        )
    server_facts, facts = server_hello["facts"], hello["facts"]
    for name in (*server_facts, *facts):
        if server_facts.get(name) != facts.get(name):
            return (
                f"Process {index} on {host} has {_shortened(name)} ="
                f" {_repr.repr(facts.get(name))} and process 0 has"
                f" {_repr.repr(server_facts.get(name))}; start all processes alike."
            )
    return None


def _shortened(text: str) -> str:
    """Returns what another process says, for a message: printable, and of limited length."""
    return printable(text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…")


def _listen(launch: Launch) -> socket.socket:
    """Opens a server on JAX's port; raises `UserError` where the port is taken."""
    address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or launch.coordinator
    port = address.rpartition(":")[2]
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"JAX_COORDINATOR_BIND_ADDRESS must be HOST:PORT, not {address!r}.")
    # On all interfaces, as JAX does: on this host, the coordinator's name may resolve to another
    # interface than on the other hosts.
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(
            ("", int(port)), family=family, backlog=_BACKLOG, dualstack_ipv6=both
        )
    except OSError as error:
        raise UserError(
            f"Process 0 cannot listen on port {port} ({error.strerror}); choose another port in"
            " --coordinator."
        ) from error


def _missing_names(launch: Launch, clients: Mapping[int, _Peer]) -> str:
    """Returns the names of the missing processes, the first eight of them."""
    names = [launch.name(index) for index in range(1, launch.count) if index not in clients]
    return ", ".join(names[:_MAX_NAMES]) + (" …" if len(names) > _MAX_NAMES else "")
