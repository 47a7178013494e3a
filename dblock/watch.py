"""What notices that a held lock is none any more: a thread that watches the lock's own connection until it is stopped.

The socket says at once that the server has ended the session, and costs the server nothing. What no socket says, a
network that is silent or a lock that somebody gave back, a light query finds, every heartbeat.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from dblock.session import duplicate, has_input

# After news on the socket that nobody has read, such as a reply to somebody else: so that it cannot keep this busy.
PAUSE_SECONDS = 0.2


class Watch:
    """A thread that asks after a held lock, until it is stopped or the lock is lost."""

    def __init__(
        self, descriptor: int, heartbeat: float, *, alive: Callable[[], bool], held: Callable[[], bool]
    ) -> None:
        """Start watching.

        Args:
            descriptor: the connection's socket. A duplicate of it is watched, for as long as this runs.
            heartbeat: seconds between two questions to the server; 0: none is asked.
            alive: whether the connection stands, asked when something can be read from it.
            held: whether the lock is still held, which asks the server. Neither must raise.
        """
        self._heartbeat = heartbeat or None
        self._alive = alive
        self._held = held
        self._socket = duplicate(descriptor)
        self._wake, self._stop = socket.socketpair()
        self._sockets_owned = threading.Lock()  # whoever acquires it closes them
        self._thread = threading.Thread(target=self._run, name="dblock watch", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            # A signal's exception, which can come before, while or after the thread begins to run.
            self.end()
            if self._sockets_owned.acquire(blocking=False):
                self._close()
            raise

    def end(self) -> None:
        """Tell it to end, without waiting for that."""
        with suppress(OSError):  # it was told already
            self._stop.shutdown(socket.SHUT_RDWR)  # closing would leave the copy of a process that was forked meanwhile
        self._stop.close()

    async def stop(self) -> None:
        """End it, and wait until it is gone. Never really waits for an event loop: it is a blocking lock's."""
        self.end()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        if not self._sockets_owned.acquire(blocking=False):
            return
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._wake, selectors.EVENT_READ)
                selector.register(self._socket, selectors.EVENT_READ)
                while True:
                    ready = [key.fileobj for key, _ in selector.select(self._heartbeat)]
                    if self._wake in ready or not (self._alive() if ready else self._held()):
                        return
                    if ready and has_input(self._socket.fileno()) and self._paused():
                        return
        finally:
            self._close()

    def _close(self) -> None:
        self._socket.close()
        self._wake.close()

    def _paused(self) -> bool:
        """Pause. True: it was stopped meanwhile."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            return bool(selector.select(PAUSE_SECONDS))
