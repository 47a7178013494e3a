"""One table of cases for all doors on all engines: what is asked for, what the server shows, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

import dblock
from tests.backends import Backend, Postgres
from tests.doors import (
    ALL_DOORS,
    COMMAND,
    COMMAND_MSSQL,
    DRIVER,
    FISQL,
    PSQL,
    PYMSSQL,
    PYTHON,
    PYTHON_MSSQL,
    Door,
    Wish,
)
from tests.support import wait_until

SCRIPTS = (PSQL, DRIVER, FISQL, PYMSSQL)
COMMANDS = (COMMAND, COMMAND_MSSQL)


@dataclass(frozen=True)
class Case:
    """What is asked for, with which outcome, and what the label is while the lock is held."""

    name: str
    wish: Wish
    outcome: str = "done"
    fields: str = ""
    mssql_fields: str = ""  # where the longer label there holds more
    options: str = ""  # settings of the session, as libpq's PGOPTIONS
    doors: tuple[Door, ...] = ALL_DOORS  # those that have such a setting, and a way to carry the value

    def label(self, door: Door) -> str:
        return f"dblock1 T {(self.mssql_fields if door.engine == 'mssql' else '') or self.fields}"

    def __str__(self) -> str:
        return self.name


LONG = "n" * 40
THIS = "the database of the test's server"
CASES = [
    Case("plain", Wish(), fields="- web-01 b"),
    Case("tenant", Wish(tenant="T1"), fields="T1 web-01 b"),
    Case("the longest wait", Wish(timeout="2147483"), fields="- web-01 b"),
    Case("free, so nobody waits", Wish(timeout="0"), fields="- web-01 b"),
    Case("fractions of a second", Wish(timeout="0.001"), fields="- web-01 b"),
    Case("the agreed database", Wish(database=THIS), fields="- web-01 b"),
    Case("empty texts are absent", Wish(more={"tenant": "", "shared": "", "slots": "", "scope": "", "key": ""}),
         fields="- web-01 b", doors=SCRIPTS),
    Case("shape in full", Wish(more={"shared": "off", "scope": "session"}), fields="- web-01 b", doors=SCRIPTS),
    Case("the expected key", Wish(more={"key": str(dblock.key("web-01", "b").value)}), fields="- web-01 b",
         doors=SCRIPTS),
    Case("quotes and dollars", Wish(target="O'Brien \"x\"", step="$(rm) `ls` $$", tenant="a\\'b"),
         fields="a%5C%27b O%27Brien%20%22x~ %24%28rm%29%20~",
         mssql_fields="a%5C%27b O%27Brien%20%22x%22 %24%28rm%29%20%60ls%60%20%24%24"),
    Case("beyond ASCII", Wish(target="wéb", step="Schritt ß", tenant="Ωmega"),
         fields="%CE%A9mega w%C3%A9b Schritt%20%C3%9F"),
    Case("white space inside and other than U+0020 at the edges", Wish(target="\u00a0a b\u2028", step="\u0085"),
         fields="- %C2%A0a%20b%E2%80%A8 %C2%85"),
    Case("a tenant called -", Wish(tenant="-"), fields="%2D web-01 b"),
    Case("the longest gives way, the tenant first", Wish(target=LONG, step=LONG, tenant=LONG),
         fields=f"{'n' * 13}~ {'n' * 13}~ {'n' * 13}~", mssql_fields=f"{'n' * 34}~ {'n' * 35}~ {'n' * 35}~"),
    Case("control characters in the tenant", Wish(tenant="a\nb\x1b[31m"), fields="a%0Ab%1B%5B31m web-01 b"),
    Case("255 bytes", Wish(target="é" * 127 + "x"), fields=f"- {'%C3%A9' * 6}%C3~ b",
         mssql_fields=f"- {'%C3%A9' * 17}~ b"),
    # What is refused never shows a lock.
    Case("256 bytes", Wish(target="é" * 128), "bad name or setting"),
    Case("no target", Wish(target=""), "bad name or setting"),
    Case("no step", Wish(step=""), "bad name or setting"),
    Case("space at the edge", Wish(target=" web-01"), "bad name or setting"),
    Case("space at the other edge", Wish(step="b "), "bad name or setting"),
    Case("control character", Wish(step="b\x1f"), "bad name or setting"),
    Case("delete", Wish(step="b\x7fc"), "bad name or setting"),
    Case("negative timeout", Wish(timeout="-1"), "bad name or setting"),
    Case("too long a timeout", Wish(timeout="2147484"), "bad name or setting"),
    Case("a timeout with a unit", Wish(timeout="5x"), "bad name or setting", doors=(*COMMANDS, *SCRIPTS)),
    Case("a timeout with an exponent", Wish(timeout="1e3"), "bad name or setting", doors=(*COMMANDS, *SCRIPTS)),
    Case("not a number", Wish(timeout="nan"), "bad name or setting"),
    Case("a timeout with a line feed", Wish(timeout="5\n"), "bad name or setting", doors=(*COMMANDS, *SCRIPTS)),
    Case("four decimals", Wish(timeout="0.0001"), "bad name or setting", doors=SCRIPTS),
    Case("another database", Wish(database="elsewhere"), "unsafe"),
    Case("read-only", Wish(), "unsafe", options="-c default_transaction_read_only=on"),
    Case("another key", Wish(more={"key": "42"}), "bad name or setting", doors=SCRIPTS),
    Case("shared, neither on nor off", Wish(more={"shared": "ON"}), "bad name or setting", doors=SCRIPTS),
    Case("slots, not a number", Wish(more={"slots": "0"}), "bad name or setting", doors=SCRIPTS),
    Case("slots beside shared", Wish(more={"slots": "2", "shared": "on"}), "bad name or setting", doors=SCRIPTS),
    Case("scope, neither", Wish(more={"scope": "statement"}), "bad name or setting", doors=SCRIPTS),
    Case("slots, too many", Wish(more={"slots": "1000"}), "bad name or setting", doors=SCRIPTS),
    Case("transaction, outside of one", Wish(more={"scope": "transaction"}), "unsafe", doors=SCRIPTS),
    # Settings of the session that must neither break a lock nor matter.
    Case("tight settings", Wish(), fields="- web-01 b",
         options="-c lock_timeout=1 -c idle_session_timeout=0 -c statement_timeout=400"),
    Case("serializable", Wish(), fields="- web-01 b", options="-c default_transaction_isolation=serializable"),
]  # fmt: skip


# What the options set is PostgreSQL's.
TABLE = [(case, door) for case in CASES for door in case.doors if not case.options or door.engine == "postgres"]


@pytest.mark.parametrize(("case", "door"), TABLE, ids=str)
def test_table(backend: Backend, case: Case, door: Door) -> None:
    wish = replace(case.wish, database=backend.database) if case.wish.database == THIS else case.wish
    with door.attempt(backend.url, wish, PGOPTIONS=case.options) as attempt:
        if case.outcome == "done":
            assert attempt.held(), attempt.stderr()
            assert backend.rows(wish) == [backend.holding(case.label(door))]
        else:
            assert not attempt.held()
        assert attempt.finish() == door.says(case.outcome), attempt.stderr()
    wait_until(lambda: backend.all_rows() == [], "the locks to be gone")


@pytest.mark.parametrize("door", ALL_DOORS, ids=str)
@pytest.mark.parametrize(("timeout", "ending"), [
    ("0", "timeout"), ("short", "timeout"), ("30", "done"), (None, "done"), (None, "cancelled"), (None, "terminated"),
])  # fmt: skip
def test_busy(backend: Backend, door: Door, timeout: str | None, ending: str) -> None:
    if ending == "cancelled" and not isinstance(backend, Postgres):
        ending = "terminated"  # SQL Server lets nobody cancel another session's statement alone
    if timeout == "short":
        timeout = backend.short_wait
    wish = Wish(tenant="T2", timeout=timeout)
    holder = dblock.lock(backend.url, target=wish.target, step=wish.step, tenant="T1")
    holder.acquire()
    holding = [backend.holding("dblock1 T T1 web-01 b")]
    waiting = backend.waiting("dblock1 wT T2 web-01 b")
    assert backend.rows(wish) == holding
    # Another door's waiter in the same state: statement_timeout and lock_timeout must not break a wait.
    with door.attempt(backend.url, wish, PGOPTIONS="-c statement_timeout=300 -c lock_timeout=100") as attempt:
        if timeout != "0":
            wait_until(lambda: backend.rows(wish) == [*holding, *waiting], "the waiter's locks")
        if ending in ("cancelled", "terminated"):
            (waiter,) = backend.waiters()
            end = backend.cancel if ending == "cancelled" and isinstance(backend, Postgres) else backend.end
            # A cancel that arrives between two statements of a waiter cancels nothing, so it is said until it is heard.
            wait_until(lambda: waiter not in backend.waiters() or end(waiter), "the waiter to be gone")
        if ending == "done":
            holder.release()
            assert attempt.held(), attempt.stderr()
            assert backend.rows(wish) == [backend.holding("dblock1 T T2 web-01 b")]
        else:
            assert not attempt.held()
            wait_until(lambda: backend.rows(wish) == holding, "the waiter's locks to be gone")
            holder.release()
        assert attempt.finish() == door.says(ending), attempt.stderr()
        if ending == "timeout":
            waited = "without waiting" if timeout == "0" else f"in {timeout} s"
            assert f"b@web-01 not acquired {waited}: {backend.in_the_way('T1')}" in attempt.stderr()
    wait_until(lambda: backend.all_rows() == [], "the locks to be gone")


UNREACHABLE = {
    "postgres": "postgresql://nobody@127.0.0.1:1/nothing",
    "mssql": "mssql+pymssql://nobody@127.0.0.1:1/nothing",
}


@pytest.mark.parametrize("door", [PYTHON, PYTHON_MSSQL, *COMMANDS], ids=str)  # without a connection there is no script
def test_unreachable(door: Door) -> None:
    with door.attempt(UNREACHABLE[door.engine], Wish()) as attempt:
        assert not attempt.held()
        assert attempt.finish() == door.says("unreachable")
        assert "cannot connect to the database" in attempt.stderr()
