"""Several at work on one connection, and what arrives between two steps: threads, tasks, signals, other locks."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus

import dblock
from tests.backends import Postgres, SqlServer
from tests.support import rounds, wait_until

Connection = psycopg.Connection[Any]
WISH: dict[str, Any] = {"target": "web-01", "step": "b"}
ROUNDS = rounds(40)


@pytest.fixture
def connection(postgres: Postgres) -> Iterator[Connection]:
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def fast_switches() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("fast_switches")
@pytest.mark.parametrize("shape", [{}, {"slots": 1}], ids=str)
def test_two_threads_on_one_connection(postgres: Postgres, connection: Connection, shape: dict[str, Any]) -> None:
    """To the server they are one session, to which it would grant the lock twice."""
    both = threading.Barrier(2, timeout=60)

    def work() -> dblock.Lock | None:
        lock = dblock.lock(connection, **WISH, **shape)
        both.wait()
        try:
            return lock if lock.acquire(timeout=1) else None
        except (dblock.AlreadyHeld, dblock.UnsafeConnection):
            return None

    with ThreadPoolExecutor(2) as pool:
        for _ in range(ROUNDS):
            held = [lock for lock in [future.result() for future in [pool.submit(work) for _ in range(2)]] if lock]
            assert len(held) == 1
            assert held[0].held
            held[0].release()
            assert postgres.all_rows() == []


def test_two_tasks_on_one_connection(postgres: Postgres) -> None:
    """One waits for a permit, which leaves the connection idle now and then; the other would be let in by it."""

    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(postgres.url, autocommit=True) as connection:
            with dblock.lock(postgres.url, slots=1, **WISH):
                waiter = dblock.alock(connection, slots=1, **WISH)
                waiting = asyncio.create_task(waiter.acquire())
                await asyncio.to_thread(wait_until, postgres.waiters, "the waiter")
                with pytest.raises(dblock.UnsafeConnection, match=r"being acquired|busy with a statement"):
                    await dblock.alock(connection, target="other", step="b").acquire()
            assert await waiting
            async with dblock.alock(connection, target="other", step="b"):  # and now it may
                pass
            await waiter.release()

    asyncio.run(main())


def test_a_cancelled_task_releases_nobody_elses_lock(postgres: Postgres) -> None:
    async def main() -> None:
        for _ in range(20):
            lock = dblock.alock(postgres.url, **WISH)
            acquiring = asyncio.create_task(lock.acquire())
            await asyncio.sleep(0)
            in_vain = asyncio.create_task(lock.acquire())
            await asyncio.to_thread(wait_until, postgres.holders, "the grant")
            in_vain.cancel()
            with suppress(asyncio.CancelledError, dblock.AlreadyHeld):
                await in_vain
            assert await acquiring
            assert lock.held
            await lock.check()
            await lock.release()

    asyncio.run(main())


def test_asking_whether_it_is_held_swallows_no_reply(postgres: Postgres, connection: Connection) -> None:
    """Neither of the caller's own queries, nor of a question of dblock's."""
    with dblock.lock(connection, **WISH) as lock, ThreadPoolExecutor(1) as pool:
        querying = pool.submit(lambda: [connection.execute("SELECT 1").fetchone() for _ in range(1000)])
        while not querying.done():
            assert lock.held
        assert querying.result() == [(1,)] * 1000

    async def main() -> None:
        async with dblock.alock(postgres.url, heartbeat=0.1, **WISH) as lock:
            busy = asyncio.create_task(ask(lock))
            for _ in range(300):
                await lock.check()
            busy.cancel()
            assert not lock.lost.is_set()

    async def ask(lock: dblock.AsyncLock) -> None:
        while True:
            assert lock.held
            await asyncio.sleep(0)

    asyncio.run(main())


def test_check_and_release_at_once(postgres: Postgres) -> None:
    """A watchdog's question does not pass for a transaction of the caller's."""
    for _ in range(20):
        with psycopg.connect(postgres.url, autocommit=True) as connection, ThreadPoolExecutor(1) as pool:
            lock = dblock.lock(connection, **WISH)
            lock.acquire()
            asking = pool.submit(ask_until_released, lock)
            lock.release()
            asking.result()
            assert not connection.closed
            assert postgres.all_rows() == []


def ask_until_released(lock: dblock.Lock) -> None:
    with suppress(dblock.LockNotHeld, dblock.LockLost):
        while True:
            lock.check()


# --- check() ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_question_says_nothing_of_the_lock(postgres: Postgres, connection: Connection) -> None:
    """The lock is held, and is given back, not left to the connection's next user."""
    over = threading.Event()

    def cancel_again_and_again() -> None:
        while not over.is_set():
            postgres.cancel(connection.info.backend_pid)

    canceller = threading.Thread(target=cancel_again_and_again)
    with dblock.lock(connection, **WISH) as lock:
        canceller.start()
        with pytest.raises(dblock.DatabaseError, match="cancel"):
            while True:
                lock.check()
        over.set()
        canceller.join()
        lock.check()
        assert not lock.lost.is_set()
    assert postgres.all_rows() == []


