"""What dblock says to PostgreSQL, and in which order. Knows no driver and does no I/O.

Each function below the class returns one message of the simple protocol, sent in autocommit, without parameters:
several statements of one message share one implicit transaction, which is what makes ``SET LOCAL`` and
transaction-level locks last exactly as long as the message. The reply is the row of the last statement.

A lock takes two key spaces. The one-bigint form of the key itself is the lock. The queue stands in the two-integer
form, whose first half is the key's high 32 bits ``h``:

    (h,  0)   held shared by everybody who waits
    (h,  n)   the ticket of the waiter who came n-th, held exclusively
    (h, -1)   the gate under which tickets are numbered, held within one message only

Exclusion never depends on the queue, only the order does. ``tests/test_server.py`` pins what is relied upon here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from dblock.errors import AlreadyHeld, DatabaseError, LockDeadlock, UnsafeConnection
from dblock.label import fields
from dblock.names import Key
from dblock.protocol import REPORT_SECONDS, Busy, Conditions, Engine, Granted, Look, Steps, Wish

_LOCK_NOT_AVAILABLE = "55P03"
_DEADLOCK_DETECTED = "40P01"

_LABEL_BYTES = 63  # application_name
_TIME_WIDTH = 10  # of an epoch in seconds, until the year 2286

# A waiter keeps a snapshot while it waits inside one statement. That hinders vacuum in the whole database, and
# makes CREATE INDEX CONCURRENTLY in the holder's step wait for the waiter who waits for the holder. So waits are cut
# in slices, and slices stay below deadlock_timeout: above it, the server kills innocent waiters in just that case.
SLICE_SECONDS = 0.9

# While it waits a session may be silent for this long; then the server ends it. A frozen or cut-off waiter would
# otherwise keep its ticket, and with it stop everybody behind.
WAITER_SILENCE_SECONDS = 5

ENGINE = Engine(
    name="postgres",
    current_database="SELECT current_database()::text",
    # The script depends on none of these. The driver looks at the session when it reads the times, and knows one date
    # style only; a pooler carries these two settings with the client.
    inspect_settings="""
        SET datestyle = 'ISO';
        SET timezone = 'UTC';
        SET LOCAL search_path = pg_catalog, pg_temp;
    """,
    entry_row=lambda row: row,
    keep_alive_seconds=None,
)


class AdvisoryLock:
    """One advisory lock in one session: a `dblock.protocol.ServerLock`."""

    def __init__(self, wish: Wish, *, server_version: int, client_backend_pid: int) -> None:
        """Prepare; nothing is sent.

        Args:
            wish: the lock.
            server_version: as libpq counts it, 150018 for 15.18.
            client_backend_pid: what the driver was told at connecting. A pooler makes that number up.
        """
        self._names = LockNames.of(wish)
        self._server_version = server_version
        self._client_backend_pid = client_backend_pid
        self._slice_seconds = SLICE_SECONDS
        self._ticket: Ticket | None = None

    def open(self, conditions: Conditions) -> Steps[None]:
        opened = Opened(*(yield self._prepare_for(conditions)))
        if opened.backend_pid != self._client_backend_pid and not conditions.allow_session_pooler:
            raise UnsafeConnection(
                "a connection pooler stands between here and the server: in transaction or statement mode it gives "
                "one lock to several callers. Connect to the server itself, or, if the pooler is in session mode for "
                "this database, say so with allow_session_pooler=True (--allow-session-pooler)"
            )
        if opened.in_recovery:
            raise UnsafeConnection(
                "this server is a hot standby: its advisory locks are its own and exclude nobody on the primary. "
                "Connect to the primary (target_session_attrs=read-write)"
            )
        if opened.read_only:
            raise UnsafeConnection(
                "this session is read-only (default_transaction_read_only), as on a server that is no longer the "
                "primary. Connect to the primary, or as a role that may write"
            )
        if conditions.database is not None and opened.database != conditions.database:
            raise UnsafeConnection(
                f"connected to database {opened.database!r}, but {conditions.database!r} was asked for: callers in "
                f"two databases do not exclude each other"
            )
        if opened.already_held:
            raise AlreadyHeld(
                "the session of this connection holds the lock already; a callable must return a new connection each "
                "time"
            )
        self._slice_seconds = min(SLICE_SECONDS, 0.9 * opened.deadlock_timeout_seconds)

    def acquire(self, timeout: float | None, report: Callable[[Look], None]) -> Steps[Granted | Busy]:
        deadline = None if timeout is None else time.monotonic() + timeout
        granted = False
        before = ""
        self._ticket = None
        try:
            granted, before, _ = yield _try_at_once(self._names)
            if not granted and timeout != 0:
                granted = yield from self._queue(deadline, report)
            return Granted(before) if granted else Busy((yield from self.look()))
        except DatabaseError as error:
            if error.sqlstate == _DEADLOCK_DETECTED:
                raise LockDeadlock(
                    f"the server ended this wait to break a deadlock; nothing is held: {error}"
                ) from error
            raise
        finally:
            if not granted:
                # A session in which this failed is closed by the runner, which gives everything back too.
                with suppress(DatabaseError):
                    yield _undo(self._names, before)

    def release(self, granted: Granted) -> Steps[bool]:
        unlocked, _ = yield _release(self._names, granted.before)
        return bool(unlocked)

    def check(self) -> Steps[bool]:
        (held,) = yield _is_held(self._names)
        return bool(held)

    def look(self) -> Steps[Look]:
        held, pid, name, host, ahead = yield _look(self._names, self._ticket)
        return Look(held, None if pid is None else f"pid {pid}", says=name, application=name, host=host, ahead=ahead)

    def _prepare_for(self, conditions: Conditions) -> str:
        own_pid = None if conditions.allow_session_pooler else self._client_backend_pid
        return _prepare(self._names, self._server_version, own_pid)

    def _queue(self, deadline: float | None, report: Callable[[Look], None]) -> Steps[bool]:
        """Wait in the order of arrival. False: the time is over."""
        next_report = time.monotonic()
        while (milliseconds := self._slice(deadline)) is not None:
            if self._ticket is None:
                yield from self._join(milliseconds)
            elif self._ticket.predecessor:
                (predecessor,) = yield _wait_for(self._names, self._ticket, milliseconds)
                self._ticket = Ticket(self._ticket.number, predecessor)
            else:
                granted, *_ = yield _wait_as_head(self._names, self._ticket, milliseconds)
                if granted:
                    return True
            if time.monotonic() >= next_report:
                next_report = time.monotonic() + REPORT_SECONDS
                report((yield from self.look()))
        return False

    def _join(self, milliseconds: int) -> Steps[None]:
        """Draw a ticket. Where a foreign lock was in its way, whatever part of it was taken is given back."""
        try:
            self._ticket = Ticket(*(yield _join(self._names, milliseconds)))
        except DatabaseError as error:
            if error.sqlstate != _LOCK_NOT_AVAILABLE:
                raise
            yield _give_back(self._names)

    def _slice(self, deadline: float | None) -> int | None:
        """Milliseconds to wait in the next statement; None when the time is over.

        Never 0, which the server takes for "without limit".
        """
        if deadline is None:
            return ceil(self._slice_seconds * 1000)
        remaining = deadline - time.monotonic()
        return ceil(min(self._slice_seconds, remaining) * 1000) if remaining > 0 else None


@dataclass(frozen=True)
class LockNames:
    """A lock as the statements need it: numbers ready to be inlined, and the label's fitted fields."""

    key: int
    waiting_fields: str
    holding_fields: str

    @classmethod
    def of(cls, wish: Wish) -> LockNames:
        def fitted(time_width: int) -> str:
            return fields(wish.tenant, wish.target, wish.step, time_width=time_width, limit=_LABEL_BYTES)

        return cls(wish.key.value, waiting_fields=fitted(_TIME_WIDTH + 1), holding_fields=fitted(_TIME_WIDTH))

    @property
    def high(self) -> int:
        """The first number of the queue's locks: the key's high half as a signed int4."""
        return self.key >> 32

    @property
    def classid(self) -> int:
        return Key(self.key).postgres.classid

    @property
    def objid(self) -> int:
        return Key(self.key).postgres.objid


