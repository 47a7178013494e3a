"""The lock for asyncio: cancelled at any instant nothing is held, and whatever must come to its end does so."""

from __future__ import annotations

import asyncio
import random
import threading
from typing import Any

import psycopg
import pytest

import dblock
from tests.backends import Backend, Postgres, SqlServer
from tests.support import rounds, wait_until

ENGINES = ["postgres", "mssql"]
WISH: dict[str, Any] = {"target": "web-01", "step": "b"}


def alock(db: Any, **arguments: Any) -> dblock.AsyncLock:
    return dblock.alock(db, **{**WISH, **arguments})


async def seen(condition: Any, what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what)


async def cancelled(task: asyncio.Task[Any]) -> bool:
    """Wait for a task's end. False: it had ended before it could be cancelled."""
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


@pytest.mark.parametrize("engine", ENGINES)
def test_held_in_the_body_only(backend: Backend, engine: str) -> None:
    async def main() -> None:
        async with alock(backend.url, tenant="T1") as held:
            assert held.held
            await held.check()
            assert await alock(backend.url).acquire(timeout=0) is False
            with pytest.raises(dblock.LockTimeout, match="b@web-01 not acquired without waiting: "):
                async with alock(backend.url, timeout=0):
                    pytest.fail("the body ran")
        assert not held.held
        with pytest.raises(dblock.LockNotHeld):
            await held.release()
        with pytest.raises(dblock.LockNotHeld):
            await held.check()

    asyncio.run(main())


def test_decorator(postgres: Postgres) -> None:
    @alock(postgres.url)
    async def step(number: int) -> int:
        assert len(postgres.holders()) == 1
        return number + 1

    assert asyncio.run(step(1)) == 2
    assert asyncio.run(step(2)) == 3
    not_a_coroutine: Any = len
    with pytest.raises(TypeError):
        alock(postgres.url)(not_a_coroutine)


def test_two_tasks_with_one_lock_object(postgres: Postgres) -> None:
    async def main() -> None:
        lock = alock(postgres.url)
        assert await lock.acquire()
        with pytest.raises(dblock.AlreadyHeld):
            await lock.acquire()
        await lock.release()

    asyncio.run(main())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_waiter_does_not_hold_up_the_event_loop(backend: Backend, engine: str) -> None:
    async def main() -> None:
        holder, waiter = alock(backend.url), alock(backend.url)
        await holder.acquire()
        waiting = asyncio.create_task(waiter.acquire())
        await seen(lambda: len(backend.waiters()) == 1, "the waiter")
        await holder.release()
        assert await waiting
        await waiter.release()

    asyncio.run(main())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("again", [False, True], ids=["once", "again and again"])
def test_cancelled_while_waiting(backend: Backend, engine: str, again: bool) -> None:
    async def main() -> None:
        async with alock(backend.url):
            before = backend.all_rows()
            waiter = alock(backend.url)
            waiting = asyncio.create_task(waiter.acquire())
            await seen(lambda: len(backend.waiters()) == 1, "the waiter")
            waiting.cancel()
            for _ in range(20 if again else 0):
                await asyncio.sleep(0)
                waiting.cancel()
            assert await cancelled(waiting)
            assert not waiter.held
            if not (isinstance(backend, SqlServer) and backend.is_babelfish):  # there it queues on, until it is granted
                await seen(lambda: backend.all_rows() == before, "the waiter's locks to be gone")
        await seen(lambda: not backend.all_rows(), "all locks to be gone")
        assert await waiter.acquire()  # it can be used again
        await waiter.release()

    asyncio.run(main())


