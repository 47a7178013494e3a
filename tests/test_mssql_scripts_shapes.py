"""sql/mssql/acquire.sql and release.sql: shared locks, slots, and locks of a transaction.

Babelfish shows application locks as PostgreSQL's advisory locks, counts them by server, and cannot give back a lock of
a transaction before its end. The first script of a connection takes it seconds, so connections are used again here.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from typing import NamedTuple

import pymssql
import pytest

import dblock
from dblock import label
from tests.backends import SqlServer
from tests.doors import Wish, set_session_context
from tests.support import wait_until
from tests.test_mssql_scripts import ACQUIRE, BODY, HELD, OPEN, RELEASE, Session, Waiter, body, fisql, resource

__all__ = ["body"]  # a fixture

SHAPES = {"exclusive": {}, "shared": {"shared": "on"}, "slots": {"slots": "2"}}
COMPATIBLE = {("shared", "shared"), ("shared", "slots"), ("slots", "shared"), ("slots", "slots")}
PAIRS = [(first, second) for first in SHAPES for second in SHAPES]
TRANSACTION = {"scope": "transaction"}
QUEUE = resource(Wish()) + "q"
CONTEXT = "SELECT CAST(SESSION_CONTEXT(N'dblock.{}') AS nvarchar(4000))"
WISHES = ("target", "step", "tenant", "timeout", "shared", "slots", "scope", "database", "key")


def permit(number: int) -> str:
    """The resource of a permit of b@web-01."""
    digest = sha256(b"web-01\x1fb\x1f" + str(number).encode()).digest()
    return f"dblock:{int.from_bytes(digest[:8], 'big', signed=True)}"


class Caller(Session):
    """A session that is used again by later tests, and asked for locks by their shape."""

    def ask(self, shape: str = "exclusive", timeout: str = "0", **more: str) -> int:
        tenant = more.pop("tenant", None)
        target = more.pop("target", "web-01")
        return self.acquire(Wish(target, tenant=tenant, timeout=timeout, more={**SHAPES[shape], **more}))

    def ask_in_transaction(self, shape: str = "exclusive", timeout: str = "0", **more: str) -> int:
        self.run("IF @@TRANCOUNT = 0 BEGIN TRANSACTION")
        return self.ask(shape, timeout, scope="transaction", **more)

    def context(self, name: str) -> str | None:
        found: str | None = self.value(CONTEXT.format(name))
        return found or None

    @property
    def slot(self) -> str | None:
        return self.context("slot")

    @property
    def held(self) -> str:
        return str(self.value(HELD) or "")

    def takes(self, name: str, mode: str = "Exclusive", owner: str = "Session") -> int:
        """Take a resource by hand."""
        return int(self.value(
            f"DECLARE @code int; EXEC @code = sp_getapplock @Resource = N'{name}', @LockMode = N'{mode}',"
            f" @LockOwner = N'{owner}', @LockTimeout = -1, @DbPrincipal = N'public'; SELECT @code"
        ))  # fmt: skip

    def gives_back(self, name: str) -> None:
        self.run(f"EXEC sp_releaseapplock @Resource = N'{name}', @LockOwner = N'Session', @DbPrincipal = N'public'")

    def begins_anew(self) -> None:
        self.run(OPEN)
        self.run("IF @@TRANCOUNT > 0 ROLLBACK; SET XACT_ABORT OFF; SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        while self.release() != 51004 or "failed" in self.said or "cut off" in self.said or "longer" in self.said:
            pass
        names = (*WISHES, "slot", "held", "waiting", "failed")
        self.run(";".join(f"EXEC sp_set_session_context N'dblock.{name}', NULL" for name in names))
        self.run("SET CONTEXT_INFO 0x")


class Company:
    """The callers, and what they hold."""

    def __init__(self, mssql: SqlServer, idle: list[Caller]) -> None:
        self.mssql = mssql
        self._idle = idle
        self._busy: list[Caller] = []

    def __call__(self) -> Caller:
        self._busy.append(self._idle.pop() if self._idle else Caller(self.mssql.url))
        return self._busy[-1]

    def locks(self, session: Session) -> list[str]:
        """The modes of all application locks of a session that are granted."""
        letters = {"ExclusiveLock": "X", "ShareLock": "S"}
        return sorted(letters.get(row.mode, row.mode) for row, pid in self.mssql.all_rows()
                      if pid == session.id and row.granted)  # fmt: skip

    def holds_nothing(self, session: Caller) -> bool:
        return not self.locks(session) and session.context("waiting") is None

    def part(self) -> None:
        for one in self._busy:
            try:
                one.begins_anew()
            except (AssertionError, pymssql.Error):
                with suppress(pymssql.Error):
                    one.connection.close()
            else:
                self._idle.append(one)
        holders = {pid for _, pid in self.mssql.all_rows()} & {one.id for one in self._idle}
        assert holders == set(), "a caller could not give back what it held"


@pytest.fixture(scope="module")
def idle() -> Iterator[list[Caller]]:
    callers: list[Caller] = []
    yield callers
    for one in callers:
        with suppress(pymssql.Error):
            one.connection.close()


@pytest.fixture
def caller(mssql: SqlServer, idle: list[Caller]) -> Iterator[Company]:
    company = Company(mssql, idle)
    yield company
    company.part()


def waits(company: Company, session: Caller, shape: str = "exclusive", **more: str) -> Waiter:
    return Waiter(company.mssql, session, Wish(tenant=more.pop("tenant", None), more={**SHAPES[shape], **more}))


def naps(company: Company, session: Caller, **more: str) -> Waiter:
    """Wait for a permit: with the queue in its hand and in no queue of the server's."""
    wish = Wish(tenant=more.pop("tenant", None), more={"slots": "2", **more})
    session.run(set_session_context(wish))
    waiter = Napper(session)
    wait_until(lambda: company.locks(session) == ["X"] or waiter.result != "waiting", "the queue in its hand")
    return waiter


