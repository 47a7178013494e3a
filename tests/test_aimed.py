"""The end of a wait is aimed at its grant, in each door, as a real process: what it reports is so, and nothing is left.

Thousands of tries of the same kind within one process are in ``test_races.py`` and ``test_alock.py``; here are the
clients as people run them, with the signals that reach them. DBLOCK_TEST_ROUNDS=3000 makes many tries of each.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

import dblock
from tests.backends import Backend, SqlServer
from tests.doors import ALL_DOORS, Attempt, Door, Wish
from tests.support import rounds, wait_until

ROUNDS = rounds(3)
SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
ENDINGS = (*SIGNALS, "timeout", "terminated")
SHAPES = {"exclusive": Wish(tenant="T1"), "slots": Wish(tenant="T1", slots="1")}
TIMEOUT_SECONDS = 0.4
FIRST_AIM_SECONDS = {"timeout": 0.02}  # its time began before anybody could see it wait
SPREAD_SECONDS, STEP_SECONDS = 0.003, 0.0005

pytestmark = pytest.mark.timeout(max(120, ROUNDS * 10))


def combinations() -> list[Any]:
    return [
        pytest.param(door, shape, ending, id=f"{door}-{shape}-{ending}")
        for door in ALL_DOORS
        for shape in SHAPES
        for ending in ENDINGS
    ]


@pytest.mark.parametrize(("door", "shape", "ending"), combinations())
def test_end_aimed_at_the_grant(backend: Backend, door: Door, shape: str, ending: str) -> None:
    """The moment drifts to where both outcomes are about equally frequent."""
    if isinstance(backend, SqlServer) and backend.is_babelfish and (shape, ending) == ("slots", "terminated"):
        pytest.skip("Babelfish keeps what a session held that is ended within sp_getapplock: needs a SQL Server")
    outcomes = Counter[str]()
    aim = FIRST_AIM_SECONDS.get(ending, 0.0)
    with ThreadPoolExecutor() as pool:
        for _ in range(ROUNDS):
            later = aim + random.uniform(-1, 1) * SPREAD_SECONDS
            held = one_try(backend, door, SHAPES[shape], Ending(ending, later), pool)
            outcomes["held" if held else "not held"] += 1
            aim += -STEP_SECONDS if held else STEP_SECONDS
    print(door, shape, ending, dict(outcomes))


class Ending(NamedTuple):
    """How the wait is ended, and how many seconds after the release; or before it, where they are negative."""

    how: str
    later: float


def one_try(backend: Backend, door: Door, wish: Wish, planned: Ending, pool: ThreadPoolExecutor) -> bool:
    """Release the lock while somebody waits for it, and end the wait. Return whether it said that it holds the lock."""
    ending, later = planned
    if ending == "timeout":
        wish = replace(wish, timeout=str(TIMEOUT_SECONDS))
    holder = dblock.lock(backend.url, target=wish.target, step=wish.step)
    holder.acquire()
    with door.attempt(backend.url, wish) as waiter:
        wait_until(lambda: backend.waiters() or waiter.process.poll() is not None, "the waiter")
        began = time.monotonic()
        sessions = backend.waiters()

        def end() -> None:
            if ending in SIGNALS:
                send(waiter, SIGNALS[ending])
            elif ending == "terminated":
                for session in sessions:
                    backend.end(session)

        moment = began + TIMEOUT_SECONDS if ending == "timeout" else time.monotonic() + SPREAD_SECONDS * 2
        releasing = pool.submit(at, moment - max(0.0, later), holder.release)
        ended = pool.submit(at, moment + min(0.0, later), end)
        held = waiter.held()
        releasing.result()
        ended.result()
        if held and ending == "timeout":
            # Nothing else ends it: so it has the lock, and nobody else.
            assert len(set(backend.holders())) == 1
            assert waiter.finish() == "done"
        elif ending == "timeout":
            assert waiter.finish() == door.says("timeout")
        else:
            code = waiter.end()  # which of the two came first, a signal that hits the body or its end, is luck
            assert held or code != 0
    wait_until(lambda: not backend.all_rows(), "all locks, tickets and flags to be gone")
    return held


def at(moment: float, do: Any) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
    do()


def send(waiter: Attempt, number: signal.Signals) -> None:
    """As a terminal or a service manager does: to all processes of the client."""
    with suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(waiter.process.pid, number)
