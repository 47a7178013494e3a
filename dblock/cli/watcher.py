"""A small process that outlives ``dblock run`` when that is killed, and ends the command before the lock is free.

The server frees the lock when it sees the connection close, and a connection closes with the last copy of its
socket. So a process of its own keeps a copy, and waits for word from ``dblock run``. If that falls silent instead, as
after ``kill -9``, the watcher kills the command's process group, waits until nobody of it is alive, and only then
lets go of the socket by ending itself. The next holder never runs beside what is left of the last one.

It is no child of ``dblock run``: tools that cancel a deployment kill the whole tree of processes, the watcher would
be among them, and the lock could be free before the last of the tree is dead. It has a session of its own and blocks
every signal that can be blocked. It never uses the connection: whoever speaks on it, it is not the watcher.

Only the command's process group is watched: a process that leaves it (``setsid``, daemons) is not.
"""

from __future__ import annotations

import sys

assert sys.platform != "win32"  # there windows_watcher.py does this

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from dblock.errors import Error

if TYPE_CHECKING:
    from typing_extensions import Self

_READY = b"ready\n"
_DONE = b"done\n"


class Watcher:
    """The watcher, as ``dblock run`` sees it. Starts on entering; on leaving it is told that the command has ended."""

    def __init__(self, lock_socket: int) -> None:
        """Prepare to watch.

        Args:
            lock_socket: the descriptor of the held lock's connection.
        """
        self._lock_socket = lock_socket
        # The only writers are this process and, until it runs the command, the child made for it; the descriptor is
        # not inherited by the command. So its end of file means: nobody is left who could say that all is well.
        self._control, self._theirs = socket.socketpair()

    def fileno(self) -> int:
        """A descriptor that becomes readable when the watcher has ended, which it should not."""
        return self._control.fileno()

    def __enter__(self) -> Self:
        # Blocked throughout, or a signal could reach the watcher before it is out of the way.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            child = os.fork()
            if child == 0:
                _become_watcher(self._theirs, self._lock_socket)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._theirs.close()
        os.waitpid(child, 0)
        # From here on it is ready: in no group of ours, and deaf.
        if self._control.recv(len(_READY)) != _READY:
            self._control.close()
            raise Error("the process that watches over the command could not be started; the command was not run")
        return self

    def watch_own_group(self) -> None:
        """Name the calling process's group as the one to be watched: called by the command's process, before it
        runs the command, so that there is no moment at which the command runs unknown to the watcher.
        """
        self._control.sendall(b"%d\n" % os.getpgrp())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # it may have been killed
            self._control.sendall(_DONE)
            while self._control.recv(64):  # its end: by then its copy of the socket is closed
                pass
        self._control.close()


def _become_watcher(control: socket.socket, lock_socket: int) -> NoReturn:
    try:
        os.setsid()
        if os.fork() == 0:  # this one's parent ends now, so it belongs to init
            os.chdir("/")
            _close_all_but(control.fileno(), lock_socket)
            control.sendall(_READY)
            _watch(control)
    finally:
        # Never back into the code of dblock run, whose clean-up would say goodbye to the server.
        os._exit(0)


def _watch(control: socket.socket) -> None:
    said = b""
    while chunk := _receive(control):
        said += chunk
        if said.endswith(_DONE):
            return
    if group := said.strip():
        _end_group(int(group))


def _receive(control: socket.socket) -> bytes:
    try:
        return control.recv(64)
    except ConnectionResetError:
        return b""


def _end_group(group: int) -> None:
    """Kill a process group, and return when none of its processes is alive.

    A process that may not be killed, being another user's through sudo, is waited for: the lock stays held.
    """
    while True:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            return
        except PermissionError:
            # Somebody of it is another user's. On macOS, that is also the answer where only zombies are left.
            if sys.platform == "darwin":
                return
        if not has_living(group):
            return
        time.sleep(0.005)


def has_living(group: int) -> bool:
    """Whether a process of the group is more than a zombie: killed ones stay zombies until a parent asks for them,
    which in a container may be never. Without /proc nobody can tell, and it counts as living.
    """
    try:
        processes = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    except OSError:
        return True
    for process in processes:
        try:
            stat = (process / "stat").read_bytes()
        except OSError:
            continue  # ended meanwhile
        # After the command's name, which may hold anything: state, parent, group, and as the 18th the threads.
        fields = stat.rpartition(b")")[2].split()
        # A process whose first thread has ended looks like a zombie while its other threads run on.
        if int(fields[2]) == group and (fields[0] not in (b"Z", b"X") or int(fields[17]) > 1):
            return True
    return not processes


def _close_all_but(*kept: int) -> None:
    """A pipe that stays open here would keep its reader waiting for the watcher's end."""
    for descriptor in [int(entry.name) for entry in Path("/dev/fd").iterdir()]:
        if descriptor not in kept:
            with suppress(OSError):  # the listing's own
                os.close(descriptor)