class Napper(Waiter):
    def __init__(self, session: Caller) -> None:
        self.session = session
        self.result: int | str = "waiting"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()


# --- who keeps out whom -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_who_keeps_out_whom(caller: Company, first: str, second: str) -> None:
    holder, other = caller(), caller()
    assert holder.ask(first) == 0, holder.said
    if (first, second) in COMPATIBLE:
        assert other.ask(second) == 0, other.said
        assert other.release() == holder.release() == 0
        assert caller.holds_nothing(other)
        return
    for timeout in ("0", "0.3"):
        started = time.monotonic()
        assert other.ask(second, timeout) == 51001
        assert time.monotonic() - started >= float(timeout)
        assert other.run("SELECT 1") == []
        assert other.release() == 51004
        assert caller.holds_nothing(other)
    assert holder.release() == 0
    assert other.ask(second) == 0
    assert other.release() == 0
    assert caller.holds_nothing(other)


@pytest.mark.parametrize(("shape", "locks"), [("exclusive", ["X"]), ("shared", ["S"]), ("slots", ["S", "X"])])
def test_what_is_taken(caller: Company, shape: str, locks: list[str]) -> None:
    for ask, owner in ((Caller.ask, "Session"), (Caller.ask_in_transaction, "Transaction")):
        one = caller()
        assert ask(one, shape) == 0, one.said
        assert caller.locks(one) == locks
        names = [resource(Wish())] + [permit(0)] * (shape == "slots")
        modes = ["Exclusive" if shape == "exclusive" else "Shared", "Exclusive"]
        for name, mode in zip(names, modes):  # noqa: B905 - as many as there are names
            assert one.value(f"SELECT APPLOCK_MODE('public', N'{name}', '{owner}')") == mode
        assert one.value(f"SELECT APPLOCK_MODE('public', N'{QUEUE}', 'Session')") == "NoLock"
        assert one.slot == ("0" if shape == "slots" else None)
        assert one.release() == 0
        one.run("IF @@TRANCOUNT > 0 COMMIT")
        assert caller.holds_nothing(one)


