"""Sessions on SQL Server through pymssql: opened from a URL, or adopted from a callable's result.

Imported only when such a connection is wanted: whoever uses dblock without SQL Server needs no pymssql.

The driver blocks inside its C library, where no signal is seen and no time of ours runs out. Its one opening is a wait
callback, which is called with the socket before the driver reads the server's reply; the waiting is done there. That
callback is one for the process, so it is put in place only while a message of dblock's is under way, looks only after
the thread that sends it, and passes everybody else on to whatever callback stood there before.
"""

from __future__ import annotations

import asyncio
import os
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pymssql
from pymssql import _mssql

from dblock.aio_session import AsyncSession, until_done
from dblock.errors import DatabaseError, UnsafeConnection
from dblock.mssql import ENGINE, AppLock
from dblock.protocol import ANSWER_SECONDS, REPORT_SECONDS, Row, ServerLock, Steps, T, Wait, WaitOver, Wish
from dblock.session import (
    Loan,
    Scope,
    Session,
    duplicate,
    has_input,
    hide_password,
    notice_dead_network,
    one_line,
)

# What may stand behind the ? of a URL, as pymssql.connect names it. Not `timeout`: it is one for the whole process, and
# would end a wait for a lock by closing the connection.
_OPTIONS = ("appname", "encryption", "login_timeout", "tds_version")

_PROGRAM_NAME_CHARACTERS = 128

# How long after the deadline the server's own word is waited for: it ends the wait in good order, and says so. Without
# it the connection must be closed, which a caller would mind more than a wait that is a little long.
_SERVER_GRACE_SECONDS = 0.02
_SERVER_GRACE_ON_LOAN_SECONDS = ANSWER_SECONDS

# Windows wakes nobody who waits for a socket when a signal arrives.
_LONGEST_NAP_SECONDS = 0.05 if os.name == "nt" else None


class PymssqlSession(Session):
    """A pymssql connection. After an error nobody knows what its session holds, so it is closed then."""

    engine = ENGINE

    def __init__(self, connection: pymssql.Connection, loan: Loan | None = None) -> None:
        super().__init__(loan)
        self._connection = connection
        self._closed = False
        self._socket: int | None = None
        self._interrupted: socket.socket | None = None

    def lock(self, wish: Wish) -> ServerLock:
        return AppLock(wish, own=self.loan is None)

    def rows(self, text: str) -> list[Row]:
        return self._send(text, lambda reply: _wait_for_reply(reply, interrupted=self._interrupted))

    def wait(self, message: Wait, meanwhile: Callable[[], None] | None) -> list[Row]:
        grace = _SERVER_GRACE_SECONDS if self.loan is None else _SERVER_GRACE_ON_LOAN_SECONDS
        give_up = None if message.deadline is None else message.deadline + grace
        return self._send(message.text, lambda reply: _wait_for_reply(reply, give_up, meanwhile, self._interrupted))

    @property
    def in_transaction(self) -> None:
        return None

    @property
    def would_begin(self) -> bool:
        return not self._connection.autocommit_state

    def interrupt_by(self, interrupted: socket.socket) -> None:
        """Break off the message under way, or the next one, when something can be read from the socket."""
        self._interrupted = interrupted

    def alive(self) -> bool:
        if not self._turn.acquire(blocking=False):
            return not self._closed  # who talks on it learns of its end
        try:
            if self.closed or self._socket is None or not has_input(self._socket):
                return not self.closed
            if self.loan is not None:
                # What can be read may be the caller's rows: only the end itself counts.
                with closing(duplicate(self._socket)) as connection:
                    return bool(connection.recv(1, socket.MSG_PEEK))
            # Unasked for, the server says that it ends the session; or it is a mere notice. A message tells.
            with suppress(DatabaseError):
                self.rows("SELECT 1")
        except (OSError, ValueError):
            return False
        finally:
            self._turn.release()
        return not self._closed

    @property
    def closed(self) -> bool:
        return self._closed or (self.loan is not None and not _is_open(self._connection))

    def fileno(self) -> int:
        if self._socket is None or self._closed:
            raise DatabaseError("no message was sent on this connection, or it is closed")
        return self._socket

    def _close(self) -> None:
        self._closed = True
        self._connection.close()

    def _send(self, text: str, wait: Callable[[int], None]) -> list[Row]:
        if self._closed:
            raise DatabaseError("the connection is closed")

        def wait_for_reply(socket: int) -> None:
            if self._socket is None and self.loan is None:
                notice_dead_network(socket)
            self._socket = socket
            wait(socket)

        try:
            with _waiting(wait_for_reply), self._connection.cursor(as_dict=False) as cursor:
                cursor.execute(text)
                found: list[Row] = []
                while True:
                    if cursor.description:
                        found = cursor.fetchall()
                    if not cursor.nextset():
                        return found
        except pymssql.Error as error:
            # Whether the session still stands and what it holds is more than the driver knows.
            self.close()
            raise translate(error) from error
        except BaseException:
            # The wait was left while the server may be about to grant: what it grants must end with the connection.
            self.close()
            raise


