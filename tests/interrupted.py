"""A process whose wait for a lock is ended by a signal, aimed at the grant, again and again.

    python -m tests.interrupted URL KIND SIGNAL TRIES

In each try another session gives the lock back, and a moment before or after it the signal comes, which raises an
exception in the main thread, as Ctrl-C does. What ``with`` said must be so: whoever was not let in has nothing of the
lock, and whoever was has it. Prints how often which was the case.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from types import FrameType
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

import dblock

KINDS = ("url", "connection", "slots", "transaction")
KEY = dblock.key("web-01", "b").value
SPREAD_SECONDS, STEP_SECONDS = 0.001, 0.0001


class Ended(BaseException):
    """What the handler of SIGTERM raises, as many programs' do."""


def end(_number: int, _frame: FrameType | None) -> None:
    raise Ended


class Other:
    """Another session: it holds the lock, gives it back, and looks what is left."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)

    def ask(self, statement: str) -> Any:
        row = self._connection.execute(statement.encode()).fetchone()
        return row[0] if row else None

    def take(self) -> None:
        self.ask(f"SELECT pg_advisory_lock({KEY})")

    def let_in_and_end(self, number: int, later: float) -> None:
        while not self.ask("SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)"):
            time.sleep(0.0005)
        if later < 0:
            os.kill(os.getpid(), number)
            time.sleep(-later)
        self.ask(f"SELECT pg_advisory_unlock({KEY})")
        if later >= 0:
            time.sleep(later)
            os.kill(os.getpid(), number)

    def left(self, *, may_be_ending: bool) -> int:
        """How many locks there are; the session of a closed connection may take a moment to end."""
        deadline = time.monotonic() + 10
        while True:
            found: int = self.ask("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
            if not found or not may_be_ending or time.monotonic() > deadline:
                return found
            time.sleep(0.001)


def one_try(other: Other, db: Any, kind: str, number: int, later: float) -> str:
    more: dict[str, dict[str, Any]] = {"slots": {"slots": 1}, "transaction": {"scope": "transaction"}}
    lock = dblock.lock(db, target="web-01", step="b", tenant="T1", **more.get(kind, {}))
    connection: Any = None if kind == "url" else db
    other.take()
    ending = threading.Thread(target=other.let_in_and_end, args=(number, later))
    ending.start()
    said = "not held"
    try:
        with lock:
            said = "held"
            lock.check()
            time.sleep(60)  # the signal is on its way
    except (KeyboardInterrupt, Ended):
        pass
    ending.join()
    closed = connection is None or connection.closed
    if kind == "transaction" and said == "held" and not closed:
        assert other.left(may_be_ending=False) == 1
        connection.rollback()
    assert not lock.held
    assert other.left(may_be_ending=closed) == 0, f"{said}, and something is left"
    if kind == "transaction" and not closed:
        assert connection.info.transaction_status in (TransactionStatus.IDLE, TransactionStatus.INTRANS)
        connection.rollback()
    return said


def main() -> None:
    url, kind, name, tries = sys.argv[1:]
    number = signal.Signals[name]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, end)
    other = Other(url)
    connection = None
    counts: Counter[str] = Counter()
    aim = 0.0
    for _ in range(int(tries)):
        if kind != "url" and (connection is None or connection.closed):
            counts["connections"] += 1
            connection = psycopg.connect(url, autocommit=kind != "transaction")
        db = url if connection is None else connection
        said = one_try(other, db, kind, number, aim + random.uniform(-1, 1) * SPREAD_SECONDS)
        counts[said] += 1
        aim += -STEP_SECONDS if said == "held" else STEP_SECONDS
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