@pytest.mark.parametrize("shape", ["shared", "slots"])
def test_who_waits_for_the_whole_lock_comes_before_later_ones(caller: Company, shape: str) -> None:
    holder, whole, later = caller(), caller(), caller()
    assert holder.ask(shape) == 0
    waiting = waits(caller, whole)
    behind = waits(caller, later, shape)
    assert holder.release() == 0
    assert waiting.join() == 0
    assert later.id in caller.mssql.waiters()
    assert whole.release() == 0
    assert behind.join() == 0
    assert later.release() == 0


# --- slots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaver", [0, 1, 2])
@pytest.mark.parametrize("way", ["release", "close"])
def test_at_most_n_and_the_next_after_any_of_them(caller: Company, leaver: int, way: str) -> None:
    inside = [caller() for _ in range(3)]
    for one in inside:
        assert one.ask("slots", slots="3") == 0
    assert [one.slot for one in inside] == ["0", "1", "2"]
    last = caller()
    for timeout in ("0", "0.3"):
        assert last.ask("slots", timeout, slots="3") == 51001
        last.release()
        assert caller.holds_nothing(last)
    waiter = naps(caller, last, slots="3")
    assert waiter.result == "waiting"
    if way == "release":
        assert inside[leaver].release() == 0
    else:
        inside[leaver].connection.close()
    assert waiter.join() == 0
    assert last.slot == str(leaver)


def test_different_numbers_share_the_first_permits(caller: Company) -> None:
    wanted = [("1", "0"), ("3", "1"), ("1", None), ("2", None), ("3", "2"), ("3", None), ("4", "3")]
    for slots, slot in wanted:
        one = caller()
        assert one.ask("slots", slots=slots) == (51001 if slot is None else 0)
        if slot is None:
            assert one.release() == 51004
        assert one.slot == slot


def test_permits_are_numbered_as_in_the_contract(caller: Company) -> None:
    """Those with one digit, two and three."""
    others, one = caller(), caller()
    for number in range(12):
        assert others.takes(permit(number)) == 0
    assert one.ask("slots", slots="999") == 0
    assert (one.slot, one.value(f"SELECT APPLOCK_MODE('public', N'{permit(12)}', 'Session')")) == ("12", "Exclusive")
    for number in range(12):
        others.gives_back(permit(number))
    assert one.release() == 0
    # So many at once are more than Babelfish has room for: only the test is told that they are taken.
    for number in (98, 99, 100, 357, 998):
        test = "IF APPLOCK_TEST("
        assert ACQUIRE.count(test) == 1
        one.run(set_session_context(Wish(timeout="0", more={"slots": "999"})))
        assert one.fails(ACQUIRE.replace(test, f"IF @dblock_slot >= {number} AND APPLOCK_TEST(")) == 0
        assert one.slot == str(number)
        assert one.value(f"SELECT APPLOCK_MODE('public', N'{permit(number)}', 'Session')") == "Exclusive"
        assert one.release() == 0


def test_waiters_for_a_permit_are_served_in_order(caller: Company) -> None:
    holder = caller()
    assert holder.ask("slots", slots="1") == 0
    sessions = [caller() for _ in range(4)]
    waiters = [naps(caller, sessions[0], slots="1", tenant="W0")]
    waiters += [waits(caller, one, "slots", slots="1", tenant=f"W{n}") for n, one in enumerate(sessions[1:], 1)]
    shown = [row.label for row, pid in caller.mssql.all_rows() if not row.granted]
    assert shown == [f"dblock1 wT {label.fields(f'W{n}', 'web-01', 'b', time_width=11, limit=128)}"
                     for n in (1, 2, 3)]  # fmt: skip
    assert holder.release() == 0
    for n, waiter in enumerate(waiters):
        assert waiter.join() == 0
        assert [later.result for later in waiters[n + 1 :]] == ["waiting"] * (3 - n)
        assert sessions[n].label.endswith(f" W{n} web-01 b")
        assert sessions[n].release() == 0


