"""What a DBA or an operator asks: `dblock status`, `dblock doctor` and `dblock force-release`, as real processes."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import dblock
from dblock.demo.server import postgres_server
from dblock.doctor import Finding, examine
from tests.backends import Backend, Postgres
from tests.doors import COMMAND, DOORS, PYTHON, SQL, Door, Wish
from tests.pooler import pgbouncer
from tests.support import wait_until

Connection = psycopg.Connection[Any]
ENGINES = pytest.mark.parametrize("engine", ["postgres", "mssql"])


def command(url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dblock", *arguments],
        env=os.environ | {"DBLOCK_URL": url} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def observer(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@contextmanager
def role(observer: Connection, url: str, attributes: str = "") -> Iterator[str]:
    """A role without rights; its URL."""
    observer.execute(f"CREATE ROLE plain LOGIN {attributes}".encode())
    try:
        yield make_conninfo(url, user="plain")
    finally:
        observer.execute("DROP ROLE plain")


# --- status -----------------------------------------------------------------------------------------------------------


def test_only_the_locks_that_were_asked_for(postgres: Postgres, url: str) -> None:
    with ExitStack() as held:
        for target, step in (("web-01", "b"), ("web-01", "c"), ("web-02", "b")):
            held.enter_context(dblock.lock(url, target=target, step=step))
        held.enter_context(dblock.lock(url, target="x" * 200, step="b"))

        def shown(*options: str) -> list[tuple[str, str]]:
            found = json.loads(command(url, "status", "--json", *options).stdout)
            return sorted((entry["target"][:6], entry["step"]) for entry in found)

        assert len(shown()) == 4
        assert shown("--target", "web-01") == [("web-01", "b"), ("web-01", "c")]
        assert shown("--step", "c") == [("web-01", "c")]
        assert shown("--target", "web-02", "--step", "b") == [("web-02", "b")]
        # By its key, where its names are too long to be shown whole.
        assert shown("--target", "x" * 200, "--step", "b") == [("xxxxxx", "b")]
        assert command(url, "status", "--target", "web-02", "--step", "b", "--fail-if-held").returncode == 1
        assert command(url, "status", "--target", "web-02", "--step", "c", "--fail-if-held").returncode == 0
    assert command(url, "status", "--fail-if-held").returncode == 0


def test_names_that_look_alike_are_pointed_out(postgres: Postgres, url: str) -> None:
    with ExitStack() as held:
        for target in ("web-01", "WEB-01", "ｗeb-01", "web-02", "web- 02"):
            held.enter_context(dblock.lock(url, target=target, step="b"))
        said = command(url, "status").stderr.splitlines()
    assert len(said) == 4
    assert all("look alike, but are two" in line for line in said)
    assert any(r"'web-01' and '\uff57eb-01'" in line or r"'\uff57eb-01' and 'web-01'" in line for line in said)


def on_a_terminal(url: str, *arguments: str, answer: bytes = b"", until: bytes = b"", columns: int = 100) -> str:
    """Run a command with a terminal, type the answer, and return what was shown; stop it when it has shown so much."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dblock", *arguments],
        env=os.environ | {"DBLOCK_URL": url, "COLUMNS": str(columns), "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    try:
        os.write(ours, answer)
        while not (until and until in shown):
            try:
                piece = os.read(ours, 4096)
            except OSError:  # its other end is closed
                break
            if not piece:
                break
            shown += piece
    finally:
        if process.poll() is None and until:
            process.terminate()
        process.wait(60)
        os.close(ours)
    return shown.decode()


def test_a_table_that_fits_the_terminal(postgres: Postgres, url: str) -> None:
    with dblock.lock(url, target="web-01", step="b", tenant="T1 [bold]x[/bold]"):
        shown = on_a_terminal(url, "status", columns=120)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert max(map(len, plain.splitlines())) <= 120
    assert "[bold]" in plain.replace("\r\n", "")  # what others write is no markup


def test_watching(postgres: Postgres, url: str) -> None:
    with PYTHON.attempt(url, Wish(tenant="T7")) as holder:
        assert holder.held()
        shown = on_a_terminal(url, "status", "--watch", until=b"T7")
    assert "T7" in shown


# --- doctor -----------------------------------------------------------------------------------------------------------


def findings(url: str, **options: Any) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(url, **options)}


