"""Behind a connection pooler: Python and the command line notice it and refuse, and the scripts never let two in."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any

import psycopg
import pytest

import dblock
from dblock.inspect import entries
from tests.doors import COMMAND, PYTHON, SQL, Door, Wish, set_wishes
from tests.pooler import forwarder, pgbouncer
from tests.support import PATIENCE_SECONDS, rounds, wait_until

ACQUIRE = (SQL / "acquire.sql").read_text()
RELEASE = (SQL / "release.sql").read_text()
KEY = dblock.key("web-01", "b").value
HELD = [(KEY, "ExclusiveLock")]

Connection = psycopg.Connection[Any]


@pytest.fixture
def observer(url: str) -> Iterator[Connection]:
    """Connected to the server itself."""
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture(params=["transaction", "statement"])
def unsafe(request: pytest.FixtureRequest, url: str) -> Iterator[str]:
    """Through a pooler that has a single connection to the server, which all of its clients share."""
    with pgbouncer(url, request.param, pool_size=1) as pooled:
        yield pooled


@pytest.fixture
def session_mode(url: str) -> Iterator[str]:
    with pgbouncer(url, "session") as pooled:
        yield pooled


def locks(observer: Connection) -> list[Any]:
    return observer.execute(
        "SELECT (classid::bigint << 32) | objid::bigint, mode FROM pg_locks WHERE locktype = 'advisory'"
    ).fetchall()


def lock(
    db: str | Callable[[], Connection], timeout: float | None = None, *, session_pooler: bool = False
) -> dblock.Lock:
    return dblock.lock(db, target="web-01", step="b", timeout=timeout, allow_session_pooler=session_pooler)


def driver(url: str, **settings: Any) -> Connection:
    # What a pooler of this version cannot carry, clients behind it leave alone: prepared statements.
    return psycopg.connect(url, autocommit=True, prepare_threshold=None, **settings)


def trusting_command(url: str, wish: Wish) -> list[str]:
    python, *_module, run = COMMAND.argv(url, wish)[:4]
    return [python, *_module, run, "--allow-session-pooler", *COMMAND.argv(url, wish)[4:]]


TRUSTING_COMMAND = replace(COMMAND, argv=trusting_command)


# --- Python and the command line refuse -------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True], ids=["free", "held"])
@pytest.mark.parametrize("source", [str, lambda url: partial(psycopg.connect, url)], ids=["url", "callable"])
def test_python_refuses(url: str, unsafe: str, observer: Connection, source: Callable[[str], Any], held: bool) -> None:
    """Without a timeout a wait for the holder would never end: the refusal comes before any waiting."""
    with ExitStack() as stack:
        if held:
            stack.enter_context(lock(url))
        with pytest.raises(dblock.UnsafeConnection, match="a connection pooler stands between"):
            lock(source(unsafe)).acquire()
        assert locks(observer) == (HELD if held else [])
    wait_until(lambda: locks(observer) == [], "the lock to be given back")


@pytest.mark.parametrize("held", [False, True], ids=["free", "held"])
def test_command_refuses(url: str, unsafe: str, observer: Connection, held: bool) -> None:
    with ExitStack() as stack:
        if held:
            stack.enter_context(lock(url))
        with COMMAND.attempt(unsafe, Wish()) as attempt:
            assert not attempt.held()
            assert attempt.finish() == COMMAND.says("unsafe") == 77
            assert "dblock: a connection pooler stands between" in attempt.stderr()
        assert locks(observer) == (HELD if held else [])


SETTINGS = "('search_path', 'statement_timeout', 'lock_timeout', 'idle_session_timeout', 'DateStyle', 'TimeZone')"


@contextmanager
def unchanged_session(unsafe: str) -> Iterator[None]:
    """Another client of the pooler has its settings in the shared session, and goes on with them after the block."""
    with driver(unsafe) as other:
        for name in ("search_path = public", "statement_timeout = '5min'", "lock_timeout = '3min'"):
            other.execute(f"SET {name}".encode())
        question = f"SELECT name, setting FROM pg_settings WHERE name IN {SETTINGS} ORDER BY name".encode()
        before = other.execute(question).fetchall()
        yield
        assert other.execute(question).fetchall() == before


def test_a_refusal_leaves_the_shared_session_as_it_was(unsafe: str) -> None:
    with unchanged_session(unsafe), pytest.raises(dblock.UnsafeConnection):
        lock(unsafe).acquire()


def test_who_holds_is_seen_through_a_pooler(url: str, unsafe: str) -> None:
    with lock(url), unchanged_session(unsafe):
        assert [(entry.state, entry.target, entry.step) for entry in entries(unsafe)] == [("held", "web-01", "b")]


# --- session mode, at the caller's word -------------------------------------------------------------------------------


@pytest.mark.parametrize("door", [PYTHON, COMMAND], ids=str)
def test_session_mode_needs_the_callers_word(session_mode: str, observer: Connection, door: Door) -> None:
    with door.attempt(session_mode, Wish()) as attempt:
        assert not attempt.held()
        assert attempt.finish() == door.says("unsafe"), attempt.stderr()
    assert locks(observer) == []


def test_session_mode_excludes(url: str, session_mode: str, observer: Connection) -> None:
    """Whoever holds the lock, directly or through the pooler, keeps out all others."""
    callers = [lock(session_mode, session_pooler=True), lock(session_mode, session_pooler=True), lock(url)]
    for holder in callers:
        with holder:
            assert locks(observer) == HELD
            assert [other.acquire(timeout=0) for other in callers if other is not holder] == [False, False]
            with TRUSTING_COMMAND.attempt(session_mode, Wish(timeout="0")) as attempt:
                assert not attempt.held()
                assert attempt.finish() == COMMAND.says("timeout")
        assert locks(observer) == []
    with TRUSTING_COMMAND.attempt(session_mode, Wish()) as attempt:
        assert attempt.held(), attempt.stderr()
        assert [other.acquire(timeout=0) for other in callers] == [False, False, False]
        assert attempt.finish() == "done"


def test_session_mode_competing(url: str, session_mode: str, observer: Connection) -> None:
    referee = Referee()

    def compete(db: str) -> None:
        for _ in range(30):
            with lock(db, session_pooler=True), referee.body():
                pass

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(compete, [session_mode, session_mode, url]))
    assert (referee.entries, referee.violations) == (90, 0)
    wait_until(lambda: locks(observer) == [], "the last lock to be given back")


def test_session_mode_killed_holder(session_mode: str, observer: Connection) -> None:
    """The pooler keeps its connection to the server, and what was locked in it must go all the same."""
    with TRUSTING_COMMAND.attempt(session_mode, Wish()) as attempt:
        assert attempt.held(), attempt.stderr()
        assert locks(observer) == HELD
        attempt.kill()
        wait_until(lambda: locks(observer) == [], "the lock to be gone")
    with lock(session_mode, session_pooler=True):
        assert locks(observer) == HELD


# --- no false alarm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", [PYTHON, COMMAND], ids=str)
def test_a_forwarder_is_no_pooler(url: str, observer: Connection, door: Door) -> None:
    with forwarder(url) as through, door.attempt(through, Wish()) as attempt:
        assert attempt.held(), attempt.stderr()
        assert locks(observer) == HELD
        assert lock(through).acquire(timeout=0) is False
        assert attempt.finish() == "done"


# --- the scripts ------------------------------------------------------------------------------------------------------

CLIENTS = 3
SERVER_CONNECTIONS = 2  # fewer than clients, so that they share
ROUNDS = rounds(300)

ASTRAY = "22023"  # dblock.target is not set
# By the script itself; and what a client meets whose connection to the server another one's failure has ended.
REFUSED = {"55006", "0A000", "55P03", ASTRAY}
ENDED = {"08P01", "57P01", "disconnected"}

# PgBouncer gives a client's name to the connection it lends to it, but not an empty one.
NAMES = {
    "different": ["deploy-1", "deploy-2", "deploy-3"],
    "equal": ["deploy", "deploy", "deploy"],
    "none": ["", "", ""],
    "some": ["deploy", "deploy", ""],
}


@dataclass
class Referee:
    """Sees who is inside, from the acquire's success to the beginning of the release."""

    entries: int = 0
    violations: int = 0
    _inside: int = 0
    _change: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def body(self) -> Iterator[None]:
        with self._change:
            self.entries += 1
            self._inside += 1
            self.violations += self._inside > 1
        try:
            yield
        finally:
            with self._change:
                self._inside -= 1


