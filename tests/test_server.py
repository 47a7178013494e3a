"""What dblock relies upon about PostgreSQL and psycopg, each behaviour on its own: if one changes, it is seen here."""

from __future__ import annotations

import os
import re
import selectors
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from random import Random
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql
from psycopg.conninfo import make_conninfo

from dblock.demo.server import postgres_server
from dblock.driver_psycopg import PsycopgSession
from dblock.errors import AlreadyHeld, UnsafeConnection
from dblock.names import Key
from dblock.postgres import LockNames
from dblock.protocol import Conditions, Wish
from tests.doors import literal
from tests.support import wait_until

Connection = psycopg.Connection[Any]
Connect = Callable[..., Connection]
Rows = list[tuple[Any, ...]]

PLAIN = "dblock_server_plain"  # a role without any rights
PASSWORD = "opens-nothing"  # noqa: S105 - of a role that lives as long as one test
HIGH, LOW = -3, 7
K = (HIGH << 32) | LOW


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    connections: list[Connection] = []

    def open_one(**settings: Any) -> Connection:
        connection = psycopg.connect(make_conninfo(url, **settings), autocommit=True, prepare_threshold=None)
        connections.append(connection)
        return connection

    yield open_one
    for connection in connections:
        connection.close()


@pytest.fixture
def session(connect: Connect) -> Connection:
    return connect()


@pytest.fixture
def other(connect: Connect) -> Connection:
    return connect()


@pytest.fixture
def plain(connect: Connect, other: Connection) -> Iterator[Connection]:
    """A session of a role that may log in and has no other rights."""
    other.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(PLAIN), sql.Literal(PASSWORD)))
    connection = connect(user=PLAIN, password=PASSWORD)
    yield connection
    connection.close()
    other.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(PLAIN)))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as executor:
        yield executor


def send(connection: Connection, message: str) -> Rows:
    """Send one message as dblock does, and return the rows of its last statement."""
    cursor = connection.execute(message.encode(), prepare=False)
    while cursor.nextset():
        pass
    return cursor.fetchall() if cursor.description else []


def value(connection: Connection, message: str) -> Any:
    ((result,),) = send(connection, message)
    return result


def locks(connection: Connection, pid: int | None = None) -> Rows:
    """The advisory locks that are held, of one session or of all."""
    return connection.execute(
        "SELECT classid::bigint, objid::bigint, objsubid::int, mode FROM pg_locks"
        " WHERE locktype = 'advisory' AND granted AND pid = COALESCE(%s, pid) ORDER BY 1, 3, 2, 4",
        (pid,),
    ).fetchall()


def waits(observer: Connection, waiter: Connection) -> bool:
    return bool(observer.execute(
        "SELECT FROM pg_locks WHERE NOT granted AND pid = %s", (waiter.info.backend_pid,)
    ).fetchall())  # fmt: skip


def activity(observer: Connection, pid: int, column: str) -> Any:
    rows = send(observer, f"SELECT {column} FROM pg_stat_activity WHERE pid = {pid}")
    return rows[0][0] if rows else None


def sqlstate_of(connection: Connection, message: str) -> str | None:
    with pytest.raises(psycopg.Error) as caught:
        send(connection, message)
    return caught.value.sqlstate


LOCK_OF_K = [(0xFFFFFFFD, LOW, 1, "ExclusiveLock")]


# --- keys in pg_locks -------------------------------------------------------------------------------------------------


KEYS = [0, 1, -1, 2**31, -(2**31), 2**32 - 1, 2**32, -(2**32), 2**63 - 1, -(2**63), K, 3736245238665493732]


@pytest.mark.parametrize("key", KEYS)
def test_a_bigint_key_in_pg_locks_and_back(session: Connection, key: int) -> None:
    """Written into the statement as it is, negative ones and the extremes of both types too."""
    send(session, f"SELECT pg_advisory_lock({key})")
    assert locks(session) == [(*Key(key).postgres, "ExclusiveLock")]
    assert value(session, "SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks WHERE objsubid = 1") == key
    assert value(session, f"SELECT pg_advisory_unlock({key})") is True


