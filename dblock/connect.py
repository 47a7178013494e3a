"""From what the caller gave to a connection: which driver's business it is, and whose the connection is.

No driver is imported before its kind of connection is wanted, so ``import dblock`` costs nothing and needs none.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import cache, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from dblock.errors import DatabaseError, UnsafeConnection
from dblock.protocol import T
from dblock.session import Scope, Session

if TYPE_CHECKING:
    import psycopg
    import pymssql
    import sqlalchemy
    import sqlalchemy.ext.asyncio
    import sqlalchemy.orm

    from dblock.aio_session import AsyncSession

    BlockingConnection: TypeAlias = psycopg.Connection[Any] | pymssql.Connection
    Source: TypeAlias = (
        str
        | Callable[[], BlockingConnection]
        | BlockingConnection
        | sqlalchemy.Engine
        | sqlalchemy.Connection
        | sqlalchemy.orm.Session
        | sqlalchemy.orm.scoped_session[Any]
    )
    AsyncSource: TypeAlias = (
        str
        | Callable[[], Awaitable[psycopg.AsyncConnection[Any]]]
        | Callable[[], pymssql.Connection]
        | psycopg.AsyncConnection[Any]
        | sqlalchemy.ext.asyncio.AsyncEngine
        | sqlalchemy.ext.asyncio.AsyncConnection
        | sqlalchemy.ext.asyncio.AsyncSession
        | sqlalchemy.ext.asyncio.async_scoped_session[Any]
    )

# The driver that speaks for each scheme of a URL. A text without a scheme is a conninfo string of libpq's.
_DRIVERS = {
    "postgresql": "psycopg",
    "postgres": "psycopg",
    "postgresql+psycopg": "psycopg",
    "mssql": "pymssql",
    "mssql+pymssql": "pymssql",
}
_EXTRAS = {"psycopg": "postgres", "pymssql": "mssql"}
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")

# Packages whose objects are taken for what they are, and not for a callable that returns a connection.
_PACKAGES = ("psycopg", "pymssql", "sqlalchemy")


class _Driver(Protocol):
    """What a module ``dblock.driver_…`` of a driver offers."""

    def connect(self, url: str, program: str = "") -> Session: ...
    def adopt(self, connection: Any) -> Session: ...
    def borrow(self, connection: Any, scope: Scope) -> Session: ...
    async def connect_async(self, url: str, program: str = "") -> AsyncSession: ...
    async def adopt_async(self, connection: Any) -> AsyncSession: ...
    def borrow_async(self, connection: Any, scope: Scope) -> AsyncSession: ...
    def translate(self, error: BaseException) -> DatabaseError: ...
    def secret_in(self, url: str) -> str | None: ...


def check_source(db: T, *, scope: Scope = "session") -> T:
    """Refuse early what cannot be a database, so that the mistake shows where the lock is made.

    Raises:
        ValueError: an empty text, a URL of another kind of database, or a lock until the end of a transaction which
            nobody but the lock would ever use.
        TypeError: neither a text, nor a connection that is known, nor callable.
    """
    if isinstance(db, str):
        _driver_named(db)
    elif _package_of(db) is None and not callable(db):
        raise TypeError(
            f"db must be a str, a connection, session or engine of psycopg, pymssql or SQLAlchemy, or a callable, not "
            f"{type(db).__name__}"
        )
    if scope == "transaction" and not is_callers(db):
        raise ValueError(
            "scope='transaction' needs the caller's connection, whose work the transaction holds: on a connection of "
            "the lock's own it would guard nothing"
        )
    return db


def is_callers(db: object) -> bool:
    """Whether it is a connection of the caller's, rather than a way to a new one."""
    if isinstance(db, str) or _package_of(db) is None:
        return False
    return type(db).__name__ not in ("Engine", "AsyncEngine") or _package_of(db) != "sqlalchemy"


def connect(db: Source, scope: Scope = "session", comment: str = "") -> Session:
    """Open a connection of the lock's own, or take the caller's.

    Args:
        db: see `dblock.lock`.
        scope: how long the lock shall last.
        comment: what is told of the caller to those who look at the session; see `dblock.label.comment`.

    Raises:
        DatabaseError: the database cannot be reached, or the driver is missing.
        ValueError: the URL or conninfo string cannot be read.
        UnsafeConnection: no lock can be trusted on what the caller gave.
    """
    session = _connect(db, scope, comment)
    session.comment = comment
    return session


