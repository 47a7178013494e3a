"""A lock that lasts as long as the caller's transaction: given back by COMMIT or ROLLBACK, never before.

And work on the caller's own connection in general: the next holder sees what the last one committed.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

import dblock
from tests.backends import Postgres
from tests.pooler import pgbouncer
from tests.support import rounds, wait_until

Connection = psycopg.Connection[Any]
WISH: dict[str, Any] = {"target": "web-01", "step": "b"}
SHAPES: list[dict[str, Any]] = [{}, {"shared": True}, {"slots": 2}]


def lock(db: Any, **arguments: Any) -> dblock.Lock:
    return dblock.lock(db, scope="transaction", **{**WISH, **arguments})


@pytest.fixture
def connection(postgres: Postgres) -> Iterator[Connection]:
    with psycopg.connect(postgres.url) as connection:
        yield connection
        if not connection.closed:
            connection.rollback()


def free(postgres: Postgres) -> bool:
    """Whether an exclusive caller would be let in."""
    other = dblock.lock(postgres.url, timeout=0, **WISH)
    if not other.acquire():
        return False
    other.release()
    return True


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
def test_released_by_the_transactions_end(
    postgres: Postgres, connection: Connection, shape: dict[str, Any], end: str
) -> None:
    held = lock(connection, **shape)
    assert held.acquire()
    assert not free(postgres)
    held.check()
    held.release()
    assert not free(postgres)
    getattr(connection, end)()
    wait_until(lambda: not postgres.all_rows(), "the lock to be gone")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_body_commits(postgres: Postgres, connection: Connection, shape: dict[str, Any]) -> None:
    with lock(connection, **shape) as held:
        assert held.held
        connection.commit()
        assert not held.held
        assert free(postgres)


def test_after_the_end_there_is_nothing_to_release(connection: Connection) -> None:
    held = lock(connection)
    held.acquire()
    connection.commit()
    with pytest.raises(dblock.LockNotHeld, match="ended with its transaction"):
        held.release()
    with pytest.raises(dblock.LockNotHeld):
        held.release()


def test_work_after_the_commit_is_pointed_out(connection: Connection) -> None:
    """It ran without the lock, still inside the block."""
    with pytest.raises(dblock.LockLost, match="more was run after that"), lock(connection):
        connection.commit()
        connection.execute("SELECT 1")


def test_a_rollback_to_a_savepoint_from_before_the_lock(connection: Connection) -> None:
    connection.execute("SAVEPOINT before")
    with pytest.raises(dblock.LockLost, match="ROLLBACK TO SAVEPOINT"), lock(connection):
        connection.execute("ROLLBACK TO SAVEPOINT before")


def test_a_savepoint_called_like_dblocks_own(postgres: Postgres, connection: Connection) -> None:
    connection.execute("SAVEPOINT dblock")
    connection.execute("CREATE TEMPORARY TABLE kept (i int)")
    with lock(connection):
        connection.execute("INSERT INTO kept VALUES (1)")
        connection.execute("ROLLBACK TO SAVEPOINT dblock")
        with pytest.raises(psycopg.errors.UndefinedTable):
            connection.execute("TABLE kept")
        connection.rollback()
    assert free(postgres)


def test_a_failed_transaction_at_the_end_of_the_body(postgres: Postgres, connection: Connection) -> None:
    """The body's own error is seen; the lock lasts until the ROLLBACK."""
    with pytest.raises(psycopg.errors.DivisionByZero), lock(connection):
        connection.execute("SELECT 1/0")
    connection.rollback()
    assert free(postgres)


def test_the_same_lock_object_again_and_again(postgres: Postgres, connection: Connection) -> None:
    held = lock(connection)
    for end in (connection.commit, connection.rollback):
        assert held.acquire()
        assert not free(postgres)
        end()
        assert free(postgres)
    assert held.acquire()
    connection.commit()
    connection.execute("SELECT 1")  # another transaction is open already
    assert held.acquire()
    with pytest.raises(dblock.AlreadyHeld):
        held.acquire()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_snapshot_older_than_the_grant(connection: Connection, isolation: str) -> None:
    connection.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}".encode())
    with pytest.raises(dblock.UnsafeConnection, match=f"the transaction is {isolation}"):
        lock(connection).acquire()
    assert connection.info.transaction_status == TransactionStatus.INTRANS
    connection.execute("SELECT 1")