@pytest.mark.parametrize("key", KEYS)
def test_the_high_half_as_a_signed_integer(session: Connection, key: int) -> None:
    """Python and acquire.sql shift alike, so their queues are one; and the extremes are still an int4."""
    names = LockNames(key, (), None, False, "", "")
    assert value(session, f"SELECT ('{key}'::bigint >> 32)::integer") == names.high
    send(session, f"SELECT pg_advisory_lock_shared({names.high}, 0)")
    assert locks(session) == [(names.classid, 0, 2, "ShareLock")]


@pytest.mark.parametrize(("number", "objid"), [(0, 0), (1, 1), (2147483647, 2147483647), (-1, 4294967295)])
def test_two_integers_in_pg_locks_and_back(session: Connection, number: int, objid: int) -> None:
    send(session, f"SELECT pg_advisory_lock({HIGH}, {number})")
    assert locks(session) == [(0xFFFFFFFD, objid, 2, "ExclusiveLock")]
    if number >= 0:  # only the gate is negative, and it never outlasts its message
        send(session, f"SELECT pg_advisory_unlock({HIGH}, objid::bigint::int) FROM pg_locks WHERE objsubid = 2")
        assert locks(session) == []


def test_the_two_forms_exclude_nobody_from_each_other(session: Connection, other: Connection) -> None:
    send(session, f"SELECT pg_advisory_lock({K})")
    assert value(other, f"SELECT pg_try_advisory_lock({HIGH}, {LOW})") is True


def test_locks_of_another_database_are_others(session: Connection, other: Connection, connect: Connect) -> None:
    send(session, "CREATE DATABASE dblock_elsewhere")
    try:
        elsewhere = connect(dbname="dblock_elsewhere")
        send(elsewhere, f"SELECT pg_advisory_lock({K})")
        assert value(session, f"SELECT pg_try_advisory_lock({K})") is True
        here = "(SELECT oid FROM pg_database WHERE datname = current_database())"
        found = f"SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND database = {here}"
        assert send(other, found) == [(session.info.backend_pid,)]
        assert send(elsewhere, found) == [(elsewhere.info.backend_pid,)]
        elsewhere.close()
    finally:
        send(session, "DROP DATABASE dblock_elsewhere WITH (FORCE)")


def test_a_waiting_request_is_shown_apart(session: Connection, other: Connection, pool: ThreadPoolExecutor) -> None:
    send(session, f"SELECT pg_advisory_lock({K})")
    waiter = pool.submit(send, other, f"SELECT pg_advisory_lock_shared({K})")
    wait_until(lambda: waits(session, other), "the waiter")
    assert session.execute(
        "SELECT pid, mode, granted, waitstart IS NULL FROM pg_locks WHERE locktype = 'advisory' ORDER BY granted"
    ).fetchall() == [
        (other.info.backend_pid, "ShareLock", False, False),
        (session.info.backend_pid, "ExclusiveLock", True, True),
    ]
    send(session, f"SELECT pg_advisory_unlock({K})")
    waiter.result()


def test_the_key_in_sql_is_the_key_in_python(session: Connection) -> None:
    random = Random(1)
    preimages = ["web-01\x1fb", *("".join(random.choices("abc \x1f'\\ßΩ日🙂", k=24)) for _ in range(200))]
    rows = session.execute(
        "SELECT ('x' || encode(substr(sha256(convert_to(p, 'UTF8')), 1, 8), 'hex'))::bit(64)::bigint"
        " FROM unnest(%s::text[]) WITH ORDINALITY AS given(p, place) ORDER BY place",
        (preimages,),
    ).fetchall()
    expected = [int.from_bytes(sha256(p.encode()).digest()[:8], "big", signed=True) for p in preimages]
    assert [key for (key,) in rows] == expected
    assert min(expected) < 0 < max(expected)


# --- one message, one transaction ---------------------------------------------------------------------------------


def test_set_local_and_transaction_locks_last_exactly_one_message(session: Connection, other: Connection) -> None:
    warnings: list[str | None] = []
    session.add_notice_handler(lambda notice: warnings.append(notice.sqlstate))
    pid = session.info.backend_pid
    assert send(session, f"""
        SET LOCAL lock_timeout = '123ms';
        SELECT pg_advisory_xact_lock({K});
        SELECT current_setting('lock_timeout'), count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = {pid}
    """) == [("123ms", 1)]  # fmt: skip
    assert value(session, "SHOW lock_timeout") == "0"
    assert locks(other) == []
    assert session.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert warnings == []
    send(session, "SET LOCAL lock_timeout = '123ms'")  # alone it does nothing, and says so
    assert warnings == ["25P01"]


