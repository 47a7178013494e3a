"""The queue on PostgreSQL: order of arrival, nobody overtakes or stops it, and no wait is in anybody's way."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql
from psycopg.conninfo import make_conninfo

import dblock
from dblock import postgres as messages
from dblock.driver_psycopg import PsycopgSession
from dblock.postgres import LockNames
from dblock.protocol import Busy, Conditions, Granted
from dblock.protocol import Wish as Wanted
from tests.backends import Postgres
from tests.doors import SQL, Wish, set_wishes
from tests.support import PATIENCE_SECONDS, wait_until

KEY = dblock.key("web-01", "b")
WANTED = Wanted(KEY, "web-01", "b", "T1")
NAMES = LockNames.of(WANTED)
ROLE, PASSWORD = "dblock_queue_role", "opens-nothing"

Connection = psycopg.Connection[Any]


@pytest.fixture
def observer(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def foreign(url: str) -> Iterator[Connection]:
    """Somebody who takes advisory locks without dblock."""
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=110) as executor:
        yield executor


@pytest.fixture
def table(observer: Connection) -> Iterator[str]:
    observer.execute("CREATE TABLE dblock_queue AS SELECT n FROM generate_series(1, 10000) AS n")
    yield "dblock_queue"
    observer.execute("DROP TABLE dblock_queue")


@contextmanager
def role(observer: Connection, url: str, **settings: str) -> Iterator[str]:
    """A URL for a role without rights, but with settings of its own."""
    name = sql.Identifier(ROLE)
    observer.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(name, sql.Literal(PASSWORD)))
    try:
        for setting, value in settings.items():
            observer.execute(
                sql.SQL("ALTER ROLE {} SET {} = {}").format(name, sql.Identifier(setting), sql.Literal(value))
            )
        yield make_conninfo(url, user=ROLE, password=PASSWORD)
    finally:
        observer.execute(sql.SQL("DROP ROLE {}").format(name))


def lock(db: Any, timeout: float | None = PATIENCE_SECONDS, tenant: str | None = None) -> dblock.Lock:
    return dblock.lock(db, target="web-01", step="b", tenant=tenant, timeout=timeout)


def turn(db: Any) -> None:
    with lock(db):
        pass


def park(pool: ThreadPoolExecutor, postgres: Postgres, number: int) -> list[Future[None]]:
    """Let so many wait, all of them seen in the queue."""
    futures = [pool.submit(turn, postgres.url) for _ in range(number)]
    wait_until(lambda: len(postgres.waiters()) == number, f"{number} in the queue")
    return futures


def acquire_on(connection: Connection, timeout: float | None) -> Granted | Busy:
    """Acquire by the protocol itself. The session stays open, so that what it keeps is there to be seen."""
    session = PsycopgSession(connection)
    server_lock = session.lock(WANTED)
    return session.run(server_lock.acquire(Conditions(), timeout, lambda *_: None))


def one(connection: Connection, query: str) -> Any:
    rows = connection.execute(query.encode()).fetchall()
    return rows[0][0] if rows else None


def waits_for_a_lock(observer: Connection, connection: Connection) -> bool:
    return bool(one(observer, f"SELECT pid FROM pg_locks WHERE NOT granted AND pid = {connection.info.backend_pid}"))


# --- order ------------------------------------------------------------------------------------------------------------


def test_a_hundred_are_served_in_the_order_of_their_arrival(postgres: Postgres, pool: ThreadPoolExecutor) -> None:
    served: list[int] = []

    def take_turn(i: int) -> None:
        with lock(postgres.url):
            served.append(i)

    with lock(postgres.url):
        futures = []
        for i in range(100):
            futures.append(pool.submit(take_turn, i))
            # Seen in the queue before the next one starts: when a thread got to run is not its order.
            wait_until(lambda i=i: len(postgres.waiters()) == i + 1, f"waiter {i} in the queue")  # type: ignore[misc]
        assert served == []
    for future in futures:
        future.result()
    assert served == list(range(100))


def test_the_order_stays_where_every_third_leaves(
    postgres: Postgres, observer: Connection, pool: ThreadPoolExecutor
) -> None:
    """By a timeout or a terminated session, in turn, in the middle of those who stay."""
    served: list[int] = []

    def take_turn(i: int) -> bool:
        waiter = lock(postgres.url, timeout=2 if i % 6 == 1 else PATIENCE_SECONDS, tenant=f"T{i}")
        acquired = waiter.acquire()
        if acquired:
            served.append(i)
            waiter.release()
        return acquired

    def session(i: int) -> Any:
        return one(observer, f"SELECT pid FROM pg_stat_activity WHERE application_name ~ '^dblock1 w[0-9]+ T{i} '")

    with lock(postgres.url):
        futures: list[Future[bool]] = []
        for i in range(60):
            futures.append(pool.submit(take_turn, i))
            # On a slow machine a waiter's time may be over before it was seen.
            wait_until(
                lambda i=i: session(i) in postgres.waiters() or futures[i].done(),  # type: ignore[misc]
                f"waiter {i} in the queue",
            )
        for i in range(4, 60, 6):
            postgres.end(session(i))
        wait(futures[1::3])
        assert [futures[i].result() for i in range(1, 60, 6)] == [False] * 10
        for i in range(4, 60, 6):
            assert isinstance(futures[i].exception(), dblock.DatabaseError)
        assert served == []
    stay = [i for i in range(60) if i % 3 != 1]
    assert all(futures[i].result() for i in stay)
    assert served == stay
    wait_until(lambda: not postgres.all_rows(), "nothing to be left")


def test_no_newcomer_overtakes(postgres: Postgres, observer: Connection, pool: ThreadPoolExecutor) -> None:
    """Two try on without a pause on open sessions, and one with a new lock each time, while thirty are served."""
    served: list[str] = []
    tries = [0, 0, 0]

    def take_turn(i: int) -> None:
        with lock(postgres.url):
            served.append(f"waiter {i}")

    def hammer_on_a_session(number: int) -> None:
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            session = PsycopgSession(connection)
            server_lock = session.lock(WANTED)
            while isinstance(session.run(server_lock.acquire(Conditions(), 0, lambda *_: None)), Busy):
                tries[number] += 1
            served.append("newcomer")

    def hammer_with_new_locks(number: int) -> None:
        newcomer = lock(postgres.url, timeout=0)
        while not newcomer.acquire():
            tries[number] += 1
        served.append("newcomer")
        newcomer.release()

    with lock(postgres.url):
        futures = [pool.submit(take_turn, i) for i in range(30)]
        wait_until(lambda: len(postgres.waiters()) == 30, "thirty in the queue")
        futures += [pool.submit(hammer_on_a_session, n) for n in (0, 1)] + [pool.submit(hammer_with_new_locks, 2)]
        wait_until(lambda: min(tries) >= 10, "all newcomers to try")
    for future in futures:
        future.result()
    assert served[30:] == ["newcomer"] * 3
    assert sorted(served[:30]) == sorted(f"waiter {i}" for i in range(30))


def test_sixty_four_who_join_at_once_get_sixty_four_tickets(
    url: str, observer: Connection, foreign: Connection, pool: ThreadPoolExecutor
) -> None:
    connections = [psycopg.connect(url, autocommit=True) for _ in range(64)]
    try:
        foreign.execute("SELECT pg_advisory_lock(%s::int, -1)", (NAMES.high,))
        join = messages._join(NAMES, PATIENCE_SECONDS * 500)
        joins = [pool.submit(PsycopgSession(connection).rows, join) for connection in connections]
        wait_until(lambda: one(observer, "SELECT count(*) FROM pg_locks WHERE NOT granted") == 64, "all at the gate")
        foreign.execute("SELECT pg_advisory_unlock(%s::int, -1)", (NAMES.high,))
        tickets = sorted(tuple(future.result()[0][:2]) for future in joins)
        assert tickets == [(number, number - 1) for number in range(1, 65)]
    finally:
        for connection in connections:
            connection.close()


# --- in nobody's way --------------------------------------------------------------------------------------------------


@contextmanager
def plainly_waiting(observer: Connection, foreign: Connection, pool: ThreadPoolExecutor) -> Iterator[None]:
    """What dblock does not do: somebody waits for the held lock in one statement, until the block ends."""
    waiter = pool.submit(foreign.execute, f"SELECT pg_advisory_lock({KEY.value})".encode())
    try:
        wait_until(lambda: waits_for_a_lock(observer, foreign), "the plain waiter")
        yield
    finally:
        observer.execute("SELECT pg_cancel_backend(%s)", (foreign.info.backend_pid,))
        assert isinstance(waiter.exception(), errors.QueryCanceled)


def build_index(url: str, table: str, timeout: str, name: str = "dblock builder") -> None:
    with psycopg.connect(url, autocommit=True, application_name=name) as step:
        step.execute(f"SET statement_timeout = '{timeout}'".encode())
        step.execute(f"CREATE INDEX CONCURRENTLY dblock_queue_n ON {table} (n)".encode())


def test_an_index_is_built_concurrently_in_the_holders_step(
    postgres: Postgres, observer: Connection, table: str, pool: ThreadPoolExecutor
) -> None:
    with lock(postgres.url):
        futures = park(pool, postgres, 20)
        build_index(postgres.url, table, "30s")
        assert one(observer, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'dblock_queue_n'::regclass") is True
        assert len(postgres.waiters()) == 20
    for future in futures:
        future.result()


def test_one_plain_waiter_would_hang_it(
    postgres: Postgres, observer: Connection, foreign: Connection, table: str, pool: ThreadPoolExecutor
) -> None:
    """Why waits are sliced: the step waits for the waiter, who waits for its lock, and the server sees no cycle."""
    with lock(postgres.url), plainly_waiting(observer, foreign, pool):
        building = pool.submit(build_index, postgres.url, table, "2s")
        blockers = "SELECT pg_blocking_pids(pid) FROM pg_stat_activity WHERE application_name = 'dblock builder'"
        wait_until(lambda: one(observer, blockers) == [foreign.info.backend_pid], "the step to wait for the waiter")
        assert isinstance(building.exception(), errors.QueryCanceled)
        assert one(observer, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'dblock_queue_n'::regclass") is False


def pages_after_vacuum(observer: Connection, table: str) -> Any:
    """How much of a table, all of whose rows were deleted, vacuum could not free."""
    observer.execute(f"VACUUM {table}".encode())
    return one(observer, f"SELECT pg_relation_size('{table}')")


def test_vacuum_removes_rows_that_were_deleted_while_ten_wait(
    postgres: Postgres, observer: Connection, table: str, pool: ThreadPoolExecutor
) -> None:
    with lock(postgres.url):
        futures = park(pool, postgres, 10)
        sessions = postgres.waiters()
        observer.execute(f"DELETE FROM {table}".encode())
        deleted = one(observer, "SELECT pg_current_xact_id()::xid::text")
        older = f"""
            SELECT count(*) FROM pg_stat_activity
            WHERE application_name LIKE 'dblock1 w%' AND age(backend_xmin) > age('{deleted}'::xid)
        """
        wait_until(lambda: one(observer, older) == 0, "the snapshots of all waiters to move past the deletion")
        wait_until(lambda: pages_after_vacuum(observer, table) == 0, "vacuum to free the table")
        assert postgres.waiters() == sessions
    for future in futures:
        future.result()


def test_one_plain_waiter_would_keep_the_rows(
    postgres: Postgres, observer: Connection, foreign: Connection, table: str, pool: ThreadPoolExecutor
) -> None:
    with lock(postgres.url):
        with plainly_waiting(observer, foreign, pool):
            observer.execute(f"DELETE FROM {table}".encode())
            assert pages_after_vacuum(observer, table) > 0
        wait_until(lambda: pages_after_vacuum(observer, table) == 0, "vacuum to free the table")


# --- settings of the role ---------------------------------------------------------------------------------------------


HASTY = {"statement_timeout": "200ms", "lock_timeout": "100ms"}
LONGER_THAN_HASTY = "'500ms'::interval"


def statement_lasted(observer: Connection, session: int) -> bool:
    return bool(one(observer, f"""
        SELECT state = 'active' AND clock_timestamp() - query_start > {LONGER_THAN_HASTY}
        FROM pg_stat_activity WHERE pid = {session}
    """))  # fmt: skip


def test_a_roles_timeouts_end_neither_a_wait_nor_an_idle_holder(
    postgres: Postgres, observer: Connection, pool: ThreadPoolExecutor
) -> None:
    hasty = {**HASTY, "idle_session_timeout": "200ms"}
    if observer.info.server_version >= 170000:
        hasty["transaction_timeout"] = "200ms"
    with role(observer, postgres.url, **hasty) as url:
        waiter, done = lock(url), threading.Event()

        def hold_until_done() -> None:
            with waiter:  # would tell at its end that the lock was lost
                done.wait(PATIENCE_SECONDS)

        with lock(postgres.url):
            holding = pool.submit(hold_until_done)
            wait_until(lambda: len(postgres.waiters()) == 1, "the waiter in the queue")
            (session,) = postgres.waiters()
            wait_until(lambda: statement_lasted(observer, session), "one statement to outlast the role's timeouts")
        try:
            idle = f"SELECT clock_timestamp() - state_change > {LONGER_THAN_HASTY} FROM pg_stat_activity WHERE pid ="
            wait_until(
                lambda: postgres.holders() == [session] and one(observer, f"{idle} {session} AND state = 'idle'"),
                "the holder to be idle for longer than the role's timeouts",
            )
        finally:
            done.set()
        holding.result()


def test_the_script_waits_on_and_leaves_the_roles_timeouts(
    postgres: Postgres, observer: Connection, pool: ThreadPoolExecutor
) -> None:
    def acquire_and_release(connection: Connection) -> tuple[Any, Any]:
        for message in (set_wishes(Wish()), (SQL / "acquire.sql").read_text()):
            connection.execute(message.encode())
        shown = one(connection, "SHOW statement_timeout"), one(connection, "SHOW lock_timeout")
        connection.execute((SQL / "release.sql").read_bytes())
        return shown

    with role(observer, postgres.url, **HASTY) as url, psycopg.connect(url, autocommit=True) as caller:
        with lock(postgres.url):
            acquiring = pool.submit(acquire_and_release, caller)
            session = caller.info.backend_pid
            wait_until(
                lambda: postgres.waiters() == [session] and statement_lasted(observer, session),
                "the script to outlast the role's timeouts",
            )
        assert acquiring.result() == ("200ms", "100ms")


# --- nobody stops it --------------------------------------------------------------------------------------------------


FROZEN = """
import sys, dblock
try:
    with dblock.lock(sys.argv[1], target="web-01", step="b"):
        print("held")
