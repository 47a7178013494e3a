"""Many at once, at most N at once, several targets at once: what each shape promises under load, and what it leaves.

One caller of each kind in each shape is in ``test_callers.py``; here they crowd.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from typing import Any

import psycopg
import pytest

import dblock
from dblock.postgres import AdvisoryLock
from dblock.protocol import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, pauses
from tests.backends import Backend, Postgres
from tests.support import wait_until

ENGINES = ["postgres", "mssql"]


def lock(db: Any, target: Any = "web-01", **arguments: Any) -> dblock.Lock:
    return dblock.lock(db, target=target, step="b", **arguments)


def waiting(backend: Backend) -> int:
    """How many say that they wait. On SQL Server who looks for a permit waits for nothing in the server."""
    return len({session for row, session in backend.all_rows() if row.label.startswith("dblock1 wT ")})


class Inside:
    """Who is inside, and how many were at most: the permits' numbers, since two with one number must never be."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._now: Counter[int | None] = Counter()
        self.most = 0
        self.twice = 0

    def enter(self, slot: int | None) -> None:
        with self._guard:
            self._now[slot] += 1
            self.most = max(self.most, sum(self._now.values()))
            self.twice += slot is not None and self._now[slot] > 1

    def leave(self, slot: int | None) -> None:
        with self._guard:
            self._now[slot] -= 1


def crowd(callers: int, work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(callers) as pool:
        for future in [pool.submit(work) for _ in range(callers)]:
            future.result()


# --- slots ------------------------------------------------------------------------------------------------------------


def test_ten_threads_a_hundred_rounds_three_slots(postgres: Postgres) -> None:
    inside = Inside()

    def work() -> None:
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            for _ in range(100):
                with lock(connection, slots=3) as held:
                    inside.enter(held.slot)
                    inside.leave(held.slot)

    crowd(10, work)
    assert inside.most <= 3
    assert inside.twice == 0
    # Three at some time: whoever is inside stays until all three are.
    full = threading.Barrier(3, timeout=60)

    def meet() -> None:
        with lock(postgres.url, slots=3) as held:
            inside.enter(held.slot)
            full.wait()
            inside.leave(held.slot)

    crowd(3, meet)
    assert inside.most == 3
    assert postgres.all_rows() == []


def test_sixty_four_callers_on_eight_slots_use_them(postgres: Postgres) -> None:
    """Never more than eight, never two with one number. How near to the ideal it comes is printed, for it depends on
    the machine; benchmarks/slots.py compares it with the raw statements in one run.
    """
    rounds, callers, slots, seconds = 6, 64, 8, 0.02
    inside = Inside()
    waits: list[float] = []

    async def work(connection: psycopg.AsyncConnection[Any], start: asyncio.Event) -> None:
        await start.wait()
        for _ in range(rounds):
            began = time.monotonic()
            async with dblock.alock(connection, target="web-01", step="b", slots=slots) as held:
                waits.append(time.monotonic() - began)
                inside.enter(held.slot)
                await asyncio.sleep(seconds)
                inside.leave(held.slot)

    async def main() -> float:
        start = asyncio.Event()
        connections = [await psycopg.AsyncConnection.connect(postgres.url, autocommit=True) for _ in range(callers)]
        tasks = [asyncio.create_task(work(connection, start)) for connection in connections]
        begun = time.monotonic()
        start.set()
        await asyncio.gather(*tasks)
        took = time.monotonic() - begun
        for connection in connections:
            await connection.close()
        return took

    took = asyncio.run(main())
    ideal = callers * rounds / slots * seconds
    print(f"{ideal / took:.0%} of the ideal throughput; longest wait {max(waits):.2f} s")
    assert inside.most <= slots
    assert inside.twice == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_waiter_goes_in_at_the_end_of_any_holder(backend: Backend, engine: str) -> None:
    """With the permit of the one that ended, whichever it was."""
    for ending in range(3):
        holders = [lock(backend.url, slots=3) for _ in range(3)]
        for holder in holders:
            holder.acquire()
        assert sorted(holder.slot or 0 for holder in holders) == [0, 1, 2]
        waiter = lock(backend.url, slots=3)
        with ThreadPoolExecutor(1) as pool:
            acquiring = pool.submit(waiter.acquire)
            wait_until(lambda: waiting(backend) == 1, "the waiter in the queue")
            freed = holders[ending].slot
            holders.pop(ending).release()
            assert acquiring.result(60)
        assert waiter.slot == freed
        for held in (*holders, waiter):
            held.release()
        wait_until(lambda: not backend.all_rows(), "the locks to be gone")


@pytest.mark.parametrize("engine", ENGINES)
def test_different_numbers_share_the_first_permits(backend: Backend, engine: str) -> None:
    with lock(backend.url, slots=2) as first, lock(backend.url, slots=2) as second:
        assert {first.slot, second.slot} == {0, 1}
        assert lock(backend.url, slots=2).acquire(timeout=0) is False
        assert lock(backend.url, slots=1).acquire(timeout=0) is False
        with lock(backend.url, slots=3) as third:
            assert third.slot == 2
            assert lock(backend.url, slots=3).acquire(timeout=0) is False


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("holder", [{"slots": 1}, {}], ids=str)
def test_slots_in_vain_leave_nothing(backend: Backend, engine: str, holder: dict[str, Any]) -> None:
    """Neither the lock itself nor a permit nor a ticket: whether permits or the lock itself were not to be had."""
    with lock(backend.url, **holder):
        before = backend.all_rows()
        for timeout in (0, 0.3):
            assert lock(backend.url, slots=1).acquire(timeout=timeout) is False
            wait_until(lambda: backend.all_rows() == before, "nothing but the holder's locks")


# --- shared -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [{"shared": True}, {"slots": 9}], ids=str)
def test_an_exclusive_waiter_is_served_before_later_ones(backend: Backend, engine: str, shape: dict[str, Any]) -> None:
    """However many shared ones stream by: none that came later goes in before it."""
    order: list[str] = []
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(6))
        first = lock(backend.url, **shape)
        first.acquire()

        def enter(name: str, arguments: dict[str, Any]) -> None:
            with lock(backend.url, **arguments):
                order.append(name)

        exclusive = pool.submit(enter, "exclusive", {})
        wait_until(lambda: len(backend.waiters()) == 1, "the exclusive one in the queue")
        assert lock(backend.url, **shape).acquire(timeout=0) is False
        late = [pool.submit(enter, "late", shape) for _ in range(5)]
        wait_until(lambda: len(backend.waiters()) == 6, "the late ones in the queue")
        assert order == []
        first.release()
        for future in (exclusive, *late):
            future.result(60)
    assert order == ["exclusive"] + ["late"] * 5


