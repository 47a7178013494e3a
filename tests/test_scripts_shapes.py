"""acquire.sql and release.sql in the shapes beside the plain one: shared, and with several slots."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import psycopg
import pytest

import dblock
from tests import hostile
from tests.doors import DRIVER, PSQL, SQL, Door, Wish, set_wishes
from tests.support import PATIENCE_SECONDS, rounds, wait_until

ACQUIRE = (SQL / "acquire.sql").read_text()
RELEASE = (SQL / "release.sql").read_text()
VECTORS = json.loads((Path(__file__).parent / "key-vectors.json").read_text())["keys"]
KEY = dblock.key("web-01", "b")

Connection = psycopg.Connection[Any]
Connect = Callable[..., Connection]


def permit(number: int, target: str = "web-01", step: str = "b") -> int:
    preimage = f"{target}\x1f{step}\x1f{number}".encode()
    return int.from_bytes(hashlib.sha256(preimage).digest()[:8], "big", signed=True)


PERMITS = {permit(number): f"permit {number}" for number in range(20)}

# How the script is asked for each shape, and whom it lets in beside whom.
EXCLUSIVE: dict[str, str] = {}
SHARED = {"shared": "on"}
SHAPES = {"exclusive": EXCLUSIVE, "shared": SHARED, "slots=1": {"slots": "1"}, "slots=2": {"slots": "2"}}
BESIDE = {("shared", "shared"), ("shared", "slots=1"), ("shared", "slots=2"), ("slots=1", "shared"),
          ("slots=2", "shared"), ("slots=1", "slots=2"), ("slots=2", "slots=2")}  # fmt: skip
PAIRS = [(one, other) for one in SHAPES for other in SHAPES]


def slots(number: int) -> dict[str, str]:
    return {"slots": str(number)}


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    connections = []

    def open_one(**settings: str) -> Connection:
        # With a name of its own a session is certainly not another client's, so a failure may end it.
        options: dict[str, Any] = {"application_name": "deploy"} | settings
        connection = psycopg.connect(url, autocommit=True, **options)
        connections.append(connection)
        return connection

    yield open_one
    for connection in connections:
        connection.close()


@pytest.fixture
def observer(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def threads(observer: Connection) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=20) as executor:
        yield executor
        # Whoever still waits, after a failure, would wait for ever.
        run(observer, "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")


def run(connection: Connection, *texts: str) -> None:
    for text in texts:
        connection.execute(text.encode())


def value(connection: Connection, query: str) -> Any:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def acquire(connection: Connection, shape: dict[str, str], timeout: str | None = "0", tenant: str | None = None) -> str:
    """Take b@web-01. Returns dblock.slot."""
    run(connection, set_wishes(Wish(timeout=timeout, tenant=tenant, more=shape)), ACQUIRE)
    return str(value(connection, "SHOW dblock.slot"))


def locks(observer: Connection) -> list[tuple[int, str, str]]:
    """All advisory locks: whose, what, and how."""
    found = observer.execute(
        """
        SELECT pid, objsubid, (classid::bigint << 32) | objid::bigint, mode
        FROM pg_locks WHERE locktype = 'advisory' AND granted
        """
    )
    return sorted(
        (pid, "queue" if form == 2 else "lock" if key == KEY.value else PERMITS.get(key, str(key)), mode)
        for pid, form, key, mode in found
    )


def pid(connection: Connection) -> int:
    return connection.info.backend_pid


def expected(connection: Connection, shape: dict[str, str], slot: str = "") -> list[tuple[int, str, str]]:
    """What the holder of a lock shows."""
    if shape == EXCLUSIVE:
        return [(pid(connection), "lock", "ExclusiveLock")]
    base = (pid(connection), "lock", "ShareLock")
    return [base, (pid(connection), f"permit {slot}", "ExclusiveLock")] if slot else [base]


def waiters(observer: Connection) -> list[int]:
    """Those who have drawn a ticket, in their order."""
    return [row[0] for row in observer.execute(
        f"""
        SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND classid = {KEY.postgres.classid}
           AND granted AND mode = 'ExclusiveLock' AND objid::bigint BETWEEN 1 AND 2147483647
        ORDER BY objid::bigint
        """
    )]  # fmt: skip


class Waiting:
    """Callers who wait in threads, each begun when the one before it stands in the queue."""

    def __init__(self, threads: ThreadPoolExecutor, observer: Connection) -> None:
        self._threads, self._observer = threads, observer

    def begin(self, connection: Connection, shape: dict[str, str], timeout: str | None = None) -> Future[str]:
        future = self._threads.submit(acquire, connection, shape, timeout)
        wait_until(lambda: future.done() or pid(connection) in waiters(self._observer), "the waiter in the queue")
        return future


@pytest.fixture
def waiting(threads: ThreadPoolExecutor, observer: Connection) -> Waiting:
    return Waiting(threads, observer)


# --- who is let in beside whom ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("held", "wished"), PAIRS, ids="-".join)
def test_shapes_beside_each_other(connect: Connect, observer: Connection, held: str, wished: str) -> None:
    holder, newcomer = connect(), connect()
    first = acquire(holder, SHAPES[held], tenant="T1")
    before = locks(observer)
    assert before == expected(holder, SHAPES[held], first)
    if (held, wished) in BESIDE:
        second = acquire(newcomer, SHAPES[wished])
        assert locks(observer) == sorted(before + expected(newcomer, SHAPES[wished], second))
        run(newcomer, RELEASE)
    else:
        with pytest.raises(
            psycopg.errors.LockNotAvailable, match=r"not acquired without waiting: held by tenant T1 \(pid"
        ):
            acquire(newcomer, SHAPES[wished])
        with pytest.raises(psycopg.OperationalError):
            run(newcomer, "SELECT")
    assert locks(observer) == before
    run(holder, RELEASE)
    assert locks(observer) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_beside_pythons_exclusive_lock(url: str, connect: Connect, shape: str) -> None:
    connection = connect()
    with (
        dblock.lock(url, target="web-01", step="b", tenant="T1"),
        pytest.raises(psycopg.errors.LockNotAvailable, match="held by tenant T1"),
    ):
        acquire(connect(), SHAPES[shape])
    acquire(connection, SHAPES[shape], tenant="T2")
    lock = dblock.lock(url, target="web-01", step="b", timeout=0)
    with pytest.raises(dblock.LockTimeout, match="held by tenant T2"), lock:
        pass
    run(connection, RELEASE)
    with lock:
        pass


@pytest.mark.parametrize("door", [PSQL, DRIVER], ids=str)
def test_through_real_clients(url: str, observer: Connection, door: Door) -> None:
    with (
        door.attempt(url, Wish(more=slots(2))) as first,
        door.attempt(url, Wish(more=slots(2))) as second,
        door.attempt(url, Wish(more=SHARED)) as third,
    ):
        assert [first.held(), second.held(), third.held()] == [True, True, True]
        with door.attempt(url, Wish(more=slots(2), timeout="0.05")) as late:
            assert not late.held()
            assert late.finish() == "55P03"
        assert sorted(what for _, what, _ in locks(observer)) == ["lock", "lock", "lock", "permit 0", "permit 1"]
        assert [attempt.finish() for attempt in (first, second, third)] == ["done", "done", "done"]
    assert locks(observer) == []


def test_the_message_counts_the_holders(connect: Connect) -> None:
    def said() -> str:
        with pytest.raises(psycopg.errors.LockNotAvailable) as error:
            acquire(connect(), EXCLUSIVE)
        return str(error.value)

    acquire(connect(), slots(5), tenant="T1")
    assert " others" not in said()
    acquire(connect(), slots(5), tenant="T2")
    assert "held by tenant T1 (pid " in said()
    assert " and 1 other\n" in said()
    acquire(connect(), SHARED, tenant="T3")
    assert " and 2 others\n" in said()


# --- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", ["shared", "slots=2"])
@pytest.mark.parametrize("held", ["shared", "slots=2"])
def test_an_exclusive_waiter_comes_before_later_ones(
    connect: Connect, observer: Connection, waiting: Waiting, held: str, later: str
) -> None:
    holder, exclusive, late = connect(), connect(), connect()
    acquire(holder, SHAPES[held])
    first = waiting.begin(exclusive, EXCLUSIVE)
    with pytest.raises(psycopg.errors.LockNotAvailable, match="1 ahead"):
        acquire(connect(), SHAPES[later])
    second = waiting.begin(late, SHAPES[later])
    assert waiters(observer) == [pid(exclusive), pid(late)]
    run(holder, RELEASE)
    first.result(PATIENCE_SECONDS)
    assert not second.done()
    run(exclusive, RELEASE)
    second.result(PATIENCE_SECONDS)
    run(late, RELEASE)
    assert locks(observer) == []


def test_pythons_exclusive_waiter_comes_before_later_ones(
    url: str, connect: Connect, observer: Connection, waiting: Waiting, threads: ThreadPoolExecutor
) -> None:
    holder, late = connect(), connect()
    acquire(holder, SHARED)
    lock = dblock.lock(url, target="web-01", step="b")
    python = threads.submit(lock.acquire)
    wait_until(lambda: len(waiters(observer)) == 1, "Python in the queue")
    second = waiting.begin(late, slots(3))
    run(holder, RELEASE)
    assert python.result(PATIENCE_SECONDS)
    assert not second.done()
    lock.release()
    assert second.result(PATIENCE_SECONDS) == "0"


def test_shared_waiters_are_served_together(connect: Connect, observer: Connection, waiting: Waiting) -> None:
    holder, readers = connect(), [connect() for _ in range(4)]
    acquire(holder, EXCLUSIVE)
    futures = [waiting.begin(reader, SHARED) for reader in readers]
    run(holder, RELEASE)
    for future in futures:
        future.result(PATIENCE_SECONDS)
    assert locks(observer) == sorted(row for reader in readers for row in expected(reader, SHARED))


# --- slots ------------------------------------------------------------------------------------------------------------


def test_an_index_is_built_concurrently_while_somebody_looks_for_a_slot(
    connect: Connect, observer: Connection, waiting: Waiting
) -> None:
    holder, waiter = connect(), connect()
    run(observer, "CREATE TABLE public.number (n int)")
    try:
        acquire(holder, slots(1))
        future = waiting.begin(waiter, slots(1))
        run(observer, "SET statement_timeout = '30s'", "CREATE INDEX CONCURRENTLY ON public.number (n)")
        assert not future.done()
        run(holder, RELEASE)
        future.result(PATIENCE_SECONDS)
    finally:
        run(observer, "DROP TABLE public.number")


def test_no_number_twice_and_at_most_so_many(connect: Connect, threads: ThreadPoolExecutor) -> None:
    inside: set[str] = set()
    violations: list[object] = []
    change, counts = threading.Lock(), dict.fromkeys(("0", "1", "2"), 0)

    def compete(seed: int) -> None:
        random, connection = Random(seed), connect()
        for _ in range(25):
            slot = acquire(connection, slots(3), timeout=None)
            with change:
                if slot in inside or len(inside) >= 3:
                    violations.append((slot, set(inside)))
                inside.add(slot)
                counts[slot] += 1
            spin(random.uniform(0, 0.004))
            with change:
                inside.discard(slot)
            run(connection, RELEASE)

    for future in [threads.submit(compete, seed) for seed in range(7)]:
        future.result(PATIENCE_SECONDS)
    assert violations == []
    assert sum(counts.values()) == 7 * 25
    assert min(counts.values()) > 0, counts


@pytest.mark.parametrize("ending", ["release", "crash", "terminate"])
@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_a_waiter_goes_in_after_any_holder(
    connect: Connect, observer: Connection, waiting: Waiting, leaver: int, ending: str
) -> None:
    holders, waiter, next_one = [connect() for _ in range(3)], connect(), connect()
    assert [acquire(holder, slots(3)) for holder in holders] == ["0", "1", "2"]
    first = waiting.begin(waiter, slots(3))
    second = waiting.begin(next_one, slots(3))
    if ending == "release":
        run(holders[leaver], RELEASE)
    elif ending == "crash":
        holders[leaver].close()
    else:
        run(observer, f"SELECT pg_terminate_backend({pid(holders[leaver])})")
    assert first.result(PATIENCE_SECONDS) == str(leaver)
    assert not second.done()
    run(waiter, RELEASE)
    assert second.result(PATIENCE_SECONDS) == str(leaver)


def test_different_numbers_share_the_first_permits(connect: Connect, observer: Connection) -> None:
    holders = [connect() for _ in range(4)]
    assert acquire(holders[0], slots(2)) == "0"
    assert acquire(holders[1], slots(4)) == "1"
    with pytest.raises(psycopg.errors.LockNotAvailable):
        acquire(connect(), slots(2))
    assert acquire(holders[2], slots(4)) == "2"
    assert acquire(holders[3], slots(999)) == "3"
    with pytest.raises(psycopg.errors.LockNotAvailable, match="and 3 others"):
        acquire(connect(), slots(4))
    run(holders[0], RELEASE)
    assert acquire(holders[0], slots(4)) == "0"
    assert len(locks(observer)) == 8


def test_exclusive_waits_for_all_slots(connect: Connect, observer: Connection, waiting: Waiting) -> None:
    holders, exclusive = [connect() for _ in range(3)], connect()
    for holder in holders:
        acquire(holder, slots(3))
    future = waiting.begin(exclusive, EXCLUSIVE)
    for holder in holders:
        assert not future.done()
        run(holder, RELEASE)
    future.result(PATIENCE_SECONDS)
    assert locks(observer) == expected(exclusive, EXCLUSIVE)


def test_slots_wait_for_an_exclusive_holder(connect: Connect, waiting: Waiting) -> None:
    holder, waiter = connect(), connect()
    acquire(holder, EXCLUSIVE)
    future = waiting.begin(waiter, slots(3))
    run(holder, RELEASE)
    assert future.result(PATIENCE_SECONDS) == "0"


@pytest.mark.parametrize("held", [EXCLUSIVE, slots(1)], ids=["exclusive", "slots"])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_timeout_leaves_nothing(
    connect: Connect, observer: Connection, waiting: Waiting, held: dict[str, str], ahead: int
) -> None:
    """Shown in a session that goes on, since it has another lock, which its name does not explain."""
    holder, waiter, others = connect(), connect(), [connect() for _ in range(ahead)]
    acquire(holder, held)
    queue = [waiting.begin(other, slots(1)) for other in others]
    run(
        waiter,
        "DO $$ BEGIN END $$",
        "SELECT pg_advisory_lock(42)",
        "SET statement_timeout = '5min'",
        "SET lock_timeout = '3min'",
    )
    settings = "SELECT json_object_agg(name, setting) FROM pg_settings"
    before, shown = locks(observer), value(waiter, settings)
    with pytest.raises(psycopg.errors.LockNotAvailable, match=r"in 0\.3 s: held by a session"):
        acquire(waiter, slots(1), timeout="0.3")
    assert locks(observer) == before
    assert value(waiter, settings) == shown
    run(holder, RELEASE)
    for other, future in zip(others, queue, strict=True):
        assert future.result(PATIENCE_SECONDS) == "0"
        run(other, RELEASE)


@pytest.mark.parametrize("timeout", ["0", "0.05", "0.4"])
def test_a_timeout_ends_the_session(connect: Connect, observer: Connection, timeout: str) -> None:
    holder, waiter = connect(), connect()
    acquire(holder, slots(1))
    with pytest.raises(psycopg.errors.LockNotAvailable):
        acquire(waiter, slots(1), timeout=timeout)
    with pytest.raises(psycopg.OperationalError):
        run(waiter, "SELECT")
    wait_until(lambda: locks(observer) == expected(holder, slots(1), "0"), "the waiter's locks to be gone")


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: ascii(f"{vector['target']}-{vector['step']}")[:30])
def test_permits_of_the_vectors(connect: Connect, observer: Connection, vector: dict[str, Any]) -> None:
    """The numbers that the vectors name, one after the other: what is below them is taken by hand."""
    connection, foreign = connect(), connect()
    keys = [permit(number, vector["target"], vector["step"]) for number in range(11)]
    assert {number: keys[int(number)] for number in vector["slots"]} == vector["slots"]
    for number in (0, 1, 9, 10):
        for below in keys[:number]:
            run(foreign, f"SELECT pg_advisory_lock({below})")
        run(connection, set_wishes(Wish(vector["target"], vector["step"], more=slots(11))), ACQUIRE)
        assert value(connection, "SHOW dblock.slot") == str(number)
        own = observer.execute(
            "SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND pid = %s",
            (pid(connection),),
        )
        assert {row[0] for row in own} == {vector["key"], keys[number]}
        run(connection, RELEASE)
        run(foreign, "SELECT pg_advisory_unlock_all()")


# --- a lock is never taken twice --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("held", "wished"), PAIRS, ids="-".join)
def test_already_held(connect: Connect, observer: Connection, held: str, wished: str) -> None:
    connection = connect()
    acquire(connection, SHAPES[held])
    with pytest.raises(psycopg.errors.ObjectInUse, match="holds this lock already; a lock is never taken twice"):
        acquire(connection, SHAPES[wished])
    wait_until(lambda: locks(observer) == [], "the session to be gone with its lock")


@pytest.mark.parametrize("wished", SHAPES)
@pytest.mark.parametrize("by_hand", ["pg_advisory_lock", "pg_advisory_lock_shared"])
def test_already_held_by_another_client_perhaps(
    connect: Connect, observer: Connection, by_hand: str, wished: str
) -> None:
    connection = connect()
    run(connection, f"SELECT {by_hand}({KEY.value})")
    before = locks(observer)
    with pytest.raises(psycopg.errors.ObjectInUse, match="and not by this script for this client"):
        acquire(connection, SHAPES[wished])
    assert locks(observer) == before


def test_a_permit_held_already(connect: Connect, observer: Connection) -> None:
    connection = connect()
    run(connection, f"SELECT pg_advisory_lock({permit(1)})")
    with pytest.raises(psycopg.errors.ObjectInUse):
        acquire(connection, slots(2))
    assert locks(observer) == [(pid(connection), "permit 1", "ExclusiveLock")]


# --- release ----------------------------------------------------------------------------------------------------------


def test_locks_of_all_shapes_in_one_session(connect: Connect, observer: Connection) -> None:
    connection, other = connect(), connect()
    acquire(other, slots(3))
    assert acquire(connection, slots(3)) == "1"
    label = value(connection, "SHOW application_name")
    run(connection, set_wishes(Wish(target="web-02", more=SHARED)), ACQUIRE)
    assert value(connection, "SHOW dblock.slot") == ""
    run(connection, set_wishes(Wish(target="web-03", more=slots(2))), ACQUIRE)
    assert value(connection, "SHOW dblock.slot") == "0"
    for slot in ("", "1"):
        run(connection, RELEASE)
        assert value(connection, "SHOW dblock.slot") == slot
    assert value(connection, "SHOW application_name") == label
    assert locks(observer) == sorted(expected(connection, slots(3), "1") + expected(other, slots(3), "0"))
    run(connection, RELEASE)
    assert value(connection, "SHOW dblock.slot") == ""
    assert value(connection, "SHOW application_name") == "deploy"
    assert locks(observer) == expected(other, slots(3), "0")


@pytest.mark.parametrize("lost", [f"pg_advisory_unlock({permit(0)})", f"pg_advisory_unlock_shared({KEY.value})"])
def test_release_of_what_somebody_gave_back_in_part(connect: Connect, lost: str) -> None:
    connection = connect()
    acquire(connection, slots(2))
    run(connection, f"SELECT {lost}")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="given back by somebody else"):
        run(connection, RELEASE)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_session_is_as_before(connect: Connect, shape: str) -> None:
    connection = connect(options="-c statement_timeout=5min -c lock_timeout=1d -c idle_session_timeout=1h")
    settings = "SELECT json_object_agg(name, setting) FROM pg_settings WHERE name <> 'application_name'"
    run(connection, "DO $$ BEGIN END $$")
    before = value(connection, settings)
    acquire(connection, SHAPES[shape])
    assert value(connection, settings) == before
    run(connection, RELEASE)
    assert value(connection, settings) == before
    assert value(connection, "SHOW application_name") == "deploy"


# --- hostile surroundings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_hostile_schema(
    url: str, connect: Connect, observer: Connection, threads: ThreadPoolExecutor, shape: str
) -> None:
    with hostile.schema(url, ACQUIRE + RELEASE):
        holder, waiter = connect(), connect()
        acquire(holder, EXCLUSIVE)
        run(waiter, set_wishes(Wish(more=SHAPES[shape])), "SET search_path = evil, pg_catalog")
        future = threads.submit(run, waiter, ACQUIRE)
        wait_until(lambda: waiters(observer) == [pid(waiter)], "the waiter in the queue")
        run(holder, RELEASE)
        future.result(PATIENCE_SECONDS)
        slot = value(waiter, "SHOW dblock.slot")
        assert locks(observer) == expected(waiter, SHAPES[shape], slot)
        run(waiter, RELEASE)
        assert locks(observer) == []


@pytest.mark.parametrize("shape", ["shared", "slots=1"])
def test_cancel_aimed_at_the_grant(connect: Connect, observer: Connection, shape: str) -> None:
    """Either the script says that it holds the lock, and does; or the session is ended, and nothing is left of it."""
    random, tally = Random(3), {True: 0, False: 0}
    held = EXCLUSIVE if shape == "shared" else SHAPES[shape]
    holder = connect()
    for _ in range(rounds(60)):
        acquire(holder, held)
        waiter = connect()
        errors: list[psycopg.Error] = []
        thread = threading.Thread(target=catching, args=(errors, waiter, SHAPES[shape]))
        thread.start()
        wait_until(lambda: len(waiters(observer)) == 1, "the waiter in the queue")
        run(holder, RELEASE)
        spin(random.uniform(0, 0.006))
        run(observer, f"SELECT pg_cancel_backend({pid(waiter)})")
        thread.join()
        tally[bool(errors)] += 1
        if errors:
            wait_until(lambda: locks(observer) == [], "what the cancelled one had taken")
        else:
            assert locks(observer) == expected(waiter, SHAPES[shape], "0" if shape == "slots=1" else "")
            run(waiter, RELEASE)
        waiter.close()
    assert min(tally.values()) > 5, tally


def catching(errors: list[psycopg.Error], connection: Connection, shape: dict[str, str]) -> None:
    try:
        run(connection, set_wishes(Wish(more=shape)), ACQUIRE)
    except psycopg.Error as error:
        errors.append(error)
        return
    # What a cancel hits that came too late for the script.
    with suppress(psycopg.errors.QueryCanceled):
        run(connection, "SELECT pg_sleep(0.001)")


def test_statement_timeout_ends_no_wait(connect: Connect, observer: Connection, waiting: Waiting) -> None:
    """Wherever it hits one who looks for a permit again and again, and those behind."""
    random, holder = Random(5), connect()
    acquire(holder, slots(1))
    queue = [connect() for _ in range(10)]
    for each in queue:
        run(each, f"SET statement_timeout = {random.randint(100, 300)}")
    futures = [waiting.begin(each, slots(1)) for each in queue]
    for each, future in zip(queue, futures, strict=True):
        spin(random.uniform(0, 0.1))
        run(holder, RELEASE)
        assert future.result(PATIENCE_SECONDS) == "0"
        holder = each
    run(holder, RELEASE)
    assert locks(observer) == []


def spin(seconds: float) -> None:
    """Let a moment pass that is shorter than any sleep."""
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass
