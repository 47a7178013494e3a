"""What dblock says to SQL Server, and in which order. Knows no driver and does no I/O.

Each function below the class returns one batch, sent in autocommit, without parameters: what is inlined are numbers,
and texts of plain ASCII. The reply is the row of the last statement.

The lock is an application lock of the session, whose resource is ``dblock:`` and the key. The server's own queue keeps
the order, so a waiter waits in one statement, which it must not leave before its time: whoever comes back is the last.
A lock with permits is the lock itself, shared, and a permit, which is a resource of its own. Who looks for one holds
the lock's resource with a ``q`` at the end, for which all others of its kind wait. The session's label stands in
``context_info``.

The codes of sp_getapplock and the rest that is relied upon here are pinned by ``tests/test_mssql_server.py``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

from dblock.errors import AlreadyHeld, DatabaseError, LockDeadlock, UnsafeConnection
from dblock.label import fields
from dblock.protocol import (
    KEEP_LABEL,
    Busy,
    Conditions,
    Engine,
    Granted,
    HangUp,
    Look,
    Pause,
    Report,
    Row,
    Steps,
    Wait,
    WaitOver,
    Wish,
    already_held,
    pauses,
)

_LABEL_BYTES = 128  # context_info
_TIME_WIDTH = 10  # of an epoch in seconds, until the year 2286

_TIMED_OUT = -1
_CANCELLED = -2
_DEADLOCK = -3
# None of the server's codes:
_NOTHING_SAID = -1000
_FULL = -1001
_IN_TRANSACTION = -1002

# "Do not wait", as the server is told. It takes a 0 too, but Babelfish answers that with the code of a mistake.
_AT_ONCE_MILLISECONDS = 1
# Who does not want to wait lets another one take his free permit, which is soon done.
_QUEUE_AT_ONCE_MILLISECONDS = 100
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
    comments="SELECT session_id, program_name FROM sys.dm_exec_sessions WHERE program_name LIKE 'dblock %'",
    release_settings=lambda key, confirm: (
        f"EXEC sys.sp_set_session_context N'dblock.key', N'{key.value}';"
        f" EXEC sys.sp_set_session_context N'dblock.confirm', N'{int(confirm) if confirm else ''}';"
    ),
    to_end=lambda key, session: (
        f"IF EXISTS (SELECT * FROM sys.dm_tran_locks AS l WHERE {_is_lock(key.mssql)}"
        f" AND l.request_session_id = {session}) KILL {session}"
    ),
)


class AppLock:
    """One application lock in one session: a `dblock.protocol.ServerLock`."""

    def __init__(self, wish: Wish, *, own: bool) -> None:
        """Prepare; nothing is sent.

        Args:
            wish: the lock.
            own: whether the session is the lock's own; otherwise the caller's, and left as it was found.
        """
        self.wish = wish
        self.may_hold = False
        self._names = LockNames.of(wish)
        self._own = own
        self._session_id = 0
        self._waiting_since: float | None = None
        self._before: Any = None
        self._babelfish = False

    def open(self, conditions: Conditions) -> Steps[None]:
        opened = Opened(*(yield _prepare(self._names, own=self._own)))
        self._session_id = opened.session_id
        self._before = opened.context_info
        self._babelfish = bool(opened.babelfish)
        if self.wish.in_transaction:
            if not opened.open_transactions or opened.transaction_state != 1:
                raise UnsafeConnection(
                    "no transaction is open in which work could be committed, so a lock until its end would end at once"
                )
            if opened.isolation == _SNAPSHOT:
                raise UnsafeConnection(
                    "the transaction is SNAPSHOT: it would go on seeing the data as they were before the lock was "
                    "granted. Use READ COMMITTED"
                )
        elif opened.open_transactions:
            raise UnsafeConnection(
                "the connection is inside a transaction: the lock would be given back before the work is committed. "
                "Use a connection in autocommit, or scope='transaction'"
            )
        elif opened.options & _IMPLICIT_TRANSACTIONS:
            raise UnsafeConnection(
                "the connection has IMPLICIT_TRANSACTIONS on: the lock would be given back before the work is "
                "committed. Use a connection in autocommit, or scope='transaction'"
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
            raise AlreadyHeld(already_held(own=self._own))

    def acquire(self, conditions: Conditions, timeout: float | None, report: Report | None) -> Steps[Granted | Busy]:
        deadline = None if timeout is None else time.monotonic() + timeout
        yield from self.open(conditions)
        self._waiting_since = None
        outcome: Granted | Busy | None = None
        self.may_hold = True
        try:
            outcome = yield from self._acquire(deadline, report, wait=timeout != 0)
        finally:
            if not isinstance(outcome, Granted) and self.may_hold:
                yield from self._undo()
        return outcome

    def settle(self) -> Steps[None]:
        yield from ()

    def withdraw(self) -> Steps[None]:
        yield from self._undo()

    def release(self, granted: Granted) -> Steps[bool]:
        if self.wish.in_transaction:
            held = yield from self.check(granted)
            if label := _set_label(granted.before):
                yield label
            return held
        code = _NOTHING_SAID
        self._before = granted.before
        try:
            code = _code((yield _release(self._names, granted)))
            self.may_hold = code == _IN_TRANSACTION
        finally:
            if self.may_hold and code != _IN_TRANSACTION:
                yield from self._undo()
        if code == _IN_TRANSACTION:
            raise UnsafeConnection(
                "inside a transaction the lock would be given back before the work is committed, so it is still held: "
                "COMMIT or ROLLBACK first"
            )
        return code >= 0

    def check(self, granted: Granted) -> Steps[bool]:
        row = yield _modes(self._names, granted.slot)
        return row == (self._names.mode, *(("Exclusive",) if granted.slot is not None else ()))

    def look(self) -> Steps[Look]:
        # Also after the wait: those are ahead who came before it began.
        waited = 0.0 if self._waiting_since is None else time.monotonic() - self._waiting_since
        visible, others, session, label, program, host, ahead = yield _look(
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
            others=others,
            ahead=ahead,
        )

    def _acquire(self, deadline: float | None, report: Report | None, *, wait: bool) -> Steps[Granted | Busy]:
        names = self._names
        enter = _enter(names, _QUEUE_AT_ONCE_MILLISECONDS) if names.permits else ""
        granted = self._grant((yield self._take(_AT_ONCE_MILLISECONDS, before=enter, leave_queue=True)))
        if granted:
            return granted
        look = yield from self.look()
        if not wait:
            return Busy(self.wish, look)
        if report:
            report(self.wish, look)
        self._waiting_since = time.monotonic()
        try:
            if names.permits:
                granted = yield from self._queue_for_permit(deadline)
            else:
                wait_here = Wait(self._take(_milliseconds(deadline), before=_wait_label(names)), deadline)
                granted = self._grant((yield wait_here))
        except WaitOver:
            return Busy(self.wish, look)  # the session is closed, so it cannot be asked again
        return granted or Busy(self.wish, (yield from self.look()))

    def _queue_for_permit(self, deadline: float | None) -> Steps[Granted | None]:
        """Become the one who looks for a permit, and look until there is one. None: the time is over."""
        names = self._names
        if not _is_granted((yield Wait(_wait_for_queue(names, _milliseconds(deadline)), deadline))):
            return None
        for seconds in pauses():
            # A free permit is nobody else's to take: so the wait, if there is one, is for the lock itself.
            granted = self._grant((yield Wait(self._take(_milliseconds(deadline)), deadline)))
            remaining = seconds if deadline is None else min(seconds, deadline - time.monotonic())
            if granted or remaining <= 0:
                return granted
            yield Pause(remaining)
        return None

    def _take(self, milliseconds: int, *, before: str = "", leave_queue: bool = False) -> str:
        forget = _FORGET if self._babelfish else ""
        return _take(self._names, milliseconds, before=before, leave_queue=leave_queue, forget=forget)

    def _grant(self, row: Row) -> Granted | None:
        if _code(row) == _FULL or not _is_granted(row):
            return None
        if self._names.permits and row[1] is None:
            raise DatabaseError("the server granted the lock, but did not say which permit of it")
        return Granted(before=self._before, slot=row[1])

    def _undo(self) -> Steps[None]:
        """Give back whatever there is of this lock. Where that fails too, the end of the session does it.

        The connection of a lock's own session is closed anyway where nothing was granted.
        """
        if not self._own:
            try:
                row = yield _give_back(self._names, self._before)
            except DatabaseError:
                row = ()
            if not row or row[0]:
                yield HangUp()
        self.may_hold = False


def _milliseconds(deadline: float | None) -> int:
    return _WITHOUT_LIMIT if deadline is None else max(1, ceil((deadline - time.monotonic()) * 1000))


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


class LockNames(NamedTuple):
    """A lock as the statements need it: texts ready to be inlined, all of them ASCII without a quote."""

    resource: str
    permits: tuple[str, ...]
    mode: str
    owner: str
    waiting_fields: str
    holding_fields: str

    @classmethod
    def of(cls, wish: Wish) -> LockNames:
        def fitted(time_width: int) -> str:
            return fields(wish.tenant, wish.target, wish.step, time_width=time_width, limit=_LABEL_BYTES)

        return cls(
            wish.key.mssql,
            permits=tuple(permit.mssql for permit in wish.permits),
            mode="Shared" if wish.shared or wish.slots is not None else "Exclusive",
            owner="Transaction" if wish.in_transaction else "Session",
            waiting_fields=fitted(_TIME_WIDTH + 1),
            holding_fields=fitted(_TIME_WIDTH),
        )

    @property
    def queue(self) -> str:
        """The resource held by the one who looks for a permit."""
        return self.resource + "q"


# --- the connection ---------------------------------------------------------------------------------------------------

_IMPLICIT_TRANSACTIONS = 2  # in @@OPTIONS
_SNAPSHOT = 5  # in sys.dm_exec_sessions


class Opened(NamedTuple):
    """What a session says of itself before it is trusted with a lock."""

    session_id: int
    database: str
    updateability: str
    open_transactions: int
    transaction_state: int
    isolation: int | None
    options: int
    context_info: bytes | None
    babelfish: int
    mode: str


def _prepare(lock: LockNames, *, own: bool) -> str:
    """Set what the lock's own session needs, and ask what decides whether it can be trusted."""
    own_session = "FROM sys.dm_exec_sessions WHERE session_id = @@SPID"
    isolation = f"(SELECT transaction_isolation_level {own_session})" if lock.owner == "Transaction" else "NULL"
    session_mode, transaction_mode = (_mode(lock.resource, owner) for owner in ("Session", "Transaction"))
    return f"""
        {"SET IMPLICIT_TRANSACTIONS OFF;" if own else ""}
        SELECT @@SPID,
               DB_NAME(),
               CAST(DATABASEPROPERTYEX(DB_NAME(), 'Updateability') AS nvarchar(60)),
               @@TRANCOUNT,
               XACT_STATE(),
               {isolation},
               @@OPTIONS,
               CONTEXT_INFO(),
               CASE WHEN SERVERPROPERTY('Babelfish') IS NULL THEN 0 ELSE 1 END,
               CASE WHEN {session_mode} <> 'NoLock' THEN {session_mode}
                    WHEN @@TRANCOUNT > 0            THEN {transaction_mode}
                    ELSE 'NoLock' END;
    """


