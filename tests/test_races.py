"""A timed or cancelled acquire never lies: tries in which its end is aimed at the moment of the grant.

A few hundred each; DBLOCK_TEST_ROUNDS=3000 makes it thousands.

After each try what was reported is compared with what another session sees in pg_locks. The aim follows the outcomes,
so that it stays where both are about equally frequent, on a fast machine and on a slow one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, Protocol

import psycopg
import pytest

import dblock
from dblock.driver_psycopg import PsycopgSession
from dblock.protocol import Conditions, Granted, Wish
from tests import interrupted
from tests.support import rounds, wait_until

ROOT = Path(__file__).parent.parent
KEY = dblock.key("web-01", "b")
TIMEOUT_SECONDS = 0.008
LEAST_SHARE = 0.05  # of the tries that each outcome must have
pytestmark = pytest.mark.timeout(300)  # thousands of tries, on machines that may be slow

HELD, NOT_HELD, CANCELLED = "held", "not held", "57014"  # what an acquire reports: an answer, or an SQLSTATE

Connection = psycopg.Connection[Any]


# --- who acquires -----------------------------------------------------------------------------------------------------


class Caller(Protocol):
    """Somebody who tries to acquire the lock."""

    connection: Connection

    def acquire(self, timeout: float | None) -> bool:
        """Return whether it is held, or raise."""

    def release(self) -> None: ...


class OneSession:
    """Acquires by the protocol itself, on one connection for all tries: what a try leaves behind is there for ever."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url, autocommit=True, prepare_threshold=None)
        self._session = PsycopgSession(self.connection)
        self._lock = self._session.lock(Wish(KEY, "web-01", "b", "T1"))
        self._granted: Granted | None = None

    def acquire(self, timeout: float | None) -> bool:
        outcome = self._session.run(self._lock.acquire(Conditions(), timeout, lambda *_: None))
        self._granted = outcome if isinstance(outcome, Granted) else None
        return self._granted is not None

    def release(self) -> None:
        assert self._granted
        assert self._session.run(self._lock.release(self._granted)) is True

    def close(self) -> None:
        self._session.close()


class PublicLock:
    """Acquires as users do, by `dblock.lock`, which opens a connection for each try."""

    connection: Connection

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = dblock.lock(self._connect, target="web-01", step="b", tenant="T1")

    def _connect(self) -> Connection:
        self.connection = psycopg.connect(self._url, autocommit=True)
        return self.connection

    def acquire(self, timeout: float | None) -> bool:
        reported = None
        try:
            reported = self._lock.acquire(timeout)
        finally:
            assert self._lock.held is (reported is True)
            assert self.connection.closed is (reported is not True)
        return reported

    def release(self) -> None:
        self._lock.release()


@pytest.fixture
def one_session(url: str) -> Iterator[OneSession]:
    session = OneSession(url)
    yield session
    session.close()


@pytest.fixture
def public_lock(url: str) -> PublicLock:
    return PublicLock(url)


# --- who is in the way ------------------------------------------------------------------------------------------------


class Holder:
    """Holds the lock, and gives it back when it sees somebody wait for it. The server itself keeps the time."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url, autocommit=True)

    def hold(self) -> None:
        self.connection.execute("SELECT pg_advisory_lock(%s)", (KEY.value,))

    def begin(self, first: str, microseconds: float, then: str) -> None:
        """Send, without waiting for the reply: when somebody waits for the lock do this, and so much later that.

        `waiter` is the pid of who waits, or NULL where nobody did for a long time.
        """
        self.connection.pgconn.send_query(
            f"""
            DO $$
            DECLARE
                waiter  int;
                patient timestamptz := clock_timestamp() + interval '30 ms';
                moment  timestamptz;
            BEGIN
                LOOP
                    SELECT pid INTO waiter FROM pg_locks
                    WHERE locktype = 'advisory' AND NOT granted AND objsubid = 1
                      AND classid = {KEY.postgres.classid} AND objid = {KEY.postgres.objid};
                    EXIT WHEN FOUND OR clock_timestamp() > patient;
                END LOOP;
                moment := clock_timestamp() + interval '{microseconds:.0f} us';
                {first};
                WHILE clock_timestamp() < moment LOOP END LOOP;
                {then};
            END $$
            """.encode()
        )
        while self.connection.pgconn.flush():
            pass

    def end(self) -> None:
        """Wait until it has been done."""
        while result := self.connection.pgconn.get_result():
            assert result.status == psycopg.pq.ExecStatus.COMMAND_OK, result.error_message


UNLOCK = f"PERFORM pg_advisory_unlock({KEY.value})"
CANCEL = "PERFORM pg_cancel_backend(waiter)"
NOTHING = "NULL"


@pytest.fixture
def holder(url: str) -> Iterator[Holder]:
    holder = Holder(url)
    with holder.connection:
        yield holder


class Aim:
    """A moment, in microseconds, that drifts towards where both outcomes are equally frequent.

    Fast at first, and slower each time the outcome changes.
    """

    def __init__(self, start: float, *, spread: float, step: float) -> None:
        self._centre, self._spread, self._step = start, spread, step
        self._last: bool | None = None
        self._stride = 10.0
        self._random = Random(3)

    def next(self) -> float:
        return self._centre + self._random.uniform(-self._spread, self._spread)

    def learn(self, *, too_late: bool) -> None:
        if self._last is not None and too_late is not self._last:
            self._stride = max(1.0, self._stride / 2)
        self._last = too_late
        self._centre += self._step * self._stride * (-1 if too_late else 1)


# --- who looks --------------------------------------------------------------------------------------------------------


class Witness:
    """Sees, from a connection of its own, what there is of the lock and its queue, and counts the outcomes."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url, autocommit=True)
        self.tally = Counter[str | None]()

    def rows(self) -> list[Any]:
        return self.connection.execute(
            "SELECT pid, objsubid, (classid::bigint << 32) | objid::bigint, granted FROM pg_locks "
            "WHERE locktype = 'advisory'"
        ).fetchall()

    def check(self, caller: Caller, reported: str | None) -> None:
        """Compare what was reported, after everything aimed at the caller has arrived, and clear up."""
        self.tally[reported] += 1
        if reported == HELD:
            assert self.rows() == [(caller.connection.info.backend_pid, 1, KEY.value, True)]
            caller.release()
        if caller.connection.closed:
            # A backend whose client has left may live a moment longer.
            wait_until(lambda: self.rows() == [], f"no lock, ticket or flag to be left after {reported!r}")
        assert self.rows() == [], reported

    def tries(self, number: int) -> Iterator[int]:
        """So many, and on a machine that is too busy to be aimed at, so many more, until both outcomes happened."""
        for _ in range(5):
            self.tally.clear()
            yield from range(number)
            if self._both():
                return
        pytest.fail(f"the aim is off: {self.tally}")

    def _both(self) -> bool:
        return len(self.tally) == 2 and min(self.tally.values()) >= LEAST_SHARE * sum(self.tally.values())


