"""Bugs to be planted into a worker, so that a test can see the referee find them. Nothing in dblock knows of this."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import dblock
from dblock.postgres import AdvisoryLock
from dblock.protocol import Steps
from dblock.watch import Watch
from tests.soak.events import PATIENCE_SECONDS


def release_skipped() -> None:
    """At the end of the body the lock is not given back, at times."""
    give_back = dblock.Lock.__exit__

    def exit_at_times(self: dblock.Lock, *error: Any) -> None:
        if random.random() < 0.5:
            give_back(self, *error)

    dblock.Lock.__exit__ = exit_at_times  # type: ignore[method-assign]


def undo_removed() -> None:
    """What a failed acquire has taken is not given back."""
    assert callable(AdvisoryLock._undo)

    def nothing(self: AdvisoryLock) -> Steps[None]:
        self.may_hold = False
        return
        yield

    AdvisoryLock._undo = nothing  # type: ignore[method-assign]


def watcher_off() -> None:
    """Nothing watches a held lock's connection."""
    assert callable(Watch._run)
    Watch._run = lambda self: None  # type: ignore[method-assign]  # noqa: ARG005


def queue_off() -> None:
    """Nobody waits in the queue; everybody tries again and again."""

    def poll(self: dblock.Lock) -> dblock.Lock:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.acquire(0):
            if time.monotonic() > deadline:
                raise dblock.LockTimeout("polled in vain")
            time.sleep(random.uniform(0, 0.2))
        return self

    dblock.Lock.__enter__ = poll  # type: ignore[assignment, method-assign]


PLANTS: dict[str, Callable[[], None]] = {
    "release-skipped": release_skipped,
    "undo-removed": undo_removed,
    "watcher-off": watcher_off,
    "queue-off": queue_off,
}
