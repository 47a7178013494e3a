"""``watcher.py`` for Windows: a process that outlives ``dblock run``, and ends the command before the lock is free.

It has a copy of the lock's socket and a handle of the command's job. If ``dblock run`` falls silent, it terminates the
job, waits until nobody of it is alive, and only then lets go of the socket by ending itself. Should both be killed at
one time, the job dies with its last handle; then nothing says in which order Windows closes job and socket.

There is no fork: it is a Python of its own that is told by a pipe what to watch. It is no child of ``dblock run``
either, but of one that has ended: tools that cancel a deployment look for the children of each process that they end.
It has another console, so that no event of this one reaches it, and is outside of the agent's job where that allows it.
"""

from __future__ import annotations

import sys

assert sys.platform == "win32"  # elsewhere watcher.py does this

import os
import socket
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from dblock.cli import windows_api
from dblock.errors import Error
from dblock.session import duplicate

if TYPE_CHECKING:
    from typing_extensions import Self

_READY = b"ready\n"
_DONE = b"done\n"
_CODE = "import sys; sys.path.insert(0, sys.argv[1]); from dblock.cli import windows_watcher as w; w.main(sys.argv[2])"


class Watcher:
    """The watcher, as ``dblock run`` sees it. Starts on entering; on leaving it is told that the command has ended."""

    def __init__(self, lock_socket: int) -> None:
        """Prepare to watch.

        Args:
            lock_socket: the descriptor of the held lock's connection.
        """
        self._lock_socket = lock_socket
        self._ended, self._end = socket.socketpair()

    def fileno(self) -> int:
        """A descriptor that becomes readable when the watcher has ended, which it should not."""
        return self._ended.fileno()

    def __enter__(self) -> Self:
        try:
            # Of its two pipes the other ends are inherited by the watcher alone: their end is somebody's end.
            child = windows_api.start_detached(
                _python("start"),
                _environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert child.stdin
            assert child.stdout
            self._to: IO[bytes] = child.stdin
            self._from: IO[bytes] = child.stdout
            child.wait()
            self._pid = int(self._from.readline())
            with duplicate(self._lock_socket) as copy:
                self._say(windows_api.share(copy, self._pid).hex().encode())
        except (OSError, ValueError) as error:
            raise Error(
                f"the process that watches over the command could not be started; the command was not run ({error})"
            ) from error
        return self

    def watch(self, job: windows_api.Job) -> None:
        """Name the job that is to be watched, before a command is in it."""
        try:
            self._say(b"%d" % job.give_to(self._pid))
        except (OSError, ValueError) as error:
            raise Error(
                f"the process that watches over the command has ended; the command was not run ({error})"
            ) from error
        # From here on it says nothing more, and what can be read is its end.
        threading.Thread(target=self._wait_for_its_end, daemon=True).start()

    def _say(self, text: bytes) -> None:
        self._to.write(text + b"\n")
        self._to.flush()
        if self._from.readline() != _READY:
            raise OSError("it does not answer")

    def _wait_for_its_end(self) -> None:
        self._from.read()
        self._end.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # it may have been killed
            self._to.write(_DONE)
            self._to.flush()
        with suppress(OSError):
            self._to.close()
            self._from.read()  # its end: by then its copy of the socket is closed
        self._ended.close()


def main(part: str) -> None:
    """What the two processes do: the first one starts the second, which is to have no living parent, and ends."""
    if part == "start":
        windows_api.start_detached(
            _python("watch"), os.environ, stdin=sys.stdin, stdout=sys.stdout, stderr=subprocess.DEVNULL
        )
        return
    try:
        _watch(sys.stdin.buffer, sys.stdout.buffer)
    finally:
        os._exit(0)


def _watch(heard: IO[bytes], said: IO[bytes]) -> None:
    from dblock.cli.windows import end_all

    def answer(text: bytes) -> None:
        said.write(text)
        said.flush()

    answer(b"%d\n" % os.getpid())
    with windows_api.shared(bytes.fromhex(heard.readline().decode())):
        answer(_READY)
        number = heard.readline().strip()
        if not number.isdigit():
            return  # it is over before a command was run
        job = windows_api.Job(int(number))
        answer(_READY)
        if heard.readline() != _DONE:
            end_all(job)


def _python(part: str) -> Sequence[str]:
    """This interpreter itself, and not what a virtual environment has in its place, which would be one process more."""
    return [
        getattr(sys, "_base_executable", "") or sys.executable,
        "-I",
        "-S",
        "-c",
        _CODE,
        str(Path(__file__).parents[2]),
        part,
    ]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "DBLOCK_URL"}