def connect(url: str, program: str = "") -> PymssqlSession:
    """Open a connection.

    Args:
        url: ``mssql+pymssql://user:password@host:1433/database``, or ``mssql://…``.
        program: what is told of the caller in program_name, as far as it fits.

    Raises:
        DatabaseError: the database cannot be reached.
        ValueError: the URL cannot be read.
    """
    arguments = _arguments(url)
    if program:
        arguments["appname"] = f"{arguments['appname']} {program}"[:_PROGRAM_NAME_CHARACTERS]
    try:
        with _waiting(_wait_for_reply):  # for the settings which the driver sends of its own accord
            connection = pymssql.connect(**arguments, autocommit=True)
    except pymssql.Error as error:
        text = hide_password(_message(error), arguments.get("password"))
        raise DatabaseError(f"cannot connect to the database: {text}") from None
    return PymssqlSession(connection)


def adopt(connection: pymssql.Connection) -> PymssqlSession:
    """Take over a new connection which a callable has opened.

    Raises:
        UnsafeConnection: it is closed.
        DatabaseError: it failed.
    """
    try:
        # Ends the transaction that pymssql begins unasked; a new connection has done nothing in it.
        connection.autocommit(True)
    except pymssql.InterfaceError:
        raise UnsafeConnection(
            "the callable returned a closed connection; it must return a new one each time"
        ) from None
    except pymssql.Error as error:
        raise DatabaseError(f"the callable's connection failed: {_message(error)}") from error
    return PymssqlSession(connection)


async def connect_async(url: str, program: str = "") -> AsyncSession:
    """Open a connection for asyncio, as `connect` does."""
    return await _in_thread_of_its_own(lambda: connect(url, program))


async def adopt_async(connection: pymssql.Connection) -> AsyncSession:
    """Take over a new connection which a callable has opened, as `adopt` does."""
    return await _in_thread_of_its_own(lambda: adopt(connection))


def borrow(connection: pymssql.Connection, scope: Scope) -> Session:
    """Use the caller's connection.

    Raises:
        UnsafeConnection: no lock of that scope could be trusted on it.
    """
    if not _is_open(connection):
        raise UnsafeConnection("the connection is closed")
    if scope == "session" and not connection.autocommit_state:
        raise UnsafeConnection(
            "the connection is not in autocommit: the lock would be given back before the work is committed, or kept "
            "beyond it. Use a connection in autocommit, or scope='transaction'"
        )
    return PymssqlSession(connection, Loan(connection, began=False, rollback=connection.rollback))


def _is_open(connection: pymssql.Connection) -> bool:
    """Whether this side has not closed it. The driver says so in no other place: ``cursor()`` works all the same."""
    try:
        return bool(connection._conn.connected)
    except pymssql.Error:
        return False


