"""The command that runs under the lock: its process group, its terminal, and the signals on their way to it.

From before the wait for the lock until after the command's end no signal is lost. While the lock is waited for, one
ends the wait. From the grant on, they are only noted in a pipe by Python's wakeup descriptor, and one loop reads them
there one after the other, together with the news that the command has ended: so none is ever sent to a process group
whose number may be another's by now.
"""

from __future__ import annotations

import sys

assert sys.platform != "win32"  # whoever imports this has refused Windows

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from dblock.cli.messages import say
from dblock.cli.watcher import Watcher, has_living
from dblock.errors import DatabaseError, LockLost

if TYPE_CHECKING:
    from typing_extensions import Self

    from dblock.lock import Lock

_PAUSE_SECONDS = 0.02

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


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


class Signals:
    """The signals that a command is to get, from its `__enter__` on.

    Attributes:
        interrupting: whether a signal raises `Interrupted` in what is being done; a second one then ends the process
            on the spot. Otherwise it is kept for `received`.
    """

    def __init__(self) -> None:
        self.interrupting = True
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        os.set_blocking(self._read, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # Also where SIGCHLD was ignored: the system would then throw the command's exit code away.
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, _note)
        for number in _FORWARDED:
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
        os.close(self._read)
        os.close(self._write)

    def fileno(self) -> int:
        """A descriptor that is readable when `received` has something to tell."""
        return self._read

    def received(self) -> list[int]:
        """The numbers of the signals that arrived since the last call, SIGCHLD among them."""
        try:
            return list(os.read(self._read, 4096))
        except BlockingIOError:
            return []

    def reset_in_child(self) -> None:
        """Undo all of this in the command's process, before it runs the command."""
        signal.set_wakeup_fd(-1)
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        if not self.interrupting:
            return
        if self._interrupted:
            # The server does not answer, or not fast enough for somebody. It gives back what this session has when
            # it sees the connection's end.
            say(f"interrupted again by {signal.Signals(number).name}: ended without waiting for the server")
            os._exit(128 + number)
        self._interrupted = True
        raise Interrupted(number)


def _note(_number: int, _frame: FrameType | None) -> None:
    """Python writes the number to the wakeup descriptor; that is all."""


class _Terminal:
    """The terminal on stdin, if it is one: only the process group in its foreground may read from it."""

    def __init__(self) -> None:
        self._own_group = os.getpgrp()
        self.exists = os.isatty(0)

    def give_to(self, group: int) -> bool:
        """Put a group into the foreground in our place. False: we are not there."""
        return self._pass_on(self._own_group, group)

    def take_from(self, group: int) -> bool:
        """Come back to the foreground in its place. False: it is not there."""
        return self._pass_on(group, self._own_group)

    def _pass_on(self, giver: int, taker: int) -> bool:
        if not self.exists:
            return False
        # Who is not in the foreground would be stopped for this.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        try:
            if os.tcgetpgrp(0) != giver:
                return False
            os.tcsetpgrp(0, taker)
        except OSError:  # hung up, or not the terminal of this session
            return False
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return True


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    signals: Signals,
    watcher: Watcher,
    lock: Lock,
    *,
    grace: float,
) -> int:
    """Run a command in a process group of its own, to its end.

    Args:
        command: its name or path, and its arguments. There is no shell.
        environment: all of its environment.
        signals: are forwarded to the whole group.
        watcher: is told the group before the command runs.
        lock: is held, and watched meanwhile. Where it is lost, the group is ended: by SIGTERM, after the grace by
            SIGKILL.
        grace: seconds.

    Returns:
        Its exit code; where a signal ended it, the signal's number below 0.

    Raises:
        CommandNotStarted: it cannot be found or executed.
        Interrupted: a signal arrived after the grant and before the start.
    """
    terminal = _Terminal()
    for number in signals.received():
        if number != signal.SIGCHLD:
            raise Interrupted(number)
    process = _start(command, environment, signals, watcher, terminal)
    try:
        _see_to_its_end(process, signals, watcher, terminal, lock)
        if process.returncode is None:
            _end(process, grace)
    finally:
        if process.returncode is None:
            # Whatever went wrong here: the lock is given back next, so the command must not run on.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        terminal.take_from(process.pid)
    code: int = process.returncode
    return code


def _start(
    command: Sequence[str],
    environment: Mapping[str, str],
    signals: Signals,
    watcher: Watcher,
    terminal: _Terminal,
) -> subprocess.Popen[bytes]:
    # Blocked from here until the child has done what follows: a signal meant for it must not be taken by handlers
    # that are ours. In this process it is delivered afterwards.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)

    def prepare() -> None:
        os.setpgid(0, 0)
        terminal.give_to(os.getpgrp())  # before it runs, or its first read would stop it
        watcher.watch_own_group()
        signals.reset_in_child()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        # There are no threads that could have held a lock at the fork. Descriptors but 0, 1 and 2 are closed.
        return subprocess.Popen(command, env=environment, preexec_fn=prepare)  # noqa: PLW1509
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CommandNotStarted(f"{command[0]}: {error.strerror}", 127) from error
    except OSError as error:
        raise CommandNotStarted(f"{command[0]}: {error.strerror}", 126) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _see_to_its_end(
    process: subprocess.Popen[bytes], signals: Signals, watcher: Watcher, terminal: _Terminal, lock: Lock
) -> None:
    """Return when the command has ended, or the lock is lost."""
    heartbeat = lock.heartbeat or None
    next_check = time.monotonic() + (heartbeat or 0)
    with selectors.DefaultSelector() as selector:
        selector.register(signals, selectors.EVENT_READ)
        selector.register(watcher, selectors.EVENT_READ)
        selector.register(lock.fileno(), selectors.EVENT_READ)
        while process.returncode is None:
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
                if number == signal.SIGCHLD:
                    _ask_after(process, terminal)
                elif process.returncode is None:
                    _forward(number, process.pid)


def _is_still_held(lock: Lock) -> bool:
    """Ask the server. A loss is said now, and decides the exit code at the release."""
    try:
        lock.check()
    except LockLost:
        return False
    except DatabaseError:
        return True  # somebody has cancelled the question; there will be another one
    return True


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a process group, all of it. Its first process is asked for last, so that the group's number stays its own."""
    deadline = time.monotonic() + grace
    _forward(signal.SIGTERM, process.pid)
    _forward(signal.SIGCONT, process.pid)
    while time.monotonic() < deadline and has_living(process.pid):
        time.sleep(_PAUSE_SECONDS)
    _forward(signal.SIGKILL, process.pid)
    process.wait()


def _ask_after(process: subprocess.Popen[bytes], terminal: _Terminal) -> None:
    """Learn whether the command has ended, or was stopped from its terminal."""
    pid, status = os.waitpid(process.pid, os.WNOHANG | (os.WUNTRACED if terminal.exists else 0))
    if pid == 0:
        return
    if not os.WIFSTOPPED(status):
        process.returncode = os.waitstatus_to_exitcode(status)
        return
    if not terminal.give_to(process.pid):
        # Ctrl-Z, or a read in the background: stop too, so that the shell comes back. Its fg or bg wakes us here.
        terminal.take_from(process.pid)
        os.kill(os.getpid(), signal.SIGTSTP)
        terminal.give_to(process.pid)
    os.killpg(process.pid, signal.SIGCONT)


def _forward(number: int, group: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass  # its end will be the next news
    except PermissionError as error:
        say(f"{signal.Signals(number).name} cannot be passed on to the command: {error.strerror}")
