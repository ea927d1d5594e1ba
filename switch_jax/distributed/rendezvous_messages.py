"""Messages of the rendezvous: lines of JSON, signed with the secret that a run's processes share.

Each side proves that it knows the secret, which is never sent itself: it signs its message (HMAC)
together with a random challenge of the other side, so that a recorded message is of no use.
Without a secret the key is empty, and whoever reaches the port can sign.
"""

import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

# Environment variable: a text that all processes of a run know, and nobody else.
START_SECRET = "SWITCH_JAX_START_SECRET"

MESSAGE_SECONDS = 5.0  # time limit for sending or receiving one message
MAX_MESSAGE_BYTES = 1 << 20
_MAX_CHALLENGE_LENGTH = 64


class SignatureError(Exception):
    """The message was signed with another secret."""


def new_challenge() -> str:
    """Returns a random text to be signed by the other side."""
    return secrets.token_hex(16)


def encode(message: Any) -> bytes:
    """Returns a message as a line."""
    return json.dumps(message).encode() + b"\n"


def decode(line: bytes | bytearray) -> Any:
    """Returns the message of a line; raises `ValueError` for anything else."""
    try:
        return json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def sign(message: Mapping[str, Any], challenge: str) -> bytes:
    """Returns a message as a line that is signed together with the receiver's challenge."""
    text = json.dumps(message)
    return encode([text, _signature(text, challenge)])


def verify(line: bytes | bytearray, challenge: str) -> dict[str, Any]:
    """Returns the message of a signed line.

    Raises `ValueError` for a line that is none, `SignatureError` for one of another secret.
    """
    match decode(line):
        case [str() as text, str() as signature]:
            pass
        case _:
            raise ValueError("not a signed message")
    if not hmac.compare_digest(signature.encode(), _signature(text, challenge).encode()):
        raise SignatureError
    message = decode(text.encode())
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def challenge_in(message: Any) -> str:
    """Returns the challenge in a message; raises `ValueError` for a message without one."""
    match message:
        case {"challenge": str() as challenge}:
            if challenge.isascii() and len(challenge) <= _MAX_CHALLENGE_LENGTH:
                return challenge
    raise ValueError("no challenge")


def receive_line(connection: socket.socket, seconds: float) -> bytes:
    """Returns the next line of a connection.

    Raises `OSError` if the whole line is not there within some seconds, `ValueError` if it is too
    long or cut off.
    """
    deadline = time.monotonic() + seconds
    line = bytearray()
    while not line.endswith(b"\n"):  # the other side sends nothing behind a line
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        block = connection.recv(1 << 16)
        line += block
        if not block or len(line) > MAX_MESSAGE_BYTES:
            raise ValueError("no line")
    return bytes(line)


def _signature(text: str, challenge: str) -> str:
    key = os.fsencode(os.environ.get(START_SECRET, ""))
    return hmac.digest(key, f"{challenge} {text}".encode(), "sha256").hex()