def test_refused_where_the_scope_cannot_be_had(postgres: Postgres, connection: Connection) -> None:
    with pytest.raises(dblock.UnsafeConnection, match=r"not in autocommit.*scope='transaction'"):
        dblock.lock(connection, **WISH).acquire()
    with psycopg.connect(postgres.url, autocommit=True) as autocommit:
        with pytest.raises(dblock.UnsafeConnection, match="no transaction is open"):
            lock(autocommit).acquire()
        with autocommit.transaction():
            with pytest.raises(dblock.UnsafeConnection, match="inside a transaction"):
                dblock.lock(autocommit, **WISH).acquire()
            with lock(autocommit) as held:
                assert held.held
    with pytest.raises(psycopg.errors.DivisionByZero):
        connection.execute("SELECT 1/0")
    with pytest.raises(dblock.UnsafeConnection, match="has failed"):
        lock(connection).acquire()
    connection.close()
    with pytest.raises(dblock.UnsafeConnection, match="closed"):
        lock(connection).acquire()


def test_refused_in_a_pipeline(postgres: Postgres) -> None:
    with (
        psycopg.connect(postgres.url, autocommit=True) as connection,
        connection.pipeline(),
        pytest.raises(dblock.UnsafeConnection, match="pipeline"),
    ):
        dblock.lock(connection, **WISH).acquire()


# --- the caller's connection ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocommit", [True, False], ids=["autocommit", "transaction"])
def test_a_lock_that_was_taken_by_hand_is_not_taken_twice(postgres: Postgres, autocommit: bool) -> None:
    key = dblock.key("web-01", "b").value
    with psycopg.connect(postgres.url, autocommit=autocommit) as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", (key,))
        scope: Any = "session" if autocommit else "transaction"
        for shape in SHAPES:
            with pytest.raises(dblock.AlreadyHeld):
                dblock.lock(connection, scope=scope, **WISH, **shape).acquire()
        assert connection.execute("SELECT pg_advisory_unlock(%s)", (key,)).fetchone() == (True,)
        assert connection.execute("SELECT pg_advisory_unlock(%s)", (key,)).fetchone() == (False,)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
@pytest.mark.parametrize("autocommit", [True, False], ids=["autocommit", "transaction"])
def test_whatever_the_connection_is_used_to(postgres: Postgres, encoding: str, autocommit: bool) -> None:
    """Other rows, another encoding, another search_path with something of an attacker's in it."""
    with psycopg.connect(postgres.url, autocommit=True) as owner:
        owner.execute("CREATE SCHEMA IF NOT EXISTS evil")
        owner.execute("""
            CREATE OR REPLACE FUNCTION evil.pg_try_advisory_lock(bigint) RETURNS boolean LANGUAGE sql AS 'SELECT true'
        """)
    with psycopg.connect(postgres.url, autocommit=True, row_factory=dict_row) as connection:
        connection.execute(f"SET client_encoding = '{encoding}'".encode())
        connection.execute("SET search_path = evil, pg_catalog")
        connection.autocommit = autocommit
        scope: Any = "session" if autocommit else "transaction"
        for shape in SHAPES:
            with dblock.lock(connection, scope=scope, **WISH, **shape):
                assert not free(postgres)
                shown = connection.execute("SHOW search_path").fetchone()
                assert shown is not None
                assert shown["search_path"] in ("evil, pg_catalog", b"evil, pg_catalog")
                connection.commit()
    with psycopg.connect(postgres.url, autocommit=True) as owner:
        owner.execute("DROP SCHEMA evil CASCADE")


