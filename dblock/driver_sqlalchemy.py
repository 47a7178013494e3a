"""What SQLAlchemy's users have, an engine, a connection, a session, as a connection of the driver beneath.

Statements go past SQLAlchemy: its way of sending them cannot read the reply of a message that holds several. What is
its own business here is the transaction, which it must know of, and the pool, to which no connection may go back while
a lock is on it.

Imported only when something of SQLAlchemy's is given.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import sqlalchemy
from sqlalchemy import event, exc
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.orm import scoped_session

from dblock.errors import DatabaseError, UnsafeConnection
from dblock.session import Loan, Scope, Session, one_line

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection

    from dblock.aio_session import AsyncSession

    Lent = sqlalchemy.Connection | OrmSession | scoped_session[Any]

_DRIVERS = ("psycopg", "pymssql")


def session(db: sqlalchemy.Engine | Lent, scope: Scope) -> Session:
    """A new connection of an engine's, or the caller's connection.

    Raises:
        UnsafeConnection: no lock of that scope could be trusted on it.
        DatabaseError: the database cannot be reached.
    """
    if any(ancestor.__module__.startswith("sqlalchemy.ext.asyncio") for ancestor in type(db).__mro__):
        raise UnsafeConnection(f"an {type(db).__qualname__} is for asyncio: use dblock.alock")
    try:
        if isinstance(db, sqlalchemy.Engine):
            connection, name = _new_connection(db)
            return cast("Session", _driver(name).adopt(connection))
        loan, proxied, name = _lend(db, scope)
    except exc.SQLAlchemyError as error:
        raise _translated(error) from error
    try:
        borrowed: Session = _driver(name).borrow(proxied.driver_connection, scope)
    except UnsafeConnection:
        if loan.began:
            loan.rollback()
        raise
    borrowed.loan = _marked(loan._replace(connection=proxied.driver_connection), proxied, scope)
    return borrowed


async def session_async(db: Any, scope: Scope) -> AsyncSession:
    """The same for asyncio."""
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, async_scoped_session
    from sqlalchemy.ext.asyncio import AsyncSession as AsyncOrmSession
    from sqlalchemy.util import greenlet_spawn

    try:
        if isinstance(db, AsyncEngine):
            connection, name = await greenlet_spawn(_new_connection, db.sync_engine)
            return cast("AsyncSession", await _driver(name).adopt_async(connection))
        if isinstance(db, async_scoped_session):
            db = db()
        if isinstance(db, AsyncOrmSession):
            blocking: Lent = db.sync_session
        elif isinstance(db, AsyncConnection):
            blocking = db.sync_connection or await _started(db)
        else:
            raise UnsafeConnection(f"{type(db).__qualname__} blocks: use dblock.lock")
        loan, proxied, name = await greenlet_spawn(_lend, blocking, scope)
    except exc.SQLAlchemyError as error:
        raise _translated(error) from error
    loan = loan._replace(rollback=db.rollback, closed=db.invalidate)
    try:
        borrowed: AsyncSession = _driver(name).borrow_async(proxied.driver_connection, scope)
    except UnsafeConnection:
        if loan.began:
            await loan.rollback()
        raise
    borrowed.loan = _marked(loan._replace(connection=proxied.driver_connection), proxied, scope)
    return borrowed


async def _started(connection: Any) -> sqlalchemy.Connection:
    started = await connection.start()
    return cast("sqlalchemy.Connection", started.sync_connection)


def _new_connection(engine: sqlalchemy.Engine) -> tuple[Any, str]:
    """A connection that no pool knows: it can never go back to one, and an exhausted pool is not waited for."""
    pool = engine.pool.recreate()
    proxied = pool.connect()
    connection = proxied.driver_connection
    proxied.detach()
    return connection, engine.dialect.driver


def _lend(db: Lent, scope: Scope) -> tuple[Loan, PoolProxiedConnection, str]:
    """The caller's connection, in a transaction that SQLAlchemy knows of where the lock shall last as long as one."""
    owner: sqlalchemy.Connection | OrmSession = db() if isinstance(db, scoped_session) else db
    began = not owner.in_transaction()
    if isinstance(owner, OrmSession):
        connection = owner.connection()
    else:
        connection = owner
        if began and scope == "transaction":
            connection.begin()
    return Loan(None, began, owner.rollback, closed=owner.invalidate), connection.connection, connection.dialect.driver


def _marked(loan: Loan, proxied: PoolProxiedConnection, scope: Scope) -> Loan:
    """Let the pool know, from now until the lock is certainly gone, that this connection may have one."""
    marks = _marks_on(proxied)
    if scope == "transaction":
        marks.transaction = True
        return loan
    mark = object()
    marks.locks.add(mark)
    return loan._replace(returned=lambda: marks.locks.discard(mark))


# --- the pool ---------------------------------------------------------------------------------------------------------


@dataclass
class _Marks:
    """What dblock may have left on a pooled connection."""

    locks: set[object] = field(default_factory=set)
    transaction: bool = False


_KEY = "dblock"

# The pools that tell of returning connections. Not event.contains(): it goes by the pool's address, which may have been
# another's.
_minded: weakref.WeakSet[Pool] = weakref.WeakSet()


def _marks_on(proxied: PoolProxiedConnection) -> _Marks:
    pool: Pool = proxied._pool
    if pool not in _minded:
        event.listen(pool, "checkin", _check_in)
        _minded.add(pool)
    marks: _Marks = proxied.info.setdefault(_KEY, _Marks())
    return marks


def _check_in(connection: DBAPIConnection | None, record: ConnectionPoolEntry) -> None:
    """A connection goes back to its pool: without a lock, or not at all."""
    marks: _Marks | None = record.info.pop(_KEY, None)
    if marks is None or connection is None:
        return
    if marks.locks:
        record.invalidate()
    elif marks.transaction:
        # The pool has rolled back already, unless it was told not to.
        try:
            connection.rollback()
        except Exception:  # noqa: BLE001 - whatever it was, the transaction may be open
            record.invalidate()


# --- pieces -----------------------------------------------------------------------------------------------------------


def _driver(name: str) -> Any:
    name = name.removesuffix("_async")
    if name not in _DRIVERS:
        raise UnsafeConnection(
            f"SQLAlchemy speaks through {name} here; dblock knows psycopg (postgresql+psycopg://…) and pymssql "
            f"(mssql+pymssql://…)"
        )
    return import_module(f"dblock.driver_{name}")


def _translated(error: exc.SQLAlchemyError) -> DatabaseError:
    original = getattr(error, "orig", None)
    said = one_line(str(original or error))
    return DatabaseError(f"SQLAlchemy has no connection: {said}", getattr(original, "sqlstate", None))
