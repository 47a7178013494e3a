"""Each word of SQL Server's has its own outcome: every code, none at all, errors, and a connection that dies.

The server is a script (`tests.scripted`): that a real one says these things is SQL Server's documentation.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from datetime import datetime, timezone
from typing import Any

import pymssql
import pytest

import dblock
from dblock import driver_pymssql, mssql
from tests.scripted import Line, Rows, scripted

URL = "mssql+pymssql://deploy:secret-7@db:1433/shared"
GRANTED_AT = int(datetime(2020, 2, 29, 10, 2, 11, tzinfo=timezone.utc).timestamp())
SINCE = re.escape(f"{datetime.fromtimestamp(GRANTED_AT, tz=timezone.utc).astimezone():%Y-%m-%d %H:%M:%S}")

OPEN = Line(r"SELECT @@SPID", [(57, "shared", "READ_WRITE", 0, 0, 2, 0, None, 0, "NoLock")])
TRIED = Line(r"sp_getapplock @Resource = N'dblock:3736245238665493732'.*@LockTimeout = 1,", [(-1, None)])
SEEN = Line(
    r"sys\.dm_tran_locks", [(1, 0, 61, f"dblock1 {GRANTED_AT} T1 web-01 b".encode() + b"\0" * 90, "app", "octo-7", 3)]
)
HIDDEN = Line(r"sys\.dm_tran_locks", [(0, 0, None, None, None, None, 0)])
RELEASED = Line(r"sp_releaseapplock", [(0,)])
DEAD = pymssql.OperationalError(
    20003, b"DB-Lib error message 20003, severity 6:\nAdaptive Server connection timed out\n"
)


def tried(answer: Rows | Exception | None) -> Line:
    return Line(TRIED.asks, answer)


def waited(answer: Rows | Exception | None, milliseconds: str = r"(59\d{4}|600000)") -> Line:
    return Line(
        rf"dblock1 w[^;]*; SET CONTEXT_INFO @label;[^;]*sp_getapplock[^;]*@LockTimeout = {milliseconds},", answer
    )


def lock(timeout: float | None = 600, database: str | None = None) -> dblock.Lock:
    return dblock.lock(URL, target="web-01", step="b", tenant="T2", timeout=timeout, database=database)


FAILURES: list[tuple[Rows | Exception, type[Exception], str]] = [
    ([(-2, None)], dblock.DatabaseError, "cancelled on the server"),
    ([(-3, None)], dblock.LockDeadlock, "deadlock"),
    ([(-999, None)], dblock.DatabaseError, "returned -999"),
    ([(-17, None)], dblock.DatabaseError, "returned -17"),
    ([(None, None)], dblock.DatabaseError, "returned nothing"),
    ([], dblock.DatabaseError, "returned nothing"),
    (
        pymssql.OperationalError(15247, b"User does not have permission"),
        dblock.DatabaseError,
        "does not have permission",
    ),
    (DEAD, dblock.DatabaseError, "connection timed out"),
]


@pytest.mark.parametrize("code", [0, 1])
def test_granted_at_once(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    with scripted(monkeypatch, [OPEN, tried([(code, None)]), RELEASED]), lock() as held:
        assert held.held


@pytest.mark.parametrize("code", [0, 1])
def test_granted_after_a_wait(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    with scripted(monkeypatch, [OPEN, TRIED, SEEN, waited([(code, None)], "-1"), RELEASED]), lock(None) as held:
        assert held.held


@pytest.mark.parametrize(("answer", "error", "text"), FAILURES)
def test_failed_at_once(
    monkeypatch: pytest.MonkeyPatch, answer: Rows | Exception, error: type[Exception], text: str
) -> None:
    with scripted(monkeypatch, [OPEN, tried(answer)]), pytest.raises(error, match=text), lock():
        pytest.fail("the body ran")


@pytest.mark.parametrize(("answer", "error", "text"), FAILURES)
def test_failed_while_waiting(
    monkeypatch: pytest.MonkeyPatch, answer: Rows | Exception, error: type[Exception], text: str
) -> None:
    with scripted(monkeypatch, [OPEN, TRIED, SEEN, waited(answer)]), pytest.raises(error, match=text), lock():
        pytest.fail("the body ran")


def test_timeout_names_the_holder(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dblock")
    holder = rf"held by tenant T1 \(session 61, host octo-7\) since {SINCE}; 3 ahead$"
    script = [OPEN, TRIED, SEEN, waited([(-1, None)]), SEEN]
    with scripted(monkeypatch, script), pytest.raises(dblock.LockTimeout) as caught, lock():
        pytest.fail("the body ran")
    assert re.fullmatch(rf"b@web-01 not acquired in 600 s: {holder}", str(caught.value))
    assert re.fullmatch(rf"waiting for b@web-01: {holder}", caplog.messages[0])


def test_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(monkeypatch, [OPEN, TRIED, HIDDEN]), pytest.raises(dblock.LockTimeout) as caught, lock(0):
        pytest.fail("the body ran")
    assert str(caught.value) == "b@web-01 not acquired without waiting: holder not visible to this login"


@pytest.mark.parametrize(("row", "text"), [
    ((1, 0, None, None, None, None, 0), "nobody holds it at this moment"),
    ((1, 0, 61, None, "SSMS", "desk-3", 1), "held by a session (session 61, application SSMS, host desk-3); 1 ahead"),
    ((1, 2, 61, None, "SSMS", None, 0), "held by a session (session 61, application SSMS) and 2 others"),
    ((1, 0, 61, b"dblock1 1 T1 other b", "x", None, 0), "held by a session (session 61, application x)"),
    ((1, 0, 61, b"\xff\xfe\x1b[31m", "a\x1b[31m", "h\n", 0),
     r"held by a session (session 61, application a\x1b[31m, host h\n)"),
])  # fmt: skip
def test_what_is_said_of_the_holder(monkeypatch: pytest.MonkeyPatch, row: tuple[object, ...], text: str) -> None:
    script = [OPEN, TRIED, Line("dm_tran_locks", [row])]
    with scripted(monkeypatch, script), pytest.raises(dblock.LockTimeout) as caught, lock(0):
        pytest.fail("the body ran")
    assert str(caught.value) == f"b@web-01 not acquired without waiting: {text}"


def test_a_timed_wait_ends_though_the_server_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(monkeypatch, [OPEN, TRIED, SEEN, waited(None, r"[12]?\d?\d")]):
        began = time.monotonic()
        assert lock().acquire(timeout=0.2) is False
        assert time.monotonic() - began >= 0.2


def test_a_long_wait_is_reported_from_another_session(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dblock")
    monkeypatch.setattr(driver_pymssql, "REPORT_SECONDS", 0.15)
    reports = [[SEEN], [HIDDEN], [Line("dm_tran_locks", DEAD)]]
    with scripted(monkeypatch, [OPEN, TRIED, SEEN, waited(None, r"[1-5]?\d?\d")], *reports):
        assert lock().acquire(timeout=0.5) is False
    first, second, third, fourth, *_ = caplog.messages
    assert first == second
    assert "held by tenant T1" in first
    assert third == "waiting for b@web-01: holder not visible to this login"
    assert fourth.startswith("waiting for b@web-01; who is in the way cannot be asked: ")


@pytest.mark.parametrize(("said", "error", "text"), [
    ({"updateability": "READ_ONLY"}, dblock.UnsafeConnection, "readable secondary"),
    ({"updateability": None}, dblock.UnsafeConnection, "readable secondary"),
    ({"database": "master"}, dblock.UnsafeConnection, "'master', but 'shared' was asked for"),
    ({"open_transactions": 1}, dblock.UnsafeConnection, "inside a transaction"),
    ({"options": 5496 | 2}, dblock.UnsafeConnection, "IMPLICIT_TRANSACTIONS"),
    ({"mode": "Exclusive"}, dblock.AlreadyHeld, "holds the lock already"),
])  # fmt: skip
def test_refused_before_anything_is_taken(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], error: type[Exception], text: str
) -> None:
    row = mssql.Opened(57, "shared", "READ_WRITE", 0, 0, 2, 5496, None, 0, "NoLock")._replace(**said)
    with scripted(monkeypatch, [Line(OPEN.asks, [row])]), pytest.raises(error, match=text), lock(database="shared"):
        pytest.fail("the body ran")


@pytest.mark.parametrize("answer", [[(-1000,)], [(-999,)], [(None,)], [], DEAD])
def test_a_release_that_is_none_is_a_loss(monkeypatch: pytest.MonkeyPatch, answer: Rows | Exception) -> None:
    held = lock()
    with scripted(monkeypatch, [OPEN, tried([(0, None)]), Line(RELEASED.asks, answer)]):
        held.acquire()
        with pytest.raises(dblock.LockLost):
            held.release()
    assert not held.held


@pytest.mark.parametrize(("before", "restored"), [(None, "0x;"), (b"\x01\xff", "0x01ff;")])
def test_context_info_is_restored(monkeypatch: pytest.MonkeyPatch, before: bytes | None, restored: str) -> None:
    release = Line(rf"sp_releaseapplock[^@]*@Resource[\s\S]*SET CONTEXT_INFO {restored}", [(0,)])
    opened = Line(OPEN.asks, [(57, "shared", "READ_WRITE", 0, 0, 2, 0, before, 0, "NoLock")])
    with scripted(monkeypatch, [opened, tried([(0, None)]), release]), lock():
        pass


def test_the_held_connection_is_asked_after(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked = Line(r"^SELECT APPLOCK_MODE\('public', N'dblock:3736245238665493732', 'Session'\);$", [("Exclusive",)])
    script = [OPEN, tried([(0, None)]), asked, asked, Line(asked.asks, [("NoLock",)])]
    held = dblock.lock(URL, target="web-01", step="b", heartbeat=0.1)
    with scripted(monkeypatch, script):
        held.acquire()
        assert held.lost.wait(30)
        assert not held.held
        assert "b@web-01 was lost while it was held" in caplog.text
        with pytest.raises(dblock.LockLost, match="has it no more"):
            held.release()


def test_no_watch_outlives_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(monkeypatch, [OPEN, tried([(0, None)]), RELEASED]):
        with lock():
            (watch,) = [thread for thread in threading.enumerate() if thread.name == "dblock watch"]
        assert not watch.is_alive()


def test_check(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = r"APPLOCK_MODE"
    held = lock()
    with scripted(monkeypatch, [OPEN, tried([(0, None)]), Line(asked, [("Exclusive",)]), Line(asked, [("Shared",)])]):
        held.acquire()
        held.check()
        with pytest.raises(dblock.LockLost):
            held.check()
        with pytest.raises(dblock.LockLost):
            held.release()
    with pytest.raises(dblock.LockNotHeld):
        held.check()