@pytest.mark.parametrize("autocommit", [True, False], ids=["autocommit", "transaction"])
def test_the_callers_own_timeouts_break_off_nothing(postgres: Postgres, autocommit: bool) -> None:
    holder = dblock.lock(postgres.url, **WISH)
    holder.acquire()
    options = "-c statement_timeout=150 -c lock_timeout=100"
    with psycopg.connect(postgres.url, autocommit=autocommit, options=options) as connection:
        scope: Any = "session" if autocommit else "transaction"
        waiter = dblock.lock(connection, scope=scope, **WISH)
        with ThreadPoolExecutor(1) as pool:
            acquiring = pool.submit(waiter.acquire)
            wait_until(lambda: len(postgres.waiters()) == 1, "the waiter")
            threading.Event().wait(1)  # far beyond both, which is what is tested
            holder.release()
            assert acquiring.result(60)
        waiter.release()


@pytest.mark.parametrize("scope", ["session", "transaction"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_cancelled_wait_leaves_nothing(postgres: Postgres, scope: Any, shape: dict[str, Any]) -> None:
    """Whoever cancels the statement: the caller's connection, its transaction and its work live on."""
    with (
        psycopg.connect(postgres.url, autocommit=scope == "session") as connection,
        dblock.lock(postgres.url, **WISH),
        ThreadPoolExecutor(1) as pool,
    ):
        connection.execute("CREATE TEMPORARY TABLE work AS SELECT 1 AS done")
        before = postgres.all_rows()
        for _ in range(rounds(10)):
            acquiring = pool.submit(dblock.lock(connection, scope=scope, **WISH, **shape).acquire)
            (waiter,) = waiters(postgres)

            def cancelled(waiter: int = waiter) -> bool:
                postgres.cancel(waiter)
                return not postgres.waiters()

            wait_until(cancelled, "the waiter to be gone")
            with pytest.raises(dblock.DatabaseError, match="canceling statement"):
                acquiring.result(60)
            assert postgres.all_rows() == before
            assert connection.execute("TABLE work").fetchone() == (1,)


def waiters(postgres: Postgres) -> list[int]:
    wait_until(postgres.waiters, "the waiter")
    return postgres.waiters()


def test_a_connection_that_dies_while_it_holds(postgres: Postgres, connection: Connection) -> None:
    held = lock(connection)
    held.acquire()
    postgres.end(postgres.holders()[0])
    wait_until(lambda: not held.held, "the end to be noticed")
    with pytest.raises(dblock.LockLost):
        held.release()


# --- the next holder sees the work ------------------------------------------------------------------------------------


@contextmanager
def _transactions(url: str) -> Iterator[tuple[Connection, Any, Callable[[], None]]]:
    with psycopg.connect(url) as connection:
        yield connection, "transaction", connection.commit


@contextmanager
def _autocommit(url: str) -> Iterator[tuple[Connection, Any, Callable[[], None]]]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection, "session", lambda: None


def test_the_next_holder_sees_the_work(postgres: Postgres) -> None:
    """1000 handovers between callers of both scopes: each adds one to what the last one left."""
    rounds, callers = 167, (_transactions, _autocommit, _transactions, _autocommit, _transactions, _autocommit)
    with psycopg.connect(postgres.url, autocommit=True) as owner:
        owner.execute("DROP TABLE IF EXISTS handed_over")
        owner.execute("CREATE TABLE handed_over AS SELECT 0 AS number")

    def work(kind: Callable[[str], Any]) -> None:
        with kind(postgres.url) as (connection, scope, commit):
            for _ in range(rounds):
                with dblock.lock(connection, scope=scope, **WISH):
                    (number,) = connection.execute("TABLE handed_over").fetchone() or (0,)
                    connection.execute("UPDATE handed_over SET number = %s", (number + 1,))
                    commit()

    with ThreadPoolExecutor(len(callers)) as pool:
        for future in [pool.submit(work, kind) for kind in callers]:
            future.result()
    with psycopg.connect(postgres.url, autocommit=True) as owner:
        assert owner.execute("TABLE handed_over").fetchone() == (rounds * len(callers),)
        owner.execute("DROP TABLE handed_over")


# --- a pooler in transaction mode -------------------------------------------------------------------------------------


def test_through_a_pooler_in_transaction_mode(postgres: Postgres) -> None:
    """Three clients on two server connections, with waits, timeouts and failures: never two inside, nothing left."""
    inside = threading.Semaphore(1)

    def work(url: str, seed: int) -> int:
        chance = random.Random(seed)
        entered = 0
        with psycopg.connect(url, prepare_threshold=None) as connection:
            for _ in range(60):
                try:
                    with lock(connection, timeout=chance.choice([0, 0.01, 5])):
                        assert inside.acquire(blocking=False), "two inside"
                        entered += 1
                        inside.release()
                        if chance.random() < 0.3:
                            connection.execute("SELECT 1/0")
                        connection.commit()
                except (dblock.LockTimeout, psycopg.errors.DivisionByZero):
                    connection.rollback()
        return entered

    with pgbouncer(postgres.url, "transaction", pool_size=2) as pooled, ThreadPoolExecutor(3) as pool:
        entered = [future.result() for future in [pool.submit(work, pooled, seed) for seed in range(3)]]
        assert all(entered)
        assert postgres.all_rows() == []
        with psycopg.connect(pooled) as connection:
            assert connection.execute("SHOW application_name").fetchone() == ("",)
            for name, value in (("lock_timeout", "0"), ("search_path", '"$user", public')):
                assert connection.execute(f"SHOW {name}".encode()).fetchone() == (value,)


# --- deadlocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["session", "transaction"])
@pytest.mark.parametrize("shape", [{}, {"shared": True}], ids=str)
def test_a_real_deadlock_is_found(postgres: Postgres, scope: Any, shape: dict[str, Any]) -> None:
    """Two callers take two locks the wrong way round, each on one connection: one of them is told, none waits on."""
    both_hold = threading.Barrier(2, timeout=60)

    def work(first: str, second: str) -> str:
        with (
            psycopg.connect(postgres.url, autocommit=scope == "session") as connection,
            dblock.lock(connection, target=first, step="b", scope=scope),
        ):
            both_hold.wait()
            try:
                with dblock.lock(connection, target=second, step="b", scope=scope, **shape):
                    return "held"
            except dblock.LockDeadlock:
                return "deadlock"

    with ThreadPoolExecutor(2) as pool:
        working = [pool.submit(work, "web-01", "web-02"), pool.submit(work, "web-02", "web-01")]
        assert sorted(future.result(60) for future in working) == ["deadlock", "held"]
    wait_until(lambda: not postgres.all_rows(), "the locks to be gone")


def test_a_deadlock_with_a_table(postgres: Postgres) -> None:
    """The lock's waiter has changed a row which the lock's holder wants to change."""
    with psycopg.connect(postgres.url, autocommit=True) as owner:
        owner.execute("DROP TABLE IF EXISTS contended")
        owner.execute("CREATE TABLE contended AS SELECT 0 AS number")
    changed = threading.Barrier(2, timeout=60)

    def holder() -> str:
        with psycopg.connect(postgres.url) as connection, lock(connection):
            changed.wait()
            try:
                connection.execute("UPDATE contended SET number = 1")
            except psycopg.errors.DeadlockDetected:
                return "deadlock"
            return "changed"

    def waiter() -> str:
        with psycopg.connect(postgres.url) as connection:
            connection.execute("UPDATE contended SET number = 2")
            changed.wait()
            try:
                lock(connection).acquire()
            except dblock.LockDeadlock:
                connection.rollback()
                return "deadlock"
            return "held"

    with ThreadPoolExecutor(2) as pool:
        outcomes = [future.result(60) for future in (pool.submit(holder), pool.submit(waiter))]
    assert "deadlock" in outcomes
    with psycopg.connect(postgres.url, autocommit=True) as owner:
        owner.execute("DROP TABLE contended")
