"""Sessions on PostgreSQL through psycopg, blocking or for asyncio: opened from a URL or conninfo string, adopted from a
callable's result, or on the caller's connection.

Imported only when such a connection is wanted: whoever uses dblock without PostgreSQL needs no psycopg.
"""

from __future__ import annotations

import re
from typing import Any, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

# No attributes of psycopg: it lacks these if a signal once broke off its import, and another one succeeded.
from psycopg.errors import InvalidSqlStatementName
from psycopg.generators import execute
from psycopg.rows import tuple_row

from dblock.aio_session import AsyncSession
from dblock.errors import DatabaseError, UnsafeConnection
from dblock.postgres import ENGINE, AdvisoryLock
from dblock.protocol import ANSWER_SECONDS, Row, ServerLock, Statement, Wish
from dblock.session import (
    AnySession,
    Loan,
    Scope,
    Session,
    answered_in_time,
    has_input,
    hide_password,
    notice_dead_network,
    one_line,
)

AnyConnection: TypeAlias = "psycopg.Connection[Any] | psycopg.AsyncConnection[Any]"

# libpq's PQTransactionStatusType.
_IDLE, _ACTIVE, _IN_TRANSACTION, _IN_FAILED_TRANSACTION = range(4)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECRETS = ("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
_UNREADABLE = (
    "cannot be read as a PostgreSQL URL or conninfo string (it is not shown, as it may hold a password); "
    "in a URL percent-encode / : @ ? # % in user and password"
)


class _OnPsycopg(AnySession):
    """What a session knows of a psycopg connection without waiting for it, blocking or not."""

    engine = ENGINE
    fresh = False  # whether this module has begun it, a moment ago
    _connection: AnyConnection

    def lock(self, wish: Wish) -> ServerLock:
        return AdvisoryLock(
            wish,
            server_version=self._connection.info.server_version,
            client_backend_pid=self.backend_pid,
            own=self.loan is None,
            fresh=self.fresh,
        )

    @property
    def closed(self) -> bool:
        return self._connection.closed

    @property
    def in_transaction(self) -> bool | None:
        status = self._connection.pgconn.transaction_status
        if status == _ACTIVE:
            return None  # somebody is talking on it just now
        return status in (_IN_TRANSACTION, _IN_FAILED_TRANSACTION)

    @property
    def would_begin(self) -> bool:
        return not self._connection.autocommit

    @property
    def backend_pid(self) -> int:
        return self._connection.info.backend_pid

    @property
    def busy(self) -> bool:
        return self._connection.pgconn.transaction_status == _ACTIVE

    def fileno(self) -> int:
        try:
            return self._connection.fileno()
        except psycopg.Error as error:
            raise translate(error) from error

    def alive(self) -> bool:
        return _alive(self._connection)

    def _message(self, text: str) -> bytes:
        # At the beginning: of a long statement the server shows no more than that.
        commented = f"/*{self.comment}*/ {text}" if self.comment else text
        # All of PostgreSQL's encodings have ASCII in common.
        return commented.encode("ascii" if commented.isascii() else self._connection.info.encoding, "surrogateescape")


class PsycopgSession(_OnPsycopg, Session):
    """A psycopg connection."""

    def __init__(self, connection: psycopg.Connection[Any], loan: Loan | None = None) -> None:
        super().__init__(loan)
        if loan is None:
            notice_dead_network(connection.fileno())
        self._connection: psycopg.Connection[Any] = connection

    def rows(self, text: str) -> list[Row]:
        _refuse_pipeline(self._connection)
        message = self._message(text)
        # The caller's connection may have a cursor class and rows of its own.
        cursor = psycopg.Cursor(self._connection, row_factory=tuple_row)
        try:
            try:
                cursor.execute(message, prepare=_may_prepare(text))
            except InvalidSqlStatementName:
                # Somebody deallocated it where the driver could not see it: nothing was run.
                cursor.execute(message, prepare=False)
            rows: list[Row] = []
            while True:
                if cursor.pgresult and cursor.pgresult.nfields:  # its description is slow to make
                    rows = cursor.fetchall()
                if not cursor.nextset():
                    return _decoded(rows)
        except psycopg.Error as error:
            raise translate(error) from error
        except BaseException:
            # A signal's exception. The driver ends the statement only for a KeyboardInterrupt that meets its waiting,
            # and while a reply is still to come nothing can be asked, not even whether the connection stands.
            if self.busy and not self._connection.lock.locked():  # by a thread that waits for a reply of its own
                self._break_off()
            raise

    def _break_off(self) -> None:
        """End the statement that is under way, or the connection."""
        try:
            self._connection.cancel_safe(timeout=ANSWER_SECONDS)
            with answered_in_time(self.fileno()):
                self._connection.wait(execute(self._connection.pgconn))
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise

    def _close(self) -> None:
        # The socket goes even where the driver could not say goodbye.
        self._connection.close()


class AsyncPsycopgSession(_OnPsycopg, AsyncSession):
    """An asynchronous psycopg connection."""

    def __init__(self, connection: psycopg.AsyncConnection[Any], loan: Loan | None = None) -> None:
        super().__init__(loan)
        if loan is None:
            notice_dead_network(connection.fileno())
        self._connection: psycopg.AsyncConnection[Any] = connection

    async def rows(self, text: str) -> list[Row]:
        _refuse_pipeline(self._connection)
        message = self._message(text)
        cursor = psycopg.AsyncCursor(self._connection, row_factory=tuple_row)
        try:
            try:
                await cursor.execute(message, prepare=_may_prepare(text))
            except InvalidSqlStatementName:
                await cursor.execute(message, prepare=False)
            rows: list[Row] = []
            while True:
                if cursor.pgresult and cursor.pgresult.nfields:
                    rows = await cursor.fetchall()
                if not cursor.nextset():
                    return _decoded(rows)
        except psycopg.Error as error:
            raise translate(error) from error

    async def _close(self) -> None:
        await self._connection.close()


# --- the lock's own connection ----------------------------------------------------------------------------------------


def connect(conninfo: str, program: str = "") -> Session:  # noqa: ARG001 - each statement has a comment here
    """Open a connection.

    Args:
        conninfo: a URL or a conninfo string.
        program: what is told of the caller at the login, where the engine knows of no other place.

    Raises:
        DatabaseError: the database cannot be reached.
        ValueError: the text cannot be read.
    """
    readable, password = _checked(conninfo)
    try:
        session = PsycopgSession(psycopg.connect(readable, autocommit=True, prepare_threshold=None))
    except psycopg.Error as error:
        raise _not_connected(error, password) from None
    session.fresh = True
    return session


async def connect_async(conninfo: str, program: str = "") -> AsyncSession:  # noqa: ARG001 - as for `connect`
    """Open a connection for asyncio, as `connect` does."""
    _refuse_proactor()
    readable, password = _checked(conninfo)
    try:
        session = AsyncPsycopgSession(
            await psycopg.AsyncConnection.connect(readable, autocommit=True, prepare_threshold=None)
        )
    except psycopg.Error as error:
        raise _not_connected(error, password) from None
    session.fresh = True
    return session


def _refuse_proactor() -> None:
    """Windows' own event loop cannot wait for psycopg's sockets: say what to do, whatever release of psycopg it is."""
    import asyncio

    if isinstance(asyncio.get_running_loop(), getattr(asyncio, "ProactorEventLoop", ())):
        raise DatabaseError(
            "psycopg cannot wait on the ProactorEventLoop, which asyncio has on Windows: use "
            "asyncio.run(…, loop_factory=asyncio.SelectorEventLoop), or before Python 3.12 call "
            "asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy()) first"
        )


def adopt(connection: psycopg.Connection[Any]) -> Session:
    """Take over a new connection which a callable has opened.

    Raises:
        UnsafeConnection: it is closed, in a transaction, or an asynchronous one.
        DatabaseError: it failed.
    """
    _check_new(connection, psycopg.Connection)
    try:
        connection.autocommit = True
        connection.prepare_threshold = None
        connection.execute("SET client_encoding = 'UTF8'")
    except psycopg.Error as error:
        raise DatabaseError(f"the callable's connection failed: {_message(error)}", error.sqlstate) from error
    return PsycopgSession(connection)


async def adopt_async(connection: psycopg.AsyncConnection[Any]) -> AsyncSession:
    """Take over a new asynchronous connection which a callable has opened, as `adopt` does."""
    _check_new(connection, psycopg.AsyncConnection)
    try:
        await connection.set_autocommit(True)
        connection.prepare_threshold = None
        await connection.execute("SET client_encoding = 'UTF8'")
    except psycopg.Error as error:
        raise DatabaseError(f"the callable's connection failed: {_message(error)}", error.sqlstate) from error
    return AsyncPsycopgSession(connection)


# --- the caller's connection ------------------------------------------------------------------------------------------


def borrow(connection: psycopg.Connection[Any], scope: Scope) -> Session:
    """Use the caller's connection.

    Raises:
        UnsafeConnection: no lock of that scope could be trusted on it.
    """
    if not isinstance(connection, psycopg.Connection):
        raise UnsafeConnection(f"a psycopg {type(connection).__qualname__} is for asyncio: use dblock.alock")
    return PsycopgSession(connection, _loan(connection, scope))


def borrow_async(connection: psycopg.AsyncConnection[Any], scope: Scope) -> AsyncSession:
    """Use the caller's asynchronous connection, as `borrow` does."""
    if not isinstance(connection, psycopg.AsyncConnection):
        raise UnsafeConnection(f"a psycopg {type(connection).__qualname__} blocks: use dblock.lock")
    return AsyncPsycopgSession(connection, _loan(connection, scope))


def _loan(connection: AnyConnection, scope: Scope) -> Loan:
    """Check the caller's connection."""
    status = connection.pgconn.transaction_status
    if connection.closed:
        raise UnsafeConnection("the connection is closed")
    _refuse_pipeline(connection)
    if status == _IN_FAILED_TRANSACTION:
        raise UnsafeConnection("the connection is inside a transaction that has failed: ROLLBACK first")
    if status == _ACTIVE:
        raise UnsafeConnection("the connection is busy with a statement")
    if scope == "session" and not connection.autocommit:
        raise UnsafeConnection(
            "the connection is not in autocommit: the lock would be given back before the work is committed, or kept "
            "beyond it. Use a connection in autocommit, or scope='transaction'"
        )
    if scope == "session" and status != _IDLE:
        raise UnsafeConnection(
            "the connection is inside a transaction: the lock would be given back before the work is committed. "
            "COMMIT first, or use scope='transaction'"
        )
    if scope == "transaction" and connection.autocommit and status == _IDLE:
        raise UnsafeConnection(
            "no transaction is open, and the connection is in autocommit: a lock until the transaction's end would "
            "end at once. Begin one, or use scope='session'"
        )
    began = status == _IDLE and scope == "transaction"
    return Loan(connection, began, rollback=connection.rollback)


def _may_prepare(text: str) -> bool | None:
    """Whether the connection may do with one statement what it does with those it sees often (None), or not (False).

    Only the simple protocol takes several statements in one message: without parameters, and not prepared.
    """
    return None if isinstance(text, Statement) else False


def _refuse_pipeline(connection: AnyConnection) -> None:
    if connection.pgconn.pipeline_status:  # PQ_PIPELINE_OFF is 0
        raise UnsafeConnection("the connection is in pipeline mode, in which a statement's outcome comes too late")


# --- pieces that both kinds of connection share -----------------------------------------------------------------------


def _alive(connection: AnyConnection) -> bool:
    """Read what the server has said unasked, such as that it ends the session, without asking anything.

    Not while somebody waits for a reply, which would be swallowed: who talks on the connection learns of its end.
    """
    blocking = connection.lock if isinstance(connection, psycopg.Connection) else None
    if connection.lock.locked() or (blocking and not blocking.acquire(blocking=False)):
        return not connection.closed
    try:
        while not connection.closed and has_input(connection.fileno()):
            if connection.pgconn.transaction_status == _ACTIVE:
                break
            connection.pgconn.consume_input()
    except (psycopg.Error, OSError, ValueError):
        return False
    finally:
        if blocking:
            blocking.release()
    return not connection.closed


def _decoded(rows: list[Row]) -> list[Row]:
    """With client_encoding SQL_ASCII the driver returns bytes for texts; nothing that is asked for here is bytes."""

    def decoded(value: Any) -> Any:
        if isinstance(value, list):
            return [decoded(element) for element in value]
        return value.decode("ascii", "surrogateescape") if isinstance(value, bytes) else value

    return [tuple(map(decoded, row)) for row in rows]


def _checked(conninfo: str) -> tuple[str, str]:
    """The conninfo string as the driver is given it, and the password in it.

    Raises:
        ValueError: it cannot be read.
    """
    conninfo = _as_libpq_reads_it(conninfo)
    settings = _settings(conninfo)
    if "@" in str(settings.get("host", "")) or re.search(r"[^0-9,]", str(settings.get("port", ""))):
        raise ValueError(
            "db has no readable host or port (it is not shown, as it may hold a password); "
            "in a URL percent-encode / : @ ? # % in user and password"
        )
    return make_conninfo(conninfo, client_encoding="UTF8"), str(settings.get("password") or "")


def _not_connected(error: psycopg.Error, password: str) -> DatabaseError:
    return DatabaseError(f"cannot connect to the database: {hide_password(_message(error), password)}", error.sqlstate)


def _check_new(connection: AnyConnection, kind: type[Any]) -> None:
    if not isinstance(connection, kind):
        raise UnsafeConnection(
            f"the callable must return a new psycopg.{kind.__name__}, not psycopg.{type(connection).__qualname__}"
        )
    if connection.closed:
        raise UnsafeConnection("the callable returned a closed connection; it must return a new one each time")
    if connection.pgconn.transaction_status != _IDLE:
        raise UnsafeConnection("the callable returned a connection inside a transaction; it must return a new one")


def translate(error: BaseException) -> DatabaseError:
    """What one of psycopg's errors says, as dblock's own."""
    return DatabaseError(_message(error), getattr(error, "sqlstate", None))


def secret_in(conninfo: str) -> str | None:
    """The name of a secret that the URL or conninfo string holds, or None.

    Raises:
        ValueError: it cannot be read. The message does not show it.
    """
    # libpq itself reads it: no other reader knows all the places where it takes a password from.
    settings = _settings(_as_libpq_reads_it(conninfo))
    return next((name for name in _SECRETS if settings.get(name)), None)


def _as_libpq_reads_it(conninfo: str) -> str:
    scheme = _SCHEME.match(conninfo)
    return "postgresql://" + conninfo[scheme.end() :] if scheme else conninfo


def _settings(conninfo: str) -> dict[str, Any]:
    # libpq's complaints quote what they could not read, and that may be a piece of the password.
    try:
        return dict(conninfo_to_dict(conninfo))
    except (psycopg.ProgrammingError, UnicodeError):
        raise ValueError(f"db {_UNREADABLE}") from None


def _message(error: BaseException) -> str:
    """The server's message without its context."""
    diagnostic = getattr(error, "diag", None)
    return one_line(getattr(diagnostic, "message_primary", None) or str(error) or type(error).__name__)