def borrow_async(connection: object, scope: Scope) -> AsyncSession:  # noqa: ARG001 - as every driver's
    """Refuse: a lock for asyncio would use the caller's connection in another thread."""
    raise UnsafeConnection("pymssql's connections block: use dblock.lock, or give dblock.alock a URL")


def translate(error: BaseException) -> DatabaseError:
    """What one of pymssql's errors says, as dblock's own."""
    return DatabaseError(_message(error))


def secret_in(url: str) -> str | None:
    """The name of a secret that the URL holds, or None.

    Raises:
        ValueError: it cannot be read. The message does not show it.
    """
    return "password" if _arguments(url).get("password") else None


# --- asyncio ----------------------------------------------------------------------------------------------------------


class AsyncPymssqlSession(AsyncSession):
    """A pymssql connection for asyncio, which the driver does not know: a thread of its own waits for it.

    Not one of the event loop's own few threads: when all of those wait for locks, no holder could give one back.
    """

    engine = ENGINE

    def __init__(self, blocking: PymssqlSession, thread: ThreadPoolExecutor) -> None:
        super().__init__(None)
        self._blocking = blocking
        self._thread = thread
        self._interrupt, interrupted = socket.socketpair()
        self._sockets = (self._interrupt, interrupted)
        blocking.interrupt_by(interrupted)

    def lock(self, wish: Wish) -> ServerLock:
        return self._blocking.lock(wish)

    async def run(self, steps: Steps[T], meanwhile: Callable[[], Coroutine[Any, Any, None]] | None = None) -> T:
        loop = asyncio.get_running_loop()

        def report() -> None:
            if meanwhile is not None:
                asyncio.run_coroutine_threadsafe(meanwhile(), loop)

        return await self._call(lambda: self._blocking.run(steps, report))

    async def rows(self, text: str) -> list[Row]:
        return await self._call(lambda: self._blocking.rows(text))

    async def _close(self) -> None:
        if not self.closed:
            await self._call(self._blocking.close)
        self._thread.shutdown(wait=False)
        for socket_ in self._sockets:
            socket_.close()

    @property
    def closed(self) -> bool:
        return self._blocking.closed

    @property
    def in_transaction(self) -> None:
        return None

    @property
    def would_begin(self) -> bool:
        return self._blocking.would_begin

    def fileno(self) -> int:
        return self._blocking.fileno()

    def alive(self) -> bool:
        return self._blocking.alive()

    async def _call(self, function: Callable[[], T]) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._thread, function)
        return await until_done(future, on_cancel=lambda: self._interrupt.send(b"x"))


async def _in_thread_of_its_own(connect: Callable[[], PymssqlSession]) -> AsyncSession:
    thread = ThreadPoolExecutor(1, thread_name_prefix="dblock")
    connecting = thread.submit(connect)
    try:
        return AsyncPymssqlSession(await asyncio.wrap_future(connecting), thread)
    except BaseException:
        # Connecting cannot be interrupted: whatever comes of it is closed when it comes.
        connecting.add_done_callback(_close_what_was_opened)
        thread.shutdown(wait=False)
        raise