except dblock.Error as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("place", [1, 2], ids=["the head", "the second"])
@pytest.mark.parametrize("shape", ["", ", slots=1", ", shared=True"])
def test_a_frozen_waiter_does_not_stop_those_behind(
    postgres: Postgres, observer: Connection, pool: ThreadPoolExecutor, place: int, shape: str
) -> None:
    """The server ends it when it has been silent for too long, and when it awakes it is told.

    So it does with the head, which is granted the lock in the message that it waits in.
    """
    program = FROZEN.replace(', step="b"', f', step="b"{shape}')
    with ExitStack() as held:
        held.enter_context(lock(postgres.url))
        before = park(pool, postgres, place - 1)
        with subprocess.Popen(
            [sys.executable, "-c", program, postgres.url], stdout=subprocess.PIPE, text=True
        ) as frozen:
            try:
                wait_until(lambda: len(postgres.waiters()) == place, "the process in the queue")
                session = postgres.waiters()[-1]
                behind = pool.submit(turn, postgres.url)
                wait_until(lambda: len(postgres.waiters()) == place + 1, "the next one")
                frozen.send_signal(signal.SIGSTOP)
                assert os.WIFSTOPPED(os.waitpid(frozen.pid, os.WUNTRACED)[1])
                stopped = time.monotonic()
                held.close()
                for future in (*before, behind):
                    future.result()
                # 2 s of silence after at most one slice of the wait.
                print(f"those behind were served {time.monotonic() - stopped:.2f} s after it froze")
                assert session not in [other for _, other in postgres.all_rows()]
                frozen.send_signal(signal.SIGCONT)
                assert frozen.communicate(timeout=PATIENCE_SECONDS)[0] == "DatabaseError\n"
            finally:
                frozen.kill()


