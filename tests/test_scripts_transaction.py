"""acquire.sql and release.sql with scope transaction: held until COMMIT or ROLLBACK, also through a pooler."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from random import Random
from time import perf_counter
from typing import Any

import psycopg
import pytest

import dblock
from tests import hostile
from tests.doors import SQL, Wish, set_wishes
from tests.pooler import pgbouncer
from tests.support import PATIENCE_SECONDS, rounds, wait_until
from tests.test_scripts_shapes import (
    ACQUIRE,
    EXCLUSIVE,
    RELEASE,
    SHAPES,
    SHARED,
    Connect,
    Connection,
    expected,
    locks,
    pid,
    run,
    slots,
    value,
    waiters,
)

BODY = "INSERT INTO public.body VALUES (1)"
SETTINGS = "SELECT json_object_agg(name, setting) FROM pg_settings WHERE name <> 'application_name'"


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    connections = []

    def open_one(through: str = url, **settings: str) -> Connection:
        options: dict[str, Any] = {"application_name": "deploy"} | settings
        # What a pooler of this version cannot carry, clients behind it leave alone: prepared statements.
        connection = psycopg.connect(through, autocommit=True, prepare_threshold=None, **options)
        connections.append(connection)
        return connection

    yield open_one
    for connection in connections:
        connection.close()


@pytest.fixture
def observer(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def threads(observer: Connection) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=20) as executor:
        yield executor
        run(observer, "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")


@pytest.fixture
def body(observer: Connection) -> Iterator[Callable[[], int]]:
    """A table into which the guarded step writes, and how often it ran."""
    run(observer, "CREATE TABLE public.body (ran int); GRANT ALL ON public.body TO public")
    yield lambda: int(value(observer, "SELECT count(*) FROM public.body"))
    run(observer, "DROP TABLE public.body")


def wishes(shape: dict[str, str] | None = None, timeout: str | None = "0", **more: Any) -> str:
    """Set them for the transaction, as the header says."""
    wish = Wish(timeout=timeout, more={"scope": "transaction", **(shape or {})}, **more)
    return set_wishes(wish).replace(", false)", ", true)")


def begin(connection: Connection, shape: dict[str, str] | None = None, timeout: str | None = "0", **more: Any) -> str:
    """Begin a transaction and take b@web-01 in it. Returns dblock.slot."""
    run(connection, "BEGIN", wishes(shape, timeout, **more), ACQUIRE)
    return str(value(connection, "SHOW dblock.slot"))


# --- as long as the transaction ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK", "PREPARE", "crash"])
@pytest.mark.parametrize("shape", SHAPES)
def test_held_until_the_end_and_not_longer(connect: Connect, observer: Connection, shape: str, ending: str) -> None:
    connection = connect()
    slot = begin(connection, SHAPES[shape], tenant="T1")
    assert slot == ("0" if "slots" in shape else "")
    held = expected(connection, SHAPES[shape], slot)
    assert locks(observer) == held
    run(connection, "SELECT 1", "SAVEPOINT later", "SELECT 2", "ROLLBACK TO later", RELEASE, RELEASE)
    assert locks(observer) == held
    assert " T1 web-01 b" in value(connection, "SHOW application_name")
    with pytest.raises(psycopg.errors.LockNotAvailable, match=r"held by tenant T1 \(pid"):
        begin(connect(), SHAPES[shape] if shape == "exclusive" else EXCLUSIVE)
    if ending == "crash":
        connection.close()
        wait_until(lambda: locks(observer) == [], "the lock to be gone")
        return
    if ending == "PREPARE":
        run(connection, "PREPARE TRANSACTION 'dblock'")
        assert len(observer.execute("SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid IS NULL").fetchall()) == (
            2 if slot else 1
        )
        run(observer, "COMMIT PREPARED 'dblock'")
    else:
        run(connection, ending)
    assert locks(observer) == []
    assert value(connection, "SHOW application_name") == "deploy"
    for left in ("held", "slot", "target", "step", "tenant", "timeout", "shared", "slots", "scope"):
        assert not value(connection, f"SELECT current_setting('dblock.{left}', true)")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="holds no lock"):
        run(connection, RELEASE)


@pytest.mark.parametrize("shape", SHAPES)
def test_rolled_back_to_a_savepoint(connect: Connect, observer: Connection, shape: str) -> None:
    connection = connect()
    run(connection, "BEGIN", "SAVEPOINT before", wishes(SHAPES[shape]), ACQUIRE, "ROLLBACK TO before")
    assert locks(observer) == []
    assert value(connection, "SHOW application_name") == "deploy"
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="holds no lock"):
        run(connection, RELEASE)
    run(connection, "ROLLBACK TO before", wishes(SHAPES[shape]), ACQUIRE, "RELEASE before")
    slot = value(connection, "SHOW dblock.slot")
    assert locks(observer) == expected(connection, SHAPES[shape], slot)
    run(connection, RELEASE, "COMMIT")
    assert locks(observer) == []


@pytest.mark.parametrize("shape", ["exclusive", "slots=1"])
def test_the_next_holder_sees_the_commit(
    connect: Connect, observer: Connection, threads: ThreadPoolExecutor, shape: str
) -> None:
    run(observer, "CREATE TABLE public.number (n int); INSERT INTO public.number VALUES (0)")
    try:

        def count(_: int) -> None:
            connection = connect()
            for _ in range(15):
                begin(connection, SHAPES[shape], timeout=None)
                number = value(connection, "SELECT n FROM public.number")
                run(connection, f"UPDATE public.number SET n = {number + 1}", "COMMIT")

        list(threads.map(count, range(6)))
        assert value(observer, "SELECT n FROM public.number") == 6 * 15
    finally:
        run(observer, "DROP TABLE public.number")


def test_waiters_of_both_scopes_stand_in_one_queue(
    url: str, connect: Connect, observer: Connection, threads: ThreadPoolExecutor
) -> None:
    holder, second = connect(), connect()
    third = dblock.lock(url, target="web-01", step="b")
    begin(holder)
    one = threads.submit(begin, second, SHARED, None)
    wait_until(lambda: waiters(observer) == [pid(second)], "the second")
    two = threads.submit(third.acquire)
    wait_until(lambda: len(waiters(observer)) == 2, "the third")
    assert not one.done()
    run(holder, "COMMIT")
    one.result(PATIENCE_SECONDS)
    assert len(waiters(observer)) == 1
    assert not two.done()
    run(second, "ROLLBACK")
    assert two.result(PATIENCE_SECONDS)
    third.release()
    assert locks(observer) == []


def test_two_locks_in_one_transaction(connect: Connect, observer: Connection) -> None:
    connection = connect()
    begin(connection, slots(2))
    label = value(connection, "SHOW application_name")
    run(connection, wishes(SHARED, target="web-02"), ACQUIRE, RELEASE)
    assert value(connection, "SHOW application_name") != label
    assert value(connection, "SHOW dblock.slot") == ""
    assert len(locks(observer)) == 3
    run(connection, "COMMIT")
    assert locks(observer) == []


def test_inside_a_sessions_lock(connect: Connect, observer: Connection) -> None:
    connection = connect()
    run(connection, set_wishes(Wish(more=slots(2))), ACQUIRE)
    label = value(connection, "SHOW application_name")
    for ending in ("COMMIT", "ROLLBACK"):
        run(connection, "BEGIN", wishes(target="web-02"), ACQUIRE)
        assert len(locks(observer)) == 3
        run(connection, ending)
        assert locks(observer) == expected(connection, slots(2), "0")
        assert value(connection, "SHOW application_name") == label
        assert value(connection, "SHOW dblock.slot") == "0"
    run(connection, RELEASE)
    assert locks(observer) == []


def test_the_implicit_transaction_of_one_command(
    connect: Connect, observer: Connection, body: Callable[[], int]
) -> None:
    holder, connection = connect(), connect()
    run(connection, f"{wishes()}; {ACQUIRE}; {BODY}; {RELEASE}; {BODY}")
    assert (body(), locks(observer)) == (2, [])
    begin(holder)
    with pytest.raises(psycopg.errors.LockNotAvailable):
        run(connection, f"{wishes()}; {ACQUIRE}; {BODY}; {RELEASE}")
    assert body() == 2


# --- psql -------------------------------------------------------------------------------------------------------------

FILES = ("-f", str(SQL / "acquire.sql"), "-c", BODY, "-f", str(SQL / "release.sql"))
INSIDE = ("-c", "set local dblock.target = 'web-01'", "-c", "set local dblock.step = 'b'", "-c",
          "set local dblock.scope = 'transaction'", "-c", "set local dblock.timeout = '0'")  # fmt: skip


def psql(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["psql", "-X", "-q", "-v", "VERBOSITY=verbose", url, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("way", ["psql -1", "BEGIN"])
def test_psql_runs_the_body_under_the_lock(url: str, body: Callable[[], int], way: str) -> None:
    inside = (*INSIDE, *FILES)
    arguments = ("-1", *inside) if way == "psql -1" else ("-c", "BEGIN", *inside, "-c", "COMMIT")
    done = psql(url, "-v", "ON_ERROR_STOP=1", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert body() == 1


@pytest.mark.parametrize("way", ["psql -1", "BEGIN"])
@pytest.mark.parametrize("variables", ["ON_ERROR_STOP=1", "ON_ERROR_STOP=0", "ON_ERROR_ROLLBACK=1"])
def test_psql_does_not_run_the_body(
    url: str, connect: Connect, body: Callable[[], int], variables: str, way: str
) -> None:
    """Not even where psql rolls back to a savepoint of its own after each error, and goes on."""
    begin(connect())
    inside = (*INSIDE, *FILES)
    arguments = ("-1", *inside) if way == "psql -1" else ("-c", "BEGIN", *inside, "-c", "COMMIT", "-c", BODY)
    done = psql(url, "-v", variables, *arguments)
    assert "ERROR:  55P03: dblock: " in done.stderr
    assert done.returncode in (2, 3)
    assert body() == 0


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_autocommit_is_refused(connect: Connect, observer: Connection, shape: str) -> None:
    connection = connect()
    run(connection, set_wishes(Wish(more={"scope": "transaction", **SHAPES[shape]})))
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="in autocommit the lock would end at once"):
        run(connection, ACQUIRE)
    with pytest.raises(psycopg.OperationalError):
        run(connection, "SELECT")
    assert locks(observer) == []


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("way", ["BEGIN", "SET TRANSACTION", "default"])
def test_an_old_snapshot_is_refused(connect: Connect, observer: Connection, way: str, level: str) -> None:
    connection = connect(options=f"-c default_transaction_isolation={level.lower().replace(' ', chr(92) + ' ')}") if (
        way == "default") else connect()  # fmt: skip
    run(connection, f"BEGIN ISOLATION LEVEL {level}" if way == "BEGIN" else "BEGIN")
    if way == "SET TRANSACTION":
        run(connection, f"SET TRANSACTION ISOLATION LEVEL {level}")
    run(connection, wishes())
    with pytest.raises(psycopg.errors.FeatureNotSupported, match=f"under {level} .*snapshot is older than the grant"):
        run(connection, ACQUIRE)
    with pytest.raises(psycopg.OperationalError):
        run(connection, "SELECT")
    assert locks(observer) == []


@pytest.mark.parametrize(("bad", "sqlstate"), [
    ({"timeout": "soon"}, "22023"), ({"more": {"scope": "transaction", "slots": "0"}}, "22023"),
    ({"target": ""}, "22023"), ({"more": {"scope": "Transaction"}}, "22023"),
    ({"more": {"scope": "transaction", "slots": "2", "shared": "on"}}, "22023"),
    ({"database": "elsewhere", "more": {"scope": "transaction"}}, "0A000"),
    ({"more": {"scope": "session"}}, "0A000"), ({}, "0A000"),
])  # fmt: skip
def test_bad_settings(connect: Connect, observer: Connection, bad: dict[str, Any], sqlstate: str) -> None:
    connection = connect()
    run(connection, "BEGIN", set_wishes(Wish(**bad)))
    with pytest.raises(psycopg.Error) as error:
        run(connection, ACQUIRE)
    assert error.value.sqlstate == sqlstate
    with pytest.raises(psycopg.OperationalError):
        run(connection, "ROLLBACK")
    assert locks(observer) == []


@pytest.mark.parametrize("wished", SHAPES)
@pytest.mark.parametrize("held", SHAPES)
@pytest.mark.parametrize("scope", ["session", "transaction"])
def test_already_held(connect: Connect, observer: Connection, scope: str, held: str, wished: str) -> None:
    connection = connect()
    if scope == "session":
        run(connection, set_wishes(Wish(more=SHAPES[held])), ACQUIRE, "BEGIN")
    else:
        begin(connection, SHAPES[held])
    with pytest.raises(psycopg.errors.ObjectInUse, match="holds this lock already; a lock is never taken twice"):
        run(connection, wishes(SHAPES[wished]), ACQUIRE)
    with pytest.raises(psycopg.OperationalError):
        run(connection, "SELECT")
    wait_until(lambda: locks(observer) == [], "the session to be gone with its lock")


def test_a_role_that_is_set_ends_the_session_too(connect: Connect, observer: Connection) -> None:
    begin(connect())
    connection = connect()
    run(connection, "BEGIN", wishes(), "SET LOCAL ROLE pg_monitor")
    with pytest.raises(psycopg.errors.LockNotAvailable):
        run(connection, ACQUIRE)
    with pytest.raises(psycopg.OperationalError):
        run(connection, "ROLLBACK")
    assert len(locks(observer)) == 1


def test_a_sessions_lock_is_not_given_back_within_the_transaction(connect: Connect, observer: Connection) -> None:
    connection = connect()
    run(connection, set_wishes(Wish(more=SHARED)), ACQUIRE, "BEGIN")
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="COMMIT first"):
        run(connection, RELEASE)
    assert locks(observer) == expected(connection, SHARED)


# --- what the session keeps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("shape", SHAPES)
def test_settings_are_as_before(connect: Connect, shape: str, ending: str) -> None:
    """Those of the transaction while it lasts, those of the session after it."""
    connection = connect(options="-c statement_timeout=5min -c lock_timeout=1d -c idle_session_timeout=1h")
    run(connection, "DO $$ BEGIN END $$", "SET search_path = public")
    session = value(connection, SETTINGS)
    run(connection, "BEGIN", "SET LOCAL search_path = pg_catalog, public", "SET LOCAL lock_timeout = '2d'")
    transaction = value(connection, SETTINGS)
    run(connection, wishes(SHAPES[shape]), ACQUIRE)
    assert value(connection, SETTINGS) == transaction
    run(connection, RELEASE)
    assert value(connection, SETTINGS) == transaction
    run(connection, ending)
    assert value(connection, SETTINGS) == session
    assert value(connection, "SHOW application_name") == "deploy"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_timeout_leaves_nothing(
    connect: Connect, observer: Connection, threads: ThreadPoolExecutor, shape: str
) -> None:
    """Shown in a session that goes on, since it has another lock, which its name does not explain."""
    holder, waiter, behind = connect(), connect(), connect()
    begin(holder, slots(1))
    run(waiter, "DO $$ BEGIN END $$", "SELECT pg_advisory_lock(42)")
    before, shown = locks(observer), value(waiter, SETTINGS)
    shape = {"shared": "exclusive", "slots=2": "slots=1"}.get(shape, shape)
    future = threads.submit(begin, waiter, SHAPES[shape], "0.5")
    wait_until(lambda: waiters(observer) == [pid(waiter)], "the waiter in the queue")
    assert value(observer, f"SELECT application_name FROM pg_stat_activity WHERE pid = {pid(waiter)}").startswith(
        "dblock1 w"
    )
    next_one = threads.submit(begin, behind, None, None)
    with pytest.raises(psycopg.errors.LockNotAvailable, match="not acquired in"):
        future.result(PATIENCE_SECONDS)
    run(waiter, "ROLLBACK")
    wait_until(lambda: waiters(observer) == [pid(behind)], "the one behind")
    assert [row for row in locks(observer) if row[0] != pid(behind)] == before
    assert value(waiter, SETTINGS) == shown
    assert value(waiter, "SHOW application_name") == "deploy"
    run(holder, "COMMIT")
    next_one.result(PATIENCE_SECONDS)


def test_a_failure_after_another_lock_of_the_transaction_ends_the_session(
    connect: Connect, observer: Connection
) -> None:
    """Also without a name: what the transaction holds is certainly its own."""
    holder, connection = connect(), connect(application_name="")
    begin(holder, target="web-02")
    begin(connection)
    with pytest.raises(psycopg.errors.LockNotAvailable):
        run(connection, wishes(target="web-02"), ACQUIRE)
    with pytest.raises(psycopg.OperationalError):
        run(connection, "ROLLBACK")
    wait_until(lambda: len(locks(observer)) == 1, "the session to be gone with its lock")


@pytest.mark.parametrize("shape", SHAPES)
def test_hostile_schema(
    url: str, connect: Connect, observer: Connection, threads: ThreadPoolExecutor, shape: str
) -> None:
    with hostile.schema(url, ACQUIRE + RELEASE):
        holder, waiter = connect(), connect()
        begin(holder)
        run(waiter, "BEGIN", wishes(SHAPES[shape], None), "SET LOCAL search_path = evil, pg_catalog")
        future = threads.submit(run, waiter, ACQUIRE)
        wait_until(lambda: waiters(observer) == [pid(waiter)], "the waiter in the queue")
        run(holder, "COMMIT")
        future.result(PATIENCE_SECONDS)
        slot = value(waiter, "SHOW dblock.slot")
        assert locks(observer) == expected(waiter, SHAPES[shape], slot)
        run(waiter, RELEASE)
        assert value(waiter, "SHOW search_path") == "evil, pg_catalog"
        run(waiter, "COMMIT")
        assert locks(observer) == []


# --- a cancel, wherever it hits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("explained", [True, False], ids=["ended", "kept"])
@pytest.mark.parametrize("shape", ["exclusive", "shared", "slots=1"])
def test_cancel_aimed_at_the_grant(
    connect: Connect, observer: Connection, threads: ThreadPoolExecutor, shape: str, explained: bool
) -> None:
    """Either the script says that it holds the lock, and does; or nothing is left, also where the session goes on.

    There a second cancel hits while the first is dealt with.
    """
    random, tally, wish = Random(7), Counter[bool](), SHAPES[shape]
    holder, waiter = connect(), connect()
    for _ in range(rounds(60)):
        begin(holder, EXCLUSIVE if shape == "shared" else wish)
        if waiter.closed or explained:
            waiter = connect()
        if not explained:
            run(waiter, "SELECT pg_advisory_lock(42)")
        before = [] if explained else [(pid(waiter), "42", "ExclusiveLock")]
        run(waiter, "BEGIN", wishes(wish, None))
        future = threads.submit(run, waiter, ACQUIRE)
        wait_until(lambda: len(waiters(observer)) == 1, "the waiter in the queue")
        run(holder, "COMMIT")
        spin(random.uniform(0, 0.006))
        run(observer, f"SELECT pg_cancel_backend({pid(waiter)})")
        if not explained:
            spin(random.uniform(0, 0.0004))
            run(observer, f"SELECT pg_cancel_backend({pid(waiter)})")
        error = future.exception(PATIENCE_SECONDS)
        tally[error is None] += 1
        # What a cancel hits that came too late for the script.
        with suppress(psycopg.Error):
            run(waiter, "SELECT pg_sleep(0.001)")
        if error is None or not explained:
            run(waiter, "ROLLBACK")
        wait_until(lambda before=before: locks(observer) == before, "what the waiter had taken")  # type: ignore[misc]
        run(waiter, "SELECT pg_advisory_unlock_all()") if not explained else waiter.close()
    assert min(tally[True], tally[False]) > 5, tally


@pytest.mark.parametrize("shape", SHAPES)
def test_a_waiter_that_is_terminated_leaves_nothing(
    connect: Connect, observer: Connection, threads: ThreadPoolExecutor, shape: str
) -> None:
    holder, waiter = connect(), connect()
    begin(holder)
    future = threads.submit(begin, waiter, SHAPES[shape], None)
    wait_until(lambda: waiters(observer) == [pid(waiter)], "the waiter in the queue")
    run(observer, f"SELECT pg_terminate_backend({pid(waiter)})")
    assert isinstance(future.exception(PATIENCE_SECONDS), psycopg.errors.AdminShutdown)
    wait_until(lambda: locks(observer) == expected(holder, EXCLUSIVE), "the waiter's locks to be gone")


def test_a_deadlock_with_a_row(connect: Connect, observer: Connection, threads: ThreadPoolExecutor) -> None:
    """The waiter has a row that the holder wants: the server ends the holder's wait, since the waiter's is cut."""
    run(observer, "CREATE TABLE public.number (n int); INSERT INTO public.number VALUES (0)")
    try:
        holder, waiter = connect(), connect()
        begin(holder)
        run(waiter, "BEGIN", "UPDATE public.number SET n = 1", wishes(None, None))
        future = threads.submit(run, waiter, ACQUIRE)
        wait_until(lambda: waiters(observer) == [pid(waiter)], "the waiter in the queue")
        with pytest.raises(psycopg.errors.DeadlockDetected):
            run(holder, "UPDATE public.number SET n = 2")
        run(holder, "ROLLBACK")
        future.result(PATIENCE_SECONDS)
        run(waiter, "COMMIT")
    finally:
        run(observer, "DROP TABLE public.number")


def test_statement_timeout_ends_no_wait(connect: Connect, observer: Connection, threads: ThreadPoolExecutor) -> None:
    random, holder = Random(5), connect()
    begin(holder, slots(1))
    queue = [connect() for _ in range(8)]
    futures = []
    for number, each in enumerate(queue, start=1):
        run(each, f"SET statement_timeout = {random.randint(100, 300)}")
        futures.append(threads.submit(begin, each, slots(1), None))
        wait_until(lambda number=number: len(waiters(observer)) == number, "the waiter in the queue")  # type: ignore[misc]
    for each, future in zip(queue, futures, strict=True):
        spin(random.uniform(0, 0.1))
        run(holder, "COMMIT")
        assert future.result(PATIENCE_SECONDS) == "0"
        holder = each
    run(holder, "COMMIT")
    assert locks(observer) == []


def spin(seconds: float) -> None:
    """Let a moment pass that is shorter than any sleep."""
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass


# --- through a pooler in transaction mode -----------------------------------------------------------------------------


@pytest.fixture
def pooled(url: str) -> Iterator[str]:
    """Two connections to the server, which all clients share."""
    with pgbouncer(url, "transaction", pool_size=2) as through:
        yield through


NAMES = [("deploy", "other"), ("deploy", "deploy"), ("deploy", ""), ("", "deploy"), ("", "")]


@pytest.mark.parametrize("names", NAMES, ids="+".join)
@pytest.mark.parametrize("shape", ["exclusive", "slots=1"])
def test_pooled_clients_exclude_each_other(
    pooled: str, connect: Connect, observer: Connection, shape: str, names: tuple[str, str]
) -> None:
    first, second = (
        connect(pooled, **({"application_name": name} if name else {"application_name": ""})) for name in names
    )
    for _ in range(3):
        begin(first, SHAPES[shape])
        with pytest.raises(psycopg.errors.LockNotAvailable):
            begin(second, SHAPES[shape], timeout="0.05")
        # The second one's connection to the server is ended, not the first one's.
        assert len(locks(observer)) == (2 if "slots" in shape else 1)
        run(first, RELEASE, "SELECT 1", "COMMIT")
        assert locks(observer) == []
        second = connect(pooled, application_name=names[1])
        begin(second, SHAPES[shape])
        run(second, "COMMIT")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
def test_nothing_is_left_on_the_connections_to_the_server(
    url: str, connect: Connect, observer: Connection, shape: str, ending: str
) -> None:
    with pgbouncer(url, "transaction", pool_size=1) as through:
        first, second = connect(through), connect(through, application_name="another")
        settings = SETTINGS.replace("WHERE", "WHERE name NOT LIKE 'plpgsql.%' AND")
        before = value(second, settings)
        begin(first, SHAPES[shape], tenant="T1")
        run(first, ending)
        assert value(second, settings) == before
        assert value(second, "SHOW application_name") == "another"
        for left in ("held", "slot", "target", "step", "tenant", "timeout", "shared", "slots", "scope"):
            assert not value(second, f"SELECT current_setting('dblock.{left}', true)")
        assert locks(observer) == []
        begin(second, SHAPES[shape])
        run(second, "COMMIT")


def test_pooled_clients_compete(pooled: str, url: str, connect: Connect, observer: Connection) -> None:
    """Also with one who holds a session's lock, directly. Those who fail in time never end another one's lock."""
    run(observer, "CREATE TABLE public.number (n int); INSERT INTO public.number VALUES (0)")
    counted = Counter[str]()

    def count(number: int) -> None:
        random, connection = Random(number), connect(pooled, application_name=f"deploy {number % 3}")
        for _ in range(40):
            if connection.closed:
                connection = connect(pooled)
            try:
                begin(connection, timeout=random.choice((None, "0.02", "0")))
                held = value(connection, "SELECT n FROM public.number")
                spin(random.uniform(0, 0.003))
                run(connection, f"UPDATE public.number SET n = {held + 1}", RELEASE, "COMMIT")
                counted["done"] += 1
            except psycopg.errors.LockNotAvailable:
                connection.close()
                counted["not acquired"] += 1

    def count_directly(_: int) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            for _ in range(40):
                with dblock.lock(url, target="web-01", step="b"):
                    held = value(connection, "SELECT n FROM public.number")
                    run(connection, f"UPDATE public.number SET n = {held + 1}")
                    counted["done"] += 1

    try:
        with ExitStack() as stack:
            executor = stack.enter_context(ThreadPoolExecutor(7))
            futures = [executor.submit(count, number) for number in range(6)] + [executor.submit(count_directly, 0)]
            for future in futures:
                future.result(PATIENCE_SECONDS)
        assert value(observer, "SELECT n FROM public.number") == counted["done"]
        assert min(counted["done"], counted["not acquired"]) > 10, counted
        wait_until(lambda: locks(observer) == [], "all locks to be gone")
    finally:
        run(observer, "DROP TABLE public.number")


@pytest.mark.parametrize("names", NAMES, ids="+".join)
@pytest.mark.parametrize("outcome", ["55006", "22023", "55P03"])
def test_a_failure_leaves_another_clients_lock(
    url: str, connect: Connect, observer: Connection, names: tuple[str, str], outcome: str
) -> None:
    """One who was wrong to take a session's lock through the pooler, and another who fails on the same connection."""
    with pgbouncer(url, "transaction", pool_size=1) as through:
        first, second = (connect(through, application_name=name) for name in names)
        direct = connect()
        run(direct, set_wishes(Wish(target="web-02")), ACQUIRE)
        run(first, set_wishes(Wish()), ACQUIRE)
        before = locks(observer)
        target = "web-02" if outcome == "55P03" else "web-01"
        with pytest.raises(psycopg.Error) as error:
            begin(second, timeout="soon" if outcome == "22023" else "0", target=target)
        assert error.value.sqlstate == outcome
        assert locks(observer) == before
        run(second, "ROLLBACK")
        if names[1]:  # without a name it goes on under the first one's, which the rollback has brought back
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                run(second, RELEASE)
        assert locks(observer) == before