# --- the connection ---------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """What a session says of itself before it is trusted with a lock."""

    backend_pid: int
    in_recovery: bool
    read_only: bool
    database: str
    already_held: bool
    deadlock_timeout_seconds: float


def _prepare(lock: LockNames, server_version: int, own_pid: int | None) -> str:
    """Set what the lock's own session needs, and ask what decides whether it can be trusted.

    The settings of role and database must not end a wait or an idle holder. search_path comes first: it decides
    which operators and functions every later statement means. Where another backend than own_pid replies, nothing is
    set beyond this message: the session is a pooler's, and its other clients would go on with it.
    """
    settings = {
        "search_path": "pg_catalog, pg_temp",
        "statement_timeout": "0",
        "lock_timeout": "0",
        "idle_session_timeout": "0",
    }
    if server_version >= 170000:
        settings["transaction_timeout"] = "0"
    needed = ", ".join(f"({_quote(name)}, {_quote(value)})" for name, value in settings.items())
    return f"""
        SET LOCAL search_path = pg_catalog, pg_temp;
        SELECT set_config(name, value, false) FROM (VALUES {needed}) AS needed(name, value)
        WHERE {"true" if own_pid is None else f"pg_backend_pid() = {own_pid}"};
        SELECT pg_backend_pid(),
               pg_is_in_recovery(),
               current_setting('transaction_read_only')::boolean,
               current_database()::text,
               {_own_lock(lock)},
               extract(epoch FROM current_setting('deadlock_timeout')::interval)::float8
    """


