"""sql/mssql/acquire.sql and release.sql through a driver and a command-line client: what fails, fails closed."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pymssql
import pytest

import dblock
from dblock import driver_pymssql, label
from tests.backends import SqlServer
from tests.doors import TSQL, Wish, set_session_context
from tests.support import rounds, wait_until

ACQUIRE = (TSQL / "acquire.sql").read_text("ascii")
RELEASE = (TSQL / "release.sql").read_text("ascii")
VECTORS = json.loads((Path(__file__).parent / "key-vectors.json").read_text())
ROUNDS = rounds(20)  # races; each takes a new connection, which is slow on Babelfish

BODY = "INSERT INTO dbo.dblock_body VALUES (1)"
PASSWORD = "Dbl0ck.plain"  # noqa: S105 - of a login that lives for one test
OPEN = "SET NOEXEC OFF; SET PARSEONLY OFF;"
LABEL = "SELECT CONTEXT_INFO()"
HELD = "SELECT CAST(SESSION_CONTEXT(N'dblock.held') AS varchar(8000))"


class Session:
    """One connection, which sends batches as they are."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.connection = pymssql.connect(**{**driver_pymssql._arguments(url), **settings}, autocommit=True)
        self.id = self.value("SELECT @@SPID")

    def run(self, batch: str) -> list[Any]:
        """Send a batch and return its first rows, or raise its first error."""
        with self.connection.cursor() as cursor:
            cursor.execute(batch)
            rows = cursor.fetchall() if cursor.description else []
            while cursor.nextset():
                pass
            return list(rows)

    def value(self, batch: str) -> Any:
        return self.run(batch)[0][0]

    def fails(self, batch: str) -> int:
        """Send a batch and return the number with which its error begins; 0: there was none."""
        self.said = ""
        try:
            self.run(batch)
        except pymssql.Error as error:
            number, text = error.args
            self.said = text.decode().partition("DB-Lib error")[0]
            # Whatever is not of the scripts must not pass for it.
            assert number == 50000, self.said
            return int(self.said.split()[0])
        return 0

    def acquire(self, wish: Wish) -> int:
        self.run(set_session_context(wish))
        return self.fails(ACQUIRE)

    def release(self) -> int:
        return self.fails(RELEASE)

    @property
    def is_open(self) -> bool:
        return self.run("SELECT 1") == [(1,)]

    @property
    def label(self) -> str:
        return bytes(self.value(LABEL) or b"").rstrip(b"\0").decode()

    def mode(self, wish: Wish) -> str:
        return str(self.value(f"SELECT APPLOCK_MODE('public', N'{resource(wish)}', 'Session')"))


Connect = Callable[..., Session]


def resource(wish: Wish) -> str:
    return dblock.key(wish.target, wish.step).mssql


@pytest.fixture
def connect(mssql: SqlServer) -> Iterator[Connect]:
    sessions = []

    def open_one(**settings: Any) -> Session:
        sessions.append(Session(mssql.url, **settings))
        return sessions[-1]

    yield open_one
    for session in sessions:
        with suppress(pymssql.Error):
            session.connection.close()


@pytest.fixture
def body(mssql: SqlServer) -> Iterator[Callable[[], int]]:
    """A table into which the guarded step writes, and how often it ran."""
    mssql.query("IF OBJECT_ID(N'dbo.dblock_body') IS NOT NULL DROP TABLE dbo.dblock_body")
    mssql.query("CREATE TABLE dbo.dblock_body (ran int)")
    yield lambda: int(mssql.query("SELECT COUNT(*) FROM dbo.dblock_body")[0][0])
    mssql.query("DROP TABLE dbo.dblock_body")


@pytest.fixture
def session(connect: Connect) -> Session:
    return connect()


@pytest.fixture
def holder(connect: Connect) -> Session:
    """Somebody holds b@web-01."""
    one = connect()
    assert one.acquire(Wish(tenant="T1")) == 0
    return one


# --- the body does not run --------------------------------------------------------------------------------------------

