"""The doors exclude each other, and serve in the order of arrival whichever door somebody came through."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from tests.backends import Backend
from tests.doors import (
    COMMAND,
    COMMAND_MSSQL,
    DOORS,
    MSSQL_DOORS,
    PSQL,
    PYMSSQL,
    PYTHON,
    PYTHON_MSSQL,
    Attempt,
    Door,
    Wish,
)
from tests.support import wait_until

THREE_DOORS = {"postgres": (PYTHON, COMMAND, PSQL), "mssql": (PYTHON_MSSQL, COMMAND_MSSQL, PYMSSQL)}
FOUR_DOORS = {"postgres": DOORS, "mssql": MSSQL_DOORS}
PAIRS = [(holder, waiter) for doors in THREE_DOORS.values() for holder in doors for waiter in doors]
NAMES = [
    ("O'Brien's \"server\"", "100 % $(x) `y`"),
    ("back\\slash and $$", "a b  c"),
    ("wéb-ß-日本-🙂", "Schritt Ω"),
]


@pytest.mark.parametrize(("target", "step"), NAMES)
@pytest.mark.parametrize(("holder", "waiter"), PAIRS, ids=str)
def test_pairs(backend: Backend, holder: Door, waiter: Door, target: str, step: str) -> None:
    wish = Wish(target=target, step=step, tenant="T1")
    with holder.attempt(backend.url, wish) as first:
        assert first.held(), first.stderr()
        with waiter.attempt(backend.url, wish) as second:
            wait_until(lambda: len(backend.waiters()) == 1, "the waiter in the queue")
            (inside,) = backend.holders()
            assert first.finish() == "done", first.stderr()
            assert second.held(), second.stderr()
            assert backend.holders() != [inside]
            assert second.finish() == "done", second.stderr()


SHAPES: dict[str, dict[str, Any]] = {"exclusive": {}, "shared": {"shared": True}, "slots": {"slots": "2"}}


def shaped(door: Door, shape: str, in_transaction: bool) -> Wish:
    """What a door asks for. The command line has a connection of its own, and so no transaction of the caller's."""
    commands = (COMMAND, COMMAND_MSSQL)
    return Wish(tenant="T1", in_transaction=in_transaction and door not in commands, **SHAPES[shape])


@pytest.mark.parametrize("in_transaction", [False, True], ids=["autocommit", "transaction"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("holder", "waiter"), PAIRS, ids=str)
def test_shapes(backend: Backend, holder: Door, waiter: Door, shape: str, in_transaction: bool) -> None:
    """A door in one shape keeps out another door in each shape that the table says, and lets in the rest."""
    with holder.attempt(backend.url, shaped(holder, shape, in_transaction)) as first:
        assert first.held(), first.stderr()
        for other in SHAPES:
            kept_out = "exclusive" in (shape, other)
            wish = replace(shaped(waiter, other, in_transaction), timeout=backend.short_wait if kept_out else None)
            with waiter.attempt(backend.url, wish) as second:
                assert second.held() is not kept_out, second.stderr()
                assert second.finish() == waiter.says("timeout" if kept_out else "done"), second.stderr()
        with waiter.attempt(backend.url, shaped(waiter, "exclusive", in_transaction)) as second:
            wait_until(lambda: len(backend.waiters()) == 1, "the waiter in the queue")
            assert first.finish() == "done", first.stderr()
            assert second.held(), second.stderr()
            assert second.finish() == "done", second.stderr()
    wait_until(lambda: not backend.all_rows(), "the locks to be gone")


def newcomer(backend: Backend, known: list[int]) -> int:
    """Wait for one more to be in the queue. A first try that is a very short wait may be seen, gone, and seen again."""
    found: list[int] = []

    def arrived() -> bool:
        found[:] = [session for session in backend.waiters() if session not in known]
        return bool(found)

    wait_until(arrived, f"waiter {len(known)} in the queue")
    return found[0]


@pytest.mark.parametrize("engine", FOUR_DOORS)
def test_thirty_waiters_in_order_ten_of_them_killed(backend: Backend, engine: str) -> None:
    wish = Wish(tenant="T1")
    doors = FOUR_DOORS[engine]
    with ExitStack() as stack:
        first = stack.enter_context(doors[0].attempt(backend.url, wish))
        assert first.held()
        waiters: list[tuple[int, Attempt]] = []
        for i in range(30):
            # Seen in the queue before the next one starts: how long a process takes to arrive is not its order.
            attempt = stack.enter_context(doors[i % len(doors)].attempt(backend.url, wish))
            waiters.append((newcomer(backend, [session for session, _ in waiters]), attempt))
        wait_until(lambda: backend.waiters() == [session for session, _ in waiters], "all of them in their order")

        for _, attempt in waiters[1::3]:
            attempt.kill()
        served: list[int] = []
        current = first
        for session, attempt in (waiter for i, waiter in enumerate(waiters) if i % 3 != 1):
            assert current.finish() == "done", current.stderr()
            assert attempt.held(), attempt.stderr()
            assert backend.holders() == [session]
            served.append(session)
            current = attempt
        assert current.finish() == "done"
        assert len(served) == 20
        wait_until(lambda: backend.all_rows() == [], "the killed ones to be gone")