def test_slots_compete(caller: Company) -> None:
    """Six sessions, three of them inside: never two with one number."""
    inside: list[str] = []
    gate = threading.Lock()
    faults: list[object] = []

    def work(one: Caller, chance: random.Random) -> None:
        try:
            for _ in range(8):
                assert one.ask("slots", "60", slots=chance.choice(["2", "3", "3"])) == 0, one.said
                slot = str(one.slot)
                with gate:
                    inside.append(slot)
                    if len(set(inside)) != len(inside) or len(inside) > 3:
                        faults.append(list(inside))
                one.run("SELECT 1")
                with gate:
                    inside.remove(slot)
                assert one.release() == 0, one.said
        except (AssertionError, pymssql.Error) as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(caller(), random.Random(n))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


@pytest.mark.parametrize("where", ["queue", "permit", "lock"])
def test_a_timeout_leaves_nothing(caller: Company, where: str) -> None:
    """Wherever it meets: before the queue, between looks, or with a free permit in sight."""
    holder, one = caller(), caller()
    one.run("SET CONTEXT_INFO 0x0102")
    if where == "queue":
        holder.takes(QUEUE)
    elif where == "permit":
        for number in (0, 1):
            holder.takes(permit(number))
    else:
        holder.takes(resource(Wish()))
    for timeout in ("0", "0.4"):
        started = time.monotonic()
        assert one.ask("slots", timeout) == 51001, one.said
        assert time.monotonic() - started >= float(timeout)
        assert one.release() == 51004
        assert caller.holds_nothing(one)
        assert (one.label, one.held, one.slot) == ("\1\2", "", None)
    for name in (QUEUE, permit(0), permit(1), resource(Wish())):
        with suppress(pymssql.Error):
            holder.gives_back(name)


def test_a_permit_that_somebody_else_snatches(caller: Company) -> None:
    """Between the look and the taking: the lock goes back, and the next look takes another one."""
    thief, one = caller(), caller()
    thief.takes(permit(0))
    blind = ACQUIRE.replace("IF APPLOCK_TEST(", "IF @dblock_nap = 1 AND @dblock_slot = 0 OR APPLOCK_TEST(")
    one.run(set_session_context(Wish(timeout="5", more={"slots": "2"})))
    assert one.fails(blind) == 0, one.said
    assert one.slot == "1"
    assert caller.locks(one) == ["S", "X"]
    assert one.release() == 0
    assert caller.holds_nothing(one)
    thief.gives_back(permit(0))


def test_the_slot_of_the_outer_lock_is_back_after_the_inner_one(caller: Company) -> None:
    other, one = caller(), caller()
    assert other.ask("slots") == 0
    assert one.ask("slots") == 0
    assert one.slot == "1"
    for shape, slot in (("exclusive", None), ("slots", "0")):
        assert one.ask(shape, target="inner") == 0
        assert one.slot == slot
        assert one.release() == 0
        assert one.slot == "1"
    assert one.ask(target="inner", timeout="soon") == 51003
    assert one.release() == 51004
    assert one.slot == "1"
    assert one.release() == 0
    assert one.slot is None


def test_a_permit_given_back_by_hand(caller: Company) -> None:
    one = caller()
    assert one.ask("slots") == 0
    one.gives_back(permit(0))
    assert one.release() == 51004
    assert "by somebody else" in one.said
    assert caller.holds_nothing(one)


