"""What a DBA or an operator asks: `dblock status`, `dblock doctor` and `dblock force-release`, as real processes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
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


def test_what_may_be_the_lock_that_was_asked_for_is_not_left_out(postgres: Postgres, url: str) -> None:
    """Whoever asks for a target alone is not told that it is free because a name was cut off, hidden or not told."""

    def held(*options: str) -> bool:
        return command(url, "status", *options, "--fail-if-held").returncode == 1

    with dblock.lock(url, target="x" * 200, step="b"):
        assert held("--target", "x" * 200)
        assert not held("--target", "y" * 200)
    for target in ("web##01", "web\u200b01", "100%", "web~"):
        with dblock.lock(url, target=target, step="b"):
            assert held("--target", target), target
            assert not held("--target", "other")
    with psycopg.connect(url, autocommit=True) as stranger:
        stranger.execute("SELECT pg_advisory_lock(%s)", (dblock.key("web-01", "b").value,))
        assert held("--target", "web-01")
        assert held("--target", "web-01", "--step", "b")
        assert not held("--target", "web-01", "--step", "c")
        stranger.execute("SELECT pg_advisory_unlock_all(), pg_advisory_lock(1, 2)")
        assert held()
        assert not held("--target", "web-01")


@pytest.mark.parametrize("arguments", [("--target", ""), ("--step="), ("--watch",), ("--target", " x", "--step", "b")])
def test_what_status_refuses(postgres: Postgres, url: str, arguments: tuple[str, ...] | str) -> None:
    done = command(url, "status", *([arguments] if isinstance(arguments, str) else arguments))
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("dblock: ")


TWINS = ("web-01", "WEB-01", "ｗeb-01", "wеb-01", "web–01", "web\u200b-01", "web-O1", "web-0l")


def test_names_that_look_alike_are_pointed_out(postgres: Postgres, url: str) -> None:
    with ExitStack() as held:
        for target in (*TWINS, "web-02", "web- 02", "web-03"):
            held.enter_context(dblock.lock(url, target=target, step="b"))
        said = command(url, "status").stderr.splitlines()
        assert len(said) == len(TWINS) * (len(TWINS) - 1) / 2 + 1
        assert all("look alike, but are two" in line for line in said)
        assert any(r"'web-01' and '\uff57eb-01'" in line or r"'\uff57eb-01' and 'web-01'" in line for line in said)
        assert command(url, "status", "--target", "web-03").stderr == ""
        # Whoever asks for the other one learns why it seems to be free.
        asked = command(url, "status", "--target", "web-\u200902", "--fail-if-held")
        assert (asked.returncode, asked.stderr.count("look alike")) == (0, 2)


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, url: str, *arguments: str, **environment: str) -> None:
        self.screen, theirs = pty.openpty()
        self._shown = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dblock", *arguments],
            env=os.environ | {"DBLOCK_URL": url, "COLUMNS": "100", "TERM": "xterm"} | environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def type(self, text: bytes) -> None:
        os.write(self.screen, text)

    def shows(self, text: str) -> bool:
        """Wait until it shows that (True), or has ended without."""
        before, self._shown = self._shown, b""
        while text.encode() not in before:
            piece = self._read()
            if not piece:
                return False
            before += piece
        return True

    def all(self) -> str:
        """Everything until its end, as it stands on the screen."""
        while piece := self._read():
            self._shown += piece
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._shown.decode()).replace("\r\n", "\n")

    def end(self) -> int:
        """End it if it has not ended, by Ctrl-C."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        return self._process.wait(60)

    def _read(self) -> bytes:
        try:
            return os.read(self.screen, 4096)
        except OSError:  # its other end is closed
            return b""


@contextmanager
def terminal(url: str, *arguments: str, **environment: str) -> Iterator[Terminal]:
    opened = Terminal(url, *arguments, **environment)
    try:
        yield opened
    finally:
        opened.end()
        os.close(opened.screen)


def on_a_terminal(url: str, *arguments: str, answer: bytes = b"", **environment: str) -> str:
    with terminal(url, *arguments, **environment) as opened:
        opened.type(answer)
        return opened.all()


@pytest.fixture
def without_rich(tmp_path: Path) -> str:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['rich'] = None")
    return str(tmp_path)


LONG = "a-target-which-has-a-name-that-has-no-room.example.com"


