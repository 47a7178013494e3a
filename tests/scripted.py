"""A stand-in for pymssql's connection that plays a script, for what no server can be made to say at will.

It is told what is asked in which order, and what to answer: rows, an error, a connection that dies. Whatever else is
asked fails the test, and so does a script that was not played to its end. Where the real thing can answer, the tests
ask it; this one stands guard where no SQL Server runs, and knows the codes that only a real one returns.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pymssql
import pytest
from pymssql import _mssql

if TYPE_CHECKING:
    from typing_extensions import Self

Rows = Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class Line:
    """One exchange: a batch in which the pattern is found, and what comes back.

    Attributes:
        asks: a regular expression.
        answer: rows; an error to raise; or None, where the server never answers.
    """

    asks: str
    answer: Rows | Exception | None


class Connection:
    """What pymssql.connect returns: as much of it as dblock uses, and nothing else."""

    def __init__(self, script: Sequence[Line]) -> None:
        self._script = list(script)
        self._here, self._there = socket.socketpair()
        self.closed = False

    def cursor(self, *, as_dict: bool) -> Cursor:
        assert not as_dict
        assert not self.closed, "a closed connection is used"
        return Cursor(self)

    def close(self) -> None:
        self.closed = True
        self._here.close()
        self._there.close()

    def unplayed(self) -> list[str]:
        return [line.asks for line in self._script]

    def play(self, batch: str) -> Rows:
        assert self._script, f"nothing more was expected, but this was sent:\n{batch}"
        line = self._script.pop(0)
        assert re.search(line.asks, batch), f"expected {line.asks!r}, but this was sent:\n{batch}"
        if line.answer is not None:
            self._there.send(b"x")
        # As the driver does: with a callback the waiting is left to it, and afterwards the reply is read.
        assert _mssql.wait_callback is not None
        _mssql.wait_callback(self._here.fileno())
        assert self._here.recv(1) == b"x"
        if isinstance(line.answer, Exception):
            raise line.answer
        return line.answer or ()


class Cursor:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rows: Rows = ()
        self.description: object = None

    def execute(self, batch: str) -> None:
        self._rows = self._connection.play(batch)
        self.description = (("",),) if self._rows else None

    def fetchall(self) -> list[tuple[Any, ...]]:
        return list(self._rows)

    def nextset(self) -> None:
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


@contextmanager
def scripted(monkeypatch: pytest.MonkeyPatch, *scripts: Sequence[Line]) -> Iterator[list[Connection]]:
    """Let pymssql.connect return stand-ins, one for each script in turn; all must be played to the end and closed."""
    connections = [Connection(script) for script in scripts]
    waiting = iter(connections)
    monkeypatch.setattr(pymssql, "connect", lambda **_: next(waiting))
    yield connections
    for connection in connections:
        assert connection.unplayed() == []
        assert connection.closed
    assert _mssql.wait_callback is None
