"""Whichever message fails, and whether the server ran it or not: nothing is left, and nothing is taken from the caller.

The server, its sessions and what they hold are real. Only the failing is made here: the driver's answer is thrown away,
or the text is never sent. Aimed tries find some of these moments (``test_races.py``); here is each of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg.pq import TransactionStatus

import dblock
from dblock.driver_psycopg import PsycopgSession
from dblock.errors import DatabaseError
from dblock.postgres import MOST_CANCELS
from dblock.protocol import Busy, Conditions, Granted, Row, Wish, acquire_all, release_all
from dblock.session import Loan
from tests.support import rounds, wait_until

Connection = psycopg.Connection[Any]

WISH = Wish(dblock.key("web-01", "b"), "web-01", "b", "T1")
SHAPES = {"exclusive": WISH, "shared": WISH._replace(shared=True), "slots": WISH._replace(slots=2)}
WISHES = {
    **{f"{shape}, session": wish for shape, wish in SHAPES.items()},
    **{f"{shape}, transaction": wish._replace(in_transaction=True) for shape, wish in SHAPES.items()},
}
MOST_MESSAGES = 12


class Failing(PsycopgSession):
    """A session one of whose messages fails: the so-and-so-many-th, before or after the server had it."""

    def __init__(
        self,
        connection: Connection,
        loan: Loan | None,
        fails: int,
        *,
        sent: bool,
        sqlstate: str | None = None,
        times: int = 1,
    ) -> None:
        super().__init__(connection, loan)
        self._fails = fails
        self._times = times
        self._sent = sent
        self._sqlstate = sqlstate
        self.said = 0

    def rows(self, text: str) -> list[Row]:
        self.said += 1
        failing = self._fails <= self.said < self._fails + self._times
        if failing and not self._sent:
            raise DatabaseError("never sent", self._sqlstate)
        rows = super().rows(text)
        if failing:
            raise DatabaseError("the reply is lost", self._sqlstate)
        return rows


def held_by(observer: Connection, pid: int) -> list[tuple[Any, ...]]:
    return observer.execute(
        "SELECT classid, objid, objsubid, mode FROM pg_locks WHERE locktype = 'advisory' AND pid = %s", (pid,)
    ).fetchall()


def outcome_of(session: Failing, wish: Wish, timeout: float | None) -> Granted | Busy | BaseException:
    try:
        outcome = session.run(acquire_all([session.lock(wish)], Conditions(), timeout, lambda *_: None))
    except dblock.Error as error:
        return error
    return outcome if isinstance(outcome, Busy) else outcome[0][1]


class Situation(NamedTuple):
    """What an acquire meets: a lock of the caller's own, somebody else, and a message that fails."""

    held_before: bool
    in_the_way: str
    fails: int
    sent: bool


@pytest.mark.parametrize("sent", [False, True], ids=["never sent", "reply lost"])
@pytest.mark.parametrize("in_the_way", ["nobody", "a holder", "a waiter"])
@pytest.mark.parametrize("held_before", [False, True], ids=["not held before", "held before"])
@pytest.mark.parametrize("wish", WISHES)
def test_each_message_of_an_acquire(url: str, wish: str, held_before: bool, in_the_way: str, sent: bool) -> None:
    endings = set()
    for timeout in (0, 0.05):
        for fails in range(1, MOST_MESSAGES):
            ending, said = one_try(url, WISHES[wish], timeout, Situation(held_before, in_the_way, fails, sent))
            endings.add(ending)
            if said < fails:
                break
        else:
            pytest.fail(f"an acquire has more than {MOST_MESSAGES} messages")
    assert "DatabaseError" in endings
    assert endings & {"AlreadyHeld"} if held_before else endings & {"Granted", "Busy"}


def one_try(url: str, wish: Wish, timeout: float, situation: Situation) -> tuple[str, int]:
    """Acquire. Return how it ended, and how many messages there were."""
    held_before, in_the_way, fails, sent = situation
    key, high = wish.key.value, wish.key.value >> 32
    with (
        psycopg.connect(url, autocommit=True) as observer,
        psycopg.connect(url, autocommit=True) as other,
        psycopg.connect(url, autocommit=True) as connection,
    ):
        pid = connection.info.backend_pid
        if held_before:
            connection.execute("SELECT pg_advisory_lock_shared(%s)", (key,))
        if in_the_way == "a waiter":
            other.execute("SELECT pg_advisory_lock(%s::int, 1), pg_advisory_lock_shared(%s::int, 0)", (high, high))
        elif in_the_way == "a holder":
            other.execute(f"SELECT pg_advisory_lock{'_shared' if held_before else ''}({key})")
        connection.execute("SET application_name = 'mine'")
        connection.execute("SET idle_in_transaction_session_timeout = '50s'")
        if wish.in_transaction:
            connection.execute("BEGIN")
        own = held_by(observer, pid)
        session = Failing(connection, Loan(connection, began=False, rollback=connection.rollback), fails, sent=sent)
        outcome = outcome_of(session, wish, timeout)
        failed = session.said >= fails

        if isinstance(outcome, Granted):
            assert not failed
            assert not held_before
            assert in_the_way == "nobody"
        elif held_before and not failed:
            assert isinstance(outcome, dblock.AlreadyHeld)
        if connection.closed:
            # A message was lost which may have taken what the caller had before, or was to give something back.
            assert failed
            wait_until(lambda: not held_by(observer, pid), "the end of the session")
        elif not isinstance(outcome, Granted):
            assert held_by(observer, pid) == own
            if connection.info.transaction_status == TransactionStatus.INERROR:
                assert failed
                connection.rollback()
            assert connection.execute("SHOW application_name").fetchone() == ("mine",)
            assert connection.execute("SHOW idle_session_timeout").fetchone() == ("0",)
            assert connection.execute("SHOW idle_in_transaction_session_timeout").fetchone() == ("50s",)
            assert connection.execute("SHOW search_path").fetchone() == ('"$user", public',)
        return type(outcome).__name__, session.said