def test_a_waiter_whose_session_is_terminated_is_told_and_leaves_nothing(
    postgres: Postgres, pool: ThreadPoolExecutor
) -> None:
    with lock(postgres.url):
        (head,) = park(pool, postgres, 1)
        behind = pool.submit(turn, postgres.url)
        wait_until(lambda: len(postgres.waiters()) == 2, "both in the queue")
        first, second = postgres.waiters()
        postgres.end(first)
        assert str(head.exception()).startswith("b@web-01 not acquired: ")
        assert isinstance(head.exception(), dblock.DatabaseError)
        wait_until(lambda: [session for _, session in postgres.all_rows()].count(first) == 0, "its locks to be gone")
        assert postgres.waiters() == [second]
    behind.result()


FOREIGN_LOCKS = {
    "the gate": "pg_advisory_lock({high}, -1)",
    "the gate, shared": "pg_advisory_lock_shared({high}, -1)",
    "somebody waits, exclusively": "pg_advisory_lock({high}, 0)",
    "a ticket": "pg_advisory_lock({high}, 1)",
    "a ticket, shared": "pg_advisory_lock_shared({high}, 1)",
    "the last ticket but one": "pg_advisory_lock({high}, 2147483646)",
    "the last ticket": "pg_advisory_lock({high}, 2147483647)",
}


