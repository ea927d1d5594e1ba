"""The rendezvous of the processes of a run, and strangers at its port."""

import contextlib
import json
import socket
import threading
import time

import pytest

from switch_jax.distributed import rendezvous as module
from switch_jax.distributed.cluster import Launch
from switch_jax.distributed.rendezvous import wait_for_processes
from switch_jax.distributed.rendezvous_messages import sign
from switch_jax.errors import UserError
from tests.support.ports import free_port


class Rendezvous:
    """Threads that meet; `errors` has the error of each (None: no error), in order of start."""

    def __init__(self, count):
        self.port, self.count = free_port(), count
        self.errors, self._threads = [], []

    def start(self, *indices, seconds=5.0, facts=()):
        for index in indices:
            position = len(self.errors)
            self.errors.append(None)
            arguments = (index, position, dict(facts), seconds)
            self._threads.append(threading.Thread(target=self._run, args=arguments))
            self._threads[-1].start()

    def _run(self, index, position, facts, seconds):
        try:
            wait_for_processes(Launch(f"localhost:{self.port}", self.count, index), facts, seconds)
        except UserError as error:
            self.errors[position] = str(error)

    def end(self):
        for thread in self._threads:
            thread.join(timeout=30)
            assert not thread.is_alive()
        return self.errors

    def connect(self):
        """Returns a connection to the server, with a limit for each call, and its challenge."""
        for _ in range(200):
            with contextlib.suppress(OSError):
                connection = socket.create_connection(("localhost", self.port), timeout=5)
                return connection, json.loads(connection.recv(1000))["challenge"]
            time.sleep(0.02)
        raise AssertionError("no server")


@pytest.fixture
def meet(monkeypatch):
    monkeypatch.delenv("SWITCH_JAX_START_SECRET", raising=False)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.02)
    return Rendezvous


def hello(**changes):
    message = {"process": 1, "count": 3, "host": "x", "facts": {}, "challenge": "c"}
    return message | changes


def test_processes_with_equal_facts_meet(meet):
    run = meet(4)
    run.start(3, 1, 0, 2, facts={"a": 1})
    assert run.end() == [None] * 4


def test_missing_processes_are_named(meet):
    run = meet(4)
    run.start(0, 2, seconds=0.5)
    first, second = run.end()
    assert first == second and "2 of 4" in first and "process 1, process 3;" in first


def test_a_missing_process_0_is_named(meet):
    run = meet(2)
    run.start(1, seconds=0.3)
    assert "Process 0 cannot be reached at localhost:" in run.end()[0]


def test_two_processes_with_one_index_are_named(meet):
    run = meet(3)
    run.start(0, 1, 1, seconds=2)
    first, *others = run.end()
    assert "started as process 1" in first and first in others


def test_different_facts_are_named(meet):
    run = meet(2)
    run.start(0, facts={"train.seed": 0, "verb": "train"})
    run.start(1, facts={"train.seed": 7, "verb": "train"})
    first, second = run.end()
    assert first == second and "Process 1 on" in first
    assert "has train.seed = 7 and process 0 has 0" in first


def test_a_process_that_left_may_come_again(meet):
    run = meet(3)
    run.start(0)
    connection, challenge = run.connect()
    connection.sendall(sign(hello(), challenge))
    time.sleep(0.1)
    connection.close()
    run.start(1, 2)
    assert run.end() == [None] * 3


