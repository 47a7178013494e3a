"""How well 64 callers use 8 slots with 20 ms of work each: dblock beside the raw statements of its queue, in one run.

    python -m benchmarks.slots [--rounds 12]

Both take turns on one throw-away PostgreSQL, each caller in a thread with a connection of its own that stays open. The
ideal is that every slot is always in use; the fair wait is that of somebody who comes last and is served in turn.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

import dblock
from dblock import names
from dblock.demo.server import postgres_server
from dblock.protocol import pauses

CALLERS, SLOTS, WORK_SECONDS = 64, 8, 0.02
TARGET, STEP = "web-01", "b"
Connection = psycopg.Connection[Any]

KEY = dblock.key(TARGET, STEP)
PERMITS = [permit.value for permit in names.permits(TARGET, STEP, SLOTS)]
HIGH = KEY.value >> 32


@contextmanager
def with_dblock(connection: Connection) -> Iterator[None]:
    with dblock.lock(connection, target=TARGET, step=STEP, slots=SLOTS):
        yield


@contextmanager
def with_statements(connection: Connection) -> Iterator[None]:
    """No labels, no checks, nothing that a failure would need: as fast as the queue's statements can be sent."""
    permit = _take(connection)
    try:
        yield
    finally:
        _send(connection, f"SELECT pg_advisory_unlock({permit}), pg_advisory_unlock_shared({KEY.value})")


def _take(connection: Connection) -> int:
    if found := _look(connection, ticket=None):
        return found
    ticket, predecessor = _send(
        connection,
        f"""
        SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0; SELECT pg_advisory_xact_lock({HIGH}, -1);
        WITH last AS MATERIALIZED (SELECT {_last_below(2**31)} AS number)
        SELECT number + 1, number, pg_advisory_lock({HIGH}, (number + 1)::int)::text,
               pg_advisory_lock_shared({HIGH}, 0)::text
        FROM last
        """,
    )[:2]
    while predecessor:
        (predecessor,) = _send(
            connection,
            f"""
            SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '900ms';
            DO $$ BEGIN PERFORM pg_advisory_xact_lock_shared({HIGH}, {predecessor});
            EXCEPTION WHEN lock_not_available THEN NULL; END $$;
            SELECT CASE WHEN pg_try_advisory_xact_lock_shared({HIGH}, {predecessor})
                        THEN {_last_below(ticket)} ELSE {predecessor} END
            """,
        )
    pause = pauses()
    while not (found := _look(connection, ticket)):
        time.sleep(next(pause))
    return found


def _look(connection: Connection, ticket: int | None) -> int | None:
    """Take a permit that is free: with a ticket as the head of the queue, without one if nobody waits."""
    shared = f"pg_try_advisory_lock_shared({KEY.value})"
    if ticket is None:
        shared = f"CASE WHEN pg_try_advisory_xact_lock({HIGH}, 0) THEN {shared} ELSE false END"
        leave = ""
    else:
        leave = (
            f"WHEN permit IS NOT NULL THEN pg_advisory_unlock({HIGH}, {ticket})"
            f" AND pg_advisory_unlock_shared({HIGH}, 0)"
        )
    found = _send(
        connection,
        f"""
        WITH entry AS MATERIALIZED (SELECT {shared} AS admitted),
             choice AS MATERIALIZED (
                SELECT admitted, CASE WHEN admitted THEN (
                    SELECT key FROM unnest(ARRAY{PERMITS}::bigint[]) AS key WHERE pg_try_advisory_lock(key) LIMIT 1)
                    END AS permit
                FROM entry)
        SELECT permit, CASE WHEN admitted AND permit IS NULL THEN pg_advisory_unlock_shared({KEY.value}) {leave} END
        FROM choice
        """,
    )
    permit: int | None = found[0]
    return permit


def _last_below(number: int) -> str:
    return f"""(
        SELECT coalesce(max(objid::bigint), 0) FROM pg_locks
        WHERE locktype = 'advisory' AND objsubid = 2 AND granted AND mode = 'ExclusiveLock'
          AND classid = {KEY.postgres.classid} AND objid > 0 AND objid::bigint < {number}
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"""


def _send(connection: Connection, text: str) -> tuple[Any, ...]:
    cursor = connection.cursor()
    cursor.execute(text.encode(), prepare=False)
    row: tuple[Any, ...] = ()
    while True:
        if cursor.description:
            row = cursor.fetchone() or ()
        if not cursor.nextset():
            return row


def crowd(connections: list[Connection], rounds: int, slot: Callable[[Connection], Any]) -> tuple[float, float]:
    """The part of the ideal throughput that is reached, and the longest wait in seconds."""
    waits: list[float] = []

    def work(connection: Connection) -> None:
        for _ in range(rounds):
            began = time.monotonic()
            with slot(connection):
                waits.append(time.monotonic() - began)
                time.sleep(WORK_SECONDS)

    threads = [threading.Thread(target=work, args=(connection,)) for connection in connections]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return CALLERS * rounds / SLOTS * WORK_SECONDS / (time.monotonic() - began), max(waits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="of each caller, in each turn")
    args = parser.parse_args()
    print(f"{'':12} {'of the ideal':>12} {'longest wait':>14}   (fair: {CALLERS / SLOTS * WORK_SECONDS:.2f} s)")
    with postgres_server() as server:
        connections = [psycopg.connect(server.url, autocommit=True) for _ in range(CALLERS)]
        for _ in range(3):
            for name, slot in (("statements", with_statements), ("dblock", with_dblock)):
                reached, longest = crowd(connections, args.rounds, slot)
                print(f"{name:12} {reached:12.0%} {longest:12.2f} s", flush=True)
        for connection in connections:
            connection.close()


if __name__ == "__main__":
    main()