@pytest.mark.parametrize("taken", FOREIGN_LOCKS)
def test_a_foreign_lock_on_the_queue_breaks_no_timed_acquire(
    url: str, postgres: Postgres, foreign: Connection, observer: Connection, taken: str
) -> None:
    """It ends in its time, gives back what it had of the queue, and what it had set of its session."""
    with lock(url), psycopg.connect(url, autocommit=True, application_name="before") as caller:
        foreign.execute(("SELECT " + FOREIGN_LOCKS[taken].format(high=NAMES.high)).encode())
        before = postgres.all_rows()
        assert isinstance(acquire_on(caller, 0.3), Busy)
        assert postgres.all_rows() == before
        assert one(caller, "SHOW application_name") == "before"
        assert one(caller, "SHOW idle_session_timeout") == "0"
        with pytest.raises(dblock.LockTimeout, match=r"^b@web-01 not acquired in 0\.3 s: held by a session \(pid "):
            lock(url, timeout=0.3).__enter__()
        wait_until(lambda: postgres.all_rows() == before, "nothing to be left")


@pytest.mark.parametrize("taken", FOREIGN_LOCKS)
def test_who_met_a_foreign_lock_on_the_queue_is_served_when_it_is_gone(
    postgres: Postgres, foreign: Connection, observer: Connection, pool: ThreadPoolExecutor, taken: str
) -> None:
    session: Future[int] = Future()

    def connection() -> Connection:
        opened = psycopg.connect(postgres.url, autocommit=True)
        session.set_result(opened.info.backend_pid)
        return opened

    with lock(postgres.url):
        foreign.execute(("SELECT " + FOREIGN_LOCKS[taken].format(high=NAMES.high)).encode())
        waiter = pool.submit(turn, connection)
        waits = f"SELECT waitstart FROM pg_locks WHERE NOT granted AND pid = {session.result()}"
        wait_until(lambda: one(observer, waits), "the waiter to meet it")
        first = one(observer, waits)
        # A wait that began later is that of another slice: it did not give up with the first.
        wait_until(lambda: one(observer, waits) not in (None, first), "another slice")
    foreign.execute("SELECT pg_advisory_unlock_all()")
    waiter.result()
    wait_until(lambda: not postgres.all_rows(), "nothing to be left")


