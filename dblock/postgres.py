"""What dblock says to PostgreSQL: each statement beside the function that writes it. Knows no driver.

Each function returns one message of the simple protocol, sent in autocommit, without parameters: several statements
of one message share one implicit transaction, which is what makes ``SET LOCAL`` and transaction-level locks last
exactly as long as the message. The reply is the row of the last statement.

A lock takes two key spaces. The one-bigint form of the key itself is the lock. The queue stands in the two-integer
form, whose first half is the key's high 32 bits ``h``:

    (h,  0)   held shared by everybody who waits
    (h,  n)   the ticket of the waiter who came n-th, held exclusively
    (h, -1)   the gate under which tickets are numbered, held within one message only

Exclusion never depends on the queue, only the order does. ``tests/test_server.py`` pins what is relied upon here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dblock.label import fields
from dblock.names import Key

LOCK_NOT_AVAILABLE = "55P03"
DEADLOCK_DETECTED = "40P01"

_TIME_WIDTH = 10  # of an epoch in seconds, until the year 2286

# While it waits a session may be silent for this long; then the server ends it. A frozen or cut-off waiter would
# otherwise keep its ticket, and with it stop everybody behind.
WAITER_SILENCE_SECONDS = 5


@dataclass(frozen=True)
class LockNames:
    """A lock as the statements need it: numbers ready to be inlined, and the label's fitted fields."""

    key: int
    waiting_fields: str
    holding_fields: str

    @classmethod
    def of(cls, key: Key, *, target: str, step: str, tenant: str | None) -> LockNames:
        return cls(
            key.value,
            waiting_fields=fields(tenant, target, step, time_width=_TIME_WIDTH + 1),
            holding_fields=fields(tenant, target, step, time_width=_TIME_WIDTH),
        )

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


def quote(text: str) -> str:
    """Write a text as an SQL literal that means the same whatever standard_conforming_strings says."""
    return " E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


# --- the connection ---------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """What a session says of itself before it is trusted with a lock."""

    backend_pid: int
    in_recovery: bool
    read_only: bool
    database: str
    already_held: bool
    deadlock_timeout_seconds: float


def prepare(lock: LockNames, server_version: int) -> str:
    """Set what the lock's own session needs, and ask what decides whether it can be trusted.

    The settings of role and database must not end a wait or an idle holder. search_path comes first: it decides
    which operators and functions every later statement means.
    """
    return f"""
        SET search_path = pg_catalog, pg_temp;
        SET statement_timeout = 0;
        SET lock_timeout = 0;
        SET idle_session_timeout = 0;
        {"SET transaction_timeout = 0;" if server_version >= 170000 else ""}
        SELECT pg_backend_pid(),
               pg_is_in_recovery(),
               current_setting('transaction_read_only')::boolean,
               current_database()::text,
               EXISTS (SELECT FROM pg_locks
                       WHERE locktype = 'advisory' AND objsubid = 1 AND pid = pg_backend_pid()
                         AND classid = {lock.classid} AND objid = {lock.objid}
                         AND database = (SELECT oid FROM pg_database WHERE datname = current_database())),
               extract(epoch FROM current_setting('deadlock_timeout')::interval)::float8
    """


# --- take, and give back ----------------------------------------------------------------------------------------


class Attempt(NamedTuple):
    """The reply to ``try_at_once`` and to ``try_as_head``."""

    granted: bool
    application_name_before: str


def try_at_once(lock: LockNames) -> str:
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


def release(lock: LockNames, application_name: str) -> str:
    """Give the lock back, and the session its old name. False means that the session did not hold the lock."""
    return f"""
        SELECT pg_advisory_unlock({lock.key}),
               set_config('application_name', {quote(application_name)}, false)
    """


def undo(lock: LockNames, application_name: str) -> str:
    """Give back whatever there is of this lock and its queue, and the session its old name."""
    return f"""
        {give_back(lock)};
        SELECT set_config('application_name', {quote(application_name)}, false)
    """


def give_back(lock: LockNames) -> str:
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


# --- the queue --------------------------------------------------------------------------------------------------


class Ticket(NamedTuple):
    """A place in the queue: the own number, and the nearest one before it (0: none, this waiter is the head)."""

    number: int
    predecessor: int


def join(lock: LockNames, gate_milliseconds: int) -> str:
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


def wait_for(lock: LockNames, ticket: Ticket, milliseconds: int) -> str:
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


def wait_as_head(lock: LockNames, ticket: Ticket, milliseconds: int) -> str:
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


class Look(NamedTuple):
    """Who holds the lock, and how many wait before the one who asks. None: the role may not see it, or there is no
    session: nobody holds the lock, or a prepared transaction does.
    """

    held: bool
    pid: int | None
    application_name: str | None
    host: str | None
    user: str | None
    ahead: int


def look(lock: LockNames, ticket: Ticket | None) -> str:
    """Ask who holds the lock and how many wait ahead. The reply is a ``Look``."""
    limit = 2147483648 if ticket is None else ticket.number
    return f"""
        SELECT holder.held IS TRUE, holder.pid, holder.application_name, holder.host, holder.usename, queue.ahead
        FROM (SELECT count(*) AS ahead
              FROM pg_locks
              WHERE {_is_ticket(lock)} AND objid::bigint < {limit}) AS queue
        LEFT JOIN LATERAL (
              SELECT true AS held, l.pid, a.application_name::text, a.usename::text,
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