# What is wrong, as batches before acquire.sql, and how it is called. Somebody else holds b@web-01.
WRONG = {
    "timeout": ([set_session_context(Wish(timeout="0.2"))], 51001),
    "no waiting": ([set_session_context(Wish(timeout="0"))], 51001),
    "bad setting": ([set_session_context(Wish(target="free", timeout="soon"))], 51003),
    "no target": (["EXEC sp_set_session_context N'dblock.step', N'b'"], 51003),
    "nothing": ([], 51003),
    "code page": (
        [set_session_context(Wish(target="free")), "EXEC sp_set_session_context N'dblock.target', 'free'"],
        51003,
    ),
    "another key": ([set_session_context(Wish(target="free", more={"key": "1"}))], 51003),
    "shared and slots": ([set_session_context(Wish(target="free", more={"shared": "on", "slots": "2"}))], 51003),
    "shared": ([set_session_context(Wish(timeout="0", more={"shared": "on"}))], 51001),
    "slots": ([set_session_context(Wish(timeout="0.2", more={"slots": "2"}))], 51001),
    "no transaction": ([set_session_context(Wish(target="free", more={"scope": "transaction"}))], 51005),
    "snapshot": (
        [
            set_session_context(Wish(target="free", more={"scope": "transaction"})),
            "SET TRANSACTION ISOLATION LEVEL SNAPSHOT",
            "BEGIN TRANSACTION",
        ],
        51005,
    ),
    "another database": ([set_session_context(Wish(target="free", database="elsewhere"))], 51005),
    "transaction": ([set_session_context(Wish(target="free")), "BEGIN TRANSACTION"], 51005),
    "implicit transactions": ([set_session_context(Wish(target="free")), "SET IMPLICIT_TRANSACTIONS ON"], 51005),
    "already held": (
        [set_session_context(Wish(target="free")), ACQUIRE, set_session_context(Wish(target="free"))],
        51006,
    ),
}


