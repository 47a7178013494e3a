"""What a command under the lock has in common on Unix and on Windows; the rest is in ``process.py`` and ``windows.py``.

From before the wait for the lock until after the command's end no signal is lost. While the lock is waited for, one
ends the wait. From the grant on, they are only noted in a socket by Python's wakeup descriptor, and one loop reads them
there one after the other, together with the news that the command has ended.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from dblock.cli.messages import say
from dblock.errors import DatabaseError, LockLost

if TYPE_CHECKING:
    from typing_extensions import Self

    from dblock.blocking import Lock

PAUSE_SECONDS = 0.02


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end of a wait. psycopg cancels its statement for a KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


class CommandNotStarted(Exception):  # noqa: N818 - says what happened
    """The command could not be started: 127 where there is none, 126 where it cannot be executed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Ended:
    """How the command ended.

    Attributes:
        exit_code: what ``dblock run`` exits with.
        by: what ended it; None: it did so itself.
    """

    exit_code: int
    by: str | None = None

    def __str__(self) -> str:
        return (
            f"the command was ended by {self.by}" if self.by else f"the command ended with exit code {self.exit_code}"
        )


class HasFileno(Protocol):
    """What a selector can wait for."""

    def fileno(self) -> int: ...


class Signals:
    """The signals that a command is to get, from its `__enter__` on.

    Attributes:
        interrupting: whether a signal raises `Interrupted` in what is being done; a second one then ends the process
            on the spot. Otherwise it is kept for `received`.
    """

    def __init__(self, forwarded: Sequence[int], noted: Sequence[int] = ()) -> None:
        """Prepare.

        Args:
            forwarded: are for the command, and interrupt.
            noted: are only kept for `received`.
        """
        self.interrupting = True
        self._forwarded = forwarded
        self._noted = noted
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._read, self._write = socket.socketpair()  # no pipe, for which Windows cannot wait
        self._read.setblocking(False)
        self._write.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in self._noted:
            self._before[number] = signal.signal(number, _note)
        for number in self._forwarded:
            # What was ignored from the start, as SIGHUP is under nohup, stays ignored, by the command too.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._read.close()
        self._write.close()

    def fileno(self) -> int:
        """A descriptor that is readable when `received` has something to tell."""
        return self._read.fileno()

    def received(self) -> list[int]:
        """The numbers of the signals that arrived since the last call, those noted among them; and 0 for a `wake`."""
        try:
            return list(self._read.recv(4096))
        except BlockingIOError:
            return []

    def wake(self) -> None:
        """Let `fileno` become readable, from any thread."""
        with suppress(OSError):  # full, which wakes as well; or closed
            self._write.send(b"\0")

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        if not self.interrupting:
            return
        if self._interrupted:
            # The server does not answer, or not fast enough for somebody. It gives back what this session has when
            # it sees the connection's end.
            say(f"interrupted again by {signal_name(number)}: ended without waiting for the server")
            os._exit(128 + number)
        self._interrupted = True
        raise Interrupted(number)


def _note(_number: int, _frame: FrameType | None) -> None:
    """Python writes the number to the wakeup descriptor; that is all."""


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most of the real-time signals have no name
        return f"signal {number}"


def see_to_its_end(
    lock: Lock, signals: Signals, watcher: HasFileno, *, running: Callable[[], bool], hear: Callable[[int], None]
) -> None:
    """Return when the command has ended, or the lock is lost.

    Args:
        lock: is held, and watched meanwhile.
        signals: what arrives there is heard.
        watcher: becomes readable when the watcher has ended.
        running: whether the command runs, as far as it was heard.
        hear: takes what `Signals.received` tells.
    """
    heartbeat = lock.heartbeat or None
    next_check = time.monotonic() + (heartbeat or 0)
    with selectors.DefaultSelector() as selector:
        selector.register(signals, selectors.EVENT_READ)
        selector.register(watcher, selectors.EVENT_READ)
        selector.register(lock.fileno(), selectors.EVENT_READ)
        while running():
            nap = heartbeat and max(0.0, next_check - time.monotonic())
            ready = [key.fileobj for key, _ in selector.select(nap)]
            if lock.fileno() in ready and not lock.stands():
                return
            if heartbeat and time.monotonic() >= next_check:
                if not _is_still_held(lock):
                    return
                next_check = time.monotonic() + heartbeat
            if watcher in ready:
                say("the watcher process was ended: killed now, this would free the lock while the command runs on")
                selector.unregister(watcher)
            for number in signals.received():
                hear(number)


def _is_still_held(lock: Lock) -> bool:
    """Ask the server. A loss is said now, and decides the exit code at the release."""
    try:
        lock.check()
    except LockLost:
        return False
    except DatabaseError:
        return True  # somebody has cancelled the question; there will be another one
    return True
