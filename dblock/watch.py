"""What keeps a held lock's connection alive where the server ends silent ones, and notices when it could not."""

from __future__ import annotations

import threading
from collections.abc import Callable


class KeepAlive:
    """A thread that asks after a held lock now and then, until it is stopped or the lock is lost."""

    def __init__(self, ask: Callable[[], bool], seconds: float) -> None:
        """Start asking.

        Args:
            ask: whether the lock is still held. It must not raise.
            seconds: between two questions.
        """
        self._ask = ask
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dblock keep-alive", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End it, and wait until it is gone. Never really waits for an event loop: it is a blocking lock's."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            if not self._ask():
                return