@contextmanager
def deadlock_timeout(observer: Connection, value: str) -> Iterator[None]:
    """Set it for sessions that are open already, too."""
    observer.execute(f"ALTER SYSTEM SET deadlock_timeout = '{value}'".encode())
    try:
        observer.execute("SELECT pg_reload_conf()")
        yield
    finally:
        observer.execute("ALTER SYSTEM RESET deadlock_timeout")
        observer.execute("SELECT pg_reload_conf()")


def test_a_deadlock_that_the_server_reports(
    postgres: Postgres, observer: Connection, foreign: Connection, pool: ThreadPoolExecutor
) -> None:
    """Slices stay below deadlock_timeout as it was at the beginning: one of them meets it only where it shrinks."""

    def connection_with_another_lock() -> Connection:
        connection = psycopg.connect(postgres.url, autocommit=True)
        connection.execute("SELECT pg_advisory_lock(1)")
        return connection

    foreign.execute("SET deadlock_timeout = '1h'")  # never the one who finds it
    foreign.execute("SELECT pg_advisory_lock(%s)", (KEY.value,))
    waiter = pool.submit(lock(connection_with_another_lock).acquire)
    wait_until(lambda: len(postgres.waiters()) == 1, "the waiter in the queue")
    cycle = pool.submit(foreign.execute, b"SELECT pg_advisory_lock(1)")
    wait_until(lambda: waits_for_a_lock(observer, foreign), "the cycle to be closed")
    with deadlock_timeout(observer, "10ms"):
        error = waiter.exception()
    assert isinstance(error, dblock.LockDeadlock)
    assert "deadlock detected" in str(error)
    cycle.result()  # what the victim's connection held went with it
    assert {session for _, session in postgres.all_rows()} == {foreign.info.backend_pid}


