"""One contestant of ``make bench``, in an environment of its own: does what stdin says, and prints what it took.

    python benchmarks/contestant.py NAME URL

Commands, one a line: ``pairs N`` and ``timed N`` acquire and release N times, on a connection that is open already, and
print the seconds of each; ``lives N`` does so with a connection each time; ``acquire``, ``acquire-timed``, ``release``:
the moment after an acquire, or before a release, by the clock that all processes of the machine share.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

TIMEOUT_SECONDS = 60
TARGET, STEP = "web-01", "b"
KEY = 3736245238665493732


class Raw:
    """What there is at least to be sent, by the driver alone."""

    def __init__(self, url: str) -> None:
        import psycopg

        self.url, self.psycopg = url, psycopg
        self.connection = psycopg.connect(url, autocommit=True)
        self.connection.prepare_threshold = None

    def acquire(self) -> None:
        self.connection.execute(f"SELECT pg_advisory_lock({KEY})")

    def acquire_timed(self) -> None:
        self.connection.execute(f"SET LOCAL lock_timeout = '{TIMEOUT_SECONDS}s'; SELECT pg_advisory_lock({KEY})")

    def release(self) -> None:
        self.connection.execute(f"SELECT pg_advisory_unlock({KEY})")

    def live(self) -> None:
        with self.psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"SELECT pg_advisory_lock({KEY})")
            connection.execute(f"SELECT pg_advisory_unlock({KEY})")


class RawSqlalchemy:
    """The same through SQLAlchemy."""

    def __init__(self, url: str) -> None:
        import sqlalchemy

        self.engine = sqlalchemy.create_engine(url.replace("://", "+psycopg://", 1), isolation_level="AUTOCOMMIT")
        self.connection = self.engine.connect()
        self.take, self.give = (sqlalchemy.text(f"SELECT pg_advisory_{name}({KEY})") for name in ("lock", "unlock"))

    def acquire(self) -> None:
        self.connection.execute(self.take)

    def release(self) -> None:
        self.connection.execute(self.give)


class Dblock:
    def __init__(self, url: str) -> None:
        import psycopg

        import dblock

        self.url, self.make = url, dblock.lock
        self.connection: Any = psycopg.connect(url, autocommit=True)

    def acquire(self) -> None:
        self.lock = self.make(self.connection, target=TARGET, step=STEP, tenant="T1")
        self.lock.acquire()

    def acquire_timed(self) -> None:
        self.lock = self.make(self.connection, target=TARGET, step=STEP, tenant="T1", timeout=TIMEOUT_SECONDS)
        self.lock.acquire()

    def release(self) -> None:
        self.lock.release()

    def live(self) -> None:
        with self.make(self.url, target=TARGET, step=STEP, tenant="T1"):
            pass


class DblockStatements(Raw):
    """What dblock says, said by the driver alone: what there is at least to be sent for labels and checks."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.connection.prepare_threshold = 5  # the driver's own; of a message with one statement, as dblock leaves it
        self.take, self.give = (text for text, _ in _said(self.connection))
        self.life = _said(url)

    def acquire(self) -> None:
        self.connection.execute(self.take).fetchall()

    def release(self) -> None:
        self.connection.execute(self.give).fetchall()

    def live(self) -> None:
        with self.psycopg.connect(self.url, autocommit=True, prepare_threshold=None) as connection:
            for text, pid in self.life:
                connection.execute(text.replace(b"%d" % pid, b"%d" % connection.info.backend_pid))


def _said(db: Any) -> list[tuple[bytes, int]]:
    """The messages of a lock's life, each with the backend's pid, which may stand in it."""
    import dblock
    from dblock.driver_psycopg import PsycopgSession

    said: list[tuple[bytes, int]] = []
    rows = PsycopgSession.rows

    def recording(self: PsycopgSession, text: str) -> list[Any]:
        said.append((text.encode(), self.backend_pid))
        return rows(self, text)

    PsycopgSession.rows = recording  # type: ignore[method-assign]
    try:
        with dblock.lock(db, target=TARGET, step=STEP, tenant="T1"):
            pass
    finally:
        PsycopgSession.rows = rows  # type: ignore[method-assign]
    return said


class DblockSqlalchemy(Dblock):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.connection = RawSqlalchemy(url).connection


class RawPymssql:
    """What there is at least to be sent on SQL Server."""

    def __init__(self, url: str) -> None:
        from urllib.parse import urlsplit

        import pymssql

        parts = urlsplit(url)
        self.arguments: dict[str, Any] = {
            "server": parts.hostname,
            "port": str(parts.port or 1433),
            "user": parts.username,
            "password": parts.password,
            "database": parts.path[1:],
            "autocommit": True,
            "tds_version": "7.4",
        }
        self.connect = pymssql.connect
        self.connection = self.connect(**self.arguments)

    def acquire(self) -> None:
        self._acquire(self.connection, -1)

    def acquire_timed(self) -> None:
        self._acquire(self.connection, TIMEOUT_SECONDS * 1000)

    def release(self) -> None:
        self._ask(self.connection, f"EXEC @r = sys.sp_releaseapplock N'dblock:{KEY}', 'Session'")

    def live(self) -> None:
        with self.connect(**self.arguments) as connection:
            self._acquire(connection, -1)
            self._ask(connection, f"EXEC @r = sys.sp_releaseapplock N'dblock:{KEY}', 'Session'")

    def _acquire(self, connection: Any, milliseconds: int) -> None:
        self._ask(
            connection,
            f"EXEC @r = sys.sp_getapplock N'dblock:{KEY}', 'Exclusive', 'Session', @LockTimeout = {milliseconds}",
        )

    def _ask(self, connection: Any, statement: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"DECLARE @r int; {statement}; SELECT @r")
            ((code,),) = cursor.fetchall()
            assert code >= 0