def test_shared_holders_stay_together(postgres: Postgres) -> None:
    """All of them are inside at once, also those that had to wait in the queue."""
    together = threading.Barrier(5, timeout=60)

    def enter() -> None:
        with lock(postgres.url, shared=True):
            together.wait()

    holder = lock(postgres.url)
    holder.acquire()
    with ThreadPoolExecutor(5) as pool:
        entering = [pool.submit(enter) for _ in range(5)]
        wait_until(lambda: len(postgres.waiters()) == 5, "all in the queue")
        holder.release()
        for future in entering:
            future.result(60)


def test_looks_for_a_permit_become_rare() -> None:
    seconds = list(islice(pauses(), 100))
    assert seconds == sorted(seconds)
    assert (seconds[0], seconds[-1]) == (FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)


# --- several targets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_several_targets_are_taken_or_none(backend: Backend, engine: str) -> None:
    targets = [f"web-{number:02}" for number in range(5)]
    for busy in (targets[0], targets[-1]):
        with lock(backend.url, busy):
            with pytest.raises(dblock.LockTimeout, match=f"^b@{busy} not acquired in 0.3 s: "):
                lock(backend.url, targets, timeout=0.3).__enter__()
            wait_until(lambda: len(backend.all_rows()) == 1, "nothing but the holder's lock")
    with lock(backend.url, targets) as held:
        assert held.targets == tuple(targets)
        assert [key.value for key in held.keys] == [dblock.key(target, "b").value for target in targets]
        for target in targets:
            assert lock(backend.url, target).acquire(timeout=0) is False
    wait_until(lambda: not backend.all_rows(), "the locks to be gone")


