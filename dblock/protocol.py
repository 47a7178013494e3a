"""Acquire, queue and give back, as generators that do no I/O.

A generator yields a message for the server and receives the last row of its reply; where the message failed, the
error is thrown in. So the order of things stands here once, whoever waits for the socket and however. The one who
runs a generator promises to throw every error in and to go on running what it yields then: that is how whatever
was taken is given back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

from dblock import postgres
from dblock.errors import AlreadyHeld, DatabaseError, LockDeadlock, UnsafeConnection
from dblock.postgres import LockNames, Look, Opened, Ticket

T = TypeVar("T")
Row = tuple[Any, ...]
Steps = Generator[str, Row, T]

# A waiter keeps a snapshot while it waits inside one statement. That hinders vacuum in the whole database, and
# makes CREATE INDEX CONCURRENTLY in the holder's step wait for the waiter who waits for the holder. So waits are cut
# in slices, and slices stay below deadlock_timeout: above it, the server kills innocent waiters in just that case.
SLICE_SECONDS = 0.9
REPORT_SECONDS = 30.0


@dataclass(frozen=True)
class Granted:
    """The lock is held. The session had this application_name before."""

    application_name_before: str


@dataclass(frozen=True)
class Busy:
    """The lock was not acquired in time, and this was in the way."""

    look: Look


def open_session(
    lock: LockNames,
    *,
    server_version: int,
    client_backend_pid: int,
    database: str | None,
    allow_session_pooler: bool,
) -> Steps[float]:
    """Make a new session ready for a lock, or refuse it.

    Args:
        lock: the lock that it is for.
        server_version: as libpq counts it, 150018 for 15.18.
        client_backend_pid: what the driver was told at connecting. A pooler makes that number up.
        database: the database it must be, or None.
        allow_session_pooler: the caller's word that a pooler in between gives a session of its own.

    Returns:
        The longest wait within one statement, in seconds.

    Raises:
        UnsafeConnection: no lock could be trusted on it.
        AlreadyHeld: it holds the lock already.
    """
    opened = Opened(*(yield postgres.prepare(lock, server_version)))
    if opened.backend_pid != client_backend_pid and not allow_session_pooler:
        raise UnsafeConnection(
            "a connection pooler stands between here and the server: in transaction or statement mode it gives one "
            "lock to several callers. Connect to the server itself, or, if the pooler is in session mode for this "
            "database, say so with allow_session_pooler=True (--allow-session-pooler)"
        )
    if opened.in_recovery:
        raise UnsafeConnection(
            "this server is a hot standby: its advisory locks are its own and exclude nobody on the primary. "
            "Connect to the primary (target_session_attrs=read-write)"
        )
    if opened.read_only:
        raise UnsafeConnection(
            "this session is read-only (default_transaction_read_only), as on a server that is no longer the primary. "
            "Connect to the primary, or as a role that may write"
        )
    if database is not None and opened.database != database:
        raise UnsafeConnection(
            f"connected to database {opened.database!r}, but {database!r} was asked for: callers in two databases "
            f"do not exclude each other"
        )
    if opened.already_held:
        raise AlreadyHeld(
            "the session of this connection holds the lock already; a callable must return a new connection each time"
        )
    return min(SLICE_SECONDS, 0.9 * opened.deadlock_timeout_seconds)


def acquire(
    lock: LockNames, *, timeout: float | None, slice_seconds: float, report: Callable[[Look], None]
) -> Steps[Granted | Busy]:
    """Take the lock: at once if it is free and nobody waits, otherwise in the queue.

    Args:
        lock: the lock.
        timeout: seconds to wait; None: without limit; 0: do not wait.
        slice_seconds: the longest wait within one statement.
        report: is told who is in the way, at once and then every 30 seconds.

    Returns:
        ``Granted`` or ``Busy``.

    Raises:
        LockDeadlock: the server chose this wait as a deadlock's victim.
        DatabaseError: the server refused or cancelled a statement. Whatever was taken is given back.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    granted = False
    before = ""
    try:
        granted, before, _ = yield postgres.try_at_once(lock)
        if granted:
            return Granted(before)
        if timeout == 0:
            return Busy(Look(*(yield postgres.look(lock, None))))
        look = yield from _queue(lock, deadline, slice_seconds, report)
        granted = look is None
        return Busy(look) if look else Granted(before)
    except DatabaseError as error:
        if error.sqlstate == postgres.DEADLOCK_DETECTED:
            raise LockDeadlock(f"the server ended this wait to break a deadlock; nothing is held: {error}") from error
        raise
    finally:
        if not granted:
            # A session in which this failed is closed by the runner, which gives everything back too.
            with suppress(DatabaseError):
                yield postgres.undo(lock, before)


def release(lock: LockNames, granted: Granted) -> Steps[bool]:
    """Give the lock back. False: the session no longer held it."""
    unlocked, _ = yield postgres.release(lock, granted.application_name_before)
    return bool(unlocked)


def _queue(
    lock: LockNames, deadline: float | None, slice_seconds: float, report: Callable[[Look], None]
) -> Steps[Look | None]:
    """Wait in the order of arrival. Returns None with the lock, and otherwise who was in the way."""
    ticket: Ticket | None = None
    next_report = time.monotonic()
    while True:
        milliseconds = _slice(deadline, slice_seconds)
        if milliseconds is None:
            return Look(*(yield postgres.look(lock, ticket)))
        if ticket is None:
            ticket = yield from _join(lock, milliseconds)
        elif ticket.predecessor:
            (predecessor,) = yield postgres.wait_for(lock, ticket, milliseconds)
            ticket = Ticket(ticket.number, predecessor)
        else:
            granted, *_ = yield postgres.wait_as_head(lock, ticket, milliseconds)
            if granted:
                return None
        if time.monotonic() >= next_report:
            next_report = time.monotonic() + REPORT_SECONDS
            report(Look(*(yield postgres.look(lock, ticket))))


def _join(lock: LockNames, milliseconds: int) -> Steps[Ticket | None]:
    """Draw a ticket; None where a foreign lock was in its way, whatever part of it was taken given back."""
    try:
        return Ticket(*(yield postgres.join(lock, milliseconds)))
    except DatabaseError as error:
        if error.sqlstate != postgres.LOCK_NOT_AVAILABLE:
            raise
    yield postgres.give_back(lock)
    return None


def _slice(deadline: float | None, slice_seconds: float) -> int | None:
    """Milliseconds to wait in the next statement; None when the time is over.

    Never 0, which the server takes for "without limit".
    """
    if deadline is None:
        return ceil(slice_seconds * 1000)
    remaining = deadline - time.monotonic()
    return ceil(min(slice_seconds, remaining) * 1000) if remaining > 0 else None