# Babelfish keeps the error of each call and test in vain, and ends when there are five; an error that is caught empties
# that store.
_FORGET = """
    BEGIN TRY RAISERROR (N'forget', 16, 1); END TRY
    BEGIN CATCH SET @label = NULL; END CATCH;
"""


# --- take, and give back ----------------------------------------------------------------------------------------------


def _take(lock: LockNames, milliseconds: int, *, before: str, leave_queue: bool, forget: str) -> str:
    """Take the lock, and a permit where it has some, and wait so long in the server's queue.

    Permits are looked for by the holder of the queue's resource only, so a free one stays free while the lock itself is
    waited for. The resource goes back with the grant; or in any case, where it was taken for this one attempt.

    Args:
        lock: the names.
        milliseconds: how long to wait for the lock itself.
        before: what is to be done first. Where it leaves a code below 0, nothing more is.
        leave_queue: the queue's resource goes back in any case.
        forget: what is to be done after every few tests and calls in vain.

    Returns:
        A batch whose reply is the code, and the permit's number.
    """
    take = _get(lock.resource, lock.mode, lock.owner, str(milliseconds))
    if lock.permits:
        take = f"""
            {_find_permit(lock, forget)}
            SET @code = {_FULL};
            IF @permit IS NOT NULL
            BEGIN
                {take}
                IF @code >= 0
                BEGIN
                    {_get("@permit", "Exclusive", lock.owner, str(_AT_ONCE_MILLISECONDS))}
                    IF @code IS NULL OR @code < 0
                    BEGIN
                        {_give(lock.resource, lock.owner)}
                        IF @code = {_TIMED_OUT} SET @code = {_FULL};
                    END;
                END;
            END;
        """
    leave = _give(lock.queue, "Session") if lock.permits else ""
    return f"""
        DECLARE @code int = 0, @label varbinary(128), @slot int, @permit nvarchar(255);
        {forget}
        {before}
        IF @code >= 0
        BEGIN
            {take}
            {leave if leave_queue else ""}
            IF @code >= 0
            BEGIN
                {"" if leave_queue else leave}
                {_label("", lock.holding_fields)}
            END;
        END;
        SELECT @code, @slot;
    """