def results(url: str, **options: Any) -> dict[str, str]:
    return {name: finding.result for name, finding in findings(url, **options).items()}


def test_a_good_setup(postgres: Postgres, url: str, observer: Connection) -> None:
    assert set(results(url).values()) <= {"good", "note"}
    done = command(url, "doctor")
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    with role(observer, url) as plain:
        found = results(plain)
        assert (found["sees others"], found["may end others"], found["exclusion"]) == ("note", "note", "good")
    assert not postgres.all_rows()


@pytest.mark.parametrize(("setting", "check", "result"), [
    ("ALTER ROLE plain SET idle_session_timeout = '1min'", "timeouts", "warning"),
    ("ALTER ROLE plain SET default_transaction_read_only = on", "writable", "bad"),
    ("ALTER ROLE plain CONNECTION LIMIT 5", "connections", "warning"),
])  # fmt: skip
def test_what_is_wrong_with_a_role(
    postgres: Postgres, observer: Connection, setting: str, check: str, result: str
) -> None:
    with role(observer, postgres.url) as plain:
        observer.execute(setting.encode())
        found = findings(plain, waiters=20)
        assert found[check].result == result
        assert found[check].remedy
        others = {finding.result for name, finding in found.items() if name not in (check, "exclusion")}
        assert others <= {"good", "note"}
        done = command(plain, "doctor", "--waiters", "20")
        assert done.returncode == {"warning": 1, "bad": 77}[result]
        assert f"{result:8} {check} " in done.stdout


def test_a_pooler_in_between(postgres: Postgres, url: str) -> None:
    with pgbouncer(url, "transaction") as pooled:
        assert results(pooled)["exclusion"] == "bad"
        done = command(pooled, "doctor")
        assert done.returncode == 77
        assert "connection pooler stands between" in done.stdout
    with pgbouncer(url, "session") as pooled:
        assert results(pooled)["exclusion"] == "bad"
        assert results(pooled, allow_session_pooler=True)["exclusion"] == "good"


def test_an_encoding_that_the_scripts_refuse(postgres: Postgres, url: str, observer: Connection) -> None:
    observer.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'")
    try:
        found = results(make_conninfo(url, dbname="ascii"))
        assert (found["encodings"], found["exclusion"]) == ("warning", "good")
    finally:
        observer.execute("DROP DATABASE ascii WITH (FORCE)")


def test_the_wrong_database_and_none(postgres: Postgres, url: str) -> None:
    assert "was asked for" in findings(url, database="elsewhere")["exclusion"].says
    done = command("postgresql://127.0.0.1:1/none", "doctor")
    assert (done.returncode, done.stdout.startswith("bad      reachable ")) == (77, True)
    assert command(url, "doctor", "--waiters", "many").returncode == 64


def test_room_for_those_who_wait() -> None:
    with postgres_server({"max_connections": "20", "max_locks_per_transaction": "10"}) as server:
        assert results(server.url, waiters=5)["connections"] == "good"
        found = findings(server.url, waiters=1000)
        assert (found["connections"].result, found["lock table"].result) == ("warning", "warning")


@ENGINES
def test_the_same_lock_in_two_databases(backend: Backend, engine: str, url: str, observer: Connection) -> None:
    if engine == "mssql":
        assert results(backend.url).get("split scope", "good") == "good"
        return
    observer.execute("CREATE DATABASE tenant2")
    try:
        with (
            dblock.lock(url, target="web-01", step="b"),
            dblock.lock(make_conninfo(url, dbname="tenant2"), target="web-01", step="b"),
        ):
            found = findings(url)["split scope"]
            assert found.result == "warning"
            assert str(dblock.key("web-01", "b").value) in found.says
            assert "postgres, tenant2" in found.says
    finally:
        observer.execute("DROP DATABASE tenant2 WITH (FORCE)")


@ENGINES
def test_a_doctor_leaves_nothing(backend: Backend, engine: str) -> None:
    assert findings(backend.url)["exclusion"].result == "good"
    wait_until(lambda: not backend.all_rows(), "nothing to be left")


# --- force-release ----------------------------------------------------------------------------------------------------

NAMES = ("--target", "web-01", "--step", "b")


