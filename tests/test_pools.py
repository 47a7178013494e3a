"""No pooled connection goes back to its pool with a lock on it, whatever was raised, whoever forgot what.

What the pool does is watched from outside: the next borrower's session must hold nothing, and must be able to take the
lock that was left behind.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import dblock
from tests.backends import Postgres
from tests.support import wait_until

OWN_LOCKS = sqlalchemy.text(
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted"
)
WISH: dict[str, Any] = {"target": "web-01", "step": "b"}


class BodyFailedError(Exception):
    pass


def sa(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture(params=[1, 2], ids=["a pool of one", "a pool of two"])
def engine(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[sqlalchemy.Engine]:
    engine = sqlalchemy.create_engine(
        sa(postgres.url), pool_size=request.param, max_overflow=0, pool_timeout=5, isolation_level="AUTOCOMMIT"
    )
    yield engine
    engine.dispose()


def assert_clean(engine: sqlalchemy.Engine, postgres: Postgres) -> None:
    """Whoever borrows next holds nothing; and nobody else does, so the lock is free."""
    size: int = engine.pool.size()  # type: ignore[attr-defined]
    connections = [engine.connect() for _ in range(size)]
    assert [connection.scalar(OWN_LOCKS) for connection in connections] == [0] * size
    for connection in connections:
        connection.close()
    wait_until(lambda: not postgres.all_rows(), "the lock to be gone")
    with dblock.lock(postgres.url, timeout=0, **WISH):
        pass


@pytest.mark.parametrize("scope", ["session", "transaction"])
def test_an_exception_in_the_body(engine: sqlalchemy.Engine, postgres: Postgres, scope: Any) -> None:
    options = {"isolation_level": "READ COMMITTED"} if scope == "transaction" else {}
    with (
        pytest.raises(BodyFailedError),
        engine.connect().execution_options(**options) as connection,
        dblock.lock(connection, scope=scope, **WISH),
    ):
        raise BodyFailedError
    assert_clean(engine, postgres)


def test_a_body_that_leaves_a_transaction_open(engine: sqlalchemy.Engine, postgres: Postgres) -> None:
    """The next holder would not see the work: it is not given back, but ended, together with the work."""
    with engine.connect() as connection, pytest.raises(dblock.UnsafeConnection), dblock.lock(connection, **WISH):
        connection.exec_driver_sql("BEGIN")
    assert_clean(engine, postgres)


def test_a_released_connection_is_used_again(engine: sqlalchemy.Engine, postgres: Postgres) -> None:
    pid = sqlalchemy.text("SELECT pg_backend_pid()")
    with engine.connect() as connection:
        before = connection.scalar(pid)
        with dblock.lock(connection, **WISH):
            pass
    with engine.connect() as connection:
        assert connection.scalar(pid) == before
    assert_clean(engine, postgres)


@pytest.mark.parametrize("shape", [{}, {"shared": True}, {"slots": 3}], ids=str)
def test_a_forgotten_release(engine: sqlalchemy.Engine, postgres: Postgres, shape: dict[str, Any]) -> None:
    connection = engine.connect()
    lock = dblock.lock(connection, **WISH, **shape)
    lock.acquire()
    connection.close()
    assert not lock.held
    assert_clean(engine, postgres)
    with pytest.raises(dblock.LockLost):
        lock.release()


def test_a_forgotten_lock_and_connection(engine: sqlalchemy.Engine, postgres: Postgres) -> None:
    def forget() -> None:
        dblock.lock(engine.connect(), **WISH).acquire()

    forget()
    gc.collect()
    assert_clean(engine, postgres)


def test_a_forgotten_release_in_a_transaction_that_nobody_rolls_back(postgres: Postgres) -> None:
    engine = sqlalchemy.create_engine(sa(postgres.url), pool_size=1, max_overflow=0, pool_reset_on_return=None)
    connection = engine.connect()
    lock = dblock.lock(connection, scope="transaction", **WISH)
    lock.acquire()
    # As if SQLAlchemy did not know of the transaction: it ends those that it began.
    connection._transaction = None
    connection.close()
    assert_clean(engine, postgres)
    engine.dispose()


def test_a_release_that_fails(engine: sqlalchemy.Engine, postgres: Postgres) -> None:
    with engine.connect() as connection:
        lock = dblock.lock(connection, **WISH)
        lock.acquire()
        (holder,) = postgres.holders()
        postgres.end(holder)
        with pytest.raises(dblock.LockLost):
            lock.release()
    assert_clean(engine, postgres)


def test_a_lock_that_is_given_back_by_hand_is_said_to_be_lost(engine: sqlalchemy.Engine, postgres: Postgres) -> None:
    with engine.connect() as connection:
        lock = dblock.lock(connection, **WISH)
        lock.acquire()
        connection.exec_driver_sql(f"SELECT pg_advisory_unlock({lock.key.value})")
        with pytest.raises(dblock.LockLost):
            lock.release()
    assert_clean(engine, postgres)


def test_a_session_that_commits_under_a_session_lock(engine: sqlalchemy.Engine, postgres: Postgres) -> None:
    """The session hands its connection to the pool at the commit: the lock ends there, and is said to be lost."""
    with Session(engine) as session, pytest.raises(dblock.LockLost), dblock.lock(session, **WISH):
        session.commit()
    assert_clean(engine, postgres)


def test_an_engine_gives_the_lock_a_connection_that_no_pool_knows(
    engine: sqlalchemy.Engine, postgres: Postgres
) -> None:
    """So it is had also where the pool is exhausted, and can never go back."""
    with engine.connect(), suppress(BodyFailedError), dblock.lock(engine, **WISH):
        assert len(postgres.holders()) == 1
        raise BodyFailedError
    assert_clean(engine, postgres)


def test_a_connection_that_is_refused_is_left_as_it_was(postgres: Postgres) -> None:
    engine = sqlalchemy.create_engine(sa(postgres.url))
    with engine.connect() as connection:
        with pytest.raises(dblock.UnsafeConnection, match="not in autocommit"):
            dblock.lock(connection, **WISH).acquire()
        assert not connection.in_transaction()
    with Session(engine) as session:
        with pytest.raises(dblock.UnsafeConnection, match="not in autocommit"):
            dblock.lock(session, **WISH).acquire()
        assert not session.in_transaction()
    engine.dispose()


def test_no_transaction_is_left_where_the_lock_was_not_had(postgres: Postgres) -> None:
    engine = sqlalchemy.create_engine(sa(postgres.url))
    with dblock.lock(postgres.url, **WISH), engine.connect() as connection, Session(engine) as session:
        for db in (connection, session):
            assert dblock.lock(db, scope="transaction", timeout=0, **WISH).acquire() is False
            assert not db.in_transaction()
    engine.dispose()


@pytest.mark.parametrize("work", ["commit", "rollback"])
def test_sqlalchemy_ends_the_transaction_and_with_it_the_lock(postgres: Postgres, work: str) -> None:
    engine = sqlalchemy.create_engine(sa(postgres.url))
    with engine.connect() as connection, Session(engine) as session:
        for db in (connection, session):
            lock = dblock.lock(db, scope="transaction", **WISH)
            with lock:
                assert len(postgres.holders()) == 1
                getattr(db, work)()
                assert not postgres.holders()
                assert not lock.held
    engine.dispose()


def test_a_scoped_session(postgres: Postgres) -> None:
    engine = sqlalchemy.create_engine(sa(postgres.url))
    registry = scoped_session(sessionmaker(engine))
    with dblock.lock(registry, scope="transaction", **WISH):
        assert len(postgres.holders()) == 1
        registry.commit()
    registry.remove()
    engine.dispose()
    assert not postgres.holders()


def test_drivers_that_are_not_known_are_refused(postgres: Postgres) -> None:
    engine = sqlalchemy.create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(dblock.UnsafeConnection, match="speaks through pysqlite"):
        dblock.lock(connection, **WISH).acquire()
    with pytest.raises(dblock.UnsafeConnection, match="speaks through pysqlite"):
        dblock.lock(engine, **WISH).acquire()


# --- asyncio ----------------------------------------------------------------------------------------------------------


async def assert_clean_async(engine: AsyncEngine, postgres: Postgres) -> None:
    async with engine.connect() as connection:
        assert await connection.scalar(OWN_LOCKS) == 0
    await asyncio.to_thread(wait_until, lambda: not postgres.all_rows(), "the lock to be gone")


async def _exception(connection: AsyncConnection) -> None:
    async with dblock.alock(connection, **WISH):
        raise BodyFailedError


async def _forgotten(connection: AsyncConnection) -> None:
    await dblock.alock(connection, **WISH).acquire()


async def _cancelled(connection: AsyncConnection) -> None:
    async def body() -> None:
        async with dblock.alock(connection, **WISH):
            inside.set()
            await asyncio.sleep(60)

    inside = asyncio.Event()
    task = asyncio.create_task(body())
    await inside.wait()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _session_commits(connection: AsyncConnection) -> None:
    async with AsyncSession(connection.engine) as session, dblock.alock(session, **WISH):
        await session.commit()


@pytest.mark.parametrize("what", [_exception, _forgotten, _cancelled], ids=lambda what: what.__name__[1:])
def test_async_pool_of_one(postgres: Postgres, what: Any) -> None:
    async def main() -> None:
        engine = create_async_engine(
            sa(postgres.url), pool_size=1, max_overflow=0, pool_timeout=5, isolation_level="AUTOCOMMIT"
        )
        with suppress(BodyFailedError):
            async with engine.connect() as connection:
                await what(connection)
        await assert_clean_async(engine, postgres)
        await engine.dispose()

    asyncio.run(main())


def test_an_async_session_that_commits_under_a_session_lock(postgres: Postgres) -> None:
    async def main() -> None:
        engine = create_async_engine(
            sa(postgres.url), pool_size=1, max_overflow=0, pool_timeout=5, isolation_level="AUTOCOMMIT"
        )
        with pytest.raises(dblock.LockLost):
            async with AsyncSession(engine) as session, dblock.alock(session, **WISH):
                await session.commit()
        await assert_clean_async(engine, postgres)
        await engine.dispose()

    asyncio.run(main())