def test_python_and_the_script_share_the_permits(caller: Company) -> None:
    """Whoever of them is inside, the numbers are never the same, and the next one is served by either's release."""
    url, one, last = caller.mssql.url, caller(), caller()
    with dblock.lock(url, target="web-01", step="b", slots=2) as first:
        assert first.slot == 0
        assert one.ask("slots") == 0
        assert one.slot == "1"
        assert last.ask("slots") == 51001
        last.release()
        assert last.ask("exclusive") == 51001
        last.release()
        with pytest.raises(dblock.LockTimeout), dblock.lock(url, target="web-01", step="b", slots=2, timeout=0):
            pass
        waiter = naps(caller, last)
    assert waiter.join() == 0
    assert last.slot == "0"
    assert one.release() == 0
    with dblock.lock(url, target="web-01", step="b", slots=2, timeout=0) as other:
        assert other.slot == 1
    assert last.release() == 0
    with dblock.lock(url, target="web-01", step="b", shared=True):
        assert one.ask("shared") == 0
        assert last.ask() == 51001


# --- never twice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_scope", ["session", "transaction"])
@pytest.mark.parametrize("first", SHAPES)
def test_never_twice_in_one_session(caller: Company, first: str, first_scope: str) -> None:
    one = caller()
    ask = Caller.ask if first_scope == "session" else Caller.ask_in_transaction
    assert ask(one, first) == 0
    locks = caller.locks(one)
    for second in SHAPES:
        scopes = ("session", "transaction") if first_scope == "session" else ("transaction",)
        for scope in scopes:
            again = Caller.ask if scope == "session" else Caller.ask_in_transaction
            assert again(one, second) == 51006, one.said
            assert one.run("SELECT 1") == []
            assert one.release() == 51004
            assert caller.locks(one) == locks
            if first_scope == "session":
                one.run("IF @@TRANCOUNT > 0 ROLLBACK")
    assert one.release() == 0
    one.run("IF @@TRANCOUNT > 0 ROLLBACK")
    assert caller.holds_nothing(one)


# --- for a transaction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("shape", SHAPES)
def test_until_the_transaction_ends_and_not_before(caller: Company, shape: str, end: str) -> None:
    one, other = caller(), caller()
    one.run("SET CONTEXT_INFO 0x0102")
    assert one.ask_in_transaction(shape, tenant="T1") == 0
    assert one.label.startswith("dblock1 1")
    locks = caller.locks(one)
    assert other.ask() == 51001
    other.release()
    assert one.release() == 0, one.said
    assert (caller.locks(one), one.label, one.held, one.slot) == (locks, "\1\2", "", None)
    assert other.ask() == 51001
    other.release()
    waiter = waits(caller, other)
    one.run(end)
    assert waiter.join() == 0
    assert caller.holds_nothing(one)
    assert one.release() == 51004


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_release_after_the_end_says_so(caller: Company, shape: str, end: str) -> None:
    one = caller()
    one.run("SET CONTEXT_INFO 0x0102")
    assert one.ask_in_transaction(shape) == 0
    one.run(end)
    assert one.release() == 51004
    assert "ended with its transaction" in one.said
    assert (one.label, one.held, one.slot) == ("\1\2", "", None)
    assert one.ask() == 0
    assert one.release() == 0


def test_what_an_ended_transaction_left_confuses_nobody(caller: Company) -> None:
    one = caller()
    one.run("SET CONTEXT_INFO 0x0102")
    assert one.ask("slots", target="outer") == 0
    outer = (one.held, one.label, one.slot)
    assert one.ask_in_transaction("slots") == 0
    assert one.ask_in_transaction(target="web-02") == 0
    assert one.slot is None
    one.run("COMMIT")
    # The same ones again, and one that begins outside any transaction.
    assert one.ask_in_transaction() == 0
    assert one.held.count(";") == 2
    assert one.release() == 0
    assert (one.held, one.label, one.slot) == outer
    one.run("ROLLBACK")
    assert one.ask_in_transaction() == 0
    one.run("ROLLBACK")
    assert one.ask() == 0
    assert one.held.count(";") == 2
    assert one.release() == 0
    assert (one.held, one.label, one.slot) == outer
    # A failure puts back what was before the ended ones, too.
    assert one.ask_in_transaction() == 0
    one.run("ROLLBACK")
    other = caller()
    assert other.ask() == 0
    assert one.ask(timeout="0.2") == 51001
    assert one.release() == 51004
    assert (one.held, one.label, one.slot) == outer
    assert one.release() == 0
    assert one.label == "\1\2"