class Client:
    """A driver that runs the scripts, and connects anew where its connection has ended."""

    def __init__(self, url: str, name: str) -> None:
        self._connect = partial(driver, url, **({"application_name": name} if name else {}))
        self._connection = self._connect()

    def say(self, *texts: str) -> str:
        """Send commands. Returns "done", or the SQLSTATE of the first that failed."""
        if self._connection.closed:
            self._connection = self._connect()
        try:
            for text in texts:
                self._connection.execute(text.encode())
        except psycopg.Error as error:
            return error.sqlstate or "disconnected"
        return "done"

    def close(self) -> None:
        self._connection.close()


@dataclass
class Game:
    """Rounds in which all clients try to get in at the same time."""

    acquire: Callable[[str], tuple[str, ...]]  # from a timeout to the commands
    release: str
    random: Random
    rounds: int = 0
    referee: Referee = field(default_factory=Referee)
    acquired: Counter[str] = field(default_factory=Counter)
    released: Counter[str] = field(default_factory=Counter)

    def play(self, pooled: str, observer: Connection, names: list[str], rounds: int) -> None:
        barrier = threading.Barrier(len(names))
        with ExitStack() as stack, ThreadPoolExecutor(len(names)) as threads:
            clients = [stack.enter_context(closing(Client(pooled, name))) for name in names]
            for _ in range(rounds):
                # Either the one inside stays until everybody has tried, or leaves at once, to a waiter or a latecomer.
                stays = self.random.random() < 0.5
                timeouts = [self.random.choice(("0", "0.02")) for _ in names]
                attempt = partial(self._attempt, barrier, stays)
                for acquired, released in threads.map(attempt, clients, timeouts):
                    self.acquired[acquired] += 1
                    self.released[released] += 1
                self.rounds += 1
                clear(observer)

    def told(self) -> str:
        return f"{self.rounds} rounds, {self.referee}, acquire {dict(self.acquired)}, release {dict(self.released)}"

    def _attempt(self, barrier: threading.Barrier, stays: bool, client: Client, timeout: str) -> tuple[str, str]:
        """Return what became of the acquire and of the release."""
        barrier.wait(PATIENCE_SECONDS)
        # Wishes that the pooler gave to another connection than the acquire are wished once more.
        acquired = next((o for _ in range(2) if (o := client.say(*self.acquire(timeout))) != ASTRAY), ASTRAY)
        with self.referee.body() if acquired == "done" else nullcontext():
            if stays:
                barrier.wait(PATIENCE_SECONDS)
        if acquired != "done":
            return acquired, "not tried"
        released = client.say(self.release)
        if released != "done":
            client.close()
        return acquired, released