def test_a_failed_message_takes_back_settings_and_transaction_locks(session: Connection, other: Connection) -> None:
    """But neither takes nor gives back a session's lock: after any error dblock asks pg_locks what is held."""
    send(session, "SET application_name = 'before'; SET idle_session_timeout = '1h'")
    send(session, f"SELECT pg_advisory_lock({K}), pg_advisory_lock_shared({HIGH}, 0)")
    assert sqlstate_of(session, f"""
        SET idle_session_timeout = '5s';
        SELECT set_config('application_name', 'after', false);
        SELECT pg_advisory_xact_lock({HIGH}, -1), pg_advisory_lock({HIGH}, 1), pg_advisory_unlock({K});
        SELECT 1 / 0
    """) == "22012"  # fmt: skip
    assert value(session, "SHOW application_name") == "before"
    assert activity(other, session.info.backend_pid, "application_name") == "before"
    assert value(session, "SHOW idle_session_timeout") == "1h"
    assert locks(other) == [(0xFFFFFFFD, 0, 2, "ShareLock"), (0xFFFFFFFD, 1, 2, "ExclusiveLock")]


def test_a_session_lock_survives_rollback_and_its_unlock_too(session: Connection, other: Connection) -> None:
    send(session, "BEGIN")
    send(session, f"SELECT pg_advisory_lock({K})")
    send(session, "ROLLBACK")
    assert locks(other) == LOCK_OF_K
    send(session, "BEGIN")
    send(session, f"SELECT pg_advisory_unlock({K})")
    assert locks(other) == []
    send(session, "ROLLBACK")
    assert locks(other) == []


@pytest.mark.parametrize("shared", ["", "_shared"])
def test_a_sessions_lock_can_be_handed_to_the_transaction(session: Connection, other: Connection, shared: str) -> None:
    """Without a gap and without a wait, also for one who queues in the server; then it ends with the transaction."""
    send(session, f"SELECT pg_advisory_lock{shared}({K})")
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(send, other, f"SELECT pg_advisory_lock({K})")
        wait_until(lambda: waits(session, other), "the one who queues")
        send(session, "BEGIN")
        send(session, "SET LOCAL lock_timeout = '1ms'")
        send(session, f"SELECT pg_advisory_xact_lock{shared}({K})")
        assert value(session, f"SELECT pg_advisory_unlock{shared}({K})") is True
        send(session, "SAVEPOINT later")
        send(session, "ROLLBACK TO later")
        assert waits(session, other)
        send(session, "COMMIT")
        waiter.result()


def test_names_of_sessions_are_read_once_in_a_transaction(session: Connection, other: Connection) -> None:
    seen = f"SELECT application_name FROM pg_stat_activity WHERE pid = {other.info.backend_pid}"
    send(session, "BEGIN")
    before = value(session, seen)
    send(other, "SET application_name = 'another'")
    assert value(session, seen) == before
    send(session, "SELECT pg_stat_clear_snapshot()")
    assert value(session, seen) == "another"


def test_pg_locks_shows_what_happened_while_the_message_waited(
    session: Connection, other: Connection, pool: ThreadPoolExecutor
) -> None:
    """pg_locks shows this moment, not the statement's snapshot: whoever comes through the gate sees every ticket."""
    send(session, f"SELECT pg_advisory_lock({HIGH}, -1)")
    joiner: Future[Rows] = pool.submit(send, other, f"""
        SELECT pg_advisory_xact_lock({HIGH}, -1);
        SELECT objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND objid < 2147483648
    """)  # fmt: skip
    wait_until(lambda: waits(session, other), "the joiner at the gate")
    send(session, f"SELECT pg_advisory_lock({HIGH}, 41)")
    send(session, f"SELECT pg_advisory_unlock({HIGH}, -1)")
    assert joiner.result() == [(41,)]


def test_a_materialized_cte_takes_locks_that_nobody_reads(session: Connection) -> None:
    message = (
        f"WITH m AS {{}} (SELECT 1 AS n, pg_advisory_lock({HIGH}, 1)::text, pg_advisory_lock_shared({HIGH}, 0)::text)"
    )
    assert value(session, message.format("MATERIALIZED") + " SELECT n FROM m") == 1
    assert locks(session) == [(0xFFFFFFFD, 0, 2, "ShareLock"), (0xFFFFFFFD, 1, 2, "ExclusiveLock")]


