"""A hot standby and read-only servers are refused at every door, before anything is taken; who holds is seen there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import dblock
from dblock.demo.server import Server, _account, _guarded_directory, postgres_server
from dblock.doctor import examine
from dblock.inspect import entries
from tests.doors import DOORS, SQL, Door, Wish, set_wishes
from tests.support import wait_until

ACQUIRE = (SQL / "acquire.sql").read_text()
KEY = dblock.key("web-01", "b").value


@pytest.fixture(scope="module")
def primary() -> Iterator[Server]:
    """A server of this file's own: others need not be fit to have a standby, nor to become read-only."""
    with postgres_server() as server:
        yield server


@contextmanager
def standby_of(primary: Server) -> Iterator[Server]:
    """Run a server that follows another one, as long as the block lasts."""
    account = _account()
    with _guarded_directory() as directory:
        if account:
            os.chown(directory, account["user"], account["group"])
        server = Server(directory, primary.bin, account, {})
        done = server._run("pg_basebackup", "-d", primary.url, "-D", str(server.data), "--write-recovery-conf",
                           "--checkpoint=fast", "--no-sync")  # fmt: skip
        assert done.returncode == 0, done.stderr
        server.start()
        try:
            streams = "SELECT status FROM pg_stat_wal_receiver"
            wait_until(lambda: execute(server.url, streams) == [("streaming",)], "the standby to follow")
            yield server
        finally:
            server.stop("immediate")


@pytest.fixture(scope="module")
def standby(primary: Server) -> Iterator[Server]:
    with standby_of(primary) as server:
        yield server


def execute(url: str, command: str) -> list[Any]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(command.encode())
        return cursor.fetchall() if cursor.description else []


def locks(server: Server) -> list[Any]:
    return execute(
        server.url, "SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks WHERE locktype = 'advisory'"
    )


def lock(url: str) -> dblock.Lock:
    return dblock.lock(url, target="web-01", step="b")


def refused(door: Door, url: str, why: str) -> None:
    with door.attempt(url, Wish()) as attempt:
        assert not attempt.held()
        assert attempt.finish() == door.says("unsafe")
        assert why in attempt.stderr()


# --- a hot standby ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True], ids=["free", "held on the primary"])
@pytest.mark.parametrize("door", DOORS, ids=str)
def test_standby_is_refused(primary: Server, standby: Server, door: Door, held: bool) -> None:
    caller = lock(primary.url)
    if held:
        caller.acquire()
    refused(door, standby.url, "this server is a hot standby")
    assert locks(standby) == []
    if held:
        caller.release()


def bad(url: str) -> set[str]:
    return {finding.check for finding in examine(url) if finding.result == "bad"}


def test_the_doctor_says_so(standby: Server) -> None:
    found = {finding.check: finding for finding in examine(standby.url)}
    assert bad(standby.url) == {"primary", "writable", "exclusion"}
    assert "hot standby" in found["exclusion"].says


def test_why_standbys_are_refused(primary: Server, standby: Server) -> None:
    """A standby does grant the lock that somebody holds on the primary."""
    with lock(primary.url):
        assert execute(standby.url, f"SELECT pg_is_in_recovery(), pg_try_advisory_lock({KEY})") == [(True, True)]
    wait_until(lambda: locks(standby) == [], "the lock to be gone with its session")


def test_a_drivers_session_on_a_standby_is_ended(standby: Server) -> None:
    with psycopg.connect(standby.url, autocommit=True) as connection:
        connection.execute(set_wishes(Wish()).encode())
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="this server is a hot standby"):
            connection.execute(ACQUIRE)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 'the body'")


def test_psql_that_goes_on_finds_its_session_on_a_standby_ended(standby: Server) -> None:
    command = ["psql", "-X", "-A", "-t", "-v", "VERBOSITY=verbose", standby.url, "-c", set_wishes(Wish()),
               "-f", str(SQL / "acquire.sql"), "-c", "SELECT 'the body'", "-f", str(SQL / "release.sql")]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert "ERROR:  0A000: dblock: this server is a hot standby" in done.stderr
    assert "the body" not in done.stdout
    assert done.returncode == 2


def test_target_session_attrs_finds_the_primary(primary: Server, standby: Server) -> None:
    """What the refusal advises."""
    both = f"127.0.0.1:{standby.port},127.0.0.1:{primary.port}"
    url = f"postgresql://postgres@{both}/postgres?target_session_attrs=read-write"
    with lock(url):
        assert locks(primary) == [(KEY,)]
        assert locks(standby) == []


def test_who_holds_is_seen_on_each_server_by_itself(primary: Server, standby: Server) -> None:
    with lock(primary.url), psycopg.connect(standby.url, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(42)")
        assert [(entry.state, entry.target, entry.key) for entry in entries(primary.url)] == [("held", "web-01", KEY)]
        assert [(entry.state, entry.target, entry.key) for entry in entries(standby.url)] == [("held", None, 42)]
        command = [sys.executable, "-m", "dblock", "status", "--url", standby.url]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert str(connection.info.backend_pid) in done.stdout
        assert "web-01" not in done.stdout


def test_a_promoted_standby_is_a_primary(primary: Server) -> None:
    """What is judged is the server's state at the acquire, by the same lock object too."""
    with standby_of(primary) as server:
        caller = lock(server.url)
        with pytest.raises(dblock.UnsafeConnection, match="hot standby"):
            caller.acquire()
        assert execute(server.url, "SELECT pg_promote()") == [(True,)]
        with caller:
            assert locks(server) == [(KEY,)]


# --- read-only --------------------------------------------------------------------------------------------------------

READ_ONLY = "this session is read-only"


@pytest.fixture
def read_only_server(primary: Server) -> Iterator[str]:
    """The whole server, as an administrator makes it before moving to another one."""
    execute(primary.url, "ALTER SYSTEM SET default_transaction_read_only = on")
    _reload(primary, "on")
    yield primary.url
    execute(primary.url, "ALTER SYSTEM RESET default_transaction_read_only")
    _reload(primary, "off")


def _reload(server: Server, expected: str) -> None:
    execute(server.url, "SELECT pg_reload_conf()")
    shown = "SHOW default_transaction_read_only"
    wait_until(lambda: execute(server.url, shown) == [(expected,)], f"default_transaction_read_only = {expected}")


@pytest.fixture
def read_only_role(primary: Server) -> Iterator[str]:
    execute(primary.url, "CREATE ROLE dblock_reader LOGIN")
    execute(primary.url, "ALTER ROLE dblock_reader SET default_transaction_read_only = on")
    yield make_conninfo(primary.url, user="dblock_reader")
    execute(primary.url, "DROP ROLE dblock_reader")


@pytest.fixture
def read_only_database(primary: Server) -> Iterator[str]:
    execute(primary.url, "CREATE DATABASE dblock_archive")
    execute(primary.url, "ALTER DATABASE dblock_archive SET default_transaction_read_only = on")
    yield make_conninfo(primary.url, dbname="dblock_archive")
    execute(primary.url, "DROP DATABASE dblock_archive WITH (FORCE)")


@pytest.mark.parametrize("kind", ["server", "role", "database"])
@pytest.mark.parametrize("door", DOORS, ids=str)
def test_read_only_is_refused(request: pytest.FixtureRequest, primary: Server, door: Door, kind: str) -> None:
    url = request.getfixturevalue(f"read_only_{kind}")
    refused(door, url, READ_ONLY)
    assert locks(primary) == []
    assert bad(url) == {"writable", "exclusion"}