def _find_permit(lock: LockNames, forget: str) -> str:
    """Find a permit that is free."""
    return "\n".join(
        (forget if number % 3 == 2 else "")
        + f"IF @permit IS NULL AND APPLOCK_TEST('public', N'{permit}', 'Exclusive', '{lock.owner}') = 1"
        f" SELECT @slot = {number}, @permit = N'{permit}';"
        for number, permit in enumerate(lock.permits)
    )


def _wait_for_queue(lock: LockNames, milliseconds: int) -> str:
    """Wait to become the one who looks for a permit. The reply: the code."""
    return f"""
        DECLARE @code int, @label varbinary(128);
        {_wait_label(lock)}
        {_enter(lock, milliseconds)}
        SELECT @code;
    """


def _enter(lock: LockNames, milliseconds: int) -> str:
    """Become the one who looks for a permit. The session owns the queue's resource, also inside a transaction."""
    return _get(lock.queue, "Exclusive", "Session", str(milliseconds))


def _wait_label(lock: LockNames) -> str:
    return _label("w", lock.waiting_fields)


def _release(lock: LockNames, granted: Granted) -> str:
    """Give the lock back, and the session what stood in context_info. The reply: the code.

    A release of what is not held would be an error, which says less than the mode.
    """
    resources = [*(() if granted.slot is None else (lock.permits[granted.slot],)), lock.resource]
    lost = " OR ".join(f"{_mode(resource, lock.owner)} = 'NoLock'" for resource in resources)
    return f"""
        DECLARE @code int = {_IN_TRANSACTION}, @lost bit = 0, @kept int = 0;
        IF @@TRANCOUNT = 0
        BEGIN
            SET @code = 0;
            IF {lost} SET @lost = 1;
            {_give_all(resources, lock.owner)}
            IF @lost = 1 OR @kept > 0 SET @code = {_NOTHING_SAID};
            {_set_label(granted.before)}
        END;
        SELECT @code;
    """


