"""Every kind of caller in every shape: from one source, over the product of all of them, which is printed at the end.

What the doors of the contract have in common with these is in ``test_cases.py`` and ``test_doors.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import dblock
from tests.backends import Backend, Postgres, SqlServer
from tests.callers import CALLERS, SHAPES, Caller, Hand
from tests.support import wait_until

PRODUCT = [(caller, shape) for caller in CALLERS for shape in SHAPES]
BORROWING = [caller for caller in CALLERS if not caller.own]

# The contract's table: who may be inside beside whom.
BESIDE = {
    ("exclusive", "exclusive"): False,
    ("exclusive", "shared"): False,
    ("exclusive", "slots"): False,
    ("shared", "shared"): True,
    ("shared", "slots"): True,
    ("slots", "slots"): True,
}


@pytest.fixture
def hand(backend: Backend, caller: Caller) -> Iterator[Hand]:
    if (
        isinstance(backend, SqlServer)
        and backend.is_babelfish
        and caller.in_transaction
        and "pymssql" not in caller.name
    ):
        pytest.skip("SQLAlchemy knows Babelfish in AUTOCOMMIT only: needs a SQL Server")
    with caller.hand(backend.url) as hand:
        yield hand


def wishes(shape: str, **more: Any) -> dict[str, Any]:
    return {"target": "web-01", "step": "b", "tenant": "T1", **SHAPES[shape], **more}


def beside(backend: Backend, shape: str) -> dblock.Lock | None:
    """Try to take the lock of one target in a shape, without waiting. On Babelfish a try may fail beside no holder."""
    lock = dblock.lock(backend.url, target="web-01", step="b", timeout=0, **SHAPES[shape])
    return lock if lock.acquire() else None


@contextmanager
def released_for_a_waiter(backend: Backend, holder: dblock.Lock) -> Iterator[None]:
    """Release the lock when somebody waits for it."""

    def release() -> None:
        wait_until(backend.waiters, "the waiter")
        holder.release()

    releasing = threading.Thread(target=release)
    releasing.start()
    yield
    releasing.join()


@pytest.mark.parametrize(("caller", "shape"), PRODUCT, ids=str)
def test_excludes_as_the_table_says(
    backend: Backend, caller: Caller, shape: str, hand: Hand, record_property: Callable[[str, object], None]
) -> None:
    lock = hand.take(**wishes(shape))
    assert lock is not None
    assert lock.held
    for other in ("exclusive", "shared", "slots"):
        mine = "exclusive" if shape == "several targets" else shape
        pair: tuple[str, str] = (mine, other) if (mine, other) in BESIDE else (other, mine)
        entered = beside(backend, other)
        assert (entered is not None) == BESIDE[pair], other
        if entered is not None:
            if other == "slots" and mine == "slots":
                assert {entered.slot, lock.slot} == {0, 1}
            entered.release()
    hand.give(lock)
    assert not lock.held or caller.in_transaction
    wait_until(lambda: not backend.all_rows(), "the locks to be gone")
    record_property("matrix", [str(caller), shape])


@pytest.mark.parametrize(("caller", "shape"), PRODUCT, ids=str)
def test_waits_and_times_out(backend: Backend, caller: Caller, shape: str, hand: Hand) -> None:
    """A timeout leaves nothing behind, and the caller's connection goes on; a wait ends with the holder's release."""
    babelfish = isinstance(backend, SqlServer) and backend.is_babelfish
    if babelfish and caller.in_transaction and shape == "several targets":
        pytest.skip("Babelfish does not give back a transaction's lock before its end: needs a SQL Server")
    holder = dblock.lock(backend.url, target="web-01", step="b", tenant="T0")
    with holder:
        before = backend.all_rows()
        assert hand.take(timeout=0.3, **wishes(shape)) is None
        wait_until(lambda: backend.all_rows() == before, "nothing but the holder's lock")
        if not caller.own:
            hand.say("SELECT 1")  # begins the transaction, where there is none
            assert hand.take(timeout=0.3, **wishes(shape)) is None
            assert hand.say("SELECT 1") == [(1,)]
            wait_until(lambda: backend.all_rows() == before, "nothing but the holder's lock")

    holder.acquire()
    with released_for_a_waiter(backend, holder):
        lock = hand.take(timeout=30, **wishes(shape))
    assert lock is not None
    hand.give(lock)
    wait_until(lambda: not backend.all_rows(), "the locks to be gone")


@pytest.mark.parametrize("second", ["exclusive", "shared", "slots"])
@pytest.mark.parametrize(("caller", "shape"), [(caller, shape) for caller in BORROWING for shape in SHAPES], ids=str)
def test_never_twice_on_one_connection(backend: Backend, caller: Caller, shape: str, second: str, hand: Hand) -> None:
    lock = hand.take(**wishes(shape))
    with pytest.raises(dblock.AlreadyHeld):
        hand.take(timeout=0, **wishes(second))
    assert lock.held
    assert beside(backend, "exclusive") is None
    hand.give(lock)
    wait_until(lambda: not backend.all_rows(), "the locks to be gone")


SETTINGS = (
    "application_name",
    "search_path",
    "statement_timeout",
    "lock_timeout",
    "idle_session_timeout",
    "idle_in_transaction_session_timeout",
    "client_encoding",
    "transaction_isolation",
)
ALL_SETTINGS = "SELECT " + ", ".join(f"current_setting('{name}')" for name in SETTINGS)


@pytest.mark.parametrize(
    ("caller", "shape"), [(c, shape) for c in BORROWING if c.engine == "postgres" for shape in SHAPES], ids=str
)
def test_nothing_of_the_callers_session_is_changed(postgres: Postgres, caller: Caller, shape: str, hand: Hand) -> None:
    """While the lock is held only the label, afterwards nothing at all: whether it was had at once, late or in vain."""
    hand.say("SET statement_timeout = '41s'")
    hand.say("SET lock_timeout = '42s'")
    hand.say("SET search_path = 'public', \"O'Brien\"")
    hand.say("SET application_name = 'the caller''s'")
    if caller.in_transaction:
        hand.say("COMMIT; BEGIN")  # past SQLAlchemy, so that the settings are the session's
    before = hand.say(ALL_SETTINGS)

    def but_for_the_label() -> list[Any]:
        return [row[1:] for row in hand.say(ALL_SETTINGS)]

    lock = hand.take(**wishes(shape))
    assert but_for_the_label() == [before[0][1:]]
    hand.give(lock)
    assert hand.say(ALL_SETTINGS) == before

    holder = dblock.lock(postgres.url, target="web-01", step="b")
    holder.acquire()
    assert hand.take(timeout=0.2, **wishes(shape)) is None
    assert hand.say(ALL_SETTINGS) == before
    with released_for_a_waiter(postgres, holder):
        lock = hand.take(**wishes(shape))
    assert but_for_the_label() == [before[0][1:]]
    hand.give(lock)
    assert hand.say(ALL_SETTINGS) == before