def test_locks_of_one_transaction(caller: Company) -> None:
    one = caller()
    for target in ("a", "b", "c"):
        assert one.ask_in_transaction(target=target) == 0
    assert one.label.endswith(" c b")
    assert [one.release() for _ in range(4)] == [0, 0, 0, 51004]
    assert one.ask_in_transaction(target="b") == 51006
    assert one.release() == 51004
    one.run("COMMIT")
    assert caller.holds_nothing(one)


def test_a_lock_of_the_session_around_one_of_a_transaction(caller: Company) -> None:
    one = caller()
    assert one.ask() == 0
    assert one.ask_in_transaction(target="inner") == 0
    assert one.release() == 0
    assert one.release() == 51005
    one.run("COMMIT")
    assert one.release() == 0
    assert caller.holds_nothing(one)


def test_a_step_in_a_transaction(caller: Company, body: Callable[[], int]) -> None:
    """Batch after batch, whatever became of the one before; the work of a refused one is not done."""
    holder, one = caller(), caller()
    batches = ["BEGIN TRANSACTION", ACQUIRE, BODY, RELEASE, "COMMIT"]
    assert holder.ask() == 0
    one.run(set_session_context(Wish(timeout="0.2", more=TRANSACTION)))
    assert [one.fails(batch) for batch in batches] == [0, 51001, 0, 51004, 0]
    assert body() == 0
    assert holder.release() == 0
    one.run(set_session_context(Wish(timeout="0.2", more=TRANSACTION)))
    assert [one.fails(batch) for batch in batches] == [0] * 5
    assert (body(), caller.locks(one)) == (1, [])


def test_fisql_in_a_transaction(mssql: SqlServer, body: Callable[[], int]) -> None:
    for more in SHAPES.values():
        wish = Wish(timeout="0", more={**TRANSACTION, **more})
        script = "\ngo\n".join([set_session_context(wish), "BEGIN TRANSACTION", ACQUIRE, BODY, RELEASE, "COMMIT", ""])
        assert "dblock:" not in fisql(mssql.url, script)
    assert body() == 3


def test_without_a_transaction_that_can_be_committed(caller: Company) -> None:
    one = caller()
    assert one.ask(scope="transaction") == 51005
    assert "there is none" in one.said
    assert one.release() == 51004
    for level, refused in (("SNAPSHOT", True), ("READ COMMITTED", False)):
        one.run(f"SET TRANSACTION ISOLATION LEVEL {level}")
        assert one.ask_in_transaction() == (51005 if refused else 0), one.said
        assert not refused or "SNAPSHOT" in one.said
        assert one.release() == (51004 if refused else 0)
        one.run("ROLLBACK")
    one.run("SET XACT_ABORT ON")
    one.run("BEGIN TRANSACTION")
    one.run(set_session_context(Wish(more=TRANSACTION)))
    doomed = "DECLARE @zero int = 0; BEGIN TRY SET @zero = 1 / @zero; END TRY BEGIN CATCH SET @zero = 1; END CATCH;"
    assert one.fails(f"{doomed} {ACQUIRE}") == 51005
    assert "rolled back" in one.said
    one.run(OPEN)
    assert caller.holds_nothing(one)


# --- a cancel anywhere ------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """Where a batch ends, as a cancel ends it."""

    step: str
    after: bool


CUTS = [Cut(step, after) for step in ("queue", "lock", "permit") for after in (False, True)] + [Cut("nap", False)]