@pytest.mark.parametrize("columns", [80, 100, 240])
def test_a_table_that_fits_the_terminal(postgres: Postgres, url: str, columns: int) -> None:
    with (
        dblock.lock(url, target="web-01", step="b", tenant="T1 [bold]x[/bold]"),
        dblock.lock(url, target=LONG, step="b"),
        PYTHON.attempt(url, Wish(tenant="T2")),
    ):
        wait_until(postgres.waiters, "the waiter")
        (waiter,) = postgres.waiters()
        shown = on_a_terminal(url, "status", COLUMNS=str(columns))
    lines = shown.splitlines()
    assert max(map(len, lines)) <= columns
    assert lines[0].split()[:8] == ["STATE", "LOCK", "TENANT", "SINCE", "FOR", "PID", "HOST", "USER"]
    assert re.search(r"held +b@web-01 +T1.* \d\d:\d\d:\d\d +\d+s +\d+ +127.0.0.1 +postgres", lines[1])
    assert re.search(rf"waiting 1 +b@web-01 +T2 +\d\d:\d\d:\d\d +\d+s +{waiter} +127.0.0.1 +postgres", shown)
    assert "[bold]" in re.sub(r"\s", "", shown)  # what others write is no markup
    assert ("SELECT pg_catalog.pg_terminate_backend(" in shown) == (columns == 240)
    whole = re.sub(r"\s", "", "".join(line[11:32] for line in lines)) if columns == 80 else shown
    assert str(dblock.key(LONG, "b").value) in whole  # beside the shortened name


def test_without_rich(postgres: Postgres, url: str, without_rich: str) -> None:
    with dblock.lock(url, target="web-01", step="b", tenant="T1"):
        lines = on_a_terminal(url, "status", PYTHONPATH=without_rich).splitlines()
        assert (len(lines), max(map(len, lines)) <= 100) == (2, True)
        assert "pip install 'dblock[cli]'" in on_a_terminal(url, "status", "--watch", PYTHONPATH=without_rich)
    done = command(url, "run", "--target", "web-01", "--step", "b", "--", "true", PYTHONPATH=without_rich)
    assert done.returncode == 0


def test_watching() -> None:
    """It is live, points out what it points out else, and outlives the server."""
    with postgres_server() as server, terminal(server.url, "status", "--watch") as watch:
        assert watch.shows("nothing is held")
        for _ in range(2):
            with (
                PYTHON.attempt(server.url, Wish(tenant="T7")) as holder,
                dblock.lock(server.url, target="Web-01", step="b"),
            ):
                assert holder.held()
                assert watch.shows("T7")
                assert watch.shows("look alike")
            server.stop("fast")
            assert watch.shows("no answer just now")
            server.start()
        assert watch.end() == 130


def test_names_that_stdout_has_no_letters_for(postgres: Postgres, url: str) -> None:
    with COMMAND.attempt(url, Wish(tenant="Zürich")) as holder:
        assert holder.held()
        (pid,) = postgres.holders()
        for arguments, code in (
            (["status"], 0),
            (["doctor"], 0),
            (["force-release", *NAMES, "--confirm", str(pid)], 0),
        ):
            done = command(url, *arguments, PYTHONIOENCODING="ascii")
            assert (done.returncode, done.stderr) == (code, "")
            assert r"Z\xfcrich" in done.stdout or arguments == ["doctor"]
        assert holder.finish() == COMMAND.says("lost")


# --- doctor -----------------------------------------------------------------------------------------------------------


def findings(url: str, **options: Any) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(url, **options)}


def results(url: str, **options: Any) -> dict[str, str]:
    return {name: finding.result for name, finding in findings(url, **options).items()}


def test_a_good_setup(postgres: Postgres, url: str, observer: Connection, tmp_path: Path) -> None:
    assert set(results(url).values()) <= {"good", "note"}
    events = tmp_path / "events"
    done = command(url, "doctor", DBLOCK_EVENTS=str(events))
    assert done.returncode == 0, done.stdout
    assert (done.stderr, events.exists()) == ("", False)
    with role(observer, url) as plain:
        found = results(plain)
        assert (found["sees others"], found["may end others"], found["exclusion"]) == ("note", "note", "good")
    assert not postgres.all_rows()