# --- take, and give back ----------------------------------------------------------------------------------------


def _try_at_once(lock: LockNames) -> str:
    """Take the lock if it is free and nobody waits for it: holding (h, 0) for a moment proves that nobody does."""
    return f"""
        WITH attempt AS MATERIALIZED (
            SELECT current_setting('application_name') AS before,
                   CASE WHEN pg_try_advisory_xact_lock({lock.high}, 0)
                        THEN pg_try_advisory_lock({lock.key})
                        ELSE false
                   END AS granted)
        SELECT granted, before, CASE WHEN granted THEN {_label("", lock.holding_fields)} END
        FROM attempt
    """


def _release(lock: LockNames, application_name: str) -> str:
    """Give the lock back, and the session its old name. False means that the session did not hold the lock."""
    return f"""
        SELECT pg_advisory_unlock({lock.key}),
               set_config('application_name', {_quote(application_name)}, false)
    """


def _undo(lock: LockNames, application_name: str) -> str:
    """Give back whatever there is of this lock and its queue, and the session its old name."""
    return f"""
        {_give_back(lock)};
        SELECT set_config('application_name', {_quote(application_name)}, false),
               set_config('idle_session_timeout', '0', false)
    """


def _give_back(lock: LockNames) -> str:
    """Give back whatever pg_locks shows of this lock and its queue as this session's.

    An error does not mean "not held": where a cancel meets the grant, the statement fails and the lock stays. So
    the server is asked, rather than the client's memory.
    """
    return f"""
        SELECT CASE WHEN objsubid = 1       THEN pg_advisory_unlock({lock.key})
                    WHEN mode = 'ShareLock' THEN pg_advisory_unlock_shared({lock.high}, objid::bigint::int)
                    ELSE                         pg_advisory_unlock({lock.high}, objid::bigint::int)
               END
        FROM pg_locks
        WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid() AND classid = {lock.classid}
          AND (objsubid = 1 AND objid = {lock.objid} OR objsubid = 2 AND objid < 2147483648)
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    """


def _is_held(lock: LockNames) -> str:
    """Whether this session holds the lock."""
    return f"SELECT {_own_lock(lock)}"


# --- the queue --------------------------------------------------------------------------------------------------


class Ticket(NamedTuple):
    """A place in the queue: the own number, and the nearest one before it (0: none, this waiter is the head)."""

    number: int
    predecessor: int


def _join(lock: LockNames, gate_milliseconds: int) -> str:
    """Draw the next ticket, under the gate. The reply is a ``Ticket``.

    The gate is held within this message only, so waiting for it is short, unless somebody foreign holds it: then
    this ends after gate_milliseconds with 55P03, before anything was taken.
    """
    return f"""
        SET LOCAL lock_timeout = '{gate_milliseconds}ms';
        SELECT pg_advisory_xact_lock({lock.high}, -1);
        SET idle_session_timeout = '{WAITER_SILENCE_SECONDS}s';
        SELECT {_label("w", lock.waiting_fields)};
        WITH last AS MATERIALIZED (SELECT {_last_ticket_below(lock, 2147483647)} AS number),
             mine AS MATERIALIZED (
                SELECT number + 1 AS number, number AS predecessor,
                       pg_advisory_lock({lock.high}, (number + 1)::int)::text,
                       pg_advisory_lock_shared({lock.high}, 0)::text
                FROM last)
        SELECT number, predecessor FROM mine
    """