def test_nothing_is_ended_without_its_pid(postgres: Postgres, url: str) -> None:
    with COMMAND.attempt(url, Wish(tenant="T1")) as holder:
        assert holder.held()
        (pid,) = set(postgres.holders())
        looked = command(url, "force-release", *NAMES)
        assert (looked.returncode, "tenant      T1" in looked.stdout) == (1, True)
        assert f"give --confirm and the pid to end, {pid}" in looked.stderr
        wrong = command(url, "force-release", *NAMES, "--confirm", "1")
        assert (wrong.returncode, "1 is not a holder's pid" in wrong.stderr) == (1, True)
        assert "is not a holder's pid" in on_a_terminal(url, "force-release", *NAMES, answer=b"\n")
        assert postgres.holders()
        assert holder.finish() == "done"


def test_the_holder_that_was_named_is_ended(postgres: Postgres, url: str) -> None:
    key = str(dblock.key("web-01", "b").value)
    with COMMAND.attempt(url, Wish(tenant="T1")) as holder:
        assert holder.held()
        (pid,) = set(postgres.holders())
        done = command(url, "force-release", key, "--confirm", str(pid))
        assert done.returncode == 0, done.stderr
        assert "ended: the server has given back" in done.stdout
        assert "Its client goes on until it notices" in done.stdout
        assert holder.finish() == COMMAND.says("lost")
    assert command(url, "force-release", key).stdout == "nobody holds this lock\n"


def test_answered_at_a_terminal(postgres: Postgres, url: str) -> None:
    with COMMAND.attempt(url, Wish()) as holder:
        assert holder.held()
        (pid,) = set(postgres.holders())
        assert "ended: " in on_a_terminal(url, "force-release", *NAMES, answer=f"{pid}\n".encode())
        assert holder.finish() == COMMAND.says("lost")


def test_without_the_right_it_prints_what_a_dba_would_run(postgres: Postgres, url: str, observer: Connection) -> None:
    with role(observer, url) as plain, COMMAND.attempt(url, Wish()) as holder:
        assert holder.held()
        (pid,) = set(postgres.holders())
        done = command(plain, "force-release", *NAMES, "--confirm", str(pid))
        assert done.returncode == 69
        statement = done.stderr.partition("somebody who may end it runs: ")[2].strip()
        assert observer.execute(statement.replace(f"pid = {pid}", "pid = 1").encode()).fetchall() == []
        assert observer.execute(statement.encode()).fetchall() == [(True,)]
        assert holder.finish() == COMMAND.says("lost")


@pytest.mark.parametrize("arguments", [("5", *NAMES), ("web-01",), (str(2**63),), (), ("--target", "web-01")])
def test_bad_arguments(url: str, arguments: tuple[str, ...]) -> None:
    done = command(url, "force-release", *arguments)
    assert done.returncode == 64
    assert done.stderr.startswith("dblock: ")


# --- a DBA with psql alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS, ids=str)
def test_one_look_tells_holder_tenant_since_and_queue(postgres: Postgres, url: str, door: Door) -> None:
    """Names too long for the label stand shortened, with a ``~``, beside the key, which key.sql matches to a name."""
    target = "a-very-long-name-of-a-target-which-has-no-room-in-the-label"
    with door.attempt(url, Wish(target, tenant="T1")) as holder, ExitStack() as waiting:
        assert holder.held()
        waiter = waiting.enter_context(door.attempt(url, Wish(target, tenant="T2")))
        wait_until(postgres.waiters, "the waiter")
        look = psql(url, "-f", str(SQL / "inspect.sql"))
        names = f"set dblock.target = '{target}'", "set dblock.step = 'b'"
        key = psql(url, *(argument for name in names for argument in ("-c", name)), "-f", str(SQL / "key.sql"))
        holder.finish()
        assert waiter.held()
        waiter.finish()
    held, queued = (line.split("|") for line in look.splitlines())
    assert held[0] == "held"
    assert queued[:2] == ["waiting", "1"]
    assert (held[4], queued[4]) == ("T1", "T2")
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d.*", held[5])
    assert target.startswith(held[2].rstrip("~"))
    assert held[2].endswith("~")
    assert held[12] == queued[12] == key.split("|")[0]


def psql(url: str, *arguments: str) -> str:
    return subprocess.run(
        ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", url, *arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
