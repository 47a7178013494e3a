"""The Python API on a real server: how a lock is taken, held, given back and lost, and what is said of it."""

from __future__ import annotations

import gc
import logging
import re
import select
import signal
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import dblock
from dblock.connect import connect
from dblock.demo.server import Server, postgres_server
from dblock.life import check_timeout
from dblock.protocol import Conditions, Granted, Wish
from tests.support import wait_until

KEY = dblock.key("web-01", "b")
HELD = [(1, KEY.value)]  # what pg_locks shows then: the lock itself, and nothing of a queue
NOWHERE = "postgresql://somebody@127.0.0.1:1/nothing"  # nobody listens there
PATIENCE_SECONDS = 60  # of those who wait in a test, so that a failing one ends

Connection = psycopg.Connection[Any]


@pytest.fixture
def observer(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def lock(db: Any, **more: Any) -> dblock.Lock:
    return dblock.lock(db, target="web-01", step="b", **more)


def locks(observer: Connection) -> list[Any]:
    return observer.execute(
        "SELECT objsubid, (classid::bigint << 32) | objid::bigint FROM pg_locks WHERE locktype = 'advisory' ORDER BY 1"
    ).fetchall()


def waiting(observer: Connection) -> int:
    """How many have drawn a ticket."""
    return len(
        observer.execute(
            "SELECT FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND mode = 'ExclusiveLock' "
            "AND granted AND objid BETWEEN 1 AND 2147483647"
        ).fetchall()
    )


def holder(observer: Connection) -> dict[str, Any]:
    """The session that holds the lock, as pg_stat_activity shows it."""
    cursor = observer.execute(
        "SELECT a.*, host(client_addr) AS host FROM pg_locks JOIN pg_stat_activity AS a USING (pid) "
        "WHERE locktype = 'advisory' AND objsubid = 1 AND granted"
    )
    assert cursor.description is not None
    (row,) = cursor.fetchall()
    return dict(zip((column.name for column in cursor.description), row, strict=True))


def terminate_holder(observer: Connection) -> None:
    observer.execute("SELECT pg_terminate_backend(%s)", (holder(observer)["pid"],))


def turn(waiter: dblock.Lock) -> None:
    with waiter:
        assert waiter.held


# --- taken and given back ---------------------------------------------------------------------------------------------


def test_with(url: str, observer: Connection) -> None:
    ours = lock(url)
    assert not ours.held
    assert locks(observer) == []
    with ours as entered:
        assert entered is ours
        assert ours.held
        assert locks(observer) == HELD
    assert not ours.held
    assert locks(observer) == []


def test_acquire_and_release_again_and_again(url: str, observer: Connection) -> None:
    ours = lock(url)
    for _ in range(3):
        assert ours.acquire() is True
        assert ours.held
        assert locks(observer) == HELD
        ours.release()
        assert not ours.held
        assert locks(observer) == []


def test_release_by_another_thread(url: str, observer: Connection) -> None:
    ours = lock(url)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(ours.acquire).result()
    assert ours.held
    ours.release()
    assert locks(observer) == []


def test_attributes(url: str) -> None:
    ours = lock(url, tenant="T1")
    assert (ours.key, ours.target, ours.step, ours.tenant) == (KEY, "web-01", "b", "T1")
    assert repr(ours) == f"<dblock.Lock b@web-01 key {KEY.value}, not held>"
    with ours:
        assert repr(ours) == f"<dblock.Lock b@web-01 key {KEY.value}, held>"


def test_names_are_shown_without_teeth(url: str) -> None:
    ours = dblock.lock(url, target="web\x9b31m", step="b\u202e")
    assert repr(ours).startswith(r"<dblock.Lock b\u202e@web\x9b31m key ")
    with ours, pytest.raises(dblock.LockTimeout, match=re.escape(r"b\u202e@web\x9b31m not acquired without waiting")):
        dblock.lock(url, target="web\x9b31m", step="b\u202e", timeout=0).__enter__()


@pytest.mark.parametrize("timeout", [0, 0.0001, 0.05])
def test_acquire_tells_free_from_busy(url: str, observer: Connection, timeout: float) -> None:
    ours = lock(url)
    assert ours.acquire(timeout) is True
    other = lock(url)
    assert other.acquire(timeout) is False
    assert not other.held
    assert locks(observer) == HELD
    ours.release()
    assert other.acquire(timeout) is True  # and a failed acquire is no obstacle to the next
    other.release()


def test_acquire_without_a_timeout_uses_the_locks_own(url: str) -> None:
    with lock(url):
        assert lock(url, timeout=0).acquire() is False
        assert lock(url, timeout=0.05).acquire() is False
        assert lock(url, timeout=PATIENCE_SECONDS).acquire(0) is False
        assert lock(url).acquire(timeout=0) is False


@pytest.mark.parametrize(("own", "arguments"), [(None, ()), (0, (None,)), (0.001, (PATIENCE_SECONDS,))])
def test_acquire_waits(url: str, observer: Connection, own: float | None, arguments: tuple[float | None, ...]) -> None:
    ours, other = lock(url), lock(url, timeout=own)
    with ThreadPoolExecutor() as pool:
        with ours:
            taken = pool.submit(other.acquire, *arguments)
            wait_until(lambda: waiting(observer) == 1, "the waiter in the queue")
            assert not taken.done()
        assert taken.result() is True
    assert locks(observer) == HELD
    other.release()


def test_the_body_does_not_run_without_the_lock(url: str, observer: Connection) -> None:
    ran = []
    with lock(url):
        with pytest.raises(dblock.LockTimeout), lock(url, timeout=0.05):
            ran.append("timeout")
        with pytest.raises(TimeoutError), lock(url, timeout=0):
            ran.append("no waiting")
    with pytest.raises(dblock.UnsafeConnection), lock(url, database="elsewhere"):
        ran.append("unsafe")
    with pytest.raises(dblock.DatabaseError), lock(NOWHERE):
        ran.append("unreachable")
    assert ran == []
    assert locks(observer) == []


def test_entering_twice(url: str, observer: Connection) -> None:
    ours = lock(url)
    with ours:
        with pytest.raises(dblock.AlreadyHeld, match="by this lock object"), ours:
            pytest.fail("entered twice")
        with pytest.raises(dblock.AlreadyHeld):
            ours.acquire(timeout=0)
        assert ours.held
        assert locks(observer) == HELD
    assert locks(observer) == []


def test_entering_while_another_thread_waits_with_the_same_object(url: str, observer: Connection) -> None:
    ours = lock(url, timeout=PATIENCE_SECONDS)
    with ThreadPoolExecutor() as pool:
        with lock(url):
            other = pool.submit(turn, ours)
            wait_until(lambda: waiting(observer) == 1, "the waiter in the queue")
            with pytest.raises(dblock.AlreadyHeld, match="or being acquired"):
                ours.acquire()
            with pytest.raises(dblock.LockNotHeld):
                ours.release()
        other.result()


def test_entering_in_vain_takes_nothing_from_the_thread_that_holds(url: str, observer: Connection) -> None:
    ours = lock(url, timeout=PATIENCE_SECONDS)
    with ThreadPoolExecutor() as pool:
        for _ in range(20):
            with lock(url):
                other = pool.submit(ours.acquire)
                wait_until(lambda: waiting(observer) == 1, "the waiter in the queue")
            while not other.done():  # at the moment of the grant, too
                with pytest.raises(dblock.AlreadyHeld), ours:
                    pytest.fail("entered twice")
            assert other.result()
            assert ours.held
            assert locks(observer) == HELD
            ours.release()


def test_release_of_what_is_not_held(url: str, observer: Connection) -> None:
    ours = lock(url)
    with pytest.raises(dblock.LockNotHeld, match="b@web-01 is not held by this lock object"):
        ours.release()
    with pytest.raises(dblock.LockNotHeld):
        ours.fileno()
    ours.acquire()
    ours.release()
    with pytest.raises(dblock.LockNotHeld):
        ours.release()
    with lock(url):
        with pytest.raises(dblock.LockNotHeld):
            ours.release()  # held, but by another object
        assert locks(observer) == HELD


def test_the_connection_is_the_locks_own_and_ends_with_it(url: str, observer: Connection) -> None:
    with lock(url) as ours:
        pid = holder(observer)["pid"]
        assert ours.fileno() > 2
    wait_until(lambda: not sessions(observer, pid), "the connection to be closed")


def sessions(observer: Connection, pid: int) -> list[Any]:
    return observer.execute("SELECT FROM pg_stat_activity WHERE pid = %s", (pid,)).fetchall()


def test_a_lock_that_nobody_refers_to_stays_held(url: str, observer: Connection) -> None:
    ours = lock(url)
    ours.acquire()
    reference = weakref.ref(ours)
    del ours
    gc.collect()
    assert locks(observer) == HELD
    still_there = reference()
    assert still_there is not None
    still_there.release()
    del still_there
    gc.collect()
    assert reference() is None


# --- lost -------------------------------------------------------------------------------------------------------------


def test_held_is_false_when_the_server_ended_the_session(url: str, observer: Connection) -> None:
    ours = lock(url)
    ours.acquire()
    terminate_holder(observer)
    wait_until(lambda: not ours.held, "the end of the session to be noticed")
    with pytest.raises(dblock.LockLost, match="b@web-01 was lost while it was held"):
        ours.release()
    with pytest.raises(dblock.LockNotHeld):
        ours.release()
    with ours:  # lost, and yet as good as new
        assert ours.held


def test_a_session_ended_meanwhile_is_told_at_the_end_of_the_body(url: str, observer: Connection) -> None:
    ran = []
    with pytest.raises(dblock.LockLost, match=r"terminating connection|has ended its connection"), lock(url):
        terminate_holder(observer)
        wait_until(lambda: locks(observer) == [], "the lock to be gone")
        ran.append("to its end")
    assert ran == ["to its end"]


def test_a_lock_that_somebody_unlocked_is_told(url: str, observer: Connection) -> None:
    connections: list[Connection] = []
    with pytest.raises(dblock.LockLost, match="this session has it no more"), lock(source(url, connections)):
        connections[0].execute("SELECT pg_advisory_unlock_all()")
        assert locks(observer) == []
    assert connections[0].closed


def test_a_connection_closed_meanwhile_is_told(url: str) -> None:
    connections: list[Connection] = []
    with pytest.raises(dblock.LockLost), lock(source(url, connections)) as ours:
        connections[0].close()
        assert not ours.held


def test_other_news_from_the_server_do_not_look_like_the_end(url: str, observer: Connection) -> None:
    connections: list[Connection] = []
    with lock(source(url, connections)) as ours:
        connections[0].execute("LISTEN dblock_news")
        observer.execute("NOTIFY dblock_news")
        readable, _, _ = select.select([ours.fileno()], [], [], PATIENCE_SECONDS)
        assert readable
        assert ours.held
        assert ours.held


class BodyError(Exception):
    """What the guarded step raises."""


def test_the_bodys_error_comes_through(url: str, observer: Connection) -> None:
    with pytest.raises(BodyError), lock(url):
        raise BodyError
    assert locks(observer) == []


@pytest.mark.parametrize("told_before", [False, True])
def test_the_bodys_error_is_not_hidden_by_the_loss(
    url: str, observer: Connection, caplog: pytest.LogCaptureFixture, told_before: bool
) -> None:
    with pytest.raises(BodyError), lock(url) as ours:
        terminate_holder(observer)
        wait_until(lambda: locks(observer) == [], "the lock to be gone")
        if told_before:
            assert ours.lost.wait(PATIENCE_SECONDS)
        raise BodyError
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.name == "dblock"
    assert record.getMessage().startswith("b@web-01 was lost while it was held: ")


def test_the_bodys_error_is_not_hidden_by_a_release_in_the_body(url: str) -> None:
    with pytest.raises(dblock.LockNotHeld), lock(url) as ours:
        ours.release()
    with pytest.raises(BodyError), lock(url) as ours:
        ours.release()
        raise BodyError


# --- a decorator ------------------------------------------------------------------------------------------------------


def test_decorated_calls_run_one_after_the_other(url: str, observer: Connection) -> None:
    events = []

    @lock(url, timeout=PATIENCE_SECONDS)
    def body(name: str, *, answer: int) -> int:
        events.append(f"{name} begins")
        if name == "first":
            wait_until(lambda: waiting(observer) == 1, "the second in the queue")
        events.append(f"{name} ends")
        return answer

    with ThreadPoolExecutor() as pool:
        first = pool.submit(body, "first", answer=1)
        wait_until(lambda: events == ["first begins"], "the first inside")
        second = pool.submit(body, "second", answer=2)
        assert (first.result(), second.result()) == (1, 2)
    assert events == ["first begins", "first ends", "second begins", "second ends"]
    assert locks(observer) == []


def test_each_decorated_call_has_a_lock_of_its_own(url: str, observer: Connection) -> None:
    """A call within a call is another caller, who waits in vain: not the same lock object entered again."""
    ours = lock(url, timeout=0)

    @ours
    def outer() -> None:
        """Say something."""
        assert locks(observer) == HELD
        assert not ours.held
        outer()

    assert (outer.__name__, outer.__doc__) == ("outer", "Say something.")
    for _ in range(2):
        with pytest.raises(dblock.LockTimeout):
            outer()
    assert locks(observer) == []
    with ours:
        assert locks(observer) == HELD


def test_a_decorated_functions_error_comes_through(url: str, observer: Connection) -> None:
    @lock(url)
    def body() -> None:
        raise BodyError

    with pytest.raises(BodyError):
        body()
    assert locks(observer) == []


def test_what_runs_after_the_call_cannot_be_decorated() -> None:
    def generator() -> Iterator[int]:
        yield 1

    async def coroutine() -> None: ...

    async def both() -> Any:
        yield 1

    for function in (generator, coroutine, both):
        with pytest.raises(TypeError, match="outside the lock"):
            lock(NOWHERE)(function)


# --- where the connection comes from ----------------------------------------------------------------------------------


def source(url: str, connections: list[Connection], **settings: Any) -> Callable[[], Connection]:
    """A callable that opens a connection, and what it has opened so far."""

    def open_one() -> Connection:
        connections.append(psycopg.connect(url, **settings))
        return connections[-1]

    return open_one


FORMS: dict[str, Callable[[str], str]] = {
    "URL": lambda url: "postgresql://" + url.partition("://")[2],
    "short URL": lambda url: "postgres://" + url.partition("://")[2],
    "SQLAlchemy's URL": lambda url: "postgresql+psycopg://" + url.partition("://")[2],
    "capitals": lambda url: "PostgreSQL://" + url.partition("://")[2],
    "conninfo": lambda url: make_conninfo("", **conninfo_to_dict(url)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_text(url: str, observer: Connection, form: str) -> None:
    with lock(FORMS[form](url)):
        assert locks(observer) == HELD


@pytest.mark.parametrize(
    ("db", "error"),
    [
        ("", ValueError),
        (" \n", ValueError),
        ("mysql://h/d", ValueError),
        ("postgresql+asyncpg://h/d", ValueError),
        ("sqlite:///d", ValueError),
        (None, TypeError),
        (5, TypeError),
        (b"postgresql://h/d", TypeError),
        ({"host": "h"}, TypeError),
    ],
)
def test_what_is_no_database(db: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^db "):
        lock(db)


@pytest.mark.parametrize("db", ["no conninfo", "host=h nonsense=1", "postgresql://h:port/d", "postgresql://a@b@h/d"])
def test_what_only_libpq_can_refuse(db: str) -> None:
    ours = lock(db)
    for _ in range(2):  # the second time the same: the lock is not taken for held
        with pytest.raises(ValueError, match=r"^db "):
            ours.acquire()


def test_a_callable_gives_a_new_connection_for_each_acquire(url: str, observer: Connection) -> None:
    connections: list[Connection] = []
    ours = lock(source(url, connections))
    assert connections == []
    for count in (1, 2):
        with ours:
            assert len(connections) == count
            assert holder(observer)["pid"] == connections[-1].info.backend_pid
        assert connections[-1].closed


def test_a_callable_is_asked_for_each_decorated_call(url: str) -> None:
    connections: list[Connection] = []
    body = lock(source(url, connections))(lambda: len(connections))
    assert (body(), body()) == (1, 2)


def test_the_connection_of_a_refused_lock_is_closed(url: str) -> None:
    connections: list[Connection] = []
    with pytest.raises(dblock.UnsafeConnection):
        lock(source(url, connections), database="elsewhere").acquire()
    with lock(url):
        assert lock(source(url, connections)).acquire(timeout=0) is False
    assert [connection.closed for connection in connections] == [True, True]


def test_a_callable_that_returns_one_connection_for_ever(url: str, observer: Connection) -> None:
    with psycopg.connect(url) as connection:
        ours = lock(lambda: connection)
        with ours:
            assert locks(observer) == HELD
        with pytest.raises(dblock.UnsafeConnection, match="returned a closed connection"):
            ours.acquire()


def test_a_callable_that_returns_the_connection_of_a_held_lock(url: str, observer: Connection) -> None:
    """The second is refused and its connection closed. It is the first one's too, who is told."""
    with psycopg.connect(url) as connection, pytest.raises(dblock.LockLost), lock(lambda: connection) as ours:
        with pytest.raises(dblock.AlreadyHeld, match="a callable must return a new connection each time"):
            lock(lambda: connection).acquire()
        assert not ours.held
    wait_until(lambda: locks(observer) == [], "the lock to be gone")


def test_a_callables_connection_in_a_transaction(url: str, observer: Connection) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("SELECT 1")
        with pytest.raises(dblock.UnsafeConnection, match="inside a transaction"):
            lock(lambda: connection).acquire()
        with pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("SELECT 1 / 0")
        with pytest.raises(dblock.UnsafeConnection, match="inside a transaction"):
            lock(lambda: connection).acquire()
    assert locks(observer) == []


@pytest.mark.parametrize(
    "returned", [None, "postgresql://h/d", object(), psycopg], ids=lambda each: type(each).__name__
)
def test_a_callable_that_returns_no_connection(returned: object) -> None:
    ours = lock(lambda: returned)
    for _ in range(2):
        with pytest.raises(dblock.UnsafeConnection, match="must return a new connection of psycopg or pymssql, not "):
            ours.acquire()


def test_a_callable_that_fails(url: str) -> None:
    answers: list[Callable[[], Connection]] = [
        lambda: psycopg.connect(NOWHERE),
        dict[str, Connection]().popitem,  # type: ignore[list-item]  # raises KeyError
        lambda: psycopg.connect(url),
    ]

    def next_answer() -> Connection:
        return answers.pop(0)()

    ours = lock(next_answer)
    with pytest.raises(dblock.DatabaseError, match="b@web-01 not acquired: the callable could not connect: "):
        ours.acquire()
    with pytest.raises(KeyError):
        ours.acquire()
    with ours:
        assert ours.held


@pytest.mark.parametrize("kind", ["text", "callable"])
def test_the_connection_is_made_ready(url: str, kind: str) -> None:
    """Whatever the caller's settings: only under UTF8 are the names sent what the key was computed from."""
    connections: list[Connection] = []
    db = make_conninfo(url, client_encoding="LATIN1")
    session = connect(db if kind == "text" else source(db, connections, autocommit=False))
    try:
        assert session.rows("SHOW client_encoding") == [("UTF8",)]
        session.rows("SELECT txid_current()")
        assert session.rows("SELECT state FROM pg_stat_activity WHERE pid = pg_backend_pid()") == [("active",)]
        assert session.rows("SELECT pg_current_xact_id_if_assigned() IS NULL") == [(True,)]  # no transaction was left
        assert session.alive()
    finally:
        session.close()
    assert not session.alive()


@pytest.mark.parametrize("kind", ["text", "callable"])
def test_a_held_lock_is_idle_and_outside_any_transaction(url: str, observer: Connection, kind: str) -> None:
    """It hinders neither vacuum nor CREATE INDEX CONCURRENTLY."""
    connections: list[Connection] = []
    ours, other = lock(url), lock(url if kind == "text" else source(url, connections))
    with other:
        assert_idle(observer)
    with ThreadPoolExecutor() as pool:
        with ours:
            taken = pool.submit(other.acquire, PATIENCE_SECONDS)
            wait_until(lambda: waiting(observer) == 1, "the waiter in the queue")
        assert taken.result()
    assert_idle(observer)
    other.release()


def assert_idle(observer: Connection) -> None:
    # The server says so a moment after the client has its answer.
    wait_until(lambda: bool(holder(observer)["state"] == "idle"), "the holder to be idle")
    session = holder(observer)
    assert session["backend_xmin"] is None
    assert session["backend_xid"] is None
    assert session["xact_start"] is None


# --- what it says -----------------------------------------------------------------------------------------------------


def refusal(url: str, timeout: float) -> str:
    with pytest.raises(dblock.LockTimeout) as caught:
        lock(url, timeout=timeout).__enter__()
    return str(caught.value)


def clock(epoch: int) -> str:
    return datetime.fromtimestamp(epoch, tz=timezone.utc).astimezone().strftime("%H:%M:%S")


def test_a_timeout_names_the_holder_and_the_queue(url: str, observer: Connection) -> None:
    with ThreadPoolExecutor() as pool:
        with lock(url, tenant="T1"):
            held = holder(observer)
            since = clock(int(held["application_name"].split()[1]))
            by = f"held by tenant T1 (pid {held['pid']}, host {held['host']}) since {since}"
            assert without_date(refusal(url, 0)) == f"b@web-01 not acquired without waiting: {by}"
            waiters = [pool.submit(turn, lock(url, timeout=PATIENCE_SECONDS)) for _ in range(2)]
            wait_until(lambda: waiting(observer) == 2, "two in the queue")
            assert without_date(refusal(url, 0.25)) == f"b@web-01 not acquired in 0.25 s: {by}; 2 ahead"
            assert without_date(refusal(url, 0.0001)) == f"b@web-01 not acquired in 0.001 s: {by}; 2 ahead"
            assert without_date(refusal(url, 0)) == f"b@web-01 not acquired without waiting: {by}; 2 ahead"
        for waiter in waiters:
            waiter.result()


def without_date(text: str) -> str:
    """The date stands there when the grant was not today, which may be so around midnight."""
    return re.sub(r"since \d{4}-\d\d-\d\d ", "since ", text)


def test_a_holder_without_a_tenant(url: str, observer: Connection) -> None:
    with lock(url):
        assert f"held by a session (pid {holder(observer)['pid']}, host " in refusal(url, 0)


@pytest.mark.parametrize(("name", "said"), [
    ("psql", "a session (pid {pid}, application psql, host {host})"),
    ("", "a session (pid {pid}, host {host})"),
    ("dblock1 1700000000 - x b", "a session (pid {pid}, application dblock1 1700000000 - x b, host {host})"),
    ("dblock1 1700000000 T%1B9 web-01 b", r"tenant T\x1b9 (pid {pid}, host {host}) since {date}"),
    ("dblock1 1700000000 T9~ web~ b", "tenant T9~ (pid {pid}, host {host}) since {date}"),
])  # fmt: skip
def test_a_foreign_holder(url: str, observer: Connection, name: str, said: str) -> None:
    """Whose label is believed only as far as it names this lock, and shown without its teeth."""
    date = datetime.fromtimestamp(1700000000, tz=timezone.utc).astimezone()
    with psycopg.connect(url, application_name=name, autocommit=True) as foreign:
        foreign.execute("SELECT pg_advisory_lock(%s)", (KEY.value,))
        held = holder(observer)
        expected = said.format(pid=held["pid"], host=held["host"], date=f"{date:%Y-%m-%d %H:%M:%S}")
        assert refusal(url, 0) == f"b@web-01 not acquired without waiting: held by {expected}"
        assert refusal(url, 0.05) == f"b@web-01 not acquired in 0.05 s: held by {expected}"


def test_nobody_and_a_prepared_transaction(url: str, observer: Connection) -> None:
    high = KEY.value >> 32
    observer.execute("SELECT pg_advisory_lock_shared(%s::int, 0)", (high,))  # somebody is just about to wait
    assert refusal(url, 0) == "b@web-01 not acquired without waiting: nobody holds it at this moment"
    observer.execute("SELECT pg_advisory_unlock_all()")
    with observer.transaction():
        observer.execute("SELECT pg_advisory_xact_lock(%s)", (KEY.value,))
        observer.execute("PREPARE TRANSACTION 'dblock'")
    try:
        assert refusal(url, 0) == "b@web-01 not acquired without waiting: held by a prepared transaction"
    finally:
        observer.execute("ROLLBACK PREPARED 'dblock'")


def test_waiting_is_logged(url: str, observer: Connection, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dblock")
    with ThreadPoolExecutor() as pool:
        with lock(url, tenant="T1"):
            pid = holder(observer)["pid"]
            waiter = pool.submit(turn, lock(url, timeout=PATIENCE_SECONDS))
            wait_until(lambda: bool(caplog.records), "the waiter to say so")
        waiter.result()
    (record,) = [record for record in caplog.records if record.name == "dblock"]
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith(f"waiting for b@web-01: held by tenant T1 (pid {pid}, host ")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of this module's own, which logs each message and asks one role for its password."""
    with postgres_server({"log_statement": "all"}) as own:
        with psycopg.connect(own.url, autocommit=True) as connection:
            connection.execute(f"CREATE ROLE dblock_secret LOGIN PASSWORD '{SECRET}'".encode())
            rules = own.data / "pg_hba.conf"
            rules.write_text(f"host all dblock_secret all scram-sha-256\n{rules.read_text()}")
            connection.execute("SELECT pg_reload_conf()")
        wait_until(lambda: not may_connect(with_password(own, "")), "the password to be asked for")
        yield own


SECRET = "s3cr3t-Pw"  # noqa: S105 - opens nothing


def with_password(server: Server, password: str) -> str:
    return make_conninfo(server.url, user="dblock_secret", password=password)


def may_connect(conninfo: str) -> bool:
    try:
        psycopg.connect(conninfo).close()
    except psycopg.OperationalError:
        return False
    return True


def everything(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error) + str(error)


def test_no_password_is_shown_by_a_lock_that_works(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    db = with_password(server, SECRET)
    shown = []
    with (
        psycopg.connect(server.url, autocommit=True) as observer,
        pytest.raises(dblock.LockLost) as lost,
        lock(db, tenant="T1") as ours,
    ):
        shown += [repr(ours), str(ours), repr(vars(ours)["_hold"]), holder(observer)["application_name"]]
        with pytest.raises(dblock.LockTimeout) as late:
            lock(db, timeout=0.05).__enter__()
        with pytest.raises(dblock.UnsafeConnection) as unsafe:
            lock(db, database="elsewhere").acquire()
        with pytest.raises(dblock.AlreadyHeld) as twice:
            ours.acquire()
        terminate_holder(observer)
        wait_until(lambda: locks(observer) == [], "the lock to be gone")
    shown += [everything(caught.value) for caught in (lost, late, unsafe, twice)]
    assert caplog.records
    for text in (*shown, caplog.text):
        assert "s3cr3t" not in text


def test_no_password_is_shown_by_a_server_that_refuses_it(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    ours = lock(with_password(server, SECRET + "-not"))
    with pytest.raises(
        dblock.DatabaseError, match=r"cannot connect to the database: .*authentication failed"
    ) as caught:
        ours.acquire()
    assert repr(ours) == f"<dblock.Lock b@web-01 key {KEY.value}, not held>"
    assert "s3cr3t" not in everything(caught.value) + caplog.text


@pytest.mark.parametrize(
    "db",
    [
        f"postgresql://u:{SECRET}@127.0.0.1:1/d",
        f"postgresql+psycopg://u:{SECRET}@127.0.0.1:1/d",
        f"postgresql://127.0.0.1:1/d?password={SECRET}",
        f"host=127.0.0.1 port=1 password='{SECRET}'",
        f"host=127.0.0.1 port=1 password='{SECRET}",
        f"postgresql://u:{SECRET}%zz@127.0.0.1:1/d",
        f"postgresql://u:a@{SECRET}@127.0.0.1:1/d",
        f"postgresql://u:{SECRET}/a@127.0.0.1:1/d",
        f"postgresql://u:a/{SECRET}@127.0.0.1:1/d",
        f"postgresql://u:{SECRET}:a@127.0.0.1:1/d",
        f"postgresql://u:{SECRET}?a@127.0.0.1:1/d",
        f"postgresql://u:a?{SECRET}@127.0.0.1:1/d",
        f"postgresql://u:{SECRET}#a@127.0.0.1:1/d",
        f"mysql://u:{SECRET}@127.0.0.1:1/d",
    ],
)
def test_no_password_is_shown_by_a_mistake(db: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises((ValueError, dblock.DatabaseError)) as caught:
        lock(db).acquire()
    # The traceback quotes lines of this file, but no values.
    assert "s3cr3t" not in everything(caught.value) + caplog.text


# --- arguments --------------------------------------------------------------------------------------------------------


def test_names_are_keyword_only() -> None:
    for arguments in (("web-01", "b"), ("web-01",)):
        with pytest.raises(TypeError, match="positional argument"):
            dblock.lock(NOWHERE, *arguments)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="step"):
        dblock.lock(NOWHERE, target="web-01")  # type: ignore[call-arg]


@pytest.mark.parametrize("wrong", [{"target": ""}, {"step": "b "}, {"target": "x" * 256}, {"step": "\ud800"}])
def test_names_are_judged_when_the_lock_is_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} "):
        dblock.lock(NOWHERE, **{"target": "web-01", "step": "b", **wrong})


@pytest.mark.parametrize("argument", ["target", "step", "tenant", "database"])
@pytest.mark.parametrize("value", [7, b"T1"])
def test_names_and_labels_are_text(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{argument} must be a str"):
        dblock.lock(NOWHERE, **{"target": "web-01", "step": "b", argument: value})


BAD_TIMEOUTS = [
    (float("nan"), ValueError),
    (float("inf"), ValueError),
    (-1, ValueError),
    (-0.001, ValueError),
    (2147483.001, ValueError),
    (2147484, ValueError),
    (10**400, ValueError),
    (True, TypeError),
    (False, TypeError),
    ("5", TypeError),
    (5j, TypeError),
]


@pytest.mark.parametrize(("timeout", "error"), BAD_TIMEOUTS, ids=lambda each: repr(each)[:12])
def test_timeouts_out_of_their_limits(timeout: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^timeout must be "):
        lock(NOWHERE, timeout=timeout)
    with pytest.raises(error, match=r"^timeout must be "):
        lock(NOWHERE).acquire(timeout)  # before anything is opened


@pytest.mark.parametrize(
    ("timeout", "means"),
    [(None, None), (0, 0.0), (0.0, 0.0), (-0.0, 0.0), (1e-300, 0.001), (0.0001, 0.001), (0.5, 0.5), (2147483, 2147483)],
)
def test_timeouts_within_their_limits(url: str, timeout: float | None, means: float | None) -> None:
    assert check_timeout(timeout) == means
    with lock(url, timeout=timeout):
        pass
    ours = lock(url)
    assert ours.acquire(timeout)
    ours.release()


# --- processes: signals and forks -------------------------------------------------------------------------------------


@contextmanager
def python(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process with this program, and nothing left of it afterwards."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


INTERRUPTED = """
import signal, sys, dblock
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may have inherited another
lock = dblock.lock(sys.argv[1], target="web-01", step="b")
try:
    if sys.argv[2] == "acquire":
        lock.acquire()
    with lock:
        print("the body ran", flush=True)
except KeyboardInterrupt:
    print("interrupted", lock.held, lock.acquire(timeout=0), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("way", ["acquire", "with"])
def test_sigint_ends_a_wait_and_leaves_nothing(url: str, observer: Connection, way: str) -> None:
    with lock(url), python(INTERRUPTED, url, way) as process:
        wait_until(lambda: waiting(observer) == 1, "the waiter in the queue")
        process.send_signal(signal.SIGINT)
        assert line(process) == "interrupted False False"
        assert locks(observer) == HELD  # while the process that was interrupted lives on
        assert process.poll() is None


FORKED = """
import gc, os, sys, dblock
lock = dblock.lock(sys.argv[1], target="web-01", step="b")
lock.acquire()
if os.fork() == 0:
    said = [str(lock.held)]
    for attempt in (lock.release, lock.acquire):
        try:
            attempt()
        except dblock.Error as error:
            said.append(type(error).__name__)
    print("child:", *said, flush=True)
    del lock
    gc.collect()
    sys.exit()  # in the ordinary way, with all that the interpreter cleans up then
_, status = os.wait()
print("parent:", status, lock.held, flush=True)
sys.stdin.readline()
lock.release()
print("released", lock.held, flush=True)
"""


def test_a_forked_child_neither_has_nor_ends_its_parents_lock(url: str, observer: Connection) -> None:
    with python(FORKED, url) as process:
        assert line(process) == "child: False LockNotHeld AlreadyHeld"
        assert line(process) == "parent: 0 True"
        assert locks(observer) == HELD
        assert process.stdin is not None
        print(file=process.stdin, flush=True)
        assert line(process) == "released False"
        assert locks(observer) == []


def test_a_forked_child_can_take_a_lock_of_its_own(url: str, observer: Connection) -> None:
    code = FORKED.replace(
        "for attempt in", "lock = dblock.lock(sys.argv[1], target='web-02', step='b')\n    for attempt in"
    )
    with python(code, url) as process:
        assert line(process) == "child: False LockNotHeld"
        assert line(process) == "parent: 0 True"
        wait_until(lambda: locks(observer) == HELD, "the child's lock to be gone with it")


# --- what it costs ----------------------------------------------------------------------------------------------------


def messages(server: Server, pid: int) -> int:
    """How many messages the server has had from a session: it logs each, before it runs it."""
    return len(re.findall(rf" \[{pid}\] LOG:  ", server.log))


def test_an_uncontended_lock_costs_two_round_trips(server: Server) -> None:
    session = connect(server.url)
    try:
        advisory_lock = session.lock(Wish(KEY, "web-01", "b", "T1"))
        ((pid,),) = session.rows("SELECT pg_backend_pid()")
        before = messages(server, pid)
        granted = session.run(advisory_lock.acquire(Conditions(), 600, print))
        assert isinstance(granted, Granted)
        assert messages(server, pid) == before + 1
        assert session.run(advisory_lock.release(granted)) is True
        assert messages(server, pid) == before + 2
        assert before == 1
    finally:
        session.close()


@pytest.mark.parametrize("timeout", [None, 0, 600])
def test_a_connection_of_its_own_costs_no_round_trip_more(server: Server, timeout: float | None) -> None:
    with psycopg.connect(server.url, autocommit=True) as observer:
        with lock(server.url, tenant="T1", timeout=timeout) as ours:
            pid = holder(observer)["pid"]
            assert ours.held  # asks the socket, not the server
            assert messages(server, pid) == 1
        assert messages(server, pid) == 2
        wait_until(lambda: not sessions(observer, pid), "the connection to be closed")
        assert messages(server, pid) == 2
