"""Sessions on PostgreSQL through psycopg: opened from a URL or conninfo string, or adopted from a callable's result.

Imported only when such a connection is wanted: whoever uses dblock without PostgreSQL needs no psycopg.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dblock.errors import DatabaseError, UnsafeConnection
from dblock.postgres import ENGINE, AdvisoryLock
from dblock.protocol import Row, ServerLock, Wish
from dblock.session import Session, hide_password, import_driver, one_line

if TYPE_CHECKING:
    import psycopg

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECRETS = ("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
_UNREADABLE = (
    "cannot be read as a PostgreSQL URL or conninfo string (it is not shown, as it may hold a password); "
    "in a URL percent-encode / : @ ? # % in user and password"
)


class PsycopgSession(Session):
    """A psycopg connection in autocommit, spoken to in the simple protocol."""

    engine = ENGINE

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        super().__init__()
        self._connection = connection

    def lock(self, wish: Wish) -> ServerLock:
        info = self._connection.info
        return AdvisoryLock(wish, server_version=info.server_version, client_backend_pid=info.backend_pid)

    def rows(self, text: str) -> list[Row]:
        import psycopg

        try:
            with self._connection.cursor() as cursor:
                # Without parameters and not prepared: the simple protocol, the only one that takes several
                # statements in one message.
                cursor.execute(text.encode(), prepare=False)
                while cursor.nextset():
                    pass
                return cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            raise translate(error) from error

    @property
    def closed(self) -> bool:
        return self._connection.closed

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        # The socket goes even where the driver could not say goodbye, and this runs while errors are on their way.
        with suppress(Exception):
            self._connection.close()


def connect(conninfo: str) -> Session:
    """Open a connection.

    Args:
        conninfo: a URL or a conninfo string.

    Raises:
        DatabaseError: the database cannot be reached, or psycopg is missing.
        ValueError: the text cannot be read.
    """
    import_driver("psycopg", "postgres")
    import psycopg
    from psycopg.conninfo import make_conninfo

    conninfo = _as_libpq_reads_it(conninfo)
    settings = _settings(conninfo)
    if "@" in str(settings.get("host", "")) or re.search(r"[^0-9,]", str(settings.get("port", ""))):
        raise ValueError(
            "db has no readable host or port (it is not shown, as it may hold a password); "
            "in a URL percent-encode / : @ ? # % in user and password"
        )
    try:
        connection = psycopg.connect(
            make_conninfo(conninfo, client_encoding="UTF8"), autocommit=True, prepare_threshold=None
        )
    except psycopg.Error as error:
        text = hide_password(_message(error), str(settings.get("password") or ""))
        raise DatabaseError(f"cannot connect to the database: {text}", error.sqlstate) from None
    return PsycopgSession(connection)


def adopt(connection: psycopg.Connection[Any]) -> Session:
    """Take over a new connection which a callable has opened.

    Raises:
        UnsafeConnection: it is closed, in a transaction, or an asynchronous one.
        DatabaseError: it failed.
    """
    import psycopg
    from psycopg.pq import TransactionStatus

    if not isinstance(connection, psycopg.Connection):
        raise UnsafeConnection(
            f"the callable must return a new psycopg.Connection, not psycopg.{type(connection).__qualname__}"
        )
    if connection.closed:
        raise UnsafeConnection("the callable returned a closed connection; it must return a new one each time")
    if connection.info.transaction_status != TransactionStatus.IDLE:
        raise UnsafeConnection("the callable returned a connection inside a transaction; it must return a new one")
    try:
        connection.autocommit = True
        connection.prepare_threshold = None
        connection.execute("SET client_encoding = 'UTF8'")
    except psycopg.Error as error:
        raise DatabaseError(f"the callable's connection failed: {_message(error)}", error.sqlstate) from error
    return PsycopgSession(connection)


def translate(error: BaseException) -> DatabaseError:
    """What one of psycopg's errors says, as dblock's own."""
    return DatabaseError(_message(error), getattr(error, "sqlstate", None))


def secret_in(conninfo: str) -> str | None:
    """The name of a secret that the URL or conninfo string holds, or None.

    Raises:
        ValueError: it cannot be read. The message does not show it.
    """
    import_driver("psycopg", "postgres")
    # libpq itself reads it: no other reader knows all the places where it takes a password from.
    settings = _settings(_as_libpq_reads_it(conninfo))
    return next((name for name in _SECRETS if settings.get(name)), None)


def _as_libpq_reads_it(conninfo: str) -> str:
    scheme = _SCHEME.match(conninfo)
    return "postgresql://" + conninfo[scheme.end() :] if scheme else conninfo


def _settings(conninfo: str) -> dict[str, Any]:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    # libpq's complaints quote what they could not read, and that may be a piece of the password.
    try:
        return dict(conninfo_to_dict(conninfo))
    except (psycopg.ProgrammingError, UnicodeError):
        raise ValueError(f"db {_UNREADABLE}") from None


def _message(error: BaseException) -> str:
    """The server's message without its context."""
    diagnostic = getattr(error, "diag", None)
    return one_line(getattr(diagnostic, "message_primary", None) or str(error) or type(error).__name__)