def test_one_deadline_for_all_targets(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the second there is no more than what the first one's wait has left."""
    given: list[float | None] = []
    acquire = AdvisoryLock.acquire

    def acquire_and_note(self: AdvisoryLock, conditions: Any, timeout: float | None, report: Any) -> Any:
        given.append(timeout)
        return acquire(self, conditions, timeout, report)

    monkeypatch.setattr(AdvisoryLock, "acquire", acquire_and_note)
    targets = sorted(("web-01", "web-02"), key=lambda target: dblock.key(target, "b").value)
    first = lock(postgres.url, targets[0])
    first.acquire()
    both = lock(postgres.url, targets)
    with ThreadPoolExecutor(1) as pool:
        acquiring = pool.submit(both.acquire, 60)
        wait_until(postgres.waiters, "the waiter for the first")
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began > 0.3, "some of the time to be over")
        first.release()
        assert acquiring.result(60)
    both.release()
    _, first_time, second_time = given
    assert first_time is not None
    assert second_time is not None
    assert 0 < second_time < first_time - 0.3
    assert first_time <= 60


@pytest.mark.parametrize("held", [1, 2])
def test_what_is_wrong_is_said_before_the_first_is_waited_for(postgres: Postgres, held: int) -> None:
    targets = sorted(("web-01", "web-02", "web-03"), key=lambda target: dblock.key(target, "b").value)
    with lock(postgres.url, targets[0]), psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", (dblock.key(targets[held], "b").value,))
        with pytest.raises(dblock.AlreadyHeld, match="holds the lock already; a lock is never taken twice"):
            lock(connection, targets, timeout=60).acquire()


def test_the_same_targets_in_any_order_never_deadlock(postgres: Postgres) -> None:
    targets = ["web-01", "web-02", "web-03"]
    inside = Inside()

    def work(order: list[str]) -> None:
        for _ in range(20):
            with lock(postgres.url, order):
                inside.enter(0)
                inside.leave(0)

    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(work, order) for order in (targets, targets[::-1], targets[1:], targets[:2][::-1])]
        for future in working:
            future.result(100)
    assert inside.most >= 1


def test_several_targets_with_slots(postgres: Postgres) -> None:
    with lock(postgres.url, "web-02", slots=2), lock(postgres.url, ["web-02", "web-01"], slots=2) as both:
        assert both.slots == (1, 0)
        with pytest.raises(ValueError, match="several targets: see its slots"):
            both.slot  # noqa: B018
        with pytest.raises(ValueError, match="several targets: see its targets"):
            both.target  # noqa: B018
        with pytest.raises(ValueError, match="several targets: see its keys"):
            both.key  # noqa: B018


@pytest.mark.parametrize("ordered", [True, False])
def test_a_lock_out_of_order_is_warned_of(postgres: Postgres, caplog: pytest.LogCaptureFixture, ordered: bool) -> None:
    caplog.set_level(logging.WARNING, "dblock")
    low, high = sorted(("web-01", "web-02"), key=lambda target: dblock.key(target, "b").value)
    outer, inner = (low, high) if ordered else (high, low)
    with lock(postgres.url, outer):
        with lock(postgres.url, inner):
            pass
        # What another thread does is another matter.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: lock(postgres.url, inner).__enter__().release()).result()
    expected = [] if ordered else [f"b@{inner} is taken while b@{outer} is held, whose key is higher"]
    assert [message.partition(":")[0] for message in caplog.messages] == expected


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "error", "text"), [
    ({"target": []}, ValueError, "target is empty"),
    ({"target": ["a", "a"]}, ValueError, "same target twice"),
    ({"target": ["a", " b"]}, ValueError, "begins or ends with a space"),
    ({"target": {"a": 1}}, TypeError, "target must be a str, or a list or tuple"),
    ({"target": b"a"}, TypeError, "target must be a str"),
    ({"slots": 0}, ValueError, "slots must be between 1 and 999"),
    ({"slots": 1000}, ValueError, "slots must be between 1 and 999"),
    ({"slots": True}, TypeError, "slots must be an int"),
    ({"slots": 2.0}, TypeError, "slots must be an int"),
    ({"shared": 1}, TypeError, "shared must be True or False"),
    ({"shared": True, "slots": 2}, ValueError, "exclude each other"),
    ({"scope": "statement"}, ValueError, "scope must be 'session' or 'transaction'"),
    ({"scope": "transaction"}, ValueError, "needs the caller's connection"),
])  # fmt: skip
@pytest.mark.parametrize("make", [dblock.lock, dblock.alock], ids=["lock", "alock"])
def test_bad_arguments(make: Any, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make("postgresql://127.0.0.1:1/d", **{"target": "web-01", "step": "b", **arguments})
