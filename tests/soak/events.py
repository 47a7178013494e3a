"""What happened, one line for each event, in one file to which all processes append.

Imports next to nothing: the command that runs under ``dblock run`` shall start in no time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

TICK_SECONDS = 0.02  # between two words of somebody inside
HEARTBEAT_SECONDS = 0.5
GRACE_SECONDS = 1.0  # of dblock run
PATIENCE_SECONDS = 20.0  # the longest time to wait for a lock


class Event(NamedTuple):
    """Something that happened to a section (one attempt to hold a lock), or was done by the fault maker."""

    time: float  # on the monotonic clock
    kind: str
    section: str
    details: dict[str, Any]


class Log:
    """The file, for one who writes: each line is one write, which no kill can cut in two."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, kind: str, section: str = "", at: float | None = None, **details: Any) -> None:
        event = [time.monotonic() if at is None else at, kind, section, details]
        os.write(self._file, json.dumps(event).encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)


class Reader:
    """The file, for the one who reads it while it grows."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115, PTH123 - closed by close; pathlib is slow to import
        self._rest = b""

    def new(self) -> Iterator[Event]:
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            yield Event(*json.loads(line))

    def close(self) -> None:
        self._file.close()


class Inside:
    """One section's stay inside: what a holder says, and when it has done its work."""

    def __init__(self, log: Log, section: str, seconds: float) -> None:
        self._log = log
        self._section = section
        self._seconds = seconds

    def enter(self, slots: list[int], at: float | None = None) -> None:
        self._until = time.monotonic() + self._seconds
        self._log.write("entered", self._section, at, slots=slots)

    def pauses(self) -> Iterator[float]:
        """Seconds to be spent, until the work is done."""
        while (left := self._until - time.monotonic()) > 0:
            yield min(TICK_SECONDS, left)

    def still(self, at: float | None = None) -> None:
        self._log.write("inside", self._section, at)

    def leave(self) -> None:
        self._log.write("left", self._section)

    def told(self) -> None:
        self._log.write("told", self._section)