def _connect(db: Source, scope: Scope, comment: str) -> Session:
    if isinstance(db, str):
        return _load(_driver_named(db)).connect(db, comment)
    package = _package_of(db)
    if package == "sqlalchemy":
        from dblock import driver_sqlalchemy

        return driver_sqlalchemy.session(cast("Any", db), scope)
    if package is not None:
        return _load(package).borrow(db, scope)
    try:
        connection = cast("Callable[[], Any]", db)()
    except Exception as error:
        raise _failed(error) from error
    return _new_connections_driver(connection).adopt(connection)


async def connect_async(db: AsyncSource, scope: Scope = "session", comment: str = "") -> AsyncSession:
    """Open a connection for asyncio, or take the caller's, as `connect` does."""
    session = await _connect_async(db, scope, comment)
    session.comment = comment
    return session


async def _connect_async(db: AsyncSource, scope: Scope, comment: str) -> AsyncSession:
    if isinstance(db, str):
        return await _load(_driver_named(db)).connect_async(db, comment)
    package = _package_of(db)
    if package == "sqlalchemy":
        from dblock import driver_sqlalchemy

        return await driver_sqlalchemy.session_async(db, scope)
    if package is not None:
        return _load(package).borrow_async(db, scope)
    try:
        from inspect import isawaitable

        connection = cast("Callable[[], Any]", db)()
        if isawaitable(connection):
            connection = await connection
    except Exception as error:
        raise _failed(error) from error
    return await _new_connections_driver(connection).adopt_async(connection)


def _failed(error: Exception) -> Exception:
    """What a callable raised: a driver's error as dblock's, anything else as it is."""
    package = _package_of(error)
    if package not in _EXTRAS:
        return error
    said = _load(package).translate(error)
    return DatabaseError(f"the callable could not connect: {said}", said.sqlstate)


def _new_connections_driver(connection: object) -> _Driver:
    package = _package_of(connection)
    if package not in _EXTRAS:
        raise UnsafeConnection(
            f"the callable must return a new connection of psycopg or pymssql, not {type(connection).__module__}."
            f"{type(connection).__qualname__}"
        )
    return _load(package)


def secret_in(url: str) -> str | None:
    """The name of a secret, such as a password, that a URL or conninfo string holds, or None.

    Raises:
        ValueError: it cannot be read. The message does not show it.
        DatabaseError: the driver that reads it is missing.
    """
    return _load(_driver_named(url)).secret_in(url)


def _driver_named(text: str) -> str:
    if not text.strip():
        raise ValueError(
            "db is empty: a URL (postgresql://…, mssql+pymssql://…), a conninfo string or a callable is needed"
        )
    scheme = _SCHEME.match(text)
    name = _DRIVERS.get(scheme["scheme"].lower()) if scheme else "psycopg"
    if name is None:
        raise ValueError(
            f"db begins with {scheme and scheme['scheme']}://, which is not supported; it may begin with "
            f"postgresql://, postgres:// or mssql+pymssql://, be a conninfo string, or a callable that returns a new "
            f"connection of psycopg or pymssql"
        )
    return name


def _package_of(thing: object) -> str | None:
    """The package that knows a connection or an error, by its class or an ancestor's."""
    kind: type = type(thing)
    return _package_of_class(kind)


@lru_cache(maxsize=64)
def _package_of_class(kind: type) -> str | None:
    packages = {ancestor.__module__.partition(".")[0] for ancestor in kind.__mro__}
    return next((name for name in _PACKAGES if name in packages), None)


@cache
def _load(name: str) -> _Driver:
    """What knows a driver, only now that it is needed.

    Raises:
        DatabaseError: the driver is not installed. The message names the extra that brings it.
    """
    try:
        return cast("_Driver", import_module(f"dblock.driver_{name}"))
    except ImportError as error:
        raise DatabaseError(
            f"the driver {name} cannot be imported ({error}); install it with: pip install 'dblock[{_EXTRAS[name]}]'"
        ) from error
