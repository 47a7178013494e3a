"""The command that runs under the lock, on Windows: its job object, and the console's events on their way to it.

There are no signals but the console's: Ctrl-C, which a process group of its own does not get, and Ctrl-Break, which
can be sent to one. So both reach the command as Ctrl-Break. Who has started what, a group does not tell: what is ended
is the job object, in which the command is before its first instruction.
"""

from __future__ import annotations

import sys

assert sys.platform == "win32"  # elsewhere process.py does this

import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dblock.cli import command, windows_api
from dblock.cli.command import PAUSE_SECONDS, CommandNotStarted, Ended, Interrupted, see_to_its_end
from dblock.cli.messages import say
from dblock.errors import Error

if TYPE_CHECKING:
    from dblock.blocking import Lock
    from dblock.cli.windows_watcher import Watcher

_KILLED = 128 + 9  # what 9, KILL, is on Unix
_FOR_CMD = frozenset('"%^&|<>!\r\n')


class Signals(command.Signals):
    """The console's events that a command is to get, as the signals that Python makes of them."""

    def __init__(self) -> None:
        super().__init__(windows_api.INTERRUPTS)


def run(
    argv: Sequence[str],
    environment: Mapping[str, str],
    signals: Signals,
    watcher: Watcher,
    lock: Lock,
    *,
    grace: float,
) -> Ended:
    """Run a command in a job object of its own, to its end.

    Args:
        argv: its name or path, and its arguments. There is no shell.
        environment: all of its environment.
        signals: are forwarded to the whole group.
        watcher: gets the job before the command is in it.
        lock: is held, and watched meanwhile. Where it is lost, the job is ended: by Ctrl-Break, after the grace by
            force.
        grace: seconds.

    Raises:
        CommandNotStarted: it cannot be found or executed.
        Interrupted: a signal arrived after the grant and before the start.
    """
    for number in filter(None, signals.received()):
        raise Interrupted(number)
    argv = _found(argv)
    with windows_api.Job() as job:
        watcher.watch(job)
        process = _start(argv, environment, job)
        threading.Thread(target=_tell_of_end, args=(process, signals), daemon=True).start()
        forced = False
        try:

            def running() -> bool:
                return process.poll() is None

            def hear(number: int) -> None:
                if number and running() and not windows_api.send_break(process.pid):
                    say(f"{command.signal_name(number)} cannot be passed on to the command: no console is shared")

            see_to_its_end(lock, signals, watcher, running=running, hear=hear)
            if running():
                forced = _end(process, job, grace)
            else:
                job.let_go()  # what the command leaves behind goes on without the lock
        finally:
            if process.poll() is None:
                # Whatever went wrong here: the lock is given back next, so the command must not run on.
                end_all(job)
                process.wait()
    return _how(process.returncode, forced=forced)


def end_all(job: windows_api.Job) -> None:
    """Kill whoever is in a job, and return when nobody of it is alive."""
    job.terminate(_KILLED)
    while job.living():
        time.sleep(PAUSE_SECONDS)


def _found(argv: Sequence[str]) -> list[str]:
    """The command with the path of its program: Windows by itself finds those only that end with .exe."""
    program = shutil.which(argv[0])
    if program is None:
        raise CommandNotStarted(f"{argv[0]}: there is no such program", 127)
    if Path(program).suffix.lower() in (".bat", ".cmd") and any(_FOR_CMD & set(argument) for argument in argv[1:]):
        raise CommandNotStarted(
            f"{argv[0]}: Windows runs a batch file by cmd.exe, which would take the arguments apart at one of "
            f'" % ^ & | < > !: pass such a one in a variable of the environment',
            126,
        )
    return [program, *argv[1:]]


def _start(argv: Sequence[str], environment: Mapping[str, str], job: windows_api.Job) -> subprocess.Popen[bytes]:
    try:
        process = windows_api.start_suspended(argv, environment)
    except FileNotFoundError as error:
        raise CommandNotStarted(f"{argv[0]}: {error.strerror}", 127) from error
    except OSError as error:
        raise CommandNotStarted(f"{argv[0]}: {error.strerror}", 126) from error
    try:
        # Before it runs: whom it starts is in the job as well.
        job.assign(process.pid)
        windows_api.resume(process.pid)
    except BaseException as error:
        process.kill()
        process.wait()
        if isinstance(error, OSError):
            raise Error(f"the command cannot be put into a job object, and was not run: {error}") from error
        raise
    return process


def _tell_of_end(process: subprocess.Popen[bytes], signals: Signals) -> None:
    process.wait()
    signals.wake()


def _end(process: subprocess.Popen[bytes], job: windows_api.Job, grace: float) -> bool:
    """End all of a job. True: it took force."""
    deadline = time.monotonic() + grace
    # Where the event cannot be sent nobody would end because of it, and there is nothing to wait for.
    if windows_api.send_break(process.pid):
        while time.monotonic() < deadline and job.living():
            time.sleep(PAUSE_SECONDS)
    forced = process.poll() is None
    end_all(job)
    process.wait()
    return forced


def _how(code: int, *, forced: bool) -> Ended:
    # Python exits with what an int of C can hold; the bits are the same.
    signed = code - 2**32 if code >= 2**31 else code
    if forced:
        return Ended(signed, "force")
    return Ended(signed, "Ctrl-C or Ctrl-Break" if code == windows_api.ENDED_BY_BREAK else None)