def test_case_takes_only_what_it_decided_for(session: Connection, other: Connection) -> None:
    attempt = f"SELECT CASE WHEN pg_try_advisory_xact_lock({HIGH}, 0) THEN pg_try_advisory_lock({K}) ELSE false END"
    send(other, f"SELECT pg_advisory_lock_shared({HIGH}, 0)")
    assert value(session, attempt) is False
    assert locks(session, session.info.backend_pid) == []
    send(other, f"SELECT pg_advisory_unlock_shared({HIGH}, 0)")
    assert value(session, attempt) is True
    assert locks(session) == LOCK_OF_K  # (high, 0) was taken for the message only


# --- waiting ----------------------------------------------------------------------------------------------------------


CAUGHT = f"""
    SET LOCAL lock_timeout = '1ms';
    DO $$BEGIN PERFORM pg_advisory_xact_lock({K}); EXCEPTION WHEN lock_not_available THEN NULL; END$$;
    SELECT pg_try_advisory_lock({K})
"""


def test_a_wait_that_ends_in_time_takes_nothing(session: Connection, other: Connection) -> None:
    send(other, f"SELECT pg_advisory_lock({K})")
    assert value(session, CAUGHT) is False
    assert locks(other, session.info.backend_pid) == []
    assert sqlstate_of(session, f"SET LOCAL lock_timeout = '1ms'; SELECT pg_advisory_xact_lock({K})") == "55P03"
    assert locks(other, session.info.backend_pid) == []


def test_a_try_after_the_transactions_lock_keeps_it_for_the_session(session: Connection, other: Connection) -> None:
    """An error does not mean "not held" where a session's lock was waited for; so only a transaction's ever is."""
    assert value(session, CAUGHT) is True
    assert locks(other) == LOCK_OF_K
    assert value(session, f"SELECT pg_advisory_unlock({K})") is True
    assert locks(other) == []  # taken twice in the message, held once after it
    for level, left in (("", LOCK_OF_K), ("xact_", [])):
        # A cancel that meets the grant is an error after it.
        assert sqlstate_of(session, f"SELECT pg_advisory_{level}lock({K}); SELECT 1 / 0") == "22012"
        assert locks(other) == left
        send(session, "SELECT pg_advisory_unlock_all()")


def test_a_wait_that_is_caught_writes_nothing_into_the_servers_log() -> None:
    with postgres_server() as server, psycopg.connect(server.url, autocommit=True) as holder:
        send(holder, f"SELECT pg_advisory_lock({K})")
        with psycopg.connect(server.url, autocommit=True) as waiter:
            before = server.log
            assert value(waiter, CAUGHT) is False
            # The log is written before the reply: what had to come is there.
            assert server.log == before
            assert sqlstate_of(waiter, f"SET LOCAL lock_timeout = '1ms'; SELECT pg_advisory_xact_lock({K})") == "55P03"
            lines = server.log.removeprefix(before).splitlines()
            assert [line.partition("] ")[2].partition(":")[0] for line in lines[:2]] == ["ERROR", "STATEMENT"]


def test_a_try_for_all_fails_at_once_while_somebody_shares(
    session: Connection, other: Connection, connect: Connect
) -> None:
    holder, newcomer = session, connect()
    send(holder, f"SELECT pg_advisory_lock_shared({HIGH}, 0)")
    assert value(newcomer, f"SELECT pg_try_advisory_xact_lock({HIGH}, 0)") is False
    assert value(other, f"SELECT pg_try_advisory_lock_shared({HIGH}, 0)") is True  # as many as like
    assert value(other, f"SELECT pg_advisory_unlock({HIGH}, 0)") is False  # exclusive and shared are given back apart
    send(holder, "SELECT pg_advisory_unlock_all()")
    assert value(newcomer, f"SELECT pg_try_advisory_xact_lock({HIGH}, 0)") is False
    assert value(other, f"SELECT pg_advisory_unlock_shared({HIGH}, 0)") is True
    assert value(newcomer, f"SELECT pg_try_advisory_xact_lock({HIGH}, 0)") is True


