"""A Windows that is made of Unix, in which the code for Windows runs: for ``test_windows.py``.

    python tests/windows.py ARGUMENTS…         as ``dblock`` there
    python tests/windows.py -c CODE ARGUMENTS…  as ``python`` there

What Windows lacks is taken away from `os` and `signal`. In place of ``dblock.cli.windows_api`` stands the module
below, with real processes: a job is a process group, Ctrl-Break is a SIGTERM for it, and for ``dblock run`` itself it
is SIGUSR2. A job does not die here with its last handle. ``FAKE_WINDOWS`` names a folder for what passes between the
processes; ``calls`` in it tells what was asked.
"""

from __future__ import annotations

import asyncio  # noqa: F401 - this and more, of the platform that is there
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from shutil import which
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch
from uuid import uuid4

with suppress(ImportError):  # the watcher has nothing but the interpreter
    import psycopg  # noqa: F401

if TYPE_CHECKING:
    from typing_extensions import Self

HERE = Path(__file__)
FOLDER = Path(os.environ.get("FAKE_WINDOWS", "/nonexistent"))
killpg, SIGKILL = os.killpg, signal.SIGKILL

ABSENT = {
    os: ("fork", "killpg", "setsid", "setpgid", "register_at_fork", "getpgrp", "geteuid", "tcgetpgrp", "tcsetpgrp"),
    signal: ("SIGKILL", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGCHLD", "SIGTSTP", "SIGCONT", "pthread_sigmask"),
}


def become() -> None:
    """Let this process look like one on Windows."""
    setattr(signal, "SIGBREAK", signal.SIGUSR2)  # noqa: B010 - mypy knows that it is not there
    for module, names in ABSENT.items():
        for name in names:
            delattr(module, name)
    sys.platform = "win32"
    sys.modules["dblock.cli.windows_api"] = api()
    # Windows waits for nothing but sockets.
    shutil.which = which_of_unix  # type: ignore[assignment]
    selectors.DefaultSelector = _SocketSelector  # type: ignore[misc,assignment]


def which_of_unix(name: str) -> str | None:
    with patch("sys.platform", "linux"):
        return which(name)


class _SocketSelector(selectors.SelectSelector):
    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        number = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        with socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as it:
            it.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)  # raises for what is none
        return super().register(fileobj, events, data)


def api() -> ModuleType:
    module = ModuleType("dblock.cli.windows_api")
    module.__dict__.update(
        INTERRUPTS=(signal.SIGINT, signal.SIGUSR2),
        ENDED_BY_BREAK=0xC000013A,
        Job=Job,
        start_suspended=start_suspended,
        resume=resume,
        send_break=send_break,
        start_detached=start_detached,
        share=share,
        shared=shared,
    )
    return module


def tell(call: str) -> None:
    with (FOLDER / "calls").open("a") as calls:
        calls.write(call + "\n")


def alive_in(group: str, process: Path) -> bool:
    try:
        state, _, its_group = process.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False  # ended meanwhile
    return its_group == group and state not in "ZX"


class Job:
    """A process group. Its handle is the number of a file in which the group stands."""

    def __init__(self, handle: int | None = None) -> None:
        self.handle = handle or uuid4().int % 10**9
        if not handle:
            self._file.write_text("")

    @property
    def _file(self) -> Path:
        return FOLDER / f"job-{self.handle}"

    def assign(self, pid: int) -> None:
        tell("assign")
        if os.environ.get("FAKE_WINDOWS_REFUSES") == "assign":
            raise PermissionError(13, "Access is denied")
        self._file.write_text(str(pid))

    def living(self) -> int:
        group = self._file.read_text()
        return sum(alive_in(group, path) for path in Path("/proc").glob("[0-9]*/stat")) if group else 0

    def terminate(self, exit_code: int) -> None:
        assert exit_code == 137
        tell("terminate")
        if group := self._file.read_text():
            with suppress(ProcessLookupError):
                killpg(int(group), SIGKILL)

    def let_go(self) -> None:
        tell("let go")

    def give_to(self, pid: int) -> int:
        os.kill(pid, 0)
        tell("give")
        return self.handle

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        tell("close")


class _Process(subprocess.Popen[bytes]):
    def kill(self) -> None:
        self.send_signal(SIGKILL)


def start_suspended(argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    if os.environ.get("FAKE_WINDOWS_REFUSES") == "start":
        raise OSError(8, "%1 is not a valid Win32 application")
    return _Process(
        ["/bin/sh", "-c", 'kill -STOP $$; exec "$@"', "sh", *argv], env=dict(environment), start_new_session=True
    )


def resume(pid: int) -> None:
    tell("resume")
    while b"T" not in Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:1]:
        pass  # it has not stopped itself yet
    os.kill(pid, 18)  # SIGCONT


def send_break(group: int) -> bool:
    tell("break")
    if os.environ.get("FAKE_WINDOWS_REFUSES") == "break":
        return False
    with suppress(ProcessLookupError):
        killpg(group, signal.SIGTERM)
    return True


def start_detached(argv: Sequence[str], environment: Mapping[str, str], **pipes: Any) -> subprocess.Popen[bytes]:
    """The code that is asked for, within this Windows again. Its arguments are those of an ``-I -S -c``."""
    if os.environ.get("FAKE_WINDOWS_REFUSES") == "watcher":
        argv = ["false"]
    else:
        isolated, no_site, c, code, *arguments = argv[1:]
        assert (isolated, no_site, c) == ("-I", "-S", "-c")
        argv = [argv[0], isolated, no_site, str(HERE), c, code, *arguments]
    return subprocess.Popen(argv, env=dict(environment), start_new_session=True, **pipes)


def share(connection: socket.socket, pid: int) -> bytes:
    os.kill(pid, 0)
    path = str(FOLDER / uuid4().hex)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    copy = connection.dup()

    def hand_over() -> None:
        with listening, copy, listening.accept()[0] as taker:
            socket.send_fds(taker, [b"x"], [copy.fileno()])

    threading.Thread(target=hand_over, daemon=True).start()
    return path.encode()


def shared(said: bytes) -> socket.socket:
    with socket.socket(socket.AF_UNIX) as giver:
        giver.connect(said)
        _, descriptors, _, _ = socket.recv_fds(giver, 1, 1)
    return socket.socket(fileno=descriptors[0])


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent.parent))
    become()
    if sys.argv[1] == "-c":
        code = sys.argv[2]
        sys.argv = ["-c", *sys.argv[3:]]
        exec(code)  # noqa: S102 - what `python -c` does
    else:
        from dblock.cli import main

        sys.exit(main())
