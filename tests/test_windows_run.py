"""``dblock run`` on Windows: where there is one, on it; elsewhere in the one that `tests.windows` makes of Unix.

So nothing here may need Unix. Whether a process lives, its connection to the test tells.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

import dblock
from tests.support import ended_afterwards

SETTINGS: dict[str, Any] = {}
if sys.platform == "win32":
    DBLOCK = (sys.executable, "-m", "dblock")
    SETTINGS["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    BREAK, NUMBER = signal.CTRL_BREAK_EVENT, signal.SIGBREAK
else:
    DBLOCK = (sys.executable, str(Path(__file__).with_name("windows.py")))
    BREAK = NUMBER = signal.SIGUSR2


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAKE_WINDOWS", str(tmp_path))
    return tmp_path


@pytest.fixture
def target() -> str:
    return f"Wöb {uuid4()}"


@contextmanager
def started(url: str, target: str, *options: str, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DBLOCK_")}
    process = subprocess.Popen(
        [*DBLOCK, "run", "--target", target, "--step", "b", *options, "--", *command],
        env=inherited | {"DBLOCK_URL": url, "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **SETTINGS,
    )
    with ended_afterwards(process):
        yield process


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def ended(process: subprocess.Popen[bytes], said: bytes | None = None) -> tuple[int, str, str]:
    stdout, stderr = (text.decode().replace("\r\n", "\n") for text in process.communicate(said, 60))
    return process.returncode, stdout, stderr


class Births:
    """Processes of a command, which connect to the test when they are ready, and are connected until they end."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(60)
        self.port = self._listening.getsockname()[1]
        self.living: list[socket.socket] = []

    def awaited(self, number: int) -> None:
        for _ in range(number):
            connection, _ = self._listening.accept()
            self.living.append(connection)
            assert connection.recv(1) == b"x"

    def all_dead(self, seconds: float = 0.1) -> bool:
        """Whether they are; a process that has ended may still be closing what it had."""
        return all(select.select([connection], [], [], seconds)[0] for connection in self.living)

    def close(self) -> None:
        for each in (self._listening, *self.living):
            each.close()


@pytest.fixture
def births() -> Iterator[Births]:
    found = Births()
    yield found
    found.close()


# A process and one that it starts, which is always deaf to Ctrl-Break.
FAMILY = """
import signal, socket, subprocess, sys
port, kind, who = sys.argv[1:]
event = getattr(signal, "SIGBREAK", signal.SIGTERM)
if kind == "deaf" or who == "child":
    signal.signal(event, signal.SIG_IGN)
elif kind == "handles":
    signal.signal(event, lambda *_: sys.exit(7))
if who == "parent":
    out = subprocess.DEVNULL
    subprocess.Popen([sys.executable, "-c", sys.argv[0], port, kind, "child"], stdin=out, stdout=out, stderr=out)
connection = socket.create_connection(("127.0.0.1", int(port)))
connection.sendall(b"x")
connection.settimeout(0.05)  # a handler's turn comes between two waits only
while True:
    try:
        if not connection.recv(1):
            break  # the test is over
    except socket.timeout:
        pass
"""


def family(births: Births, kind: str) -> list[str]:
    return python(f"import sys; sys.argv[0] = {FAMILY!r}; exec(sys.argv[0])", births.port, kind, "parent")


def end_the_session_of(url: str, target: str) -> None:
    from dblock.inspect import entries

    (pid,) = (entry.pid for entry in entries(url) if entry.key == dblock.key(target, "b").value)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(%s)", (pid,))


@pytest.mark.parametrize("code", [0, 3, 75])
def test_the_commands_own_exit_code(url: str, target: str, code: int) -> None:
    show = "import os, sys; print(sys.stdin.read(), os.environ['DBLOCK_HELD'], 'DBLOCK_URL' in os.environ)"
    with started(url, target, command=python(f"{show}; sys.exit({code})")) as process:
        assert ended(process, b"in") == (code, "in 1 False\n", "")


def test_arguments_arrive_as_they_are(url: str, target: str) -> None:
    arguments = ["a b", 'a"b', "%PATH%", "^&|", "Ω", "", "C:\\x\\"]
    with started(url, target, command=python("import sys; print(ascii(sys.argv[1:]))", *arguments)) as process:
        assert ended(process) == (0, f"{arguments!a}\n", "")


def test_no_such_command(url: str, target: str) -> None:
    with started(url, target, command=["no-such-command"]) as process:
        said = "dblock: no-such-command: there is no such program; the command was not run\n"
        assert ended(process) == (127, "", said)


def test_an_event_ends_the_wait(url: str, target: str) -> None:
    with dblock.lock(url, target=target, step="b"), started(url, target, command=python("print()")) as process:
        assert process.stderr
        assert process.stderr.readline().decode().startswith(f"dblock: waiting for b@{target}: held by ")
        process.send_signal(BREAK)
        code, stdout, stderr = ended(process)
        assert (code, stdout) == (128 + NUMBER, "")
        assert "the lock is not held" in stderr


def test_an_event_reaches_the_command(url: str, target: str, births: Births) -> None:
    with started(url, target, command=family(births, "handles")) as process:
        births.awaited(2)
        process.send_signal(BREAK)
        assert ended(process) == (7, "", "")
        assert not births.all_dead(0)  # the child goes on, without the lock
        with dblock.lock(url, target=target, step="b", timeout=0):
            pass


@pytest.mark.parametrize("kind", ["deaf", "obedient"])
def test_a_lost_lock_ends_the_command_and_all_that_it_started(url: str, target: str, births: Births, kind: str) -> None:
    with started(url, target, "--grace", "100ms", command=family(births, kind)) as process:
        births.awaited(2)
        end_the_session_of(url, target)
        code, stdout, stderr = ended(process)
        assert (code, stdout) == (76, "")
        assert stderr.splitlines()[-1].startswith("dblock: b@")
        assert stderr.rstrip().endswith("the command was ended by force") == (kind == "deaf")
        assert births.all_dead()


def test_when_dblock_run_is_killed_the_command_is_dead_before_the_lock_is_free(
    url: str, target: str, births: Births
) -> None:
    with started(url, target, command=family(births, "deaf")) as process:
        births.awaited(2)
        process.kill()
        with dblock.lock(url, target=target, step="b", timeout=60):
            assert births.all_dead()