def test_a_try_overtakes_nobody_who_waits_within_the_server(
    session: Connection, other: Connection, connect: Connect, pool: ThreadPoolExecutor
) -> None:
    """So the head of the queue, once it waits for the lock itself, is served before any newcomer."""
    holder, newcomer = connect(), connect()
    send(holder, f"SELECT pg_advisory_lock({K})")
    head = pool.submit(send, session, f"SELECT pg_advisory_lock({K})")
    wait_until(lambda: waits(other, session), "the head")
    tries: list[bool] = []

    def hammer() -> None:
        while not head.done():
            tries.append(value(newcomer, f"SELECT pg_try_advisory_lock({K})"))

    hammering = pool.submit(hammer)
    wait_until(lambda: len(tries) > 10, "the newcomer to try on and on")
    send(holder, f"SELECT pg_advisory_unlock({K})")
    head.result()
    hammering.result()
    assert not any(tries)


def test_no_timeout_is_no_limit(session: Connection, other: Connection, pool: ThreadPoolExecutor) -> None:
    """0 means without limit to the server; so dblock never sends it where it means a slice."""
    send(other, f"SELECT pg_advisory_lock({K})")
    waiter = pool.submit(send, session, f"SET LOCAL lock_timeout = '0ms'; SELECT pg_advisory_xact_lock({K})")
    waited = (
        f"clock_timestamp() - waitstart > '100ms' FROM pg_locks WHERE NOT granted AND pid = {session.info.backend_pid}"
    )
    wait_until(lambda: send(other, f"SELECT {waited}") == [(True,)], "a wait that is long beside a millisecond")
    assert not waiter.done()
    send(other, f"SELECT pg_advisory_unlock({K})")
    waiter.result()


def test_a_snapshot_lasts_as_long_as_the_message(
    session: Connection, other: Connection, pool: ThreadPoolExecutor
) -> None:
    """While it waits a session hinders vacuum; between its slices, and while it is idle with a lock, it does not."""
    pid = session.info.backend_pid
    send(session, f"SELECT pg_advisory_lock_shared({HIGH}, 0)")
    wait_until(lambda: bool(activity(other, pid, "state") == "idle"), "the session to be idle")
    assert activity(other, pid, "backend_xmin") is None
    assert activity(other, pid, "xact_start") is None
    send(other, f"SELECT pg_advisory_lock({K})")
    slices = pool.submit(send, session, CAUGHT.replace("1ms", "1h"))
    wait_until(lambda: waits(other, session), "the waiter")
    assert activity(other, pid, "backend_xmin") is not None
    send(other, f"SELECT pg_advisory_unlock({K})")
    slices.result()
    wait_until(lambda: bool(activity(other, pid, "state") == "idle"), "the session to be idle again")
    assert activity(other, pid, "backend_xmin") is None


@pytest.mark.parametrize(
    ("setting", "seconds"), [("1", 0.001), ("1s", 1.0), ("1500ms", 1.5), ("1min", 60.0), ("2h", 7200.0)]
)
def test_deadlock_timeout_in_seconds(session: Connection, setting: str, seconds: float) -> None:
    send(session, f"SET deadlock_timeout = '{setting}'")
    asked = "SELECT extract(epoch FROM current_setting('deadlock_timeout')::interval)::float8"
    assert value(session, asked) == seconds


@pytest.mark.parametrize(("deadlock_timeout", "ends_with"), [("1min", "55P03"), ("10ms", "40P01")])
def test_only_a_wait_longer_than_deadlock_timeout_is_a_deadlock(
    session: Connection, other: Connection, pool: ThreadPoolExecutor, deadlock_timeout: str, ends_with: str
) -> None:
    """So slices below it never kill the innocent, and never find a real one either."""
    send(other, f"SET deadlock_timeout = '1h'; SELECT pg_advisory_lock({K})")
    send(session, f"SET deadlock_timeout = '{deadlock_timeout}'; SELECT pg_advisory_lock({HIGH}, 1)")
    cycle = pool.submit(send, other, f"SELECT pg_advisory_lock({HIGH}, 1)")
    wait_until(lambda: bool(session.execute("SELECT FROM pg_locks WHERE NOT granted").fetchall()), "the other's wait")
    assert sqlstate_of(session, f"SET LOCAL lock_timeout = '300ms'; SELECT pg_advisory_xact_lock({K})") == ends_with
    assert value(session, f"SELECT pg_advisory_unlock({HIGH}, 1)") is True  # the victim keeps its other locks
    cycle.result()