def _wait_for(lock: LockNames, ticket: Ticket, milliseconds: int) -> str:
    """Wait until the predecessor's ticket is given back, at most for one slice. The reply is the new predecessor.

    The wait is caught inside a DO block: an error that left the message would write two lines into the server's
    log for each slice of each waiter.
    """
    return f"""
        SET LOCAL lock_timeout = '{milliseconds}ms';
        DO $$
        BEGIN
            PERFORM pg_advisory_xact_lock_shared({lock.high}, {ticket.predecessor});
        EXCEPTION WHEN lock_not_available THEN NULL;
        END $$;
        SELECT CASE WHEN pg_try_advisory_xact_lock_shared({lock.high}, {ticket.predecessor})
                    THEN {_last_ticket_below(lock, ticket.number)}
                    ELSE {ticket.predecessor}
               END
    """


def _wait_as_head(lock: LockNames, ticket: Ticket, milliseconds: int) -> str:
    """Wait for the lock itself, at most for one slice, and take it. The reply begins with whether it was granted.

    The wait takes the lock for the message only, the try takes it for the session: a cancel or a timeout that meets
    the grant of the wait leaves nothing behind. With the grant the ticket goes back, so that the next becomes head.
    """
    return f"""
        SET LOCAL lock_timeout = '{milliseconds}ms';
        DO $$
        BEGIN
            PERFORM pg_advisory_xact_lock({lock.key});
        EXCEPTION WHEN lock_not_available THEN NULL;
        END $$;
        WITH attempt AS MATERIALIZED (SELECT pg_try_advisory_lock({lock.key}) AS granted)
        SELECT granted,
               CASE WHEN granted THEN pg_advisory_unlock({lock.high}, {ticket.number}) END,
               CASE WHEN granted THEN pg_advisory_unlock_shared({lock.high}, 0) END,
               CASE WHEN granted THEN set_config('idle_session_timeout', '0', false) END,
               CASE WHEN granted THEN {_label("", lock.holding_fields)} END
        FROM attempt
    """


# --- who is in the way ------------------------------------------------------------------------------------------


def _look(lock: LockNames, ticket: Ticket | None) -> str:
    """Ask who holds the lock and how many wait ahead.

    The reply: whether it is held, and of the holder pid, application_name and host; how many are ahead. A holder
    without a pid is a prepared transaction.
    """
    limit = 2147483648 if ticket is None else ticket.number
    return f"""
        SELECT holder.held IS TRUE, holder.pid, holder.application_name, holder.host, queue.ahead
        FROM (SELECT count(*) AS ahead
              FROM pg_locks
              WHERE {_is_ticket(lock)} AND objid::bigint < {limit}) AS queue
        LEFT JOIN LATERAL (
              SELECT true AS held, l.pid, a.application_name::text,
                     coalesce(a.client_hostname, host(a.client_addr),
                              CASE WHEN a.client_port = -1 THEN 'local' END) AS host
              FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
              WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
                AND l.classid = {lock.classid} AND l.objid = {lock.objid}
                AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
              LIMIT 1) AS holder ON true
    """


# --- pieces -----------------------------------------------------------------------------------------------------


def _label(state: str, fitted_fields: str) -> str:
    """Set the label, with the server's own clock: at the grant it is the moment of the grant."""
    return (
        f"set_config('application_name', 'dblock1 {state}' || floor(extract(epoch FROM clock_timestamp()))::bigint"
        f" || ' {fitted_fields}', false)"
    )


def _quote(text: str) -> str:
    """Write a text as an SQL literal that means the same whatever standard_conforming_strings says."""
    return " E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def _own_lock(lock: LockNames) -> str:
    return (
        f"EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND pid = pg_backend_pid()"
        f" AND granted AND classid = {lock.classid} AND objid = {lock.objid}"
        f" AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
    )


def _is_ticket(lock: LockNames) -> str:
    return (
        f"locktype = 'advisory' AND objsubid = 2 AND granted AND mode = 'ExclusiveLock'"
        f" AND classid = {lock.classid} AND objid::bigint BETWEEN 1 AND 2147483647"
        f" AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )


def _last_ticket_below(lock: LockNames, limit: int) -> str:
    return (
        f"(SELECT coalesce(max(objid::bigint), 0) FROM pg_locks WHERE {_is_ticket(lock)} AND objid::bigint < {limit})"
    )