def _give_back(lock: LockNames, context_info: Any) -> str:
    """Give back whatever the session has of this lock, and the session what stood in context_info.

    The reply: how much could not be given back.
    """
    return f"""
        DECLARE @code int, @kept int = 0;
        {_give_all((*lock.permits, lock.resource), lock.owner)}
        {_give_all((lock.queue,), "Session") if lock.permits else ""}
        {_set_label(context_info)}
        SELECT @kept;
    """


def _modes(lock: LockNames, slot: int | None) -> str:
    """How this session holds the lock and its permit: a light query, too."""
    resources = [lock.resource, *(() if slot is None else (lock.permits[slot],))]
    modes = ", ".join(_mode(resource, lock.owner) for resource in resources)
    if lock.owner == "Session":
        return f"SELECT {modes};"
    # Outside a transaction the question would be an error.
    return f"IF @@TRANCOUNT > 0 SELECT {modes}; ELSE SELECT 'NoLock';"


# --- who is in the way ------------------------------------------------------------------------------------------------


def _look(lock: LockNames, session_id: int, milliseconds: int) -> str:
    """Ask who holds the lock, and how many have waited for it longer than the given session.

    The reply: whether this login may see it; how many more than one hold it; and of that one the session, its label,
    program and host; how many are ahead. The views are asked in a text of its own, since only so can the refusal of a
    right be caught, and a view that this server does not have (as Babelfish) be left alone.
    """
    query = f"""
        SELECT 1, COALESCE(holder.others, 0), holder.session_id, holder.label, holder.program_name, holder.host_name,
               (SELECT COUNT(*)
                FROM sys.dm_tran_locks AS l
                JOIN sys.dm_os_waiting_tasks AS t
                  ON t.session_id = l.request_session_id AND t.resource_address = l.lock_owner_address
                WHERE ({_is_lock(lock.resource)} OR {_is_lock(lock.queue)})
                  AND l.request_status NOT LIKE 'GRANT%' AND l.request_session_id <> {session_id}
                  AND t.wait_duration_ms >= {milliseconds})
        FROM (SELECT 1 AS always) AS one
        LEFT JOIN (SELECT TOP (1) s.session_id, s.program_name, s.host_name,
                          COALESCE(r.context_info, s.context_info) AS label, COUNT(*) OVER () - 1 AS others
                   FROM sys.dm_tran_locks AS l
                   JOIN sys.dm_exec_sessions AS s ON s.session_id = l.request_session_id
                   LEFT JOIN sys.dm_exec_requests AS r ON r.session_id = l.request_session_id
                   WHERE {_is_lock(lock.resource)} AND l.request_status LIKE 'GRANT%'
                   ORDER BY s.session_id) AS holder ON 1 = 1;
    """
    return f"""
        IF OBJECT_ID(N'sys.dm_tran_locks') IS NULL
            SELECT 0, 0, NULL, NULL, NULL, NULL, 0;
        ELSE
        BEGIN TRY
            EXEC (N'{query.replace("'", "''")}');
        END TRY
        BEGIN CATCH
            SELECT 0, 0, NULL, NULL, NULL, NULL, 0;
        END CATCH;
    """