# --- the label --------------------------------------------------------------------------------------------------------


def test_a_label_is_seen_by_everybody_at_once(
    session: Connection, other: Connection, plain: Connection, pool: ThreadPoolExecutor
) -> None:
    """While the message that sets it still waits, and by a role that may see neither host nor statement."""
    pid = session.info.backend_pid
    send(other, f"SELECT pg_advisory_lock({K})")
    label = "dblock1 w1700000000 T%C3%9F web-01 b"
    set_label = f"SELECT set_config('application_name', '{label}', false)"
    waiter = pool.submit(send, session, f"{set_label}; SELECT pg_advisory_xact_lock({K})")
    wait_until(lambda: waits(other, session), "the waiter")
    shown = f"SELECT pid, application_name, usename IS NOT NULL, client_addr FROM pg_stat_activity WHERE pid = {pid}"
    assert send(plain, shown) == [(pid, label, True, None)]
    assert len(locks(plain)) == 1
    assert send(plain, "SELECT pid FROM pg_locks WHERE NOT granted") == [(pid,)]
    send(other, f"SELECT pg_advisory_unlock({K})")
    waiter.result()
    assert activity(plain, pid, "application_name") == label


def test_a_label_has_63_bytes(session: Connection, other: Connection) -> None:
    send(session, f"SELECT set_config('application_name', '{'x' * 63}yz', false)")
    assert activity(other, session.info.backend_pid, "application_name") == "x" * 63
    send(session, "SELECT set_config('application_name', 'wéb', false)")
    assert activity(other, session.info.backend_pid, "application_name") != "wéb"


@pytest.mark.parametrize("conforming", ["on", "off"])
def test_quoted_texts_mean_the_same(session: Connection, conforming: str) -> None:
    send(session, f"SET standard_conforming_strings = {conforming}; SET backslash_quote = off")
    for text in ("", "plain", "O'Brien", "\\", "\\'", "a\\b\\\\'';--", "%s %% %C3", "ß🙂\n\t"):
        assert value(session, f"SELECT {literal(text)}") == text


# --- the session ------------------------------------------------------------------------------------------------------


def test_what_a_session_needs_any_role_may_set(plain: Connection) -> None:
    session = PsycopgSession(plain)
    lock = session.lock(Wish(Key(K), "web-01", "b", None))
    session.run(lock.open(Conditions()))
    # Set for the session, though the message sets search_path for itself before.
    assert value(plain, "SHOW search_path") == "pg_catalog, pg_temp"
    for name in ("statement_timeout", "lock_timeout", "idle_session_timeout"):
        assert value(plain, f"SHOW {name}") == "0"
    known = value(plain, "SELECT count(*) FROM pg_settings WHERE name = 'transaction_timeout'")
    assert known == (plain.info.server_version >= 170000)
    send(plain, f"SELECT pg_advisory_lock({K})")
    with pytest.raises(AlreadyHeld):
        session.run(lock.open(Conditions()))
    send(plain, "SET default_transaction_read_only = on")
    assert value(plain, f"SELECT pg_advisory_unlock({K}) AND pg_try_advisory_lock({K})") is True  # works there as well
    with pytest.raises(UnsafeConnection, match="read-only"):
        session.run(lock.open(Conditions()))


def test_the_drivers_numbers_are_the_servers(session: Connection) -> None:
    assert session.info.backend_pid == value(session, "SELECT pg_backend_pid()")
    assert session.info.server_version == int(value(session, "SHOW server_version_num"))


def test_idle_session_timeout_ends_an_idle_session_but_no_wait(plain: Connection, other: Connection) -> None:
    send(plain, f"SELECT pg_advisory_lock_shared({HIGH}, 0)")
    # A statement may take longer than the timeout: idle means that the server waits for the client.
    send(plain, "SET idle_session_timeout = '50ms'; SELECT pg_sleep(0.2)")
    wait_until(lambda: locks(other) == [], "the idle session to be ended")
    assert sqlstate_of(plain, "SELECT 1") == "57P05"