def clear(observer: Connection) -> None:
    """Do what a DBA has to where a release went to another connection of the pool than the acquire: end the session."""
    observer.execute("SELECT pg_terminate_backend(pid, 60000) FROM pg_locks WHERE locktype = 'advisory'")


def script(timeout: str) -> tuple[str, ...]:
    return set_wishes(Wish(timeout=timeout)), ACQUIRE


def plain(_timeout: str) -> tuple[str, ...]:
    """Fails where the lock is not granted, with 22012."""
    return (f"SELECT 1 / pg_try_advisory_lock({KEY})::int",)


@pytest.mark.timeout(300)  # half a minute on a quiet machine
def test_scripts_never_let_two_in(url: str, observer: Connection) -> None:
    """Though nothing inside tells of a pooler in transaction mode: a lock of one's own session is one too many."""
    game = Game(script, RELEASE, Random(4))
    with pgbouncer(url, "transaction", pool_size=SERVER_CONNECTIONS) as pooled:
        for names in NAMES.values():
            game.play(pooled, observer, names, ROUNDS // len(NAMES))
    wait_until(lambda: locks(observer) == [], "the pooler's locks to be gone with it")
    assert (game.rounds, game.referee.violations) == (ROUNDS, 0), game.told()
    assert game.acquired["done"] == game.referee.entries
    assert game.acquired.keys() <= {"done"} | REFUSED | ENDED, game.told()
    # Some got in, and others came to a connection on which somebody held the lock, or to another one.
    assert min(game.acquired[outcome] for outcome in ("done", "55006", "55P03")) >= 10, game.told()


def test_the_referee_sees_two_inside(url: str, observer: Connection) -> None:
    """Without the scripts' care the same game lets several in, or the test above would mean nothing."""
    game = Game(plain, f"SELECT pg_advisory_unlock({KEY})", Random(4))
    with pgbouncer(url, "transaction", pool_size=SERVER_CONNECTIONS) as pooled:
        game.play(pooled, observer, NAMES["equal"], 50)
    assert game.referee.violations > 0, game.told()


@pytest.mark.parametrize("names", [
    ("deploy", "other"), ("deploy", "deploy"), ("deploy", ""), ("", "deploy"), ("", ""),
], ids="+".join)  # fmt: skip
@pytest.mark.parametrize(("timeout", "outcome"), [("0", "55006"), ("soon", "22023")])
def test_a_script_that_fails_leaves_another_clients_lock(
    unsafe: str, observer: Connection, names: tuple[str, str], timeout: str, outcome: str
) -> None:
    """Both are on the only connection to the server. The other one also gives back, as a driver's ``finally`` does."""
    with closing(Client(unsafe, names[0])) as first, closing(Client(unsafe, names[1])) as second:
        assert first.say(*script("0")) == "done"
        said = second.say(*script(timeout))
        assert locks(observer) == HELD, said
        assert said == outcome
        assert second.say(RELEASE) == "55000"
        assert locks(observer) == HELD
        assert first.say(RELEASE) == "done"
    assert locks(observer) == []