class DblockPymssql(Dblock):
    def __init__(self, url: str) -> None:
        import dblock

        self.url, self.make = url, dblock.lock
        self.connection = RawPymssql(url).connection


class PostgresqlLock(Raw):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        from postgresql_lock import Lock

        self.make = Lock

    def acquire(self) -> None:
        self.lock = self.make(self.connection, "b@web-01", interface="psycopg3")
        assert self.lock.acquire()

    def release(self) -> None:
        self.lock.release()


class SqlalchemyDlock(RawSqlalchemy):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        from sqlalchemy_dlock import create_sadlock

        self.make = create_sadlock

    def acquire(self) -> None:
        self.lock = self.make(self.connection, "b@web-01")
        assert self.lock.acquire()

    def acquire_timed(self) -> None:
        self.lock = self.make(self.connection, "b@web-01")
        assert self.lock.acquire(timeout=TIMEOUT_SECONDS)

    def release(self) -> None:
        self.lock.release()


class SqlalchemyDlockPymssql(SqlalchemyDlock):
    def __init__(self, url: str) -> None:
        import sqlalchemy
        from sqlalchemy_dlock import create_sadlock

        self.connection = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT").connect()
        self.make = create_sadlock


class Pals:
    """Has no other acquire than one with a timeout, and takes its connection from a pool."""

    def __init__(self, url: str) -> None:
        import pals

        self.locker = pals.Locker("bench", url.replace("://", "+psycopg2://", 1), acquire_timeout_default=60_000)

    def acquire(self) -> None:
        self.lock = self.locker.lock("b@web-01")
        assert self.lock.acquire()

    acquire_timed = acquire

    def release(self) -> None:
        self.lock.release()


class DjangoPglock:
    def __init__(self, url: str) -> None:
        from urllib.parse import urlsplit

        import django
        from django.conf import settings

        parts = urlsplit(url)
        settings.configure(
            DATABASES={
                "default": {
                    "ENGINE": "django.db.backends.postgresql",
                    "NAME": parts.path[1:],
                    "USER": parts.username,
                    "HOST": parts.hostname,
                    "PORT": parts.port,
                }
            },
            INSTALLED_APPS=["pgactivity", "pglock"],
        )
        django.setup()
        import pglock

        self.make = pglock.advisory

    def acquire(self) -> None:
        self.lock = self.make("b@web-01")
        self.lock.acquire()

    def acquire_timed(self) -> None:
        self.lock = self.make("b@web-01", timeout=TIMEOUT_SECONDS)
        self.lock.acquire()

    def release(self) -> None:
        self.lock.release()


class Tooz:
    """Polls, and opens a connection for each lock."""

    def __init__(self, url: str) -> None:
        from tooz import coordination

        self.coordinator = coordination.get_coordinator(url, b"bench")
        self.coordinator.start()

    def acquire(self) -> None:
        self.lock = self.coordinator.get_lock(b"b@web-01")
        assert self.lock.acquire()

    def release(self) -> None:
        self.lock.release()


CONTESTANTS: dict[str, Any] = {
    "raw": Raw,
    "raw SQLAlchemy": RawSqlalchemy,
    "dblock": Dblock,
    "dblock's statements": DblockStatements,
    "dblock SQLAlchemy": DblockSqlalchemy,
    "raw pymssql": RawPymssql,
    "dblock pymssql": DblockPymssql,
    "sqlalchemy-dlock pymssql": SqlalchemyDlockPymssql,
    "postgresql-lock": PostgresqlLock,
    "sqlalchemy-dlock": SqlalchemyDlock,
    "pals": Pals,
    "django-pglock": DjangoPglock,
    "tooz": Tooz,
}


def obey(contestant: Any, command: str, number: int) -> object:
    if command in ("acquire", "acquire-timed"):
        (contestant.acquire if command == "acquire" else contestant.acquire_timed)()
        return time.monotonic()
    if command == "release":
        before = time.monotonic()
        contestant.release()
        return before
    seconds = []
    for _ in range(number):
        began = time.perf_counter()
        if command == "lives":
            contestant.live()
        else:
            (contestant.acquire_timed if command == "timed" else contestant.acquire)()
            contestant.release()
        seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    contestant = CONTESTANTS[sys.argv[1]](sys.argv[2])
    print(json.dumps(None), flush=True)
    for line in sys.stdin:
        command, _, number = line.strip().partition(" ")
        print(json.dumps(obey(contestant, command, int(number or 0))), flush=True)


if __name__ == "__main__":
    main()
