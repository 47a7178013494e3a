"""inspect.sql and force_release.sql where a lock has several holders: shared, and with slots."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import dblock
from dblock.inspect import Entry, entries
from tests import hostile
from tests.doors import SQL, Wish, set_wishes
from tests.support import PATIENCE_SECONDS, wait_until
from tests.test_scripts_shapes import ACQUIRE, EXCLUSIVE, SHARED, Connection, permit, pid, run, slots, waiters

INSPECT = (SQL / "inspect.sql").read_text()
FORCE_RELEASE = (SQL / "force_release.sql").read_text()
KEY = dblock.key("web-01", "b").value

Connect = Callable[..., Connection]


@pytest.fixture(scope="module")
def here(url: str) -> Iterator[str]:
    """A database of its own, in which nobody else holds anything."""
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("CREATE DATABASE dblock_shapes")
        yield make_conninfo(url, dbname="dblock_shapes")
        admin.execute("DROP DATABASE dblock_shapes WITH (FORCE)")


@pytest.fixture
def connect(here: str) -> Iterator[Connect]:
    connections = []

    def open_one(**settings: Any) -> Connection:
        connections.append(psycopg.connect(here, autocommit=True, **settings))
        return connections[-1]

    yield open_one
    for connection in connections:
        connection.close()
    wait_until(lambda: entries(here) == [], "all locks of the test gone")


@pytest.fixture
def dba(connect: Connect) -> Connection:
    return connect()


@pytest.fixture
def threads(dba: Connection) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=20) as executor:
        yield executor
        run(dba, "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")


def hold(
    connection: Connection, shape: dict[str, str], target: str = "web-01", tenant: str | None = None
) -> Connection:
    run(connection, set_wishes(Wish(target, tenant=tenant, more=shape)), ACQUIRE)
    return connection


def see(connection: Connection) -> list[Entry]:
    return [Entry(*row) for row in connection.execute(INSPECT.encode())]


def modes(found: list[Entry]) -> list[tuple[Any, ...]]:
    return sorted((entry.pid, entry.mode, entry.key, entry.lock) for entry in found)


# --- inspect.sql ------------------------------------------------------------------------------------------------------


def test_one_row_for_each_holder(here: str, connect: Connect, dba: Connection) -> None:
    holders = [hold(connect(), shape, tenant=f"T{number}")
               for number, shape in enumerate((slots(3), SHARED, slots(3), slots(999)))]  # fmt: skip
    found = see(dba)
    assert modes(found) == sorted(
        (pid(holder), mode, KEY, "dblock")
        for holder, mode in zip(holders, ("slot 0", "shared", "slot 1", "slot 2"), strict=True)
    )
    assert {(entry.state, entry.target, entry.step) for entry in found} == {("held", "web-01", "b")}
    assert sorted(entry.tenant or "" for entry in found) == ["T0", "T1", "T2", "T3"]
    assert {entry.mode for entry in entries(here)} == {"slot 0", "shared", "slot 1", "slot 2"}


def test_the_last_of_the_permits(connect: Connect, dba: Connection) -> None:
    for number in range(998):
        run(dba, f"SELECT pg_advisory_lock({permit(number)})")
    holder = hold(connect(), slots(999))
    assert (pid(holder), "slot 998", KEY, "dblock") in modes(see(dba))
    run(dba, "SELECT pg_advisory_unlock_all()")


def test_waiters_below_several_holders(connect: Connect, dba: Connection, threads: ThreadPoolExecutor) -> None:
    holders = [hold(connect(), slots(2)), hold(connect(), slots(2))]
    waiting = [connect(), connect(), connect()]
    for number, (waiter, shape) in enumerate(zip(waiting, (EXCLUSIVE, slots(2), SHARED), strict=True), start=1):
        threads.submit(hold, waiter, shape)
        wait_until(lambda number=number: len(waiters(dba)) == number, "the waiter in the queue")  # type: ignore[misc]
    for _ in range(20):
        found = see(dba)
        assert [entry.state for entry in found] == ["held", "held", "waiting", "waiting", "waiting"]
        assert [entry.pid for entry in found[2:]] == [pid(waiter) for waiter in waiting]
        assert [entry.position for entry in found] == [None, None, 1, 2, 3]
        assert set(found[2].blocked_by or ()) == {pid(holder) for holder in holders}
        assert [entry.mode for entry in found[:2]] == ["slot 0", "slot 1"]


def test_one_who_looks_for_a_slot_waits_all_the_time(
    connect: Connect, dba: Connection, threads: ThreadPoolExecutor
) -> None:
    """Though at each look it has the lock itself, for a moment."""
    holder, waiter = hold(connect(), slots(1)), connect()
    future = threads.submit(hold, waiter, slots(1))
    wait_until(lambda: len(waiters(dba)) == 1, "the waiter in the queue")
    for _ in range(300):
        assert [(entry.pid, entry.state) for entry in see(dba)] == [(pid(holder), "held"), (pid(waiter), "waiting")]
    holder.close()
    future.result(PATIENCE_SECONDS)
    wait_until(lambda: modes(see(dba)) == [(pid(waiter), "slot 0", KEY, "dblock")], "the slot")


def test_the_first_of_the_queue_waits_shared(connect: Connect, dba: Connection, threads: ThreadPoolExecutor) -> None:
    hold(connect(), EXCLUSIVE)
    threads.submit(hold, connect(), SHARED)
    wait_until(lambda: [entry.mode for entry in see(dba)] == ["exclusive", "shared"], "the one who waits")


def test_a_sessions_first_lock_is_known_by_anothers_label(connect: Connect, dba: Connection) -> None:
    """A session says the names of its last lock only. What another one says of the same key is as true."""
    both = hold(hold(connect(), slots(2)), EXCLUSIVE, "web-02")
    before = modes(see(dba))
    assert (pid(both), "exclusive", dblock.key("web-02", "b").value, "dblock") in before
    assert (pid(both), "shared", KEY, "bigint, names unknown") in before
    assert (pid(both), "exclusive", permit(0), "bigint, names unknown") in before
    other = hold(connect(), slots(2))
    assert modes(see(dba)) == sorted([
        (pid(both), "exclusive", dblock.key("web-02", "b").value, "dblock"), (pid(both), "slot 0", KEY, "dblock"),
        (pid(other), "slot 1", KEY, "dblock"),
    ])  # fmt: skip


def test_shortened_names_leave_two_rows(connect: Connect, dba: Connection) -> None:
    holder = hold(connect(), slots(2), "n" * 100)
    assert [(entry.pid, entry.mode) for entry in see(dba)] in (
        [(pid(holder), "shared"), (pid(holder), "exclusive")], [(pid(holder), "exclusive"), (pid(holder), "shared")],
    )  # fmt: skip


def test_a_permit_without_the_lock_is_a_foreign_lock(connect: Connect, dba: Connection) -> None:
    hold(connect(), SHARED)
    foreign = connect()
    run(foreign, f"SELECT pg_advisory_lock({permit(0)})")
    assert (pid(foreign), "exclusive", permit(0), "bigint, names unknown") in modes(see(dba))


def test_a_prepared_transaction(connect: Connect, dba: Connection) -> None:
    owner = connect()
    hold(connect(), slots(2))
    run(owner, "BEGIN")
    hold(owner, {**slots(2), "scope": "transaction"})
    run(owner, "PREPARE TRANSACTION 'dblock shapes'")
    try:
        assert (None, "slot 1", "ROLLBACK PREPARED 'dblock shapes'") in [
            (entry.pid, entry.mode, entry.to_free) for entry in see(dba)
        ]
    finally:
        run(dba, "ROLLBACK PREPARED 'dblock shapes'")


def test_hostile_schema(here: str, connect: Connect) -> None:
    with hostile.schema(here, INSPECT + FORCE_RELEASE):
        holder, reader = connect(), connect()
        hold(holder, slots(2))
        run(reader, "SELECT set_config('dblock.target', 'web-01', false), set_config('dblock.step', 'b', false)")
        run(reader, "SET search_path = evil, pg_catalog")
        assert modes(see(reader)) == [(pid(holder), "slot 0", KEY, "dblock")]
        assert [row[-1] for row in reader.execute(FORCE_RELEASE.encode())] == ["slot 0"]


def test_readable_in_time(connect: Connect, dba: Connection) -> None:
    """A hundred holders of two locks: every permit's key is computed once for a lock, not for each of them."""
    holders = [hold(connect(), slots(60), f"web-0{number % 2}") for number in range(60)]
    found = see(dba)
    assert len(found) == len(holders)
    assert sorted(entry.mode for entry in found) == sorted(chain(*([f"slot {number}"] * 2 for number in range(30))))
    plan = dba.execute(b"EXPLAIN (ANALYZE, TIMING OFF) " + INSPECT.encode()).fetchall()
    (milliseconds,) = re.findall(r"Execution Time: ([0-9.]+) ms", "\n".join(row[0] for row in plan))
    assert float(milliseconds) < 1000


