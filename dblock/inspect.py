"""Who holds and who waits, for people, and how a holder is ended: what ``inspect.sql`` and ``force_release.sql`` say.

They exist once for each engine, as the scripts that a DBA runs. Here they run in a session of their own, so what is
seen does not depend on the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from dblock.connect import check_source, connect
from dblock.errors import UnsafeConnection
from dblock.label import printable, read_comment
from dblock.scripts import script

if TYPE_CHECKING:
    from dblock.connect import Source
    from dblock.names import Key
    from dblock.session import Session


@dataclass(frozen=True)
class Entry:
    """One holder of an advisory lock, or one who waits; in the order of the script's columns.

    What is None cannot be known, or not by the role that asked.

    Attributes:
        state: ``held`` or ``waiting``.
        position: of one who waits in dblock's queue; 1 is next.
        target: where the step runs; with a ``~`` at the end where a long name was shortened.
        step: what runs there.
        tenant: for whom, as the session says.
        since: when it was granted, or the wait began.
        seconds: how long ago that was.
        pid: the session's process on the server; None for a prepared transaction.
        host: where its client runs.
        user: its role.
        to_free: of a holder, the statement that ends it.
        mode: ``exclusive``, ``shared``, or ``slot N`` where it holds permit N.
        key: the lock's number; None for a lock of two integers.
        lock: whose kind of lock it is: dblock's, one bigint, or two integers.
        application: application_name where it is not this lock's label, or the prepared transaction.
        blocked_by: of one who waits, the pids of the holders and of those ahead; 0 is a prepared transaction.
        labels: what else the session says of itself, as far as this role may see.
    """

    state: str
    position: int | None
    target: str | None
    step: str | None
    tenant: str | None
    since: datetime | None
    seconds: int | None
    pid: int | None
    host: str | None
    user: str | None
    to_free: str | None
    mode: str
    key: int | None
    lock: str
    application: str | None
    blocked_by: list[int] | None
    labels: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON knows it: ``since`` in ISO 8601, texts free of what a terminal would act on."""
        document = {name: printable(value) if isinstance(value, str) else value for name, value in asdict(self).items()}
        return document | {
            "since": self.since and self.since.isoformat(),
            "blocked_by": self.blocked_by or [],
            "labels": {name: printable(value) for name, value in self.labels.items()},
        }


def entries(db: Source, *, database: str | None = None) -> list[Entry]:
    """Ask who holds and who waits in one database, the most urgent first.

    Args:
        db: a URL, a conninfo string, or a callable that returns a new connection. It may be a pooler's or a standby's:
            nothing is taken.
        database: the database it must be, or None.

    Returns:
        An entry for each holder, and below it one for each who waits for it, in their order.

    Raises:
        UnsafeConnection: it is another database.
        DatabaseError: the database cannot be reached, or refused the query.
        ValueError: db cannot be read.
    """
    with _asking(db, database) as session:
        engine = session.engine
        found = session.rows(engine.inspect_settings + script(f"{engine.name}/inspect"))
        comments = {pid: read_comment(text) for pid, text in session.rows(engine.comments)}
        entries = (Entry(*engine.entry_row(row)) for row in found)
        return [replace(entry, labels=comments.get(entry.pid, {})) for entry in entries]


@dataclass(frozen=True)
class Holder:
    """One holder of a lock, or why there is none; in the order of the script's columns.

    Attributes:
        outcome: what happened, or what to do next.
        pid: the session's process on the server; None where there is none to end.
        host: where its client runs.
        user: its role.
        application: dblock's label, or the name of its program.
        since: when the lock was granted, as the label says.
        activity: what the session does; None where this role may not see it.
        query_start: since when.
        key: the lock's number.
        mode: ``exclusive`` or ``shared``.
    """

    outcome: str
    pid: int | None
    host: str | None
    user: str | None
    application: str | None
    since: datetime | None
    activity: str | None
    query_start: datetime | None
    key: int | None
    mode: str | None

    @property
    def ended(self) -> bool:
        return self.outcome.startswith("ended")

    @property
    def forbidden(self) -> bool:
        """Whether this role may not end it."""
        return "you may not end" in self.outcome


def force_release(db: Source, key: Key, *, end: int | None = None, database: str | None = None) -> list[Holder]:
    """Show who holds a lock; and end one of these sessions, only if it still holds that lock.

    Args:
        db: as for `entries`; the primary server.
        key: the lock's.
        end: the session to end, by its pid; None: only look.
        database: the database it must be, or None.

    Returns:
        An entry for each holder, the one that was to be ended first; or one that says why there is none.

    Raises:
        UnsafeConnection: it is another database.
        DatabaseError: the database cannot be reached, or refused the query.
        ValueError: db cannot be read.
    """
    with _asking(db, database) as session:
        engine = session.engine
        session.rows(engine.inspect_settings + engine.release_settings(key, "" if end is None else str(end)))
        return [Holder(*row) for row in session.rows(script(f"{engine.name}/force_release"))]


def to_end(db: Source, key: Key, pid: int) -> str:
    """The statement with which somebody who may do so ends a session, only while it holds the lock."""
    with _asking(db, None) as session:
        return session.engine.to_end(key, pid)


@contextmanager
def _asking(db: Source, database: str | None) -> Iterator[Session]:
    """A session to ask on, in the database that it must be."""
    with closing(connect(check_source(db))) as session:
        ((connected_to,),) = session.rows(session.engine.current_database)
        if database is not None and connected_to != database:
            raise UnsafeConnection(
                f"connected to database {connected_to!r}, but {database!r} was asked for: its locks are not seen here"
            )
        yield session