def cut_off(cut: Cut) -> str:
    pattern = r"EXECUTE \(@dblock_sql\);" if cut.step == "nap" else r"EXEC @dblock_result = sys\.sp_getapplock[^;]*;"
    place = re.search(pattern, ACQUIRE)
    assert place
    at = place.end() if cut.after else place.start()
    asked = "" if cut.step == "nap" else f"IF @dblock_next = N'{cut.step}' "
    return f"{ACQUIRE[:at]} {asked}RETURN; {ACQUIRE[at:]}"


@pytest.mark.parametrize("scope", ["session", "transaction"])
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{'after' if cut.after else 'before'}-{cut.step}")
def test_cut_off(caller: Company, cut: Cut, scope: str) -> None:
    holder, one = caller(), caller()
    if cut.step == "nap":
        for number in (0, 1):
            holder.takes(permit(number))
    one.run("SET CONTEXT_INFO 0x0102")
    if scope == "transaction":
        one.run("BEGIN TRANSACTION")
    one.run(set_session_context(Wish(more={"slots": "2", "scope": scope})))
    assert one.fails(cut_off(cut)) == 0
    taken = len(CUTS[: CUTS.index(cut) + 1]) // 2 if cut.step != "nap" else 1
    assert len(caller.locks(one)) == taken
    assert one.label.startswith("dblock1 w")
    one.run(OPEN)
    assert one.ask(target="free", scope=scope) == 51005
    assert "run release.sql" in one.said
    of_transaction = scope == "transaction" and taken > 1
    if caller.mssql.is_babelfish and of_transaction:  # it gives back a transaction's lock at the end only
        assert one.release() == 51007
        one.run("ROLLBACK")
    assert one.release() == 51004
    assert "WITHOUT the lock" in one.said
    one.run("IF @@TRANCOUNT > 0 ROLLBACK" if caller.mssql.is_babelfish else "SELECT 1")
    assert caller.holds_nothing(one)
    assert (one.label, one.held, one.slot) == ("\1\2", "", None)
    one.run("IF @@TRANCOUNT > 0 ROLLBACK")
    if cut.step == "nap":
        for number in (0, 1):
            holder.gives_back(permit(number))
    assert holder.ask() == 0
    assert holder.release() == 0
    assert one.ask(target="free") == 0
    assert one.release() == 0


@pytest.mark.parametrize("step", ["queue", "lock", "permit", "held"])
def test_an_error_anywhere_leaves_nothing(caller: Company, step: str) -> None:
    """An error in the middle is caught: acquire.sql itself gives everything back, and closes the session."""
    one = caller()
    one.run("SET CONTEXT_INFO 0x0102")
    one.run(set_session_context(Wish(more={"slots": "2"})))
    granted = re.search(r"-- Only what the session then has is a grant\.", ACQUIRE)
    labelled = re.search(r"SET @dblock_list = ", ACQUIRE)
    assert granted
    assert labelled
    at = labelled.start() if step == "held" else granted.start()
    asked = "" if step == "held" else f"IF @dblock_next = N'{step}' "
    assert one.fails(f"{ACQUIRE[:at]} {asked}RAISERROR (N'planted', 16, 1);\n {ACQUIRE[at:]}") == 51007
    assert "planted" in one.said
    assert one.run("SELECT 1") == []
    assert one.release() == 51004
    assert caller.holds_nothing(one)
    assert (one.label, one.held, one.slot) == ("\1\2", "", None)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_message_of_one_without_a_permit(caller: Company) -> None:
    holders, one = [caller(), caller()], caller()
    for n, holder in enumerate(holders):
        assert holder.ask("slots", tenant=f"T{n}") == 0
    assert one.ask("slots", "0.2") == 51001
    if caller.mssql.is_babelfish:
        assert one.said.endswith("b@web-01 not acquired in 0.2 s: holder not visible to this login")
    else:
        assert re.search(r"not acquired in 0\.2 s: held by tenant T[01] \(session \d+, host .*\) since .* and 1 other$",
                         one.said)  # fmt: skip