# --- pieces -----------------------------------------------------------------------------------------------------------


def _get(resource: str, mode: str, owner: str, milliseconds: str) -> str:
    name = resource if resource.startswith("@") else f"N'{resource}'"
    return (
        f"EXEC @code = sys.sp_getapplock @Resource = {name}, @LockMode = N'{mode}', @LockOwner = N'{owner}',"
        f" @LockTimeout = {milliseconds}, @DbPrincipal = N'public';"
    )


def _give(resource: str, owner: str, code: str = "") -> str:
    return (
        f"EXEC {code}sys.sp_releaseapplock @Resource = N'{resource}', @LockOwner = N'{owner}',"
        f" @DbPrincipal = N'public';"
    )


def _give_all(resources: Sequence[str], owner: str) -> str:
    """Give back those which the session has. A transaction's can have none of its own outside a transaction."""
    inside = "@@TRANCOUNT > 0 AND " if owner == "Transaction" else ""
    return "\n".join(
        f"IF {inside}{_mode(resource, owner)} <> 'NoLock' BEGIN {_give(resource, owner, '@code = ')}"
        f" IF @code IS NULL OR @code < 0 SET @kept = @kept + 1; END;"
        for resource in resources
    )


def _mode(resource: str, owner: str) -> str:
    return f"APPLOCK_MODE('public', N'{resource}', '{owner}')"


def _set_label(context_info: Any) -> str:
    """Give the session back what it had there before."""
    if context_info is KEEP_LABEL:
        return ""
    return f"SET CONTEXT_INFO 0x{(context_info or b'').hex()};"


def _label(state: str, fitted_fields: str) -> str:
    """Set the label, with the server's own clock: at the grant it is the moment of the grant."""
    return (
        f"SET @label = CAST('dblock1 {state}' + CAST(DATEDIFF_BIG(SECOND, '19700101', SYSUTCDATETIME()) AS varchar(20))"
        f" + ' {fitted_fields}' AS varbinary(128)); SET CONTEXT_INFO @label;"
    )


def _is_lock(resource: str) -> str:
    # resource_description is 0:[the resource](hash); [[] is a bracket in a pattern.
    return (
        f"l.resource_type = 'APPLICATION' AND l.resource_database_id = DB_ID()"
        f" AND l.resource_description LIKE '0:[[]{resource}]:%'"
    )
