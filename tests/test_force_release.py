"""force_release.sql: it ends the session that was confirmed, only while it holds that very lock, and nothing else."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

import dblock
from tests import hostile
from tests.doors import PSQL, SQL, Wish
from tests.support import wait_until

FORCE_RELEASE = (SQL / "force_release.sql").read_text()
KEY = dblock.key("web-01", "b").value

Row = dict[str, Any]
Connection = psycopg.Connection[Row]
Connect = Callable[..., Connection]


@pytest.fixture(scope="module")
def here(url: str) -> Iterator[str]:
    """A database of its own, in which nobody else holds anything."""
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("CREATE DATABASE dblock_force")
        yield make_conninfo(url, dbname="dblock_force")
        admin.execute("DROP DATABASE dblock_force WITH (FORCE)")


@pytest.fixture
def connect(here: str) -> Iterator[Connect]:
    """Open connections that are closed after the test, and their locks gone before the next one."""
    connections = []

    def open_one(**settings: str) -> Connection:
        connection = psycopg.connect(here, autocommit=True, row_factory=dict_row, **settings)  # type: ignore[arg-type]  # conninfo
        connections.append(connection)
        return connection

    yield open_one
    for connection in connections:
        connection.close()
    with psycopg.connect(here, autocommit=True) as observer:
        wait_until(lambda: not holders(observer), "all locks of the test gone")


@pytest.fixture
def dba(connect: Connect) -> Connection:
    return connect()


@contextmanager
def role(dba: Connection, name: str, *, member_of: str | None = None) -> Iterator[str]:
    dba.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    try:
        if member_of:
            dba.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(member_of), sql.Identifier(name)))
        yield name
    finally:
        dba.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def force_release(connection: psycopg.Connection[Any], **settings: object) -> list[Row]:
    """Set the wishes and run the script as any driver does. A wish that is not given is absent, except those kept."""
    for name, value in settings.items():
        connection.execute("SELECT set_config(%s, %s, false)", (f"dblock.{name}", str(value)))
    return connection.execute(FORCE_RELEASE.encode()).fetchall()


def the_one(rows: list[Row]) -> Row:
    (row,) = rows
    return row


def outcome(connection: Connection, **settings: object) -> str:
    said: str = the_one(force_release(connection, **settings))["outcome"]
    return said


def holders(connection: psycopg.Connection[Any]) -> list[Any]:
    return connection.execute(
        """
        SELECT pid, (classid::bigint << 32) | objid::bigint AS key FROM pg_locks
        WHERE locktype = 'advisory' AND objsubid = 1 AND granted
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        ORDER BY pid, key
        """
    ).fetchall()


def lock(connection: Connection, key: int = KEY) -> int:
    connection.execute("SELECT pg_advisory_lock(%s)", (key,))
    return connection.info.backend_pid


def alive(connection: Connection) -> bool:
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


# --- look, then end ---------------------------------------------------------------------------------------------------


def test_it_shows_the_holder_and_ends_nothing(connect: Connect, dba: Connection) -> None:
    holder = connect(application_name="dblock1 1795526014 T1 web-01 b")
    pid = lock(holder)
    for settings in ({"target": "web-01", "step": "b"}, {"key": KEY}, {"target": "", "step": ""}):
        row = the_one(force_release(dba, **settings))
        assert row["outcome"] == f"held: to end this session, SET dblock.confirm = '{pid}' and run this again"
        assert (row["pid"], row["user"], row["application"], row["key"]) == (
            pid, holder.info.user, "dblock1 1795526014 T1 web-01 b", KEY
        )  # fmt: skip
        assert row["host"] == (holder.info.hostaddr or "local")
        assert row["since"].timestamp() == 1795526014
        assert row["activity"] == "idle"
    assert alive(holder)


def test_it_ends_the_confirmed_holder_and_the_next_is_served(here: str, connect: Connect, dba: Connection) -> None:
    holder, bystander = connect(), connect()
    pid, _ = lock(holder), lock(bystander, 5)
    with PSQL.attempt(here, Wish(tenant="T2")) as waiter:
        wait_until(lambda: queue_length(dba) == 1, "the waiter")
        row = the_one(force_release(dba, target="web-01", step="b", confirm=pid))
        assert (row["outcome"], row["pid"]) == ("ended: the server has given back all that the session held", pid)
        assert waiter.held()
        assert waiter.finish() == "done"
    assert not alive(holder)
    assert alive(bystander)


def queue_length(connection: Connection) -> int:
    row = connection.execute(
        f"SELECT count(*) AS n FROM pg_locks WHERE objsubid = 2 AND objid = 0 AND classid = {KEY >> 32}".encode()
    ).fetchone()
    assert row is not None
    return int(row["n"])


def test_the_confirmation_is_used_up(connect: Connect, dba: Connection) -> None:
    first = connect()
    pid = lock(first)
    assert outcome(dba, key=5, confirm=pid) == f"nothing was ended: pid {pid} does not hold this lock, nor does anybody"
    assert outcome(dba, key=KEY).startswith("held: ")
    assert outcome(dba, confirm=pid).startswith("ended: ")
    assert outcome(dba) == "nobody holds this lock"
    second = connect()
    lock(second)
    assert outcome(dba).startswith("held: ")
    assert alive(second)


def test_one_who_no_longer_holds_it_is_not_ended(connect: Connect, dba: Connection) -> None:
    former, holder = connect(), connect()
    pid = lock(former)
    assert outcome(dba, target="web-01", step="b").startswith("held: ")
    former.execute("SELECT pg_advisory_unlock_all()")
    assert outcome(dba, confirm=pid) == f"nothing was ended: pid {pid} does not hold this lock, nor does anybody"
    row_pid = lock(holder)
    row = the_one(force_release(dba, confirm=pid))
    assert row["outcome"] == f"nothing was ended: pid {pid} does not hold this lock, this session does"
    assert row["pid"] == row_pid
    assert alive(former)
    assert alive(holder)


def test_one_who_waits_for_it_is_not_ended(here: str, connect: Connect, dba: Connection) -> None:
    with dblock.lock(here, target="web-01", step="b"), PSQL.attempt(here, Wish()) as waiter:
        wait_until(lambda: queue_length(dba) == 1, "the waiter")
        (waiting,) = dba.execute("SELECT pid FROM pg_locks WHERE objsubid = 2 AND objid = 0").fetchall()
        said = outcome(dba, key=KEY, confirm=waiting["pid"])
        assert said == f"nothing was ended: pid {waiting['pid']} does not hold this lock, this session does"
        assert waiter.process.poll() is None
        assert queue_length(dba) == 1


def test_another_lock_or_another_database_is_not_meant(url: str, connect: Connect, dba: Connection) -> None:
    other_lock, pair = connect(), connect()
    pid = lock(other_lock, KEY + 1)
    pair.execute(f"SELECT pg_advisory_lock({KEY >> 32}, 1)".encode())
    with psycopg.connect(url, autocommit=True) as elsewhere:
        elsewhere.execute("SELECT pg_advisory_lock(%s)", (KEY,))
        for each in (pid, pair.info.backend_pid, elsewhere.info.backend_pid):
            assert outcome(dba, key=KEY, confirm=each).startswith("nothing was ended: ")
        elsewhere.execute("SELECT 1")
    assert alive(other_lock)
    assert alive(pair)


def test_only_the_confirmed_one_of_several_shared_holders(connect: Connect, dba: Connection) -> None:
    several = [connect(), connect(), connect()]
    for each in several:
        each.execute("SELECT pg_advisory_lock_shared(%s)", (KEY,))
    pids = [each.info.backend_pid for each in several]
    first, *others = force_release(dba, key=KEY, confirm=pids[1])
    assert (first["pid"], first["outcome"][:7]) == (pids[1], "ended: ")
    assert [row["pid"] for row in others] == sorted([pids[0], pids[2]])
    for row in others:
        assert row["outcome"] == f"held: to end this session, SET dblock.confirm = '{row['pid']}' and run this again"
    assert [alive(each) for each in several] == [True, False, True]


def test_a_session_that_holds_it_twice_is_one_holder(connect: Connect, dba: Connection) -> None:
    holder = connect()
    holder.execute("SELECT pg_advisory_lock(%s), pg_advisory_lock_shared(%s)", (KEY, KEY))
    assert outcome(dba, key=KEY).startswith("held: ")
    assert outcome(dba, confirm=holder.info.backend_pid).startswith("ended: ")


def test_the_own_session_is_never_ended(dba: Connection) -> None:
    pid = lock(dba)
    said = "nothing was ended: your own session holds it; release.sql gives it back, or "
    assert outcome(dba, key=KEY) == f"{said}SELECT pg_catalog.pg_advisory_unlock({KEY})"
    assert outcome(dba, confirm=pid).startswith(said)
    assert alive(dba)


# --- who may ----------------------------------------------------------------------------------------------------------

NOT_PERMITTED = (
    "you may not end this session; its own role may, a member of pg_signal_backend unless it is a superuser's, or a"
    " superuser"
)


def test_without_the_right_it_says_so(connect: Connect, dba: Connection) -> None:
    with role(dba, "dblock_other") as other, role(dba, "dblock_signal", member_of="pg_signal_backend") as signal:
        holder, superuser = connect(user=other), connect()
        pid, superusers_pid = lock(holder), lock(superuser, 5)
        with connect(user=signal) as may, role(dba, "dblock_plain") as plain:
            with connect(user=plain) as may_not:
                row = the_one(force_release(may_not, key=KEY))
                assert row["outcome"] == f"held: {NOT_PERMITTED}"
                assert (row["pid"], row["user"], row["host"], row["query_start"]) == (pid, other, None, None)
                assert outcome(may_not, confirm=pid) == f"nothing was ended: {NOT_PERMITTED}"
                assert alive(holder)
            assert outcome(may, key=5, confirm=superusers_pid) == f"nothing was ended: {NOT_PERMITTED}"
            assert alive(superuser)
            assert outcome(may, key=KEY, confirm=pid).startswith("ended: ")
            assert not alive(holder)


def test_a_role_may_end_its_own_sessions(connect: Connect, dba: Connection) -> None:
    with role(dba, "dblock_plain") as plain:
        holder = connect(user=plain)
        pid = lock(holder)
        with connect(user=plain) as same:
            assert outcome(same, key=KEY, confirm=pid).startswith("ended: ")
        assert not alive(holder)


# --- prepared transactions, bad settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("gid", ["T1", "o'clock \\", "\x1b[31m\u00e9"], ids=ascii)
def test_a_prepared_transaction(connect: Connect, dba: Connection, gid: str) -> None:
    owner = connect()
    owner.execute("BEGIN")
    owner.execute("SELECT pg_advisory_xact_lock(%s)", (KEY,))
    owner.execute(sql.SQL("PREPARE TRANSACTION {}").format(sql.Literal(gid)))
    row = the_one(force_release(dba, key=KEY, confirm=owner.info.backend_pid))
    said, statement = row["outcome"].split("; to end it: ")
    assert said == "held by a prepared transaction, which has no session to end"
    assert row["pid"] is None
    assert statement.isprintable()
    dba.execute(statement.encode())
    assert outcome(dba) == "nobody holds this lock"
    assert alive(owner)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "neither dblock.target and dblock.step nor dblock.key is set"),
        ({"target": "web-01"}, "dblock.target and dblock.step must both be set"),
        ({"step": "b", "key": KEY}, "dblock.target and dblock.step must both be set"),
        ({"key": "five"}, "dblock.key is no key"),
        ({"key": "9223372036854775808"}, "dblock.key is no key"),
        ({"key": "-9223372036854775809"}, "dblock.key is no key"),
        ({"key": "1e3"}, "dblock.key is no key"),
        ({"key": KEY, "target": "web-02", "step": "b"}, "dblock.target and dblock.step have the key"),
        ({"key": KEY, "confirm": "x"}, "dblock.confirm is no pid"),
        ({"key": KEY, "confirm": "-1"}, "dblock.confirm is no pid"),
        ({"key": KEY, "confirm": "0"}, "dblock.confirm is no pid"),
        ({"key": KEY, "confirm": "1; DROP"}, "dblock.confirm is no pid"),
        ({"key": KEY, "confirm": "99999999999"}, "dblock.confirm is no pid"),
    ],
    ids=str,
)
def test_bad_settings(connect: Connect, dba: Connection, settings: dict[str, object], said: str) -> None:
    holder = connect()
    lock(holder)
    assert outcome(dba, **settings).startswith(f"refused: {said}")
    assert alive(holder)


def test_extreme_keys(connect: Connect, dba: Connection) -> None:
    for key in (-(2**63), 2**63 - 1, -1, 0):
        holder = connect()
        pid = lock(holder, key)
        assert outcome(dba, key=key, confirm=pid).startswith("ended: ")
        assert not alive(holder)


def test_a_pid_that_no_process_has(connect: Connect, dba: Connection) -> None:
    lock(connect())
    assert outcome(dba, key=KEY, confirm=4294967295).startswith("nothing was ended: pid 4294967295 does not hold")


def test_names_beyond_ascii_need_utf8(here: str, connect: Connect) -> None:
    with dblock.lock(here, target="w\u00e9b", step="b"):
        assert outcome(connect(), target="w\u00e9b", step="b").startswith("held: ")
        said = outcome(connect(client_encoding="LATIN1"), target="w\u00e9b", step="b")
        assert said.startswith("refused: ")
        assert said.endswith("names beyond ASCII need server_encoding and client_encoding UTF8")


# --- through psql, and among traps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("standard_conforming_strings", ["on", "off"])
def test_through_psql(here: str, connect: Connect, standard_conforming_strings: str) -> None:
    holder = connect()
    pid = lock(holder)
    options = f"-c standard_conforming_strings={standard_conforming_strings} -c escape_string_warning=off"
    names = ["-c", "set dblock.target = 'web-01'", "-c", "set dblock.step = 'b'"]

    def psql(*settings: str) -> str:
        done = subprocess.run(
            ["psql", "-X", "-q", "-A", "-t", here, *names, *settings, "-f", str(SQL / "force_release.sql")],
            env={"PATH": "/usr/bin:/bin", "PGOPTIONS": options},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout

    assert psql().startswith(f"held: to end this session, SET dblock.confirm = '{pid}' and run this again|{pid}|")
    assert alive(holder)
    said = psql("-c", f"set dblock.confirm = '{pid}'")
    assert said.startswith(f"ended: the server has given back all that the session held|{pid}|")
    assert psql().startswith("nobody holds this lock|")
    assert not alive(holder)


def test_hostile_schema(here: str, connect: Connect, dba: Connection) -> None:
    with hostile.schema(here, FORCE_RELEASE):
        holder, bystander = connect(), connect()
        pid, _ = lock(holder), lock(bystander, 5)
        dba.execute("SELECT set_config('dblock.target', 'web-01', false), set_config('dblock.step', 'b', false)")
        dba.execute("SET search_path = evil, pg_catalog")
        with pytest.raises(psycopg.errors.RaiseException, match="trapped"):
            dba.execute("SELECT current_setting('dblock.target')")
        assert outcome(dba).startswith("held: ")
        dba.execute("SELECT pg_catalog.set_config('dblock.confirm', %s, false)", (str(pid),))
        assert outcome(dba).startswith("ended: ")
        assert not alive(holder)
        assert alive(bystander)
        dba.execute("RESET search_path")