def _close_what_was_opened(connecting: Future[PymssqlSession]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()


# --- waiting ----------------------------------------------------------------------------------------------------------

_under_way = threading.local()  # .wait: what this thread's message of dblock's does while it waits
_installing = threading.Lock()
_messages_under_way = 0
_callback_before: Callable[[int], object] | None = None


@contextmanager
def _waiting(wait: Callable[[int], None]) -> Iterator[None]:
    """Let pymssql wait for replies to this thread's messages by the given function, as long as the block lasts."""
    outer = getattr(_under_way, "wait", None)
    _install()
    try:
        _under_way.wait = wait
        yield
    finally:
        _under_way.wait = outer
        _uninstall()


def _install() -> None:
    global _messages_under_way, _callback_before  # noqa: PLW0603 - the driver's callback is one for the process
    with _installing:
        _messages_under_way += 1
        if _messages_under_way == 1:
            _callback_before = _mssql.wait_callback
            _mssql.set_wait_callback(_callback)


def _uninstall() -> None:
    global _messages_under_way, _callback_before  # noqa: PLW0603
    with _installing:
        _messages_under_way -= 1
        # Somebody else may have set another one meanwhile: that one stays.
        if _messages_under_way == 0 and _mssql.wait_callback is _callback:
            _mssql.set_wait_callback(_callback_before)
            _callback_before = None


def _callback(socket: int) -> None:
    wait = getattr(_under_way, "wait", None) or _callback_before
    if wait is not None:
        wait(socket)


class _Interrupted(BaseException):
    """The task that waits was cancelled."""


def _wait_for_reply(
    reply: int,
    give_up: float | None = None,
    meanwhile: Callable[[], None] | None = None,
    interrupted: socket.socket | None = None,
) -> None:
    """Return when the server's reply arrives. Whatever is raised here, a signal's exception too, ends the wait.

    Raises:
        WaitOver: it is time to give up.
        _Interrupted: something can be read from the given socket.
    """
    next_report = time.monotonic() + REPORT_SECONDS if meanwhile else None
    with selectors.DefaultSelector() as selector:
        selector.register(reply, selectors.EVENT_READ)
        if interrupted is not None:
            selector.register(interrupted, selectors.EVENT_READ)
        while not (ready := selector.select(_nap(give_up, next_report))):
            now = time.monotonic()
            if give_up is not None and now >= give_up:
                raise WaitOver("the server did not end the wait in time")
            if meanwhile and next_report is not None and now >= next_report:
                next_report = now + REPORT_SECONDS
                meanwhile()
        if any(key.fileobj is interrupted for key, _ in ready):
            raise _Interrupted


def _nap(*moments: float | None) -> float | None:
    """Seconds until the earliest of the moments, or None where there is none."""
    naps = [max(0.0, moment - time.monotonic()) for moment in moments if moment is not None]
    if _LONGEST_NAP_SECONDS is not None:
        naps.append(_LONGEST_NAP_SECONDS)
    return min(naps, default=None)


# --- the URL, and errors ----------------------------------------------------------------------------------------------


def _arguments(url: str) -> dict[str, Any]:
    """The URL as arguments of ``pymssql.connect``. Nothing of it is shown, as it may hold a password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        host, port, options = None, None, []
    if not host or parts.fragment:
        raise ValueError(
            "db cannot be read as a SQL Server URL (it is not shown, as it may hold a password): write "
            "mssql+pymssql://user:password@host:1433/database, and percent-encode / : @ ? # % in user and password"
        )
    arguments: dict[str, Any] = {"server": unquote(host), "appname": "dblock"}
    if port is not None:
        arguments["port"] = str(port)
    for name, value in (("user", parts.username), ("password", parts.password), ("database", parts.path[1:])):
        if value:
            arguments[name] = unquote(value)
    for name, value in options:
        if name not in _OPTIONS:
            raise ValueError(
                f"db holds an option behind its ? that is none of {', '.join(_OPTIONS)} (it is not shown, as it may be "
                f"a part of a password)"
            )
        arguments[name] = value
    return arguments


def _message(error: BaseException) -> str:
    """The server's message, or the driver's where the server said nothing."""
    parts = [part.decode(errors="replace") if isinstance(part, bytes) else part for part in _flat(error.args)]
    text = "".join(part for part in parts if isinstance(part, str))
    said, _, _ = text.partition("DB-Lib error message 20018")  # "General SQL Server error: Check messages"
    return one_line(re.sub(r"DB-Lib error message \d+, severity \d+:", "", said or text)) or type(error).__name__


def _flat(values: tuple[Any, ...]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value