def test_the_socket_is_readable_when_the_session_was_ended(session: Connection, other: Connection) -> None:
    """The driver does not know it yet: `Connection.closed` is no answer to whether the lock is still held."""
    with selectors.DefaultSelector() as selector:
        selector.register(session, selectors.EVENT_READ)
        send(session, f"SELECT pg_advisory_lock({K})")
        assert selector.select(timeout=0) == []
        other.execute("SELECT pg_terminate_backend(%s)", (session.info.backend_pid,))
        assert selector.select(timeout=60)
    assert not session.closed
    wait_until(lambda: locks(other) == [], "the lock to be given back")
    assert sqlstate_of(session, "SELECT 1") == "57P01"
    assert session.closed


@pytest.mark.parametrize("crash", [False, True], ids=["closed", "cut off"])
def test_a_lock_ends_with_its_connection(session: Connection, other: Connection, crash: bool) -> None:
    send(session, f"SELECT pg_advisory_lock({K})")
    assert locks(other) == LOCK_OF_K
    if crash:  # what the server sees of a process that dies: the end of the stream, without a word
        with socket.socket(fileno=os.dup(session.fileno())) as wire:
            wire.shutdown(socket.SHUT_RDWR)
    else:
        session.close()
    wait_until(lambda: locks(other) == [], "the lock to be given back")


def test_a_session_may_end_itself_within_an_error_that_is_still_reported(plain: Connection, other: Connection) -> None:
    send(plain, f"SELECT pg_advisory_lock({K})")
    assert sqlstate_of(plain, """
        DO $$BEGIN
            RAISE EXCEPTION 'why' USING ERRCODE = '55P03',
                HINT = CASE WHEN pg_terminate_backend(pg_backend_pid()) THEN 'the session is ended' END;
        END$$
    """) == "55P03"  # fmt: skip
    # With 57P01, unless the driver has read that word together with the error before.
    with pytest.raises(psycopg.OperationalError):
        send(plain, "SELECT 1")
    wait_until(lambda: locks(other) == [], "the lock to be given back")


def test_a_prepared_transactions_lock_has_no_pid(session: Connection, other: Connection) -> None:
    send(session, "BEGIN")
    send(session, f"SELECT pg_advisory_xact_lock({K})")
    send(session, "PREPARE TRANSACTION 'dblock'")
    try:
        assert send(other, "SELECT pid, granted FROM pg_locks WHERE locktype = 'advisory'") == [(None, True)]
        # What names it: the lock on its transaction id, which has the same virtual transaction.
        assert value(other, """
            SELECT p.gid FROM pg_prepared_xacts AS p
            JOIN pg_locks AS x ON x.transactionid = p.transaction AND x.pid IS NULL
            JOIN pg_locks AS l ON l.virtualtransaction = x.virtualtransaction AND l.locktype = 'advisory'
        """) == "dblock"  # fmt: skip
    finally:
        send(session, "ROLLBACK PREPARED 'dblock'")
    assert locks(other) == []


def test_an_unlock_of_what_is_not_held_is_false_and_no_error(session: Connection, other: Connection) -> None:
    warnings: list[str | None] = []
    session.add_notice_handler(lambda notice: warnings.append(notice.sqlstate))
    send(other, f"SELECT pg_advisory_lock({K})")
    assert value(session, f"SELECT pg_advisory_unlock({K})") is False
    assert warnings == ["01000"]
    assert locks(other) == LOCK_OF_K


# --- DO blocks, of which the scripts are made -------------------------------------------------------------------------


REFUSALS = """
    DO $$
    DECLARE here text; nested text;
    BEGIN
        BEGIN COMMIT; EXCEPTION WHEN invalid_transaction_termination THEN here := SQLERRM; END;
        BEGIN
            EXECUTE 'DO $nested$ BEGIN COMMIT; END $nested$';
        EXCEPTION WHEN invalid_transaction_termination THEN nested := SQLERRM;
        END;
        PERFORM set_config('dblock_test.alike', (here = nested)::text, false);
    END $$
"""


def test_refused_commits_tell_whether_a_do_block_is_in_a_transaction(session: Connection) -> None:
    def alike() -> object:
        return value(session, "SELECT current_setting('dblock_test.alike')::boolean")

    send(session, REFUSALS)
    assert alike() is False
    send(session, f"{REFUSALS}; SELECT 1")
    assert alike() is True
    send(session, "BEGIN")
    send(session, REFUSALS)
    assert alike() is True
    send(session, "COMMIT")