@pytest.mark.parametrize("xact_abort", ["ON", "OFF"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.usefixtures("holder")
def test_later_batches_do_not_run(session: Session, body: Callable[[], int], wrong: str, xact_abort: str) -> None:
    """Each batch is sent whatever became of the one before."""
    before, number = WRONG[wrong]
    session.run(f"SET XACT_ABORT {xact_abort}")
    for batch in before:
        session.run(batch)
    assert session.fails(ACQUIRE) == number
    for _ in range(2):
        assert session.run(BODY) == session.run("SELECT 1") == []
    assert body() == 0
    assert session.release() == 51004
    assert session.is_open

    session.run(
        "IF @@TRANCOUNT > 0 ROLLBACK; SET IMPLICIT_TRANSACTIONS OFF; SET TRANSACTION ISOLATION LEVEL READ COMMITTED"
    )
    assert session.acquire(Wish(target="another")) == 0
    session.run(BODY)
    assert session.release() == 0
    assert session.release() == (0 if wrong == "already held" else 51004)
    assert body() == 1


def test_a_retry_need_not_release(session: Session, holder: Session, body: Callable[[], int]) -> None:
    for _ in range(8):  # the fifth failure in a row used to bring Babelfish down
        session.run(OPEN + set_session_context(Wish(timeout="0")))
        assert session.fails(ACQUIRE) == 51001
    holder.release()
    session.run(OPEN + set_session_context(Wish(timeout="0")))
    assert session.fails(ACQUIRE) == 0
    session.run(BODY)
    assert (session.release(), session.release(), body()) == (0, 51004, 1)


@pytest.mark.usefixtures("holder")
def test_an_inner_lock_that_fails(session: Session, body: Callable[[], int]) -> None:
    """Its release.sql does not give back the outer lock, whose step goes on."""
    outer = Wish(target="outer")
    assert session.acquire(outer) == 0
    before = (session.label, session.value(HELD))
    assert session.acquire(Wish(timeout="0")) == 51001
    session.run(BODY)
    assert body() == 0
    assert session.release() == 51004
    assert (session.label, session.value(HELD)) == before
    assert session.mode(outer) == "Exclusive"
    session.run(BODY)
    assert (session.release(), session.mode(outer), session.release(), body()) == (0, "NoLock", 51004, 1)


@pytest.mark.usefixtures("holder")
def test_an_outer_lock_that_fails(session: Session, body: Callable[[], int]) -> None:
    """The inner lock is free, but nothing may run under it alone: nor after its release.sql."""
    assert session.acquire(Wish(timeout="0")) == 51001
    assert session.acquire(Wish(target="inner")) == 51003
    assert "run release.sql" in session.said
    session.run(BODY)
    assert session.release() == 51004
    assert "stays closed" in session.said
    session.run(BODY)
    assert body() == 0
    assert session.release() == 51004
    assert session.is_open


def test_in_one_batch(session: Session, holder: Session, body: Callable[[], int]) -> None:
    wishes = set_session_context(Wish(timeout="0"))
    for text in (f"{wishes} {ACQUIRE} {BODY};", f"{ACQUIRE} {BODY}; {RELEASE}"):
        session.run(wishes)
        assert session.fails(text) == 51001
        assert (session.release(), body()) == (51004, 0)
    # The caller's CATCH has the error, and the session is open; what was to be guarded was passed over all the same.
    session.run(wishes)
    session.run(f"BEGIN TRY {ACQUIRE} {BODY}; END TRY BEGIN CATCH SELECT ERROR_MESSAGE() END CATCH")
    session.run(OPEN)
    assert (session.release(), body()) == (51004, 0)
    holder.release()
    session.run(f"{wishes} {ACQUIRE} {BODY}; {RELEASE}")
    assert (body(), session.mode(Wish())) == (1, "NoLock")


def test_nested_is_refused_always(session: Session) -> None:
    """At the end of a nested text the server takes back NOEXEC, so even a free lock is refused there."""
    session.run(set_session_context(Wish()))
    quoted = ACQUIRE.replace("'", "''")
    assert session.fails(f"EXEC sp_executesql N'{quoted}'") == 51005
    session.run(OPEN)
    assert (session.mode(Wish()), session.release()) == ("NoLock", 51004)


def test_a_wish_that_cannot_be_consumed(mssql: SqlServer, session: Session) -> None:
    if mssql.is_babelfish:
        pytest.skip("on Babelfish this error ends the batch, whatever catches it")
    session.run(set_session_context(Wish()))
    session.run("EXEC sp_set_session_context N'dblock.timeout', N'0', @read_only = 1")
    assert session.fails(ACQUIRE) == 51007
    assert not session.is_open
    session.run(OPEN)
    assert session.mode(Wish()) == "NoLock"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_cut_off(session: Session, connect: Connect, moment: str) -> None:
    """A cancel ends the batch where it waits, and may meet the grant: here the batch itself ends there."""
    session.run("DECLARE @mine varbinary(128) = 0x0102; SET CONTEXT_INFO @mine")
    wait = re.search(r"EXEC @dblock_result = sys\.sp_getapplock[^;]*;", ACQUIRE)
    assert wait
    cut = wait.start() if moment == "before" else wait.end()
    session.run(set_session_context(Wish()))
    session.run(f"{ACQUIRE[:cut]} RETURN; {ACQUIRE[cut:]}")
    assert session.label.startswith("dblock1 w")
    session.run(OPEN)
    assert session.acquire(Wish()) == 51005
    assert "run release.sql" in session.said
    assert session.release() == 51004
    assert "WITHOUT the lock" in session.said
    assert (session.mode(Wish()), session.label) == ("NoLock", "\1\2")
    assert connect().acquire(Wish(timeout="0")) == 0
    assert session.acquire(Wish(target="free")) == 0


# --- through tools ----------------------------------------------------------------------------------------------------


def on_lines(script: str) -> list[str]:
    batches: list[list[str]] = [[]]
    for line in script.splitlines(keepends=True):
        if line.strip().upper() == "GO":
            batches.append([])
        else:
            batches[-1].append(line)
    return ["".join(batch) for batch in batches]


SPLITS: dict[str, Callable[[str], list[str]]] = {
    "expression": lambda script: re.split(r"^\s*GO\s*$", script, flags=re.MULTILINE | re.IGNORECASE),
    "lines": on_lines,
    "newlines": lambda script: re.split(r"\nGO\r?\n", script),
    "CRLF": lambda script: script.split("\r\nGO\r\n"),
}


def step(wish: Wish, end: str = "\n") -> str:
    script = "\nGO\n".join([set_session_context(wish), ACQUIRE, BODY + ";", RELEASE]) + "\nGO\n"
    return script.replace("\n", end)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_splits(session: Session, holder: Session, body: Callable[[], int], split: str, end: str) -> None:
    def run_all(wish: Wish) -> list[int]:
        errors = []
        for batch in SPLITS[split](step(wish, end)):
            try:
                errors.append(session.fails(batch))
            except AssertionError:
                errors.append(-1)  # not the scripts' own error
        return errors

    if split == "CRLF" and end == "\n":
        # Nothing is split, and a batch with GO in it is no batch: not even the wishes are set.
        assert run_all(Wish(target="free")) == [-1]
        assert body() == 0
        return
    assert [n for n in run_all(Wish(timeout="0")) if n] == [51001, 51004]
    assert body() == 0
    holder.release()
    assert not any(run_all(Wish(timeout="0")))
    assert (body(), session.mode(Wish())) == (1, "NoLock")


def test_no_line_ends_a_batch_or_means_something_to_a_tool() -> None:
    for script in (ACQUIRE, RELEASE, (TSQL / "key.sql").read_text("ascii")):
        assert len(on_lines(script)) == 1
        for mark in ("$(", ":setvar", "#{", "\t", "\r", '"\n'):
            assert mark not in script
        # sqlcmd and fisql take a line for a command that begins so.
        assert not re.search(r"^\s*(:|!!|(reset|quit|exit|ed|vi|list)\b)", script, re.MULTILINE | re.IGNORECASE)
        assert script.count("/*") == script.count("*/") == 1


def fisql(url: str, script: str) -> str:
    server = urlsplit(url)
    done = subprocess.run(
        ["fisql", "-S", f"{server.hostname}:{server.port or 1433}", "-U", unquote(server.username or ""),
         "-P", unquote(server.password or ""), "-D", server.path[1:], "-w", "2000"],
        input=script.encode(), env=os.environ | {"TDSVER": "7.4", "LC_ALL": "C.UTF-8"}, capture_output=True,
        check=False,
    )  # fmt: skip
    return (done.stdout + done.stderr).decode()


def test_fisql(mssql: SqlServer, holder: Session, body: Callable[[], int]) -> None:
    said = fisql(mssql.url, step(Wish(timeout="0")))
    assert re.search(r"Msg 50000\b.*state 1\b.*51001 dblock: b@web-01 not acquired", said, re.DOTALL | re.IGNORECASE), (
        said
    )
    assert "51004 dblock: " in said
    assert body() == 0
    holder.release()
    assert "dblock:" not in fisql(mssql.url, step(Wish(target="Zürich 🙂", timeout="0")))
    assert body() == 1


# --- what the session keeps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, b"\x01", b"mine\0\xff\0", bytes(range(128)), bytes(range(128, 256))])
def test_context_info_is_put_back(session: Session, holder: Session, before: bytes | None) -> None:
    if before:
        session.run(f"DECLARE @mine varbinary(128) = 0x{before.hex()}; SET CONTEXT_INFO @mine")
    was = session.value(LABEL) or bytes(128)
    assert was.rstrip(b"\0") == (before or b"").rstrip(b"\0")
    assert session.acquire(Wish(target="first", tenant="T1")) == 0
    first = session.value(LABEL)
    assert session.acquire(Wish(target="second")) == 0
    second = session.value(LABEL)
    assert session.acquire(Wish(timeout="0")) == 51001
    assert session.release() == 51004
    assert session.value(LABEL) == second != first
    assert session.acquire(Wish(target="third")) == 0
    assert [session.release() for _ in range(4)][:2] == [0, 0]
    assert session.value(LABEL) == was
    assert session.acquire(Wish(timeout="0")) == 51001
    session.run(OPEN)
    assert session.value(LABEL) == was


def test_wishes_are_consumed(session: Session, holder: Session) -> None:
    names = ("target", "step", "tenant", "timeout", "shared", "slots", "scope", "database", "key")
    left = " OR ".join(f"SESSION_CONTEXT(N'dblock.{name}') IS NOT NULL" for name in names)
    wishes = dict.fromkeys(names, "x")
    for more in (wishes, {"timeout": "0"}):
        assert session.acquire(Wish(more=more)) != 0
        session.run(OPEN)
        assert session.value(f"SELECT CASE WHEN {left} THEN 1 ELSE 0 END") == 0
        session.release()
    holder.release()
    assert session.acquire(Wish(tenant="T1", timeout="1")) == 0
    assert session.value(f"SELECT CASE WHEN {left} THEN 1 ELSE 0 END") == 0


@pytest.mark.parametrize(
    "options",
    ["QUOTED_IDENTIFIER OFF", "ANSI_NULLS OFF", "CONCAT_NULL_YIELDS_NULL OFF", "ANSI_WARNINGS OFF", "ANSI_PADDING OFF",
     "ARITHABORT OFF", "LOCK_TIMEOUT 0", "ROWCOUNT 1", "NOCOUNT ON", "DATEFORMAT dmy"],
)  # fmt: skip
def test_options_of_the_caller(session: Session, holder: Session, options: str) -> None:
    try:
        session.run(f"SET {options}")
    except pymssql.Error:
        pytest.skip(f"this server refuses SET {options}")
    assert session.acquire(Wish(timeout="0.1")) == 51001
    assert session.release() == 51004
    holder.release()
    assert session.acquire(Wish(timeout="0.1")) == 0
    assert session.mode(Wish()) == "Exclusive"
    assert session.release() == 0
    assert session.mode(Wish()) == "NoLock"


# --- the release ------------------------------------------------------------------------------------------------------


def test_release_waits_for_the_commit(session: Session) -> None:
    assert session.acquire(Wish()) == 0
    session.run("BEGIN TRANSACTION")
    assert session.release() == 51005
    assert session.mode(Wish()) == "Exclusive"
    session.run("COMMIT")
    assert session.release() == 0
    assert session.mode(Wish()) == "NoLock"


def test_release_after_an_error(session: Session, connect: Connect) -> None:
    assert session.acquire(Wish()) == 0
    with pytest.raises(pymssql.Error):
        session.run("SELECT 1 / 0 FROM dbo.nowhere")
    assert session.release() == 0
    assert connect().acquire(Wish(timeout="0")) == 0


def test_release_in_another_database(mssql: SqlServer, session: Session, connect: Connect) -> None:
    assert session.acquire(Wish()) == 0
    session.run("USE tempdb")
    assert session.release() == 0
    assert connect().acquire(Wish(timeout="0")) == 0
    session.run(f"USE [{mssql.database}]")
    assert session.label == ""


def test_lock_given_back_by_hand(session: Session) -> None:
    outer = Wish(target="outer")
    assert (session.acquire(outer), session.acquire(Wish())) == (0, 0)
    session.run(f"EXEC sp_releaseapplock @Resource = N'{resource(Wish())}', @LockOwner = N'Session'")
    assert session.release() == 51004
    assert "by somebody else" in session.said
    assert session.mode(outer) == "Exclusive"
    assert session.label.endswith(" - outer b")
    assert session.release() == 0


@pytest.mark.parametrize("forged", ["nonsense", "1 2", ";", "1 x y;", "7"])
def test_forged_memory(session: Session, forged: str) -> None:
    session.run(f"EXEC sp_set_session_context N'dblock.held', N'{forged}'")
    assert session.release() in (51004, 51007)
    assert session.acquire(Wish()) == 0
    assert session.release() == 0


# --- names and settings -----------------------------------------------------------------------------------------------


def test_vectors(session: Session) -> None:
    for vector in VECTORS["keys"]:
        wish = Wish(target=vector["target"], step=vector["step"], more={"key": str(vector["key"])})
        assert session.acquire(wish) == 0, session.said
        assert session.mode(wish) == "Exclusive"
        assert session.release() == 0


def expression(name: str) -> str:
    """The name in T-SQL, put together from its UTF-16 code units, so that every string can be written."""
    units = name.encode("utf-16-le", "surrogatepass")
    return " + ".join(f"NCHAR({int.from_bytes(units[i : i + 2], 'little')})" for i in range(0, len(units), 2)) or "N''"


def test_refused_vectors(mssql: SqlServer, session: Session) -> None:
    """Babelfish has no lone surrogates, nor NCHAR for halves of a pair; a NUL makes a name one that is not set."""
    reached = 0
    for vector in VECTORS["refused"]:
        try:
            for name in ("target", "step"):
                plain = vector[name].isprintable() and max(vector[name], default="") < "\ud800"
                value = "N'{}'".format(vector[name].replace("'", "''")) if plain else expression(vector[name])
                session.run(f"DECLARE @value nvarchar(4000) = {value};"
                            f"EXEC sp_set_session_context N'dblock.{name}', @value")  # fmt: skip
        except pymssql.Error:
            assert mssql.is_babelfish
            continue
        reached += 1
        assert session.fails(ACQUIRE) == 51003, vector
        assert re.search(r"51003 dblock: dblock\.(target|step) ", session.said)
        session.release()
    assert len(VECTORS["refused"]) - reached == (3 if mssql.is_babelfish else 0)


GOOD = {"timeout": ["0", "1", "0.5", "0.001", "0000001", "2147483", "2147483.000", "1234567.1"],
        "shared": ["on", "off", ""], "scope": ["session", ""], "slots": ["1", "10", "999", ""], "key": [""],
        "database": [""]}  # fmt: skip
BAD = {
    "timeout": ["-1", "+1", ".5", "1.", "1.2345", "12345678", "2147484", "2147483.001", " 1", "1 ", "1\n", "1e3", "1,5",
                "0x1", "1.2.3", "..", ".", "٣", "１", "²", "soon", "NaN", "1 0", "1|", "|",
                "0" * 4000],
    "shared": ["ON", "On", " on", "on ", "on\n", "true", "1", "ｏｎ", "on|"],
    "scope": ["Session", "session ", "transaction\n", "TRANSACTION", "x"],
    "slots": ["0", "01", "1000", "1 ", " 1", "-1", "1.0", "x", "２", "1\n", "1|"],
    "key": ["3736245238665493733", "3736245238665493732 ", "+3736245238665493732", "03736245238665493732", "x"],
}  # fmt: skip


@pytest.mark.parametrize("setting", BAD)
def test_grammar(session: Session, setting: str) -> None:
    for value in BAD[setting]:
        assert session.acquire(Wish(more={setting: value})) == 51003, value
        assert session.said.startswith(f"51003 dblock: dblock.{setting} is "), session.said
        session.release()
    for value in GOOD[setting]:
        assert session.acquire(Wish(more={setting: value})) == 0, (value, session.said)
        session.release()


def test_database_is_exact(mssql: SqlServer, session: Session) -> None:
    for other in (mssql.database.upper(), f"{mssql.database} ", f" {mssql.database}"):
        assert session.acquire(Wish(database=other)) == 51005
        session.release()
    assert session.acquire(Wish(database=mssql.database)) == 0


def test_a_number_may_be_a_number(session: Session, holder: Session) -> None:
    session.run(set_session_context(Wish()) + "EXEC sp_set_session_context N'dblock.timeout', 0")
    assert session.fails(ACQUIRE) == 51001


ALPHABET = "abcXYZ019._-~%'\"/\\ \u00a0éß€漢🙂\u200b\U0010ffff\u0085"


def random_name(chance: random.Random) -> str:
    return "".join(chance.choices(ALPHABET, k=chance.choice([1, 2, 9, 30, 62]))).strip(" ") or "x"


def test_labels(session: Session) -> None:
    chance = random.Random(3)
    for _ in range(200):
        wish = Wish(random_name(chance), random_name(chance), chance.choice([None, "-", "", random_name(chance) * 4]))
        started = time.time()
        assert session.acquire(wish) == 0, session.said
        prefix, granted, fields = session.label.split(" ", 2)
        assert fields == label.fields(wish.tenant, wish.target, wish.step, time_width=10, limit=128), wish
        assert prefix == "dblock1"
        assert abs(int(granted) - started) < 60
        assert session.release() == 0


def test_tenant_may_be_any_text(session: Session) -> None:
    for tenant, shown in (("a\tb\n", "a%09b%0A"), (" ", "%20"), ("x" * 4000, "x" * 99 + "~")):
        assert session.acquire(Wish(tenant=tenant)) == 0
        assert session.label.split(" ")[2:] == [shown, "web-01", "b"], tenant[:9]
        session.release()


# --- waiting ----------------------------------------------------------------------------------------------------------


class Waiter:
    """A session that runs acquire.sql in a thread; ``result`` is the number of its error."""

    def __init__(self, mssql: SqlServer, session: Session, wish: Wish) -> None:
        self.session = session
        self.result: int | str = "waiting"
        session.run(set_session_context(wish))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        wait_until(lambda: session.id in mssql.waiters() or not self._thread.is_alive(), "the waiter in the queue")

    def _run(self) -> None:
        try:
            self.result = self.session.fails(ACQUIRE)
        except (AssertionError, pymssql.Error) as error:
            self.result = repr(error)

    def join(self) -> int | str:
        self._thread.join()
        return self.result


def test_waits_in_order_with_a_label(mssql: SqlServer, connect: Connect, holder: Session) -> None:
    waiters = []
    for number in range(3):
        waiters.append(Waiter(mssql, connect(), Wish(tenant=f"W{number} " + "é" * 60)))
    fields = [label.fields(f"W{n} " + "é" * 60, "web-01", "b", time_width=11, limit=128) for n in range(3)]
    assert [row.label for row, _ in mssql.all_rows()][1:] == [f"dblock1 wT {field}" for field in fields] or [
        re.sub(r"^dblock1 w\d{10}", "dblock1 wT", row.label) for row, _ in mssql.all_rows()
    ][1:] == [f"dblock1 wT {field}" for field in fields]
    holder.release()
    for waiter in waiters:
        assert waiter.join() == 0
        assert waiter.session.label.startswith("dblock1 1")
        assert waiter.session.release() == 0


def test_timeout_is_kept(session: Session, holder: Session) -> None:
    session.acquire(Wish(timeout="0"))  # the first script on a connection is slow on Babelfish
    session.release()
    for timeout in ("0.001", "0.5", "1.25"):
        started = time.monotonic()
        assert session.acquire(Wish(timeout=timeout)) == 51001
        assert float(timeout) <= time.monotonic() - started < float(timeout) + 1
        assert f"b@web-01 not acquired in {timeout} s: h" in session.said
        session.release()
    assert session.acquire(Wish(timeout="0")) == 51001
    assert "b@web-01 not acquired without waiting: h" in session.said


def test_deadlock(mssql: SqlServer, connect: Connect) -> None:
    one, other = connect(), connect()
    assert (one.acquire(Wish("web-01")), other.acquire(Wish("web-02"))) == (0, 0)
    first = Waiter(mssql, one, Wish("web-02"))
    second = Waiter(mssql, other, Wish("web-01"))
    wait_until(lambda: "waiting" not in (first.result, second.result) or 51002 in (first.result, second.result),
               "a victim")  # fmt: skip
    victim, survivor = (first, second) if first.result == 51002 else (second, first)
    assert victim.join() == 51002
    assert not victim.session.is_open
    assert victim.session.release() == 51004  # for the lock it did not get
    assert victim.session.release() == 0  # its own
    assert survivor.join() == 0
    assert [survivor.session.release() for _ in range(3)] == [0, 0, 51004]


def test_login_without_rights(mssql: SqlServer, holder: Session) -> None:
    mssql.query(f"CREATE LOGIN dblock_plain WITH PASSWORD = '{PASSWORD}'")
    mssql.query("CREATE USER dblock_plain FOR LOGIN dblock_plain")
    try:
        plain = Session(mssql.url, user="dblock_plain", password=PASSWORD)
        assert plain.acquire(Wish(timeout="0.2")) == 51001
        assert plain.said.endswith("not acquired in 0.2 s: holder not visible to this login")
        plain.release()
        holder.release()
        assert (plain.acquire(Wish()), plain.release()) == (0, 0)
        plain.connection.close()
    finally:
        mssql.query("DROP USER dblock_plain")
        wait_until(lambda: not _raises(mssql, "DROP LOGIN dblock_plain"), "the login to be gone")


def _raises(mssql: SqlServer, query: str) -> bool:
    try:
        mssql.query(query)
    except pymssql.Error:
        return True
    return False


VIEWS = """
    CREATE TABLE dbo.dm_tran_locks (resource_type nvarchar(60), resource_database_id int,
        resource_description nvarchar(256), request_status nvarchar(60), request_session_id int,
        lock_owner_address varbinary(8));
    CREATE TABLE dbo.dm_os_waiting_tasks (session_id int, wait_duration_ms bigint, resource_address varbinary(8));
    CREATE TABLE dbo.dm_exec_sessions (session_id int, host_name nvarchar(128), context_info varbinary(128));
    CREATE TABLE dbo.dm_exec_requests (session_id int, context_info varbinary(128));
"""
SAID = {
    "dblock1 {} T1 web-01 b": "held by tenant T1 (session 57, host octo-7) since ",
    "dblock1 {} T~ web~ b~": "held by tenant T~ (session 57, host octo-7) since ",
    "dblock1 {} - web-01 b": "held by a session (session 57, host octo-7) since ",
    "dblock1 {} T1 web-0 b": "held by a session (session 57, host octo-7)",
    "dblock1 {} T1 web-02~ b": "held by a session (session 57, host octo-7)",
    "dblock1 {} T1 WEB-01 b": "held by a session (session 57, host octo-7)",
    "dblock1 w{} T1 web-01 b": "held by a session (session 57, host octo-7)",
    "dblock1 99999999999 T1 web-01 b": "held by a session (session 57, host octo-7)",
    "dblock1 1": "held by a session (session 57, host octo-7)",
    "mine": "held by a session (session 57, host octo-7)",
}


def test_holder_is_named(mssql: SqlServer, session: Session, holder: Session) -> None:
    """From the server's views; on Babelfish, which has none, from tables of their shape."""
    if not mssql.is_babelfish:
        assert session.acquire(Wish(timeout="0.2")) == 51001
        assert f"held by tenant T1 (session {holder.id}, host " in session.said
        return
    acquire = re.sub(r"sys\.(dm_\w+)", r"dbo.\1", ACQUIRE)
    mssql.query(VIEWS)
    try:
        for status, session_id, wish in (("GRANT", 57, Wish()), ("WAIT", 58, Wish()), ("WAIT", 59, Wish()),
                                         ("WAIT", 60, Wish(target="other"))):  # fmt: skip
            mssql.query(f"INSERT INTO dbo.dm_tran_locks VALUES (N'APPLICATION', DB_ID(), N'0:[{resource(wish)}]:(0a)',"
                        f" N'{status}', {session_id}, CAST({session_id} AS varbinary(8)))")  # fmt: skip
        mssql.query("INSERT INTO dbo.dm_os_waiting_tasks SELECT request_session_id,"
                    " CASE request_session_id WHEN 59 THEN -1 ELSE 90000 END, lock_owner_address"
                    " FROM dbo.dm_tran_locks WHERE request_status = N'WAIT'")  # fmt: skip
        mssql.query("INSERT INTO dbo.dm_exec_sessions VALUES (57, N'octo-7', NULL)")
        for said, expected in SAID.items():
            text = said.format(int(time.time())).encode().ljust(128, b"\0").hex()
            mssql.query(f"UPDATE dbo.dm_exec_sessions SET context_info = 0x{text}")
            session.run(set_session_context(Wish(timeout="0")))
            assert session.fails(acquire) == 51001
            shown = re.sub(r"since \d\d:\d\d:\d\d;", "since ;", session.said)
            assert shown == f"51001 dblock: b@web-01 not acquired without waiting: {expected}; 1 ahead"
            session.release()
        mssql.query("UPDATE dbo.dm_exec_sessions SET host_name = N'a' + NCHAR(10) + N'##octopus[' + NCHAR(8232)")
        session.run(set_session_context(Wish(timeout="0")))
        assert session.fails(acquire) == 51001
        assert "(session 57, host a?#?octopus[?)" in session.said
    finally:
        for view in re.findall(r"dbo\.dm_\w+", VIEWS):
            mssql.query(f"DROP TABLE {view}")


# --- a cancel that meets the grant ------------------------------------------------------------------------------------


def sockets() -> set[int]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if str(entry.readlink()).startswith("socket:"):
                found.add(int(entry.name))
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ending", ["KILL", "closed"])
def test_end_aimed_at_the_grant(mssql: SqlServer, connect: Connect, body: Callable[[], int], ending: str) -> None:
    """Either acquire.sql says that it holds the lock, and does; or the body cannot run. The next one is served soon."""
    chance, tally = random.Random(2), Counter[str]()
    holder, third = connect(), connect()
    assert (third.acquire(Wish()), third.release()) == (0, 0)  # the first script on a connection is slow on Babelfish
    name = f"@Resource = N'{resource(Wish())}', @LockOwner = N'Session'"
    for _ in range(ROUNDS):
        holder.run(f"EXEC sp_getapplock {name}, @LockMode = N'Exclusive'")
        before = sockets()
        session = connect()
        (mine,) = sockets() - before
        waiter = Waiter(mssql, session, Wish())

        def end(session: Session = session, mine: int = mine) -> None:
            if ending == "KILL":
                with suppress(pymssql.Error):
                    mssql.end(session.id)
            else:
                # A connection must not be closed by another thread; its socket may.
                with socket.socket(fileno=os.dup(mine)) as its_socket:
                    its_socket.shutdown(socket.SHUT_RDWR)

        def give_back() -> None:
            holder.run(f"EXEC sp_releaseapplock {name}")

        delay = chance.uniform(-0.003, 0.006)
        first, then = (give_back, end) if delay > 0 else (end, give_back)
        first()
        spin(abs(delay))
        then()
        granted = waiter.join() == 0
        tally["granted" if granted else "ended"] += 1
        ran = body()
        with suppress(pymssql.Error):
            session.run(BODY)
        assert granted or body() == ran
        with suppress(pymssql.Error):
            session.connection.close()

        started = time.monotonic()
        assert third.acquire(Wish(timeout="30")) == 0, third.said
        tally["late"] += time.monotonic() - started > 1
        assert third.release() == 0
    print(f"{ending}: {dict(tally)}")
    assert tally["ended"] > 0
    assert tally["late"] == 0


def spin(seconds: float) -> None:
    """Let a moment pass that is shorter than any sleep."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