# --- who is in the way ------------------------------------------------------------------------------------------------


README_LINE = re.compile(r"^ +dblock: (b@web-01 not acquired in .*)$", re.MULTILINE)


def test_who_is_in_the_way(
    postgres: Postgres, observer: Connection, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """Logged at once while waiting; in the error as the README has it; and a role without rights is told too."""
    caplog.set_level(logging.INFO, "dblock")
    readme = README_LINE.search((Path(__file__).parent.parent / "README.md").read_text())
    assert readme
    with lock(postgres.url, tenant="T1"):
        (session,) = postgres.holders()
        host = one(observer, f"SELECT host(client_addr) FROM pg_stat_activity WHERE pid = {session}")
        since = r"(\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d"
        futures = []
        for ahead in ("", "; 1 ahead", "; 2 ahead"):
            futures.append(pool.submit(turn, postgres.url))
            wait_until(lambda: len(caplog.messages) == len(futures), "the waiter to say so")
            holder = rf"held by tenant T1 \(pid {session}, host {re.escape(host)}\) since {since}"
            assert re.fullmatch(f"waiting for b@web-01: {holder}{ahead}", caplog.messages[-1])
        expected = re.escape(readme[1])
        for shown, real in (("600", "0.3"), ("4123", str(session)), ("octo-7", host)):
            expected = expected.replace(re.escape(shown), re.escape(real))
        expected = re.sub(r"\d\d:\d\d:\d\d", lambda _: since, expected)
        assert re.fullmatch(expected, refusal(postgres.url))
        with role(observer, postgres.url) as url:
            # Hosts are for roles that may see them; the label is for everybody.
            assert re.fullmatch(expected.replace(rf",\ host\ {re.escape(host)}", ""), refusal(url))
    for future in futures:
        future.result()


def refusal(url: str) -> str:
    with pytest.raises(dblock.LockTimeout) as caught:
        lock(url, timeout=0.3).__enter__()
    return str(caught.value)
