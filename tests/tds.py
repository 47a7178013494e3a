"""Recorded replies of a SQL Server endpoint, played back to the real pymssql where no such server runs.

Only what the server sends is kept, one piece for each message of the client's; what the client sends, its login among
it, is not. The player answers each whole message with the next piece, and ends the connection where the recording does.

    python -m tests.tds        records tests/tds-replies.json anew, from the server in DBLOCK_TEST_MSSQL_URL
"""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import dblock

RECORDINGS = Path(__file__).parent / "tds-replies.json"
_HEADER_BYTES = 8
_LAST_PACKET = 0x01  # in the second byte of a packet's header
_TARGET, _STEP = "web-01", "recorded"


def recordings() -> dict[str, list[bytes]]:
    kept = json.loads(RECORDINGS.read_text())
    return {name: [base64.b64decode(piece) for piece in pieces] for name, pieces in kept.items()}


@contextmanager
def player(pieces: list[bytes]) -> Iterator[str]:
    """Play one recording to the first client that comes. Yields the URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def play() -> None:
            with suppress(OSError):
                client, _ = listening.accept()
                with client:
                    for piece in pieces:
                        if not _message(client):
                            return
                        client.sendall(piece)
                    if not pieces[-1]:
                        return  # the server died here
                    _message(client)

        thread = threading.Thread(target=play, daemon=True)
        thread.start()
        yield f"mssql+pymssql://recorded@127.0.0.1:{listening.getsockname()[1]}/shared"
    thread.join(30)


@contextmanager
def recorder(url: str) -> Iterator[tuple[str, list[bytes]]]:
    """Carry one connection to a server. Yields a URL, and the list that fills with the server's replies."""
    server = urlsplit(url)
    pieces: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def carry() -> None:
            with suppress(OSError):
                client, _ = listening.accept()
                behind = socket.create_connection((server.hostname, server.port or 1433))
                with client, behind:
                    while message := _message(client):
                        behind.sendall(message)
                        pieces.append(_message(behind))
                        client.sendall(pieces[-1])

        thread = threading.Thread(target=carry, daemon=True)
        thread.start()
        here = server._replace(netloc=server.netloc.rpartition("@")[0] + f"@127.0.0.1:{listening.getsockname()[1]}")
        yield here.geturl(), pieces
    thread.join(30)


def _message(peer: socket.socket) -> bytes:
    """One whole message: packets up to the one that says it is the last. Empty at the connection's end."""
    message = b""
    while True:
        header = _exactly(peer, _HEADER_BYTES)
        if not header:
            return b""
        message += header + _exactly(peer, int.from_bytes(header[2:4], "big") - _HEADER_BYTES)
        if header[1] & _LAST_PACKET:
            return message


def _exactly(peer: socket.socket, number: int) -> bytes:
    found = b""
    while len(found) < number:
        more = peer.recv(number - len(found))
        if not more:
            return b""
        found += more
    return found


# --- what is recorded -------------------------------------------------------------------------------------------------


def _granted(url: str) -> None:
    with dblock.lock(url, target=_TARGET, step=_STEP, tenant="T1"):
        pass


def _refused(url: str) -> None:
    with dblock.lock(os.environ["DBLOCK_TEST_MSSQL_URL"], target=_TARGET, step=_STEP, tenant="T1"):
        assert not dblock.lock(url, target=_TARGET, step=_STEP, tenant="T2").acquire(timeout=1)


def _checked(url: str) -> None:
    with dblock.lock(url, target=_TARGET, step=_STEP) as held:
        held.check()


SCENES: dict[str, Callable[[str], None]] = {"granted": _granted, "refused": _refused, "checked": _checked}


def _record() -> None:
    found: dict[str, list[str]] = {}
    for name, scene in SCENES.items():
        with recorder(os.environ["DBLOCK_TEST_MSSQL_URL"]) as (url, pieces):
            scene(url)
        found[name] = [base64.b64encode(piece).decode() for piece in pieces if piece]
    RECORDINGS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    _record()