CANCELED = "57014"


@pytest.mark.parametrize("sent", [False, True], ids=["never sent", "reply lost"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "caller's"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cancelled_release_loses_nothing(url: str, shape: str, own: bool, sent: bool) -> None:
    """What is still there after somebody's cancel was held to the end; on the caller's session others could release."""
    with psycopg.connect(url, autocommit=True) as connection, psycopg.connect(url) as observer:
        loan = None if own else Loan(connection, False, rollback=connection.rollback)
        session = Failing(connection, loan, 0, sent=sent, sqlstate=CANCELED)
        holds = session.run(acquire_all([session.lock(SHAPES[shape])], Conditions(), 0, None))
        assert not isinstance(holds, Busy)
        session._fails = session.said + 1
        assert session.run(release_all(holds)) is not (sent and not own)
        assert not connection.closed
        assert held_by(observer, connection.info.backend_pid) == []


@pytest.mark.parametrize("sent", [False, True], ids=["never sent", "reply lost"])
@pytest.mark.parametrize("times", [2, MOST_CANCELS])
@pytest.mark.parametrize("shape", SHAPES)
def test_cancels_in_a_row_do_not_close_the_callers_connection(url: str, shape: str, times: int, sent: bool) -> None:
    """Whichever messages of a wait they hit."""
    with psycopg.connect(url, autocommit=True) as observer, dblock.lock(url, target="web-01", step="b"):
        for fails in range(1, MOST_MESSAGES):
            with psycopg.connect(url, autocommit=True) as connection:
                loan = Loan(connection, False, rollback=connection.rollback)
                session = Failing(connection, loan, fails, sent=sent, sqlstate=CANCELED, times=times)
                assert not isinstance(outcome_of(session, SHAPES[shape], 0.05), Granted)
                assert not connection.closed
                assert held_by(observer, connection.info.backend_pid) == []


@pytest.mark.parametrize("in_transaction", [False, True], ids=["own", "transaction"])
def test_a_cancel_that_really_meets_the_release(url: str, in_transaction: bool) -> None:
    """The lock was not lost. The transaction goes on, unless the cancel came before its savepoint."""
    with psycopg.connect(url, autocommit=True) as admin, psycopg.connect(url) as connection:
        scope: Any = "transaction" if in_transaction else "session"
        for _ in range(rounds(100)):
            lock = dblock.lock(connection if in_transaction else url, target="web-01", step="b", scope=scope)
            lock.acquire()
            (pid,) = admin.execute("SELECT pid FROM pg_locks WHERE locktype = 'advisory'").fetchone() or (0,)
            canceling = threading.Thread(target=admin.execute, args=("SELECT pg_cancel_backend(%s)", (pid,)))
            canceling.start()
            lock.release()
            canceling.join()
            connection.rollback()
            assert held_by(admin, pid) == []


class Signalled(BaseException):
    """What a signal's handler raises."""


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Let a signal's exception come between the next message's sending and the wait for its reply."""
    due = False
    wait = psycopg.Connection.wait

    def wait_or_raise(self: psycopg.Connection[Any], steps: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal due
        if due:
            due = False
            next(steps)
            raise Signalled
        return wait(self, steps, *arguments, **more)

    def make_due() -> None:
        nonlocal due
        due = True

    monkeypatch.setattr(psycopg.Connection, "wait", wait_or_raise)
    yield make_due
    assert not due


@pytest.mark.parametrize("own", [True, False], ids=["own", "caller's"])
def test_a_signal_just_before_the_wait_for_a_reply(url: str, own: bool, signalled: Callable[[], None]) -> None:
    """The lock can be asked after as before; and it is released without a word of a loss."""
    with psycopg.connect(url, autocommit=True) as connection:
        with dblock.lock(url if own else connection, target="web-01", step="b") as held:
            signalled()
            with pytest.raises(Signalled):
                held.check()
            assert held.held
            held.check()
        assert not connection.closed


def test_a_statement_that_cannot_be_broken_off_ends_with_its_connection(
    url: str, signalled: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the cancel is lost on its way; the caller gets the signal's exception, and no other one."""
    monkeypatch.setattr("dblock.session.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(psycopg.Connection, "cancel_safe", lambda *_, **__: None)
    with psycopg.connect(url, autocommit=True) as connection:
        asked = PsycopgSession(connection, Loan(connection, False, rollback=connection.rollback))
        signalled()
        with pytest.raises(Signalled):
            asked.rows("SELECT pg_sleep(20)")
        assert connection.closed
