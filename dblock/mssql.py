"""What dblock says to SQL Server, and in which order. Knows no driver and does no I/O.

Each function below the class returns one batch, sent in autocommit, without parameters: what is inlined are numbers,
and texts of plain ASCII. The reply is the row of the last statement.

The lock is an application lock of the session, whose resource is ``dblock:`` and the key. The server's own queue keeps
the order, so a waiter waits in one statement, which it must not leave before its time: whoever comes back is the last.
The session's label stands in ``context_info``.

The codes of sp_getapplock and the rest that is relied upon here are pinned by ``tests/test_mssql_server.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from dblock.errors import AlreadyHeld, DatabaseError, LockDeadlock, UnsafeConnection
from dblock.label import fields
from dblock.protocol import Busy, Conditions, Engine, Granted, Look, Row, Steps, Wait, WaitOver, Wish

_LABEL_BYTES = 128  # context_info
_TIME_WIDTH = 10  # of an epoch in seconds, until the year 2286

_TIMED_OUT = -1
_CANCELLED = -2
_DEADLOCK = -3
_NOTHING_SAID = -1000  # none of the server's codes

# "Do not wait", as the server is told. It takes a 0 too, but Babelfish answers that with the code of a mistake.
_AT_ONCE_MILLISECONDS = 1
_WITHOUT_LIMIT = -1


def _entry_row(row: Row) -> Row:
    """SQL Server has no lists: the sessions in the way are a text."""
    *columns, blocked_by = row
    return (*columns, [int(session) for session in blocked_by.split(",")] if blocked_by else None)


ENGINE = Engine(
    name="mssql",
    current_database="SELECT DB_NAME()",
    inspect_settings="",
    entry_row=_entry_row,
    # Azure SQL Database ends a connection that was idle for 30 minutes, and TCP's keepalive does not count there.
    keep_alive_seconds=300.0,
)


class AppLock:
    """One application lock in one session: a `dblock.protocol.ServerLock`."""

    def __init__(self, wish: Wish) -> None:
        self._names = LockNames.of(wish)
        self._session_id = 0
        self._waiting_since: float | None = None

    def open(self, conditions: Conditions) -> Steps[None]:
        opened = Opened(*(yield _prepare(self._names)))
        self._session_id = opened.session_id
        if opened.open_transactions:
            raise UnsafeConnection(
                "the connection is inside a transaction; a callable must return a new connection, in autocommit"
            )
        if opened.updateability != "READ_WRITE":
            raise UnsafeConnection(
                f"the database {opened.database!r} is read-only here ({opened.updateability}), as on a readable "
                f"secondary, whose locks exclude nobody on the primary. Connect to the primary"
            )
        if conditions.database is not None and opened.database != conditions.database:
            raise UnsafeConnection(
                f"connected to database {opened.database!r}, but {conditions.database!r} was asked for: callers in "
                f"two databases do not exclude each other"
            )
        if opened.mode != "NoLock":
            raise AlreadyHeld(
                "the session of this connection holds the lock already; a callable must return a new connection each "
                "time"
            )

    def acquire(self, timeout: float | None, report: Callable[[Look], None]) -> Steps[Granted | Busy]:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._waiting_since = None
        row = yield _take(self._names, _AT_ONCE_MILLISECONDS)
        if _is_granted(row):
            return Granted(before=row[1])
        look = yield from self.look()
        if timeout == 0:
            return Busy(look)
        report(look)
        milliseconds = _WITHOUT_LIMIT if deadline is None else max(1, ceil((deadline - time.monotonic()) * 1000))
        self._waiting_since = time.monotonic()
        try:
            row = yield Wait(_take(self._names, milliseconds, label_the_wait=True), deadline)
        except WaitOver:
            return Busy(look)
        return Granted(before=row[1]) if _is_granted(row) else Busy((yield from self.look()))

    def release(self, granted: Granted) -> Steps[bool]:
        row = yield _release(self._names, granted.before)
        return _code(row) >= 0

    def check(self) -> Steps[bool]:
        (mode,) = yield _mode(self._names)
        return bool(mode == "Exclusive")

    def look(self) -> Steps[Look]:
        # Also after the wait: those are ahead who came before it began.
        waited = 0.0 if self._waiting_since is None else time.monotonic() - self._waiting_since
        visible, session, label, program, host, ahead = yield _look(
            self._names, self._session_id, milliseconds=int(waited * 1000)
        )
        if not visible:
            return Look(None)
        says = bytes(label or b"").rstrip(b"\0").decode("ascii", "replace")
        return Look(
            session is not None,
            None if session is None else f"session {session}",
            says=says,
            application=program,
            host=host,
            ahead=ahead,
        )


def _code(row: Row) -> int:
    """The return code of the call. No row, or NULL, is as bad as it gets: nothing says that anything was done."""
    return _NOTHING_SAID if not row or row[0] is None else int(row[0])


def _is_granted(row: Row) -> bool:
    """Whether sp_getapplock granted the lock; False: not in time.

    Raises:
        LockDeadlock: the server chose this wait as a deadlock's victim.
        DatabaseError: anything else.
    """
    code = _code(row)
    if code >= 0:
        return True
    if code == _TIMED_OUT:
        return False
    if code == _DEADLOCK:
        raise LockDeadlock("the server ended this wait to break a deadlock; nothing is held (sp_getapplock: -3)")
    if code == _CANCELLED:
        raise DatabaseError("the wait was cancelled on the server (sp_getapplock: -2)")
    said = "nothing" if code == _NOTHING_SAID else str(code)
    raise DatabaseError(f"the server refused the lock: sp_getapplock returned {said}")


@dataclass(frozen=True)
class LockNames:
    """A lock as the statements need it: texts ready to be inlined, all of them ASCII without a quote."""

    resource: str
    waiting_fields: str
    holding_fields: str

    @classmethod
    def of(cls, wish: Wish) -> LockNames:
        def fitted(time_width: int) -> str:
            return fields(wish.tenant, wish.target, wish.step, time_width=time_width, limit=_LABEL_BYTES)

        return cls(wish.key.mssql, waiting_fields=fitted(_TIME_WIDTH + 1), holding_fields=fitted(_TIME_WIDTH))


# --- the connection ---------------------------------------------------------------------------------------------------


class Opened(NamedTuple):
    """What a session says of itself before it is trusted with a lock."""

    session_id: int
    database: str
    updateability: str
    open_transactions: int
    mode: str


def _prepare(lock: LockNames) -> str:
    """Set what the lock's own session needs, and ask what decides whether it can be trusted."""
    return f"""
        SET NOCOUNT ON;
        SET IMPLICIT_TRANSACTIONS OFF;
        SELECT @@SPID,
               DB_NAME(),
               CAST(DATABASEPROPERTYEX(DB_NAME(), 'Updateability') AS nvarchar(60)),
               @@TRANCOUNT,
               APPLOCK_MODE('public', N'{lock.resource}', 'Session');
    """