def test_a_failed_transaction_is_no_loss(connection: Connection) -> None:
    with dblock.lock(connection, **WISH) as lock:
        with pytest.raises(psycopg.errors.DivisionByZero), connection.transaction():
            connection.execute("SELECT 1/0")
        with suppress(psycopg.errors.DivisionByZero):
            connection.execute("BEGIN")
            connection.execute("SELECT 1/0")
        lock.check()
        connection.execute("ROLLBACK")
        lock.check()


def test_check_begins_no_transaction(postgres: Postgres) -> None:
    with psycopg.connect(postgres.url) as connection:
        lock = dblock.lock(connection, scope="transaction", **WISH)
        lock.acquire()
        connection.commit()
        with pytest.raises(dblock.LockNotHeld):
            lock.check()
        assert connection.info.transaction_status == TransactionStatus.IDLE


def test_autocommit_that_is_turned_off_in_the_body(postgres: Postgres, connection: Connection) -> None:
    """The unlock would begin a transaction."""
    lock = dblock.lock(connection, **WISH)
    lock.acquire()
    connection.autocommit = False
    with pytest.raises(dblock.UnsafeConnection):
        lock.release()
    assert lock.held
    connection.autocommit = True
    lock.release()
    assert connection.info.transaction_status == TransactionStatus.IDLE
    assert postgres.all_rows() == []


# --- signals ----------------------------------------------------------------------------------------------------------


class SignalledError(Exception):
    pass


@pytest.fixture
def alarms() -> Iterator[None]:
    """Let SIGALRM raise an exception."""

    def interrupt(*_: object) -> None:
        raise SignalledError

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupted(action: Callable[[], object], seconds: float) -> bool:
    """Act, with a signal on its way. Whether the exception of its handler came out of that, and not after it."""
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        action()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except SignalledError as error:
        return len(traceback.extract_tb(error.__traceback__)) > 2  # more than this function and the handler
    return False


# A signal that comes before the first step leaves a coroutine that was not begun.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("alarms")
@pytest.mark.parametrize("autocommit", [True, False], ids=["autocommit", "transaction"])
@pytest.mark.parametrize("action", ["acquire", "release"])
def test_signals_aimed_between_two_steps(postgres: Postgres, autocommit: bool, action: str) -> None:
    """What is said not to be held is not: given back, or with its connection closed, or its transaction at an end."""
    scope: Any = "session" if autocommit else "transaction"
    with ExitStack() as stack:
        connection = stack.enter_context(psycopg.connect(postgres.url, autocommit=autocommit))
        hits = 0
        for i in range(ROUNDS * 3):
            if connection.closed or connection.info.transaction_status == TransactionStatus.ACTIVE:
                connection.close()
                connection = stack.enter_context(psycopg.connect(postgres.url, autocommit=autocommit))
            lock = dblock.lock(connection, scope=scope, **WISH)
            if action == "release":
                lock.acquire()
            hit = interrupted(getattr(lock, action), 0.00005 + (i % 60) * 0.00003)
            hits += hit
            if lock.held:
                assert not hit or action == "release"  # which it then had not begun
                assert postgres.holders() == [connection.info.backend_pid]
                lock.release()
            if not autocommit and not connection.closed:
                connection.rollback()
            wait_until(lambda: not postgres.all_rows(), "nothing to be held")
        assert hits > 0


# --- other locks on the same connection -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 0, 2), (0, 2, 1), (2, 0, 1)], ids=str)
def test_labels_are_restored_in_whatever_order(connection: Connection, order: tuple[int, ...]) -> None:
    connection.execute("SET application_name = 'mine'")
    locks = [dblock.lock(connection, target=f"web-{number}", step="b") for number in range(len(order))]
    for lock in locks:
        lock.acquire()
    for number in order:
        locks[number].release()
    assert connection.execute("SHOW application_name").fetchone() == ("mine",)


# --- SQL Server -------------------------------------------------------------------------------------------------------


def test_held_leaves_the_callers_rows_alone(mssql: SqlServer) -> None:
    import pymssql

    from dblock.driver_pymssql import _arguments

    connection = pymssql.connect(**_arguments(mssql.url), autocommit=True)
    with dblock.lock(connection, **WISH) as lock, connection.cursor() as cursor:
        digits = "(VALUES (0), (1), (2), (3), (4), (5), (6), (7), (8), (9))"
        joined = ", ".join(f"{digits} AS d{number}(i)" for number in range(4))
        cursor.execute(f"SELECT d0.i FROM {joined}")
        rows = 0
        for _ in cursor:
            rows += 1
            assert lock.held
        assert rows == 10000
    connection.close()


def test_held_on_a_connection_that_the_caller_closed(mssql: SqlServer) -> None:
    """Also where its descriptor is another connection's by now."""
    import pymssql

    from dblock.driver_pymssql import _arguments

    connection = pymssql.connect(**_arguments(mssql.url), autocommit=True)
    lock = dblock.lock(connection, **WISH)
    lock.acquire()
    descriptor = lock.fileno()
    connection.close()
    assert not lock.held
    with pymssql.connect(**_arguments(mssql.url), autocommit=True) as another:
        other = dblock.lock(another, target="web-02", step="b")
        with other:
            assert other.fileno() == descriptor
            assert not lock.held
    with pytest.raises(dblock.LockLost):
        lock.release()
    with pytest.raises(dblock.UnsafeConnection, match="closed"):
        lock.acquire()