# --- force_release.sql ------------------------------------------------------------------------------------------------


def force_release(connection: Connection, **settings: object) -> list[tuple[Any, ...]]:
    for name, wished in settings.items():
        connection.execute("SELECT set_config(%s, %s, false)", (f"dblock.{name}", str(wished)))
    cursor = connection.execute(FORCE_RELEASE.encode())
    assert [column.name for column in cursor.description or ()][-2:] == ["key", "mode"]
    return [(row[1], row[0].partition(":")[0], row[-1]) for row in cursor]


@pytest.mark.parametrize("scope", ["session", "transaction"])
def test_each_holder_is_shown_and_ended_apart(connect: Connect, dba: Connection, scope: str) -> None:
    shapes = (slots(2), slots(2), SHARED)
    holders = [connect() for _ in shapes]
    for holder, shape in zip(holders, shapes, strict=True):
        if scope == "transaction":
            run(holder, "BEGIN")
        hold(holder, {**shape, "scope": scope})
    expected = [(pid(holder), "held", mode)
                for holder, mode in zip(holders, ("slot 0", "slot 1", "shared"), strict=True)]  # fmt: skip
    assert sorted(force_release(dba, target="web-01", step="b")) == sorted(expected)
    ended = (pid(holders[0]), "ended", "slot 0")
    assert sorted(force_release(dba, confirm=pid(holders[0]))) == sorted([ended, *expected[1:]])
    assert sorted(force_release(dba)) == sorted(expected[1:])
    assert {entry.pid for entry in see(dba)} == {pid(holder) for holder in holders[1:]}
    hold(connect(), slots(1))  # the permit is free too


def test_by_its_key_alone_a_slot_is_shared(connect: Connect, dba: Connection) -> None:
    holder = hold(connect(), slots(2))
    assert force_release(dba, key=KEY) == [(pid(holder), "held", "shared")]
    assert force_release(dba, key=KEY, confirm=pid(holder)) == [(pid(holder), "ended", "shared")]
    assert force_release(dba, key=KEY) == [(None, "nobody holds this lock", None)]


def test_the_exclusive_holder(connect: Connect, dba: Connection) -> None:
    holder = hold(connect(), EXCLUSIVE)
    assert force_release(dba, target="web-01", step="b") == [(pid(holder), "held", "exclusive")]


def test_the_own_session_is_told_how_to_give_it_back(connect: Connect, dba: Connection) -> None:
    hold(dba, SHARED)
    dba.execute("SELECT set_config('dblock.key', %s, false)", (str(KEY),))
    ((said, *_),) = dba.execute(FORCE_RELEASE.encode()).fetchall()
    assert said.endswith(f"SELECT pg_catalog.pg_advisory_unlock_shared({KEY})")