def test_cancelled_in_the_body_and_while_releasing(postgres: Postgres) -> None:
    async def main() -> None:
        async def body() -> None:
            async with alock(postgres.url):
                inside.set()
                await asyncio.sleep(60)

        for cancels in range(1, 6):
            inside = asyncio.Event()
            task = asyncio.create_task(body())
            await inside.wait()
            for _ in range(cancels):
                task.cancel()
                await asyncio.sleep(0)
            assert await cancelled(task)
            await seen(lambda: not postgres.all_rows(), "the lock to be gone")

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["URL", "connection", "transaction"])
@pytest.mark.parametrize("shape", [{}, {"slots": 1}], ids=str)
def test_cancellations_aimed_at_the_grant(postgres: Postgres, kind: str, shape: dict[str, Any]) -> None:
    """A release and a cancellation at the same time: whatever is reported is so, and nothing is left.

    DBLOCK_TEST_ROUNDS=167 makes it 1000 in all.
    """
    tries = rounds(40)
    outcomes = {"held": 0, "cancelled": 0}

    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(postgres.url, autocommit=kind != "transaction") as connection:
            db: Any = postgres.url if kind == "URL" else connection
            scope = "transaction" if kind == "transaction" else "session"
            for _ in range(tries):
                await one(alock(db, scope=scope, **shape), connection)

    async def one(waiter: dblock.AsyncLock, connection: psycopg.AsyncConnection[Any]) -> None:
        holder = alock(postgres.url, **shape)
        await holder.acquire()
        task = asyncio.create_task(waiter.acquire())
        await seen(postgres.waiters, "the waiter")
        releasing = asyncio.create_task(holder.release())
        await asyncio.sleep(random.uniform(0, 0.012))
        task.cancel()
        was_cancelled = await cancelled(task)
        await releasing
        outcomes["cancelled" if was_cancelled else "held"] += 1
        assert waiter.held is not was_cancelled
        if not was_cancelled:
            assert len(set(postgres.holders())) == 1
            await waiter.release()
        await connection.rollback()
        await seen(lambda: not postgres.all_rows(), "all locks to be gone")

    asyncio.run(main())
    print(kind, shape, outcomes)
    assert min(outcomes.values()) > 0


def test_cancelled_while_connecting_to_sql_server(mssql_url: str) -> None:
    """The login cannot be interrupted; what comes of it is closed when it comes."""

    async def main() -> None:
        before = threading.active_count()
        task = asyncio.create_task(alock(mssql_url).acquire())
        await asyncio.sleep(0.001)
        task.cancel()
        assert await cancelled(task)
        await seen(lambda: threading.active_count() <= before + 1, "the thread's end")  # this one waits itself

    asyncio.run(main())


@pytest.mark.parametrize("engine", ["mssql"])
def test_check_survives_its_cancellation(backend: Backend, engine: str) -> None:
    async def main() -> None:
        async with alock(backend.url) as held:
            for _ in range(5):
                task = asyncio.create_task(held.check())
                await asyncio.sleep(0.001)
                task.cancel()
                await cancelled(task)
            await held.check()

    asyncio.run(main())


@pytest.mark.parametrize("engine", ["mssql"])
def test_more_waiters_than_the_event_loop_has_threads(backend: Backend, engine: str) -> None:
    """Each waits in a thread of its own: or the holder could not give the lock back."""

    async def turn() -> None:
        async with alock(backend.url):
            pass

    async def main() -> None:
        holder = alock(backend.url)
        await holder.acquire()
        tasks = [asyncio.create_task(turn()) for _ in range(40)]
        await seen(lambda: len(backend.waiters()) == 40, "all of them in the queue")
        await holder.release()
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_blocking_connections_are_refused(postgres: Postgres) -> None:
    """And the other way round: the types say so too, in tests/typed.py."""

    async def main(db: Any) -> None:
        await alock(db).acquire()

    async def other() -> None:
        async with await psycopg.AsyncConnection.connect(postgres.url, autocommit=True) as connection:
            db: Any = connection
            with pytest.raises(dblock.UnsafeConnection, match=r"use dblock\.alock"):
                dblock.lock(db, **WISH).acquire()

    with (
        psycopg.connect(postgres.url, autocommit=True) as connection,
        pytest.raises(dblock.UnsafeConnection, match=r"use dblock\.lock"),
    ):
        asyncio.run(main(connection))
    asyncio.run(other())
