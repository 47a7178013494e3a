"""What anybody can see of the locks, and do to them, by raw statements."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import psycopg

from tests import backends


class Observer(ABC):
    """A connection that takes part in nothing."""

    backend: backends.Backend

    _connection: Any

    @abstractmethod
    def connect(self) -> None:
        """Connect, or connect anew."""

    def close(self) -> None:
        self._connection.close()

    @abstractmethod
    def end(self, session: int) -> bool:
        """End a session. False: there is none."""

    @abstractmethod
    def cancel(self, session: int) -> bool:
        """Cancel a session's statement. False: that cannot be done."""

    @abstractmethod
    def free(self, target: str, step: str, slots: int) -> bool:
        """Whether a lock, all of its permits and its queue can be taken."""

    def rows(self) -> list[tuple[str, str]]:
        """What there is of any locks, each with the section named by its session's label."""
        return [
            (f"{row.space} {row.number} {row.mode}{'' if row.granted else ' (waiting)'} in session {session}",
             section_of(row.label))
            for row, session in self.backend.all_rows()
            if row.granted or self.backend.name == "postgres"  # a closed waiter stays on Babelfish until it is granted
        ]  # fmt: skip

    def sessions(self) -> dict[str, int]:
        """The session of each section."""
        return {section_of(row.label): session for row, session in self.backend.all_rows()}


def section_of(label: str) -> str:
    """The tenant's field of a label."""
    fields = label.split(" ")
    return fields[2] if fields[0] == "dblock1" and len(fields) == 5 else ""


def key(target: str, step: str, permit: int | None = None) -> int:
    text = target + "\x1f" + step + ("" if permit is None else f"\x1f{permit}")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


class PostgresObserver(Observer):
    def __init__(self, url: str) -> None:
        self._url = url
        self.connect()

    def connect(self) -> None:
        self._connection = psycopg.connect(self._url, autocommit=True)
        self.backend = backends.Postgres(self._url, self._connection)

    def end(self, session: int) -> bool:
        return self._says("SELECT pg_terminate_backend(%s)", session)

    def cancel(self, session: int) -> bool:
        return self._says("SELECT pg_cancel_backend(%s)", session)

    def free(self, target: str, step: str, slots: int) -> bool:
        keys = [key(target, step), *(key(target, step, permit) for permit in range(slots))]
        with psycopg.connect(self._url, autocommit=True) as connection:
            taken = [connection.execute("SELECT pg_try_advisory_lock(%s)", (number,)).fetchone() for number in keys]
            taken.append(connection.execute("SELECT pg_try_advisory_lock(%s::int, 0)", (keys[0] >> 32,)).fetchone())
        return all(row == (True,) for row in taken)

    def _says(self, statement: str, session: int) -> bool:
        (done,) = self._connection.execute(statement, (session,)).fetchone()
        return bool(done)


class SqlServerObserver(Observer):
    def __init__(self, url: str) -> None:
        self._url = url
        self.connect()

    def connect(self) -> None:
        self._connection = self._open()
        self.backend = backends.SqlServer(self._url, self._connection)

    def _open(self) -> Any:
        import pymssql

        from dblock import driver_pymssql

        return pymssql.connect(**driver_pymssql._arguments(self._url), autocommit=True)

    def end(self, session: int) -> bool:
        import pymssql

        try:
            self.backend.end(session)
        except pymssql.Error:
            return False
        return True

    def cancel(self, session: int) -> bool:  # noqa: ARG002 - nobody but the client can
        return False

    def free(self, target: str, step: str, slots: int) -> bool:
        connection = self._open()
        try:
            cursor = connection.cursor()
            for permit in (None, *range(slots)):
                cursor.execute(
                    f"DECLARE @r int; EXEC @r = sys.sp_getapplock @Resource = N'dblock:{key(target, step, permit)}', "
                    f"@LockMode = N'Exclusive', @LockOwner = N'Session', @LockTimeout = 1000; SELECT @r"
                )
                if cursor.fetchone()[0] < 0:
                    return False
            return True
        finally:
            connection.close()