# --- take, and give back ----------------------------------------------------------------------------------------------


def _take(lock: LockNames, milliseconds: int, *, label_the_wait: bool = False) -> str:
    """Take the lock, and wait so long in the server's queue. The reply: the code, and the context_info before."""
    return f"""
        SET NOCOUNT ON;
        DECLARE @code int, @label varbinary(128), @before varbinary(128) = CONTEXT_INFO();
        {_label("w", lock.waiting_fields) if label_the_wait else ""}
        EXEC @code = sys.sp_getapplock @Resource = N'{lock.resource}', @LockMode = N'Exclusive',
             @LockOwner = N'Session', @LockTimeout = {milliseconds}, @DbPrincipal = N'public';
        IF @code >= 0
        BEGIN
            {_label("", lock.holding_fields)}
        END;
        SELECT @code, @before;
    """


def _release(lock: LockNames, context_info: bytes | None) -> str:
    """Give the lock back, and the session what stood in context_info. The reply: the code.

    A release of what is not held would be an error, which says less than the mode.
    """
    return f"""
        SET NOCOUNT ON;
        DECLARE @code int = {_NOTHING_SAID};
        IF APPLOCK_MODE('public', N'{lock.resource}', 'Session') <> 'NoLock'
            EXEC @code = sys.sp_releaseapplock @Resource = N'{lock.resource}', @LockOwner = N'Session',
                 @DbPrincipal = N'public';
        SET CONTEXT_INFO 0x{(context_info or b"").hex()};
        SELECT @code;
    """


def _mode(lock: LockNames) -> str:
    """How this session holds the lock: a light query, too."""
    return f"SELECT APPLOCK_MODE('public', N'{lock.resource}', 'Session');"


# --- who is in the way ------------------------------------------------------------------------------------------------


def _look(lock: LockNames, session_id: int, milliseconds: int) -> str:
    """Ask who holds the lock, and how many have waited for it longer than the given session.

    The reply: whether this login may see it; and of the holder the session, its label, program and host; how many are
    ahead. The views are asked in a text of its own, since only so can the refusal of a right be caught, and a view that
    this server does not have (as Babelfish) be left alone.
    """
    query = f"""
        SELECT 1, holder.session_id, holder.label, holder.program_name, holder.host_name,
               (SELECT COUNT(*)
                FROM sys.dm_tran_locks AS l
                JOIN sys.dm_os_waiting_tasks AS t
                  ON t.session_id = l.request_session_id AND t.resource_address = l.lock_owner_address
                WHERE {_is_lock(lock)} AND l.request_status NOT LIKE 'GRANT%' AND l.request_session_id <> {session_id}
                  AND t.wait_duration_ms >= {milliseconds})
        FROM (SELECT 1 AS always) AS one
        LEFT JOIN (SELECT TOP (1) s.session_id, s.program_name, s.host_name,
                          COALESCE(r.context_info, s.context_info) AS label
                   FROM sys.dm_tran_locks AS l
                   JOIN sys.dm_exec_sessions AS s ON s.session_id = l.request_session_id
                   LEFT JOIN sys.dm_exec_requests AS r ON r.session_id = l.request_session_id
                   WHERE {_is_lock(lock)} AND l.request_status LIKE 'GRANT%') AS holder ON 1 = 1;
    """
    return f"""
        SET NOCOUNT ON;
        IF OBJECT_ID(N'sys.dm_tran_locks') IS NULL
            SELECT 0, NULL, NULL, NULL, NULL, 0;
        ELSE
        BEGIN TRY
            EXEC (N'{query.replace("'", "''")}');
        END TRY
        BEGIN CATCH
            SELECT 0, NULL, NULL, NULL, NULL, 0;
        END CATCH;
    """


# --- pieces -----------------------------------------------------------------------------------------------------------


def _label(state: str, fitted_fields: str) -> str:
    """Set the label, with the server's own clock: at the grant it is the moment of the grant."""
    return (
        f"SET @label = CAST('dblock1 {state}' + CAST(DATEDIFF_BIG(SECOND, '19700101', SYSUTCDATETIME()) AS varchar(20))"
        f" + ' {fitted_fields}' AS varbinary(128)); SET CONTEXT_INFO @label;"
    )


def _is_lock(lock: LockNames) -> str:
    # resource_description is 0:[the resource](hash); [[] is a bracket in a pattern.
    return (
        f"l.resource_type = 'APPLICATION' AND l.resource_database_id = DB_ID()"
        f" AND l.resource_description LIKE '0:[[]{lock.resource}]:%'"
    )
