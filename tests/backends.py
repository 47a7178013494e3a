"""The engines as the tests see them from outside: whose locks there are, what the labels say, how a session is ended.

What the doors promise is the same on each engine and is tested from one source; how it shows differs and stands here.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import psycopg

import dblock
from dblock import driver_pymssql
from tests.doors import Wish


class Row(NamedTuple):
    """A lock as another session sees it."""

    space: str  # "key": the lock itself; "queue": what keeps the order beside it
    number: int
    mode: str
    granted: bool
    label: str  # with T for its time


class Backend(ABC):
    """One server, watched over a connection that takes part in nothing."""

    name: str
    url: str
    database: str
    short_wait: str  # seconds, but long enough for somebody else to see the waiter

    @abstractmethod
    def all_rows(self) -> list[tuple[Row, int]]:
        """Every lock that any door could have taken, with the session that has it or waits for it."""

    @abstractmethod
    def rows(self, wish: Wish) -> list[Row]:
        """What there is of one lock."""

    @abstractmethod
    def waiting(self, label: str) -> list[Row]:
        """What one waiter shows."""

    @abstractmethod
    def waiters(self) -> list[int]:
        """The sessions that wait, in the order of their arrival."""

    @abstractmethod
    def end(self, session: int) -> None:
        """End a session as an administrator would."""

    @abstractmethod
    def in_the_way(self, tenant: str) -> str:
        """How the message of one who was not served begins to tell of the holder."""

    def holding(self, label: str) -> Row:
        return Row("key", 0, "ExclusiveLock", True, label)

    @abstractmethod
    def holders(self) -> list[int]:
        """The sessions that hold the lock itself."""


def _timeless(label: str) -> str:
    return re.sub(r"^(dblock1 w?)\d{10} ", r"\1T ", label)


class Postgres(Backend):
    name = "postgres"
    short_wait = "0.4"

    def __init__(self, url: str, observer: psycopg.Connection[Any]) -> None:
        self.url = url
        self.database = observer.info.dbname
        self._observer = observer

    def all_rows(self) -> list[tuple[Row, int]]:
        found = self._observer.execute(
            """
            SELECT CASE objsubid WHEN 1 THEN 'key' ELSE 'queue' END,
                   CASE objsubid WHEN 1 THEN 0 ELSE objid::bigint END,
                   mode, granted, coalesce(application_name, ''), pid
            FROM pg_locks LEFT JOIN pg_stat_activity USING (pid)
            WHERE locktype = 'advisory'
            ORDER BY 1, 2, granted DESC
            """
        )
        return [(Row(row[0], row[1], row[2], row[3], _timeless(row[4])), row[5]) for row in found]

    def rows(self, wish: Wish) -> list[Row]:
        key = dblock.key(wish.target, wish.step).postgres
        others = self._observer.execute(
            """
            SELECT FROM pg_locks
            WHERE locktype = 'advisory' AND NOT (classid = %s AND (objsubid = 2 OR objid = %s))
            """,
            (key.classid, key.objid),
        ).fetchall()
        assert others == []
        return [row for row, _ in self.all_rows()]

    def waiting(self, label: str) -> list[Row]:
        return [
            Row("key", 0, "ExclusiveLock", False, label),
            Row("queue", 0, "ShareLock", True, label),
            Row("queue", 1, "ExclusiveLock", True, label),
        ]

    def holders(self) -> list[int]:
        # A waiter has the lock for a moment within its transaction, still labelled as one who waits.
        return [
            session
            for row, session in self.all_rows()
            if row.space == "key" and row.granted and row.label.startswith("dblock1 T")
        ]

    def waiters(self) -> list[int]:
        tickets = (
            (row.number, session)
            for row, session in self.all_rows()
            # Not number 0, which whoever tries at once has exclusively for a moment.
            if row.space == "queue" and row.mode == "ExclusiveLock" and row.granted and 0 < row.number < 2**31
        )
        return [session for _, session in sorted(tickets)]

    def end(self, session: int) -> None:
        self._observer.execute("SELECT pg_terminate_backend(%s)", (session,))

    def cancel(self, session: int) -> None:
        """End a session's statement as an administrator would."""
        self._observer.execute("SELECT pg_cancel_backend(%s)", (session,))

    def in_the_way(self, tenant: str) -> str:
        return f"held by tenant {tenant} (pid "