@pytest.fixture
def witness(url: str) -> Iterator[Witness]:
    witness = Witness(url)
    with witness.connection:
        yield witness


def report(caller: Caller, timeout: float | None) -> str | None:
    """Acquire, and return what the caller is told."""
    try:
        return HELD if caller.acquire(timeout) else NOT_HELD
    except dblock.DatabaseError as error:
        return error.sqlstate


def absorb_late_cancel(connection: Connection) -> None:
    """Let a cancel that came too late for the acquire hit a statement of no importance."""
    with suppress(psycopg.errors.QueryCanceled):
        connection.execute("SELECT")


# --- the races --------------------------------------------------------------------------------------------------------


def race_timeout(caller: Caller, holder: Holder, witness: Witness, tries: int) -> None:
    """The holder's release is aimed at the end of the caller's time."""
    aim = Aim(3000, spread=400, step=60)
    for _ in witness.tries(tries):
        holder.hold()
        holder.begin(NOTHING, max(0, aim.next()), UNLOCK)
        reported = report(caller, TIMEOUT_SECONDS)
        holder.end()
        aim.learn(too_late=reported == NOT_HELD)
        assert reported in (HELD, NOT_HELD)
        witness.check(caller, reported)


def race_cancel(caller: Caller, holder: Holder, witness: Witness, tries: int) -> None:
    """A cancel is aimed at the grant: the holder's session releases, and sooner or later cancels the waiter."""
    aim = Aim(0, spread=150, step=15)
    for _ in witness.tries(tries):
        later = aim.next()
        holder.hold()
        if later > 0:
            holder.begin(UNLOCK, later, CANCEL)
        else:
            holder.begin(CANCEL, -later, UNLOCK)
        reported = report(caller, None)
        holder.end()
        if reported == HELD:
            absorb_late_cancel(caller.connection)
        aim.learn(too_late=reported == HELD)
        assert reported in (HELD, CANCELLED)
        witness.check(caller, reported)


def test_timeout_meets_grant(one_session: OneSession, holder: Holder, witness: Witness) -> None:
    race_timeout(one_session, holder, witness, rounds(300))


def test_timeout_meets_grant_through_the_public_lock(public_lock: PublicLock, holder: Holder, witness: Witness) -> None:
    race_timeout(public_lock, holder, witness, rounds(100))


def test_cancel_meets_grant(one_session: OneSession, holder: Holder, witness: Witness) -> None:
    race_cancel(one_session, holder, witness, rounds(300))


def test_cancel_meets_grant_through_the_public_lock(public_lock: PublicLock, holder: Holder, witness: Witness) -> None:
    race_cancel(public_lock, holder, witness, rounds(100))


def test_the_drivers_cancel_meets_grant(public_lock: PublicLock, holder: Holder, witness: Witness) -> None:
    """The cancel that psycopg sends from another thread, and on Ctrl-C too."""
    aim = Aim(2000, spread=300, step=60)

    def cancel_when_waiting() -> None:
        wait_until(lambda: any(not granted for *_, granted in witness.rows()), "the waiter")
        holder.begin(NOTHING, max(0, aim.next()), UNLOCK)
        public_lock.connection.cancel_safe()

    with ThreadPoolExecutor() as pool:
        for _ in witness.tries(rounds(100)):
            holder.hold()
            cancelled = pool.submit(cancel_when_waiting)
            reported = report(public_lock, None)
            cancelled.result()
            holder.end()
            if reported == HELD:
                absorb_late_cancel(public_lock.connection)
            aim.learn(too_late=reported == CANCELLED)  # here the moment is that of the release
            assert reported in (HELD, CANCELLED)
            witness.check(public_lock, reported)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("kind", interrupted.KINDS)
@pytest.mark.timeout(600)
def test_a_signal_meets_grant(url: str, kind: str, number: str) -> None:
    """Without a word of a loss, and the caller's connection lives on."""
    tries = rounds(50)
    done = subprocess.run(
        [sys.executable, "-m", "tests.interrupted", url, kind, number, str(tries)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    print(kind, number, found)
    assert found.get("held", 0) + found.get("not held", 0) == tries
    assert found.get("connections", 1) == 1