def test_strangers_are_ignored_and_counted(meet, monkeypatch, capsys):
    """All kinds at once, before and while the processes of the run come, and none delays them."""
    monkeypatch.setenv("SWITCH_JAX_START_SECRET", "of the test")
    run = meet(3)
    run.start(0, seconds=20)
    slow, _ = run.connect()
    slow.sendall(b'{"process"')  # and nothing more: slow loris
    silent = [run.connect()[0] for _ in range(200)]
    impossible, challenge = run.connect()
    impossible.sendall(sign(hello(process=7), challenge))
    countless, challenge = run.connect()
    countless.sendall(sign(hello(count=10**4000), challenge))
    surrogate, challenge = run.connect()
    surrogate.sendall(sign(hello(challenge="\ud800"), challenge))
    mistyped, challenge = run.connect()
    mistyped.sendall(sign(hello(process=True), challenge))
    replayed, _ = run.connect()
    replayed.sendall(sign(hello(), challenge))  # of another connection
    garbage, _ = run.connect()
    garbage.sendall(b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n")
    nested, _ = run.connect()
    nested.sendall(b"[" * 100_000 + b"\n")
    halfway, _ = run.connect()
    halfway.sendall(b'["{')
    halfway.close()
    endless, _ = run.connect()
    with contextlib.suppress(OSError):
        for _ in range(1 << 10):  # 1 GiB, if nobody objects
            endless.sendall(b"x" * (1 << 20))
        raise AssertionError("1 GiB has been received")
    with monkeypatch.context() as other:
        other.setenv("SWITCH_JAX_START_SECRET", "another")
        impostor, challenge = run.connect()
        line = sign(hello(), challenge)
    impostor.sendall(line)
    assert json.loads(impostor.recv(1000)) == {"refused": "secret"}
    start = time.monotonic()
    run.start(1, 2, seconds=20)
    assert run.end() == [None] * 3
    assert time.monotonic() - start < 4  # less than a slow stranger may take
    text = capsys.readouterr().err
    assert text.startswith("Ignored connections: ") and text.count("\n") == 1
    assert "2 with an impossible process index" in text
    assert "2 with another $SWITCH_JAX_START_SECRET" in text
    assert "6 of something else" in text
    for connection in (
        slow,
        *silent,
        impossible,
        countless,
        surrogate,
        mistyped,
        replayed,
        garbage,
        nested,
        endless,
    ):
        connection.close()


def test_a_slow_stranger_is_told_in_the_message_of_the_time_limit(meet, monkeypatch):
    """A byte now and then does not prolong the time for a message."""
    monkeypatch.setattr(module, "MESSAGE_SECONDS", 0.2)
    run = meet(2)
    run.start(0, seconds=0.8)
    connection, _ = run.connect()
    with connection, contextlib.suppress(OSError):
        while True:
            connection.sendall(b"[")
            time.sleep(0.002)  # the server finds something to read whenever it looks
    assert "start fewer. Ignored connections: 1 too slow." in run.end()[0]


def test_a_flood_of_silent_connections_is_survived(meet, monkeypatch):
    monkeypatch.setattr(module, "_MAX_STRANGERS", 4)
    run = meet(2)
    run.start(0)
    silent = [run.connect()[0] for _ in range(20)]
    run.start(1)
    assert run.end() == [None, None]
    for connection in silent:
        connection.close()


def test_a_process_with_another_secret_is_told_so(meet, monkeypatch):
    run = meet(2)
    monkeypatch.setenv("SWITCH_JAX_START_SECRET", "a")
    run.start(0, seconds=1)
    connection, _ = run.connect()
    connection.close()
    # The environment is that of both threads: a server that refuses is as good as another secret.
    monkeypatch.setattr(module, "verify", lambda *_: (_ for _ in ()).throw(module.SignatureError))
    run.start(1, seconds=1)
    first, second = run.end()
    assert "Process 0 at localhost:" in second and "another $SWITCH_JAX_START_SECRET" in second
    assert "1 with another $SWITCH_JAX_START_SECRET" in first


def test_a_false_server_cannot_answer_for_process_0(meet, monkeypatch):
    """It has the challenge of a client, but not the secret; and it may send anything."""
    monkeypatch.setenv("SWITCH_JAX_START_SECRET", "of the test")
    run = meet(2)
    with socket.create_server(("localhost", run.port)) as server:
        run.start(1, seconds=0.3)
        connection, _ = server.accept()
        with connection:
            connection.sendall(b'{"challenge": "a"}\n')
            connection.recv(1 << 16)
            connection.sendall(json.dumps(['{"fault": null}', "00"]).encode() + b"\n")
            assert "another $SWITCH_JAX_START_SECRET" in run.end()[0]


def test_what_a_process_says_is_printed_escaped(meet):
    run = meet(2)
    run.start(0)
    connection, challenge = run.connect()
    name = "a\x1b[2J\n" + "b" * 10_000
    nested: list = []
    for _ in range(900):
        nested = [nested]
    connection.sendall(
        sign(hello(count=2, host="h\x07", facts={name: ["c\x1b", nested]}), challenge)
    )
    message = run.end()[0]
    connection.close()
    assert r"Process 1 on h\x07 has a\x1b[2J\nbbb" in message and r"'c\x1b'" in message
    assert message.isprintable() and len(message) < 600


def test_a_taken_port_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on port {port}"):
            wait_for_processes(Launch(f"localhost:{port}", 2, 0), {}, 1)


def test_a_bind_address_without_a_port_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "localhost")
    with pytest.raises(UserError, match="JAX_COORDINATOR_BIND_ADDRESS must be HOST:PORT"):
        wait_for_processes(Launch("localhost:1", 2, 0), {}, 1)