class SqlServer(Backend):
    """SQL Server itself, or Babelfish, which has no views of locks but shows PostgreSQL's."""

    name = "mssql"
    short_wait = "3"  # on Babelfish the first batches of a connection take up to a second

    def __init__(self, url: str, observer: Any) -> None:
        self.url = url
        self._observer = observer
        ((self.database, babelfish),) = self.query(
            "SELECT DB_NAME(), CASE WHEN SERVERPROPERTY('Babelfish') IS NULL THEN 0 ELSE 1 END"
        )
        self.is_babelfish = bool(babelfish)

    def query(self, text: str) -> list[Any]:
        with self._observer.cursor() as cursor:
            cursor.execute(text)
            return cursor.fetchall() if cursor.description else []

    def all_rows(self) -> list[tuple[Row, int]]:
        if self.is_babelfish:
            # An exclusive application lock is an advisory lock whose fourth number is 2. The view of sessions misses
            # some while others end.
            found = self.query(
                """
                SELECT l.mode, l.granted, s.context_info, l.pid, l.waitstart
                FROM pg_catalog.pg_locks AS l LEFT JOIN sys.dm_exec_sessions AS s ON s.session_id = l.pid
                WHERE l.locktype = 'advisory' AND l.objsubid = 2
                """
            )
        else:
            found = self.query(
                """
                SELECT CASE l.request_mode WHEN 'X' THEN 'ExclusiveLock' ELSE l.request_mode END,
                       CASE l.request_status WHEN 'GRANT' THEN 1 ELSE 0 END,
                       COALESCE(r.context_info, s.context_info), l.request_session_id, -t.wait_duration_ms
                FROM sys.dm_tran_locks AS l
                JOIN sys.dm_exec_sessions AS s ON s.session_id = l.request_session_id
                LEFT JOIN sys.dm_exec_requests AS r ON r.session_id = l.request_session_id
                LEFT JOIN sys.dm_os_waiting_tasks AS t
                  ON t.session_id = l.request_session_id AND t.resource_address = l.lock_owner_address
                WHERE l.resource_type = 'APPLICATION' AND l.resource_database_id = DB_ID()
                """
            )
        # Of one who has just begun to wait it is not known at once since when: not yet seen.
        granted = [row for row in found if row[1]]
        waiting = sorted((row for row in found if not row[1] and row[4] is not None), key=lambda row: row[4])
        return [
            (Row("key", 0, mode, bool(held), _timeless(bytes(label or b"").rstrip(b"\0").decode())), session)
            for mode, held, label, session, _ in granted + waiting
        ]

    def rows(self, wish: Wish) -> list[Row]:
        if not self.is_babelfish:
            resource = dblock.key(wish.target, wish.step).mssql
            others = self.query(
                f"""
                SELECT resource_description FROM sys.dm_tran_locks
                WHERE resource_type = 'APPLICATION' AND resource_database_id = DB_ID()
                  AND resource_description NOT LIKE '0:[[]{resource}]:%'
                """
            )
            assert others == []
        return [row for row, _ in self.all_rows()]

    def waiting(self, label: str) -> list[Row]:
        return [Row("key", 0, "ExclusiveLock", False, label)]

    def holders(self) -> list[int]:
        return [session for row, session in self.all_rows() if row.granted]

    def waiters(self) -> list[int]:
        return [session for row, session in self.all_rows() if not row.granted]

    def end(self, session: int) -> None:
        self.query(f"KILL {session}")

    def in_the_way(self, tenant: str) -> str:
        return "holder not visible to this login" if self.is_babelfish else f"held by tenant {tenant} (session "


@contextmanager
def postgres(url: str) -> Iterator[Postgres]:
    with psycopg.connect(url, autocommit=True) as observer:
        yield Postgres(url, observer)


@contextmanager
def sql_server(url: str) -> Iterator[SqlServer]:
    import pymssql

    observer = pymssql.connect(**driver_pymssql._arguments(url), autocommit=True)
    try:
        yield SqlServer(url, observer)
    finally:
        observer.close()