@pytest.mark.parametrize(("setting", "check", "result"), [
    ("ALTER ROLE plain SET idle_session_timeout = '1min'", "timeouts", "warning"),
    ("ALTER ROLE plain SET statement_timeout = '1min'", "timeouts", "warning"),
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


@pytest.mark.parametrize("mode", ["session", "transaction", "statement"])
def test_a_pooler_in_between(postgres: Postgres, url: str, mode: str) -> None:
    with pgbouncer(url, mode) as pooled:
        found = results(pooled)
        assert {name for name, result in found.items() if result not in ("good", "note")} == {"pooler", "exclusion"}
        assert {found["pooler"], found["exclusion"]} == {"bad"}
        done = command(pooled, "doctor")
        assert done.returncode == 77
        assert "bad      pooler          one in between\n" in done.stdout
        if mode == "session":
            assert set(results(pooled, allow_session_pooler=True).values()) <= {"good", "note"}
            assert "in session mode by your word" in command(pooled, "doctor", "--allow-session-pooler").stdout


def test_an_encoding_that_the_scripts_refuse(postgres: Postgres, url: str, observer: Connection) -> None:
    observer.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'")
    try:
        found = results(make_conninfo(url, dbname="ascii"))
        assert (found["encodings"], found["exclusion"]) == ("warning", "good")
    finally:
        observer.execute("DROP DATABASE ascii WITH (FORCE)")


def test_the_wrong_database_and_none(postgres: Postgres, url: str) -> None:
    assert "was asked for" in findings(url, database="elsewhere")["exclusion"].says
    assert results(url, database="elsewhere")["database"] == "bad"
    assert results(url, database=postgres.database)["database"] == "good"
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
    if engine == "mssql":  # what is asked there is tested with inspect.sql
        visible = backend.in_the_way("T1") != "holder not visible to this login"
        assert results(backend.url)["split scope"] == ("good" if visible else "note")
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
        for nothing in (b"\n", b"\x04", b"1\n"):  # Ctrl-D is no answer, too
            assert "is not a holder's pid" in on_a_terminal(url, "force-release", *NAMES, answer=nothing)
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
    assert command(url, "force-release", "-5").stdout == "nobody holds this lock\n"


def test_answered_at_a_terminal(postgres: Postgres, url: str) -> None:
    with COMMAND.attempt(url, Wish()) as holder:
        assert holder.held()
        (pid,) = set(postgres.holders())
        assert "ended: " in on_a_terminal(url, "force-release", *NAMES, answer=f"{pid}\n".encode())
        assert holder.finish() == COMMAND.says("lost")


@pytest.mark.parametrize("confirm", [False, True])
def test_without_the_right_it_prints_what_a_dba_would_run(
    postgres: Postgres, url: str, observer: Connection, confirm: bool
) -> None:
    with role(observer, url) as plain, COMMAND.attempt(url, Wish()) as holder:
        assert holder.held()
        (pid,) = set(postgres.holders())
        done = command(plain, "force-release", *NAMES, *(("--confirm", str(pid)) if confirm else ()))
        assert done.returncode == 69
        statement = done.stderr.partition("nothing was ended: somebody who may end it runs: ")[2].strip()
        assert observer.execute(statement.replace(f"pid = {pid}", "pid = 1").encode()).fetchall() == []
        assert observer.execute(statement.encode()).fetchall() == [(True,)]
        assert holder.finish() == COMMAND.says("lost")


def test_with_the_right_to_end_one_of_two(postgres: Postgres, url: str, observer: Connection) -> None:
    shared = Wish(shared=True)
    with role(observer, url) as plain, COMMAND.attempt(url, shared) as theirs:
        assert theirs.held()
        (not_mine,) = postgres.holders()
        with COMMAND.attempt(plain, shared) as ours:
            assert ours.held()
            (mine,) = set(postgres.holders()) - {not_mine}
            assert "give --confirm" in command(plain, "force-release", *NAMES).stderr
            refused = command(plain, "force-release", *NAMES, "--confirm", str(not_mine))
            assert (refused.returncode, f"pid = {not_mine} " in refused.stderr) == (69, True)
            assert command(plain, "force-release", *NAMES, "--confirm", str(mine)).returncode == 0
            assert ours.finish() == COMMAND.says("lost")
        assert theirs.finish() == "done"


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
