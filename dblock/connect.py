"""From what the caller gave to a connection of the lock's own, and how a message is run on it. Knows psycopg.

The driver is imported only when a connection is opened, so ``import dblock`` costs nothing and needs none.
"""

from __future__ import annotations

import re
import selectors
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dblock.errors import DatabaseError, UnsafeConnection
from dblock.protocol import Row, Steps, T

if TYPE_CHECKING:
    import psycopg

Source = str | Callable[[], Any]

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
_SCHEMES = {"postgresql", "postgres", "postgresql+psycopg"}


class Session:
    """One connection that a lock owns from its opening to its closing."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self.backend_pid = connection.info.backend_pid
        self.server_version = connection.info.server_version

    def run(self, steps: Steps[T]) -> T:
        """Run a protocol's generator to its end: send what it yields, hand it the replies, throw errors in."""
        try:
            message = next(steps)
            while True:
                try:
                    row = self._execute(message)
                except BaseException as error:  # noqa: BLE001 - the generator re-raises it after giving back
                    message = steps.throw(error)
                else:
                    message = steps.send(row)
        except StopIteration as end:
            result: T = end.value
            return result

    def alive(self) -> bool:
        """Tell whether the connection stands, without traffic as long as the server has said nothing unasked."""
        if self._connection.closed:
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            unasked = selector.select(timeout=0)
        if unasked:
            # Unasked for, the server says that it ends the session; or it is a mere notice. One more message tells.
            try:
                self._execute("SELECT")
            except DatabaseError:
                return False
        return True

    def fileno(self) -> int:
        """The descriptor of the connection's socket."""
        return self._connection.fileno()

    def close(self) -> None:
        """End the session; the server gives back whatever it held."""
        # The socket goes even where the driver could not say goodbye, and this runs while errors are on their way.
        with suppress(Exception):
            self._connection.close()

    def rows(self, message: str) -> list[Row]:
        """Send one message, and return all rows of its last statement.

        Raises:
            DatabaseError: the server or the connection failed it.
        """
        import psycopg

        try:
            with self._connection.cursor() as cursor:
                # Without parameters and not prepared: the simple protocol, the only one that takes several
                # statements in one message.
                cursor.execute(message.encode(), prepare=False)
                while cursor.nextset():
                    pass
                return cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            raise DatabaseError(_first_line(error), error.sqlstate) from error

    def _execute(self, message: str) -> Row:
        rows = self.rows(message)
        return rows[0] if rows else ()


def check_source(db: Source) -> Source:
    """Refuse early what cannot be a database, so that the mistake shows where the lock is made.

    Raises:
        ValueError: an empty text, or a URL of another kind of database.
        TypeError: neither text nor callable.
    """
    if isinstance(db, str):
        if not db.strip():
            raise ValueError(
                "db is empty: a PostgreSQL URL (postgresql://…), a conninfo string or a callable is needed"
            )
        url = _URL.match(db)
        if url and url["scheme"].lower() not in _SCHEMES:
            raise ValueError(
                f"db begins with {url['scheme']}://, which is not supported; it may begin with postgresql:// or "
                f"postgres://, be a conninfo string, or a callable that returns a psycopg connection"
            )
        return db
    if not callable(db):
        raise TypeError(f"db must be a str or a callable, not {type(db).__name__}")
    return db


def connect(db: Source) -> Session:
    """Open the lock's own connection.

    Args:
        db: a URL, a conninfo string, or a callable that returns a new psycopg connection.

    Raises:
        DatabaseError: the database cannot be reached, or psycopg is missing.
        ValueError: the URL or conninfo string cannot be read.
        UnsafeConnection: the callable returned something no lock can be trusted on.
    """
    try:
        import psycopg
    except ImportError as error:
        raise DatabaseError(
            f"the driver psycopg cannot be imported ({error}); install it with: pip install 'dblock[postgres]'"
        ) from error

    if isinstance(db, str):
        return Session(_connect_to(db))
    try:
        connection = db()
    except psycopg.Error as error:
        raise DatabaseError(f"the callable could not connect: {_first_line(error)}", error.sqlstate) from error
    if not isinstance(connection, psycopg.Connection):
        raise UnsafeConnection(
            f"the callable must return a new psycopg.Connection, not {type(connection).__module__}."
            f"{type(connection).__qualname__}"
        )
    return Session(_make_ready(connection))


def hide_password(text: str, password: str | None) -> str:
    """Take a password out of a text that is about to be shown."""
    return text.replace(password, "***") if password else text


def _connect_to(conninfo: str) -> psycopg.Connection[Any]:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    if url := _URL.match(conninfo):
        conninfo = "postgresql://" + conninfo[url.end() :]
    # libpq's complaints quote what they could not read, and that may be a piece of the password.
    try:
        settings = conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:
        raise ValueError(
            "db cannot be read as a PostgreSQL URL or conninfo string (it is not shown, as it may hold a password); "
            "in a URL percent-encode / : @ ? # % in user and password"
        ) from None
    if "@" in str(settings.get("host", "")) or re.search(r"[^0-9,]", str(settings.get("port", ""))):
        raise ValueError(
            "db has no readable host or port (it is not shown, as it may hold a password); "
            "in a URL percent-encode / : @ ? # % in user and password"
        )
    password = str(settings.get("password") or "")
    try:
        return psycopg.connect(make_conninfo(conninfo, client_encoding="UTF8"), autocommit=True, prepare_threshold=None)
    except psycopg.Error as error:
        text = hide_password(_first_line(error), password)
        raise DatabaseError(f"cannot connect to the database: {text}", error.sqlstate) from None


def _make_ready(connection: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    import psycopg
    from psycopg.pq import TransactionStatus

    if connection.closed:
        raise UnsafeConnection("the callable returned a closed connection; it must return a new one each time")
    if connection.info.transaction_status != TransactionStatus.IDLE:
        raise UnsafeConnection("the callable returned a connection inside a transaction; it must return a new one")
    try:
        connection.autocommit = True
        connection.prepare_threshold = None
        connection.execute("SET client_encoding = 'UTF8'")
    except psycopg.Error as error:
        raise DatabaseError(f"the callable's connection failed: {_first_line(error)}", error.sqlstate) from error
    return connection


def _first_line(error: Exception) -> str:
    """The server's message without its context, on one line."""
    diagnostic = getattr(error, "diag", None)
    text = getattr(diagnostic, "message_primary", None) or str(error) or type(error).__name__
    return " ".join(text.split())
