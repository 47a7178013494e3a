"""The kinds of callers that Python code can be, each as one blocking hand: what it passes as `db`, and how it commits.

A caller for asyncio lives in an event loop of its own, in another thread. So one text of a test drives all.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import dblock
from dblock import driver_pymssql

T = TypeVar("T")


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()


class Hand(ABC):
    """A caller with a connection, where it has one, that works and takes locks one after the other."""

    @abstractmethod
    def take(self, timeout: float | None = None, **arguments: Any) -> Any:
        """Acquire, and return the lock; None: not in time."""

    @abstractmethod
    def give(self, lock: Any) -> None:
        """End the work, and with it the lock."""

    @abstractmethod
    def say(self, statement: str) -> list[Any]:
        """Work on the connection that was passed to the lock."""


class BlockingHand(Hand):
    def __init__(self, db: Any, execute: Callable[[str], Any], end: Callable[[], Any] | None) -> None:
        self._db, self._execute, self._end = db, execute, end

    def take(self, timeout: float | None = None, **arguments: Any) -> dblock.Lock | None:
        lock = dblock.lock(self._db, scope="transaction" if self._end else "session", **arguments)
        return lock if lock.acquire(timeout) else None

    def give(self, lock: dblock.Lock) -> None:
        lock.release()
        if self._end:
            self._end()

    def say(self, statement: str) -> list[Any]:
        return rows(self._execute(statement))


class AsyncHand(Hand):
    def __init__(self, loop: Loop, db: Any, execute: Callable[[str], Any], end: Callable[[], Any] | None) -> None:
        self._loop, self._db, self._execute, self._end = loop, db, execute, end

    def take(self, timeout: float | None = None, **arguments: Any) -> dblock.AsyncLock | None:
        lock = dblock.alock(self._db, scope="transaction" if self._end else "session", **arguments)
        return lock if self._loop.run(lock.acquire(timeout)) else None

    def give(self, lock: dblock.AsyncLock) -> None:
        self._loop.run(lock.release())
        if self._end:
            self._loop.run(self._end())

    def say(self, statement: str) -> list[Any]:
        async def say() -> list[Any]:
            result = await self._execute(statement)
            if isinstance(result, psycopg.AsyncCursor):
                return [] if result.description is None else await result.fetchall()
            return rows(result)

        return self._loop.run(say())


def rows(result: Any) -> list[Any]:
    """The rows of a psycopg cursor or an SQLAlchemy result; none where the statement has none."""
    has_rows = result.returns_rows if isinstance(result, sqlalchemy.CursorResult) else result.description is not None
    return [tuple(row) for row in result.fetchall()] if has_rows else []


@dataclass(frozen=True)
class Caller:
    """A kind of caller.

    Attributes:
        name: for the matrix.
        engine: postgres or mssql.
        own: the lock has a connection of its own.
        in_transaction: the lock lasts as long as the caller's transaction.
        hand: opens one.
    """

    name: str
    engine: str
    own: bool
    in_transaction: bool
    hand: Callable[[str], Any]

    def __str__(self) -> str:
        return f"{self.engine}: {self.name}"


def _none(_: str) -> Any:
    raise AssertionError("this caller passes no connection on which it could work")


def _sa(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


# --- blocking ---------------------------------------------------------------------------------------------------------


@contextmanager
def _url(url: str) -> Iterator[Hand]:
    yield BlockingHand(url, _none, None)


@contextmanager
def _callable(url: str) -> Iterator[Hand]:
    yield BlockingHand(lambda: psycopg.connect(url), _none, None)


@contextmanager
def _pymssql_callable(url: str) -> Iterator[Hand]:
    import pymssql

    yield BlockingHand(lambda: pymssql.connect(**driver_pymssql._arguments(url)), _none, None)


@contextmanager
def _engine(url: str) -> Iterator[Hand]:
    # On SQL Server the only level which Babelfish knows as well.
    engine = sqlalchemy.create_engine(_sa(url), pool_size=1, max_overflow=0, isolation_level="AUTOCOMMIT")
    try:
        yield BlockingHand(engine, _none, None)
    finally:
        engine.dispose()


def _psycopg(autocommit: bool) -> Callable[[str], Any]:
    @contextmanager
    def hand(url: str) -> Iterator[Hand]:
        with psycopg.connect(url, autocommit=autocommit) as connection:
            yield BlockingHand(connection, connection.execute, None if autocommit else connection.commit)
            connection.rollback()

    return hand


def _pymssql(autocommit: bool) -> Callable[[str], Any]:
    @contextmanager
    def hand(url: str) -> Iterator[Hand]:
        import pymssql

        connection = pymssql.connect(**driver_pymssql._arguments(url), autocommit=autocommit)

        def execute(statement: str) -> Any:
            cursor: Any = connection.cursor()
            cursor.execute(statement)
            return cursor

        try:
            yield BlockingHand(connection, execute, None if autocommit else connection.commit)
        finally:
            connection.close()

    return hand


def _sa_connection(autocommit: bool) -> Callable[[str], Any]:
    @contextmanager
    def hand(url: str) -> Iterator[Hand]:
        engine = sqlalchemy.create_engine(_sa(url), **({"isolation_level": "AUTOCOMMIT"} if autocommit else {}))
        with engine.connect() as connection:
            yield BlockingHand(
                connection,
                lambda text: connection.execute(sqlalchemy.text(text)),
                None if autocommit else connection.commit,
            )
        engine.dispose()

    return hand


def _sa_session(autocommit: bool) -> Callable[[str], Any]:
    @contextmanager
    def hand(url: str) -> Iterator[Hand]:
        engine = sqlalchemy.create_engine(_sa(url), **({"isolation_level": "AUTOCOMMIT"} if autocommit else {}))
        with Session(engine) as session:
            yield BlockingHand(
                session, lambda text: session.execute(sqlalchemy.text(text)), None if autocommit else session.commit
            )
        engine.dispose()

    return hand


# --- asyncio ----------------------------------------------------------------------------------------------------------


@contextmanager
def _loop() -> Iterator[Loop]:
    loop = Loop()
    try:
        yield loop
    finally:
        loop.close()


@contextmanager
def _async_url(url: str) -> Iterator[Hand]:
    with _loop() as loop:
        yield AsyncHand(loop, url, _none, None)


@contextmanager
def _async_callable(url: str) -> Iterator[Hand]:
    with _loop() as loop:
        yield AsyncHand(loop, lambda: psycopg.AsyncConnection.connect(url), _none, None)


@contextmanager
def _async_engine(url: str) -> Iterator[Hand]:
    with _loop() as loop:
        engine = create_async_engine(_sa(url), pool_size=1, max_overflow=0)
        yield AsyncHand(loop, engine, _none, None)
        loop.run(engine.dispose())


def _async_psycopg(autocommit: bool) -> Callable[[str], Any]:
    @contextmanager
    def hand(url: str) -> Iterator[Hand]:
        with _loop() as loop:
            connection = loop.run(psycopg.AsyncConnection.connect(url, autocommit=autocommit))
            yield AsyncHand(loop, connection, connection.execute, None if autocommit else connection.commit)
            loop.run(connection.close())

    return hand


def _async_sa(kind: str, autocommit: bool) -> Callable[[str], Any]:
    @contextmanager
    def hand(url: str) -> Iterator[Hand]:
        with _loop() as loop:
            options = {"isolation_level": "AUTOCOMMIT"} if autocommit else {}
            engine = create_async_engine(_sa(url), **options)
            connection: Any = AsyncSession(engine) if kind == "session" else engine.connect()
            if kind == "connection":
                loop.run(_start(connection))
            yield AsyncHand(
                loop,
                connection,
                lambda text: connection.execute(sqlalchemy.text(text)),
                None if autocommit else connection.commit,
            )
            loop.run(connection.close())
            loop.run(engine.dispose())

    return hand


async def _start(connection: Any) -> None:
    await connection.start()


CALLERS = [
    Caller("URL", "postgres", True, False, _url),
    Caller("callable", "postgres", True, False, _callable),
    Caller("Engine", "postgres", True, False, _engine),
    Caller("psycopg, autocommit", "postgres", False, False, _psycopg(True)),
    Caller("psycopg, transaction", "postgres", False, True, _psycopg(False)),
    Caller("Connection, autocommit", "postgres", False, False, _sa_connection(True)),
    Caller("Connection, transaction", "postgres", False, True, _sa_connection(False)),
    Caller("Session, autocommit", "postgres", False, False, _sa_session(True)),
    Caller("Session, transaction", "postgres", False, True, _sa_session(False)),
    Caller("async URL", "postgres", True, False, _async_url),
    Caller("async callable", "postgres", True, False, _async_callable),
    Caller("AsyncEngine", "postgres", True, False, _async_engine),
    Caller("async psycopg, autocommit", "postgres", False, False, _async_psycopg(True)),
    Caller("async psycopg, transaction", "postgres", False, True, _async_psycopg(False)),
    Caller("AsyncConnection, autocommit", "postgres", False, False, _async_sa("connection", True)),
    Caller("AsyncConnection, transaction", "postgres", False, True, _async_sa("connection", False)),
    Caller("AsyncSession, autocommit", "postgres", False, False, _async_sa("session", True)),
    Caller("AsyncSession, transaction", "postgres", False, True, _async_sa("session", False)),
    Caller("URL", "mssql", True, False, _url),
    Caller("callable", "mssql", True, False, _pymssql_callable),
    Caller("Engine", "mssql", True, False, _engine),
    Caller("pymssql, autocommit", "mssql", False, False, _pymssql(True)),
    Caller("pymssql, transaction", "mssql", False, True, _pymssql(False)),
    Caller("Connection, autocommit", "mssql", False, False, _sa_connection(True)),
    Caller("Connection, transaction", "mssql", False, True, _sa_connection(False)),
    Caller("Session, autocommit", "mssql", False, False, _sa_session(True)),
    Caller("Session, transaction", "mssql", False, True, _sa_session(False)),
    Caller("async URL", "mssql", True, False, _async_url),
]

SHAPES: dict[str, dict[str, Any]] = {
    "exclusive": {},
    "shared": {"shared": True},
    "slots": {"slots": 2},
    "several targets": {"target": ["web-02", "web-01", "web-03"]},
}
