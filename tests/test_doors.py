"""The doors exclude each other, and serve in the order of arrival whichever door somebody came through."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import psycopg
import pytest

import dblock
from tests.doors import COMMAND, DOORS, PSQL, PYTHON, Attempt, Door, Wish
from tests.support import wait_until

PAIRS = [(holder, waiter) for holder in (PYTHON, COMMAND, PSQL) for waiter in (PYTHON, COMMAND, PSQL)]
NAMES = [
    ("O'Brien's \"server\"", "100 % $(x) `y`"),
    ("back\\slash and $$", "a b  c"),
    ("wéb-ß-日本-🙂", "Schritt Ω"),
]


def tickets(observer: psycopg.Connection[Any], wish: Wish) -> list[int]:
    """The pids of those who wait, in the order in which they came."""
    key = dblock.key(wish.target, wish.step)
    rows = observer.execute(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND classid = %s"
        " AND mode = 'ExclusiveLock' AND granted AND objid BETWEEN 1 AND 2147483647 ORDER BY objid",
        (key.postgres.classid,),
    ).fetchall()
    return [pid for (pid,) in rows]


def holders(observer: psycopg.Connection[Any], wish: Wish) -> list[int]:
    key = dblock.key(wish.target, wish.step)
    rows = observer.execute(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND classid = %s AND objid = %s"
        " AND granted AND pid IN (SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'dblock1 1%%')",
        (key.postgres.classid, key.postgres.objid),
    ).fetchall()
    return [pid for (pid,) in rows]


@pytest.mark.parametrize(("target", "step"), NAMES)
@pytest.mark.parametrize(("holder", "waiter"), PAIRS, ids=str)
def test_pairs(url: str, holder: Door, waiter: Door, target: str, step: str) -> None:
    wish = Wish(target=target, step=step, tenant="T1")
    with psycopg.connect(url, autocommit=True) as observer, holder.attempt(url, wish) as first:
        assert first.held(), first.stderr()
        with waiter.attempt(url, wish) as second:
            wait_until(lambda: len(tickets(observer, wish)) == 1, "the waiter in the queue")
            (inside,) = holders(observer, wish)
            assert first.finish() == "done", first.stderr()
            assert second.held(), second.stderr()
            assert holders(observer, wish) != [inside]
            assert second.finish() == "done", second.stderr()


def test_thirty_waiters_in_order_ten_of_them_killed(url: str) -> None:
    wish = Wish(tenant="T1")
    with ExitStack() as stack:
        observer = stack.enter_context(psycopg.connect(url, autocommit=True))
        first = stack.enter_context(PYTHON.attempt(url, wish))
        assert first.held()
        waiters: list[tuple[int, Attempt]] = []
        for i in range(30):
            # Seen in the queue before the next one starts: how long a process takes to arrive is not its order.
            attempt = stack.enter_context(DOORS[i % len(DOORS)].attempt(url, wish))
            wait_until(lambda i=i: len(tickets(observer, wish)) == i + 1, f"waiter {i} in the queue")  # type: ignore[misc]
            waiters.append((tickets(observer, wish)[-1], attempt))
        assert [pid for pid, _ in waiters] == tickets(observer, wish)

        for _, attempt in waiters[1::3]:
            attempt.kill()
        served: list[int] = []
        current = first
        for pid, attempt in (waiter for i, waiter in enumerate(waiters) if i % 3 != 1):
            assert current.finish() == "done", current.stderr()
            assert attempt.held(), attempt.stderr()
            served += holders(observer, wish)
            assert served[-1] == pid
            current = attempt
        assert current.finish() == "done"
        assert len(served) == 20
        wait_until(lambda: tickets(observer, wish) == [] == holders(observer, wish), "the killed ones to be gone")
