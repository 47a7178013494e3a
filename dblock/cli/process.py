"""The command that runs under the lock, on Unix: its process group, its terminal, and the signals on their way to it.

The end of the command and the signals for it are read one after the other: so none is ever sent to a process group
whose number may be another's by now.
"""

from __future__ import annotations

import sys

assert sys.platform != "win32"  # there windows.py does this

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dblock.cli import command
from dblock.cli.command import PAUSE_SECONDS, CommandNotStarted, Ended, Interrupted, see_to_its_end
from dblock.cli.messages import say
from dblock.cli.watcher import Watcher, has_living

if TYPE_CHECKING:
    from dblock.blocking import Lock

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Signals(command.Signals):
    """The signals that a command is to get, and the one that tells of its end."""

    def __init__(self) -> None:
        # SIGCHLD also where it was ignored: the system would then throw the command's exit code away.
        super().__init__(_FORWARDED, noted=(signal.SIGCHLD,))

    def reset_in_child(self) -> None:
        """Undo all of this in the command's process, before it runs the command."""
        signal.set_wakeup_fd(-1)
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)


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
    argv: Sequence[str],
    environment: Mapping[str, str],
    signals: Signals,
    watcher: Watcher,
    lock: Lock,
    *,
    grace: float,
) -> Ended:
    """Run a command in a process group of its own, to its end.

    Args:
        argv: its name or path, and its arguments. There is no shell.
        environment: all of its environment.
        signals: are forwarded to the whole group.
        watcher: is told the group before the command runs.
        lock: is held, and watched meanwhile. Where it is lost, the group is ended: by SIGTERM, after the grace by
            SIGKILL.
        grace: seconds.

    Raises:
        CommandNotStarted: it cannot be found or executed.
        Interrupted: a signal arrived after the grant and before the start.
    """
    terminal = _Terminal()
    for number in signals.received():
        if number != signal.SIGCHLD:
            raise Interrupted(number)
    process = _start(argv, environment, signals, watcher, terminal)

    def hear(number: int) -> None:
        if number == signal.SIGCHLD:
            _ask_after(process, terminal)
        elif process.returncode is None:
            _forward(number, process.pid)

    try:
        see_to_its_end(lock, signals, watcher, running=lambda: process.returncode is None, hear=hear)
        if process.returncode is None:
            _end(process, grace)
    finally:
        if process.returncode is None:
            # Whatever went wrong here: the lock is given back next, so the command must not run on.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        terminal.take_from(process.pid)
    code: int = process.returncode
    return Ended(128 - code, command.signal_name(-code)) if code < 0 else Ended(code)


def _start(
    argv: Sequence[str],
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
        return subprocess.Popen(argv, env=environment, preexec_fn=prepare)  # noqa: PLW1509
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CommandNotStarted(f"{argv[0]}: {error.strerror}", 127) from error
    except OSError as error:
        raise CommandNotStarted(f"{argv[0]}: {error.strerror}", 126) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a process group, all of it. Its first process is asked for last, so that the group's number stays its own."""
    deadline = time.monotonic() + grace
    _forward(signal.SIGTERM, process.pid)
    _forward(signal.SIGCONT, process.pid)
    while time.monotonic() < deadline and has_living(process.pid):
        time.sleep(PAUSE_SECONDS)
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
