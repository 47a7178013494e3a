"""From what the caller gave to a connection of the lock's own: which driver's business it is.

No driver is imported before its kind of connection is wanted, so ``import dblock`` costs nothing and needs none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol, cast

from dblock.errors import DatabaseError, UnsafeConnection
from dblock.session import Session

Source = str | Callable[[], Any]

# The driver that speaks for each scheme of a URL. A text without a scheme is a conninfo string of libpq's.
_DRIVERS = {
    "postgresql": "psycopg",
    "postgres": "psycopg",
    "postgresql+psycopg": "psycopg",
    "mssql": "pymssql",
    "mssql+pymssql": "pymssql",
}
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")


class _Driver(Protocol):
    """What a module ``dblock.driver_…`` offers."""

    def connect(self, url: str) -> Session: ...
    def adopt(self, connection: Any) -> Session: ...
    def translate(self, error: BaseException) -> DatabaseError: ...
    def secret_in(self, url: str) -> str | None: ...


def check_source(db: Source) -> Source:
    """Refuse early what cannot be a database, so that the mistake shows where the lock is made.

    Raises:
        ValueError: an empty text, or a URL of another kind of database.
        TypeError: neither text nor callable.
    """
    if isinstance(db, str):
        _driver_for(db)
    elif not callable(db):
        raise TypeError(f"db must be a str or a callable, not {type(db).__name__}")
    return db


def connect(db: Source) -> Session:
    """Open the lock's own connection.

    Args:
        db: a URL, a conninfo string, or a callable that returns a new connection of psycopg or pymssql.

    Raises:
        DatabaseError: the database cannot be reached, or the driver is missing.
        ValueError: the URL or conninfo string cannot be read.
        UnsafeConnection: the callable returned something no lock can be trusted on.
    """
    if isinstance(db, str):
        return _driver_for(db).connect(db)
    try:
        connection = db()
    except Exception as error:
        driver = _driver_of(error)
        if driver is None:
            raise
        said = driver.translate(error)
        raise DatabaseError(f"the callable could not connect: {said}", said.sqlstate) from error
    driver = _driver_of(connection)
    if driver is None:
        raise UnsafeConnection(
            f"the callable must return a new connection of psycopg or pymssql, not {type(connection).__module__}."
            f"{type(connection).__qualname__}"
        )
    return driver.adopt(connection)


def secret_in(url: str) -> str | None:
    """The name of a secret, such as a password, that a URL or conninfo string holds, or None.

    Raises:
        ValueError: it cannot be read. The message does not show it.
        DatabaseError: the driver that reads it is missing.
    """
    return _driver_for(url).secret_in(url)


def _driver_for(text: str) -> _Driver:
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
    return _load(name)


def _driver_of(thing: object) -> _Driver | None:
    """The driver that a connection or an error belongs to, by the package of its class or of an ancestor's."""
    packages = {ancestor.__module__.partition(".")[0] for ancestor in type(thing).__mro__}
    return next((_load(name) for name in sorted(set(_DRIVERS.values())) if name in packages), None)


def _load(name: str) -> _Driver:
    return cast("_Driver", import_module(f"dblock.driver_{name}"))