def test_a_do_block_commits_and_with_it_gives_up_snapshot_and_transaction_locks(
    session: Connection, other: Connection, pool: ThreadPoolExecutor
) -> None:
    """Settings and session locks stay; a block of statements that failed has given its transaction locks back."""
    send(other, f"SELECT pg_advisory_lock({K})")
    # Stands at the lock in each of its two transactions.
    block = pool.submit(send, session, f"""
        DO $$
        BEGIN
            PERFORM set_config('application_name', 'committed', false), set_config('lock_timeout', '1h', true);
            BEGIN
                PERFORM pg_advisory_xact_lock({HIGH}, 1), pg_advisory_lock({HIGH}, 2);
                RAISE EXCEPTION USING ERRCODE = 'lock_not_available';
            EXCEPTION WHEN lock_not_available THEN NULL;
            END;
            PERFORM pg_advisory_xact_lock({HIGH}, 3), pg_advisory_lock({HIGH}, 4), pg_advisory_xact_lock({K});
            COMMIT;
            PERFORM set_config('dblock_test.timeout', current_setting('lock_timeout'), false);
            PERFORM pg_advisory_xact_lock({HIGH}, 5);
        END $$
    """)  # fmt: skip
    pid = session.info.backend_pid

    def tickets() -> list[int]:
        return [objid for _, objid, objsubid, _ in locks(other, pid) if objsubid == 2]

    wait_until(lambda: waits(other, session), "the first wait")
    assert tickets() == [2, 3, 4]
    first_xmin = activity(other, pid, "backend_xmin::text::bigint")
    assert first_xmin is not None
    moved_on = value(other, "SELECT pg_current_xact_id()::text::bigint")
    # Between one wait and the next nothing is left of the first.
    send(other, f"SELECT pg_advisory_lock({HIGH}, 5)")
    send(other, f"SELECT pg_advisory_unlock({K})")
    wait_until(lambda: waits(other, session) and tickets() == [2, 4], "the second wait, without the first's locks")
    assert activity(other, pid, "backend_xmin::text::bigint") > moved_on >= first_xmin
    send(other, f"SELECT pg_advisory_unlock({HIGH}, 5)")
    block.result()
    assert value(session, "SHOW application_name") == "committed"
    assert value(session, "SELECT current_setting('dblock_test.timeout')") == "0"


def test_statement_timeout_comes_once_in_a_do_block(session: Connection) -> None:
    """Caught there, it does not come again, also after a COMMIT: acquire.sql waits on, by its own clock."""
    send(session, "SET statement_timeout = '50ms'")
    send(session, """
        DO $$
        DECLARE cancelled integer := 0;
        BEGIN
            FOR i IN 1..3 LOOP
                BEGIN
                    PERFORM pg_sleep(0.15);
                EXCEPTION WHEN query_canceled THEN
                    cancelled := cancelled + 1;
                END;
                COMMIT;
            END LOOP;
            PERFORM set_config('dblock_test.cancelled', cancelled::text, false);
        END $$
    """)  # fmt: skip
    assert value(session, "SELECT current_setting('dblock_test.cancelled')") == "1"


# --- psycopg ----------------------------------------------------------------------------------------------------------


def test_only_without_parameters_a_message_has_several_statements(session: Connection) -> None:
    assert send(session, "SELECT 1; SELECT 2 WHERE false; SELECT '50 % of %s'") == [("50 % of %s",)]
    with pytest.raises(errors.SyntaxError, match=re.escape("cannot insert multiple commands")):
        session.execute("SELECT %s; SELECT 2", (1,))


def test_an_error_in_any_statement_of_a_message_is_raised(session: Connection) -> None:
    for message in ("SELECT 1 / 0; SELECT 1", "SELECT 1; SELECT 1 / 0", "SELECT 1; SELECT 1 / 0; SELECT 2"):
        assert sqlstate_of(session, message) == "22012"
    assert send(session, "SELECT 1") == [(1,)]


def test_an_error_without_a_server_has_no_sqlstate() -> None:
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect("postgresql://somebody@127.0.0.1:1/nothing")
    assert caught.value.sqlstate is None
