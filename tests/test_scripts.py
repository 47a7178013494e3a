"""acquire.sql and release.sql through psql and through a driver: what fails, fails closed."""

from __future__ import annotations

import itertools
import json
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import psycopg
import pytest
from psycopg import sql

import dblock
from tests.backends import Postgres
from tests.doors import PSQL, SQL, Wish, literal, set_wishes
from tests.support import rounds, wait_until

ACQUIRE = (SQL / "acquire.sql").read_text()
RELEASE = (SQL / "release.sql").read_text()
VECTORS = json.loads((Path(__file__).parent / "key-vectors.json").read_text())

Connection = psycopg.Connection[Any]
Connect = Callable[..., Connection]


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    connections = []

    def open_one(**settings: str) -> Connection:
        connection = psycopg.connect(url, autocommit=True, **settings)  # type: ignore[arg-type]  # kwargs are conninfo
        connections.append(connection)
        return connection

    yield open_one
    for connection in connections:
        connection.close()


@pytest.fixture
def observer(connect: Connect) -> Connection:
    return connect()


@pytest.fixture
def body(observer: Connection) -> Iterator[Callable[[], int]]:
    """A table into which the guarded step writes, and how often it ran."""
    observer.execute("CREATE TABLE public.body (ran int); GRANT ALL ON public.body TO public")
    yield lambda: value(observer, "SELECT count(*) FROM public.body")
    observer.execute("DROP TABLE public.body")


BODY = "INSERT INTO public.body VALUES (1)"


def value(connection: Connection, query: str) -> Any:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def run(connection: Connection, text: str) -> None:
    connection.execute(text.encode())


def acquire(connection: Connection, wish: Wish) -> None:
    run(connection, set_wishes(wish))
    run(connection, ACQUIRE)


def locks(observer: Connection) -> list[Any]:
    return observer.execute(
        "SELECT objsubid, (classid::bigint << 32) | objid::bigint, mode FROM pg_locks WHERE locktype = 'advisory'"
    ).fetchall()


def key_row(wish: Wish) -> tuple[int, int, str]:
    return (1, dblock.key(wish.target, wish.step).value, "ExclusiveLock")


def ended(connection: Connection) -> bool:
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return True
    return False


# --- the body does not run ------------------------------------------------------------------------------------------

# What is wrong, as commands before acquire.sql.
WRONG = {
    "timeout": ([set_wishes(Wish(timeout="0.2"))], "55P03"),
    "no waiting": ([set_wishes(Wish(timeout="0"))], "55P03"),
    "bad setting": ([set_wishes(Wish(timeout="soon"))], "22023"),
    "no target": (["SELECT set_config('dblock.step', 'b', false)"], "22023"),
    "already held": ([set_wishes(Wish(target="free")), ACQUIRE, set_wishes(Wish(target="free"))], "55006"),
    "another database": ([set_wishes(Wish(database="elsewhere"))], "0A000"),
    "SET ROLE": ([set_wishes(Wish(timeout="0")), "SET ROLE pg_monitor"], "55P03"),
    "SET SESSION AUTHORIZATION": ([set_wishes(Wish(timeout="0")), "SET SESSION AUTHORIZATION dblock_plain"], "55P03"),
    "BEGIN": ([set_wishes(Wish(target="free")), "BEGIN"], "0A000"),
}


@pytest.fixture
def busy(url: str, observer: Connection) -> Iterator[dblock.Lock]:
    """Somebody holds b@web-01; and there is a role without any rights."""
    observer.execute("CREATE ROLE dblock_plain LOGIN")
    with dblock.lock(url, target="web-01", step="b") as lock:
        yield lock
    observer.execute("DROP ROLE dblock_plain")


def psql(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["psql", "-X", "-q", "-v", "VERBOSITY=verbose", url, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def commands(*texts: str) -> list[str]:
    return list(itertools.chain.from_iterable(("-c", text) for text in texts))


FILES = ("-f", str(SQL / "acquire.sql"), "-c", BODY, "-f", str(SQL / "release.sql"))


@pytest.mark.parametrize("stop", [True, False], ids=["ON_ERROR_STOP", "going on"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.usefixtures("busy")
def test_psql_does_not_run_the_body(url: str, body: Callable[[], int], stop: bool, wrong: str) -> None:
    before, sqlstate = WRONG[wrong]
    done = psql(url, "-v", f"ON_ERROR_STOP={int(stop)}", *commands(*before), *FILES)
    assert f"ERROR:  {sqlstate}: dblock: " in done.stderr
    # 3: psql stopped at the error; 2: it went on, and found its connection ended.
    assert done.returncode in (2, 3)
    assert body() == 0


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.usefixtures("busy")
def test_driver_cannot_run_the_body(connect: Connect, body: Callable[[], int], wrong: str) -> None:
    before, sqlstate = WRONG[wrong]
    connection = connect(application_name="deploy")
    with pytest.raises(psycopg.Error) as error:
        for text in (*before, ACQUIRE):
            run(connection, text)
    assert error.value.sqlstate == sqlstate
    with pytest.raises(psycopg.OperationalError):
        run(connection, BODY)
    assert body() == 0


@pytest.mark.parametrize("stop", [True, False], ids=["ON_ERROR_STOP", "going on"])
def test_psql_in_one_transaction(url: str, body: Callable[[], int], stop: bool) -> None:
    done = psql(url, "-1", "-v", f"ON_ERROR_STOP={int(stop)}", *commands(set_wishes(Wish())), *FILES)
    assert "ERROR:  0A000: dblock: inside a transaction" in done.stderr
    assert body() == 0


def test_psql_one_command_with_several_statements(url: str, body: Callable[[], int]) -> None:
    done = psql(url, *commands(f"{set_wishes(Wish())}; {ACQUIRE}; {BODY}; {RELEASE}"))
    assert "ERROR:  0A000: dblock: inside a transaction" in done.stderr
    assert body() == 0


def test_driver_one_command_with_several_statements(connect: Connect, body: Callable[[], int]) -> None:
    connection = connect()
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="inside a transaction"):
        run(connection, f"{set_wishes(Wish())}; {ACQUIRE}; {BODY}; {RELEASE}")
    assert body() == 0


def test_inside_a_function_is_a_transaction(connect: Connect, body: Callable[[], int]) -> None:
    connection = connect()
    run(connection, set_wishes(Wish()))
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="inside a transaction"):
        run(connection, f"DO $caller$ BEGIN EXECUTE {literal(ACQUIRE)}; {BODY}; END $caller$")
    assert body() == 0


def test_psql_runs_the_body_under_the_lock(url: str, body: Callable[[], int]) -> None:
    done = psql(
        url, "-v", "ON_ERROR_STOP=1", *commands("set dblock.target = 'web-01'", "set dblock.step = 'b'"), *FILES
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert body() == 1


def test_extended_protocol(connect: Connect, observer: Connection) -> None:
    """A driver that prepares everything sends acquire.sql and release.sql all the same."""
    connection = connect()
    run(connection, set_wishes(Wish()))
    connection.execute(ACQUIRE, prepare=True)
    assert locks(observer) == [key_row(Wish())]
    connection.execute(RELEASE, prepare=True)
    assert locks(observer) == []


# --- what the session keeps -------------------------------------------------------------------------------------------


def settings(connection: Connection) -> dict[str, str]:
    return dict(connection.execute("SELECT name, setting FROM pg_settings").fetchall())


def test_the_session_is_as_before(connect: Connect) -> None:
    connection = connect(
        options="-c statement_timeout=5min -c lock_timeout=1d -c idle_session_timeout=1h "
        "-c search_path=pg_catalog,public -c deadlock_timeout=700ms",
        application_name="it's \\ mine",
    )
    run(connection, "DO $$ BEGIN END $$")  # loads plpgsql, which adds settings of its own
    before = settings(connection)
    acquire(connection, Wish(tenant="T1"))
    label = value(connection, "SHOW application_name")
    assert label.startswith("dblock1 ")
    assert settings(connection) == before | {"application_name": label}
    run(connection, RELEASE)
    assert settings(connection) == before


@pytest.mark.parametrize("timeout", ["0", None])
def test_wishes_are_consumed(connect: Connect, timeout: str | None) -> None:
    """Also by a failure: shown in a session that is not ended, since its label does not explain its other lock."""
    other, connection = connect(), connect()
    acquire(other, Wish())
    run(connection, "SELECT pg_advisory_lock(42)")
    run(connection, set_wishes(Wish(target="web-01" if timeout else "free", tenant="T1", timeout=timeout)))
    try:
        run(connection, ACQUIRE)
        assert timeout is None
    except psycopg.errors.LockNotAvailable:
        assert timeout == "0"
    for name in ("target", "step", "tenant", "timeout", "shared", "slots", "scope", "database", "key"):
        assert value(connection, f"SELECT current_setting('dblock.{name}', true)") == ""
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"dblock\.target is not set"):
        run(connection, ACQUIRE)


def test_locks_that_the_label_does_not_explain_keep_the_session(connect: Connect, observer: Connection) -> None:
    other, connection = connect(), connect(application_name="psql")
    acquire(other, Wish())
    run(connection, "SELECT pg_advisory_lock(42)")
    with pytest.raises(psycopg.errors.LockNotAvailable) as error:
        acquire(connection, Wish(timeout="0.2"))
    assert "The session is not ended" in str(error.value.diag.message_hint)
    assert sorted(locks(observer)) == sorted([(1, 42, "ExclusiveLock"), key_row(Wish())])
    assert value(connection, "SHOW application_name") == "psql"
    assert value(connection, "SHOW search_path") == '"$user", public'


@pytest.mark.parametrize("forged", ["{", "[]", "7", '[{"key": "x"}]', '[{"key": "42", "label": "psql"}, 5]'])
def test_forged_memory_explains_nothing(connect: Connect, forged: str) -> None:
    connection = connect(application_name="psql")
    run(connection, f"SELECT pg_advisory_lock(42), set_config('dblock.held', {literal(forged)}, false)")
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        run(connection, ACQUIRE)
    assert value(connection, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 1


def test_two_locks_in_one_session(connect: Connect, observer: Connection) -> None:
    connection = connect(application_name="psql")
    first, second = Wish(target="web-01"), Wish(target="web-02")
    acquire(connection, first)
    acquire(connection, second)
    assert sorted(locks(observer)) == sorted([key_row(first), key_row(second)])
    assert value(connection, "SHOW application_name").endswith(" - web-02 b")
    run(connection, RELEASE)
    assert locks(observer) == [key_row(first)]
    assert value(connection, "SHOW application_name").endswith(" - web-01 b")
    run(connection, RELEASE)
    assert locks(observer) == []
    assert value(connection, "SHOW application_name") == "psql"


def test_failure_with_an_explained_lock_ends_the_session(connect: Connect, observer: Connection) -> None:
    connection = connect(application_name="deploy")
    acquire(connection, Wish())
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        acquire(connection, Wish(target="web-02", timeout="x"))
    assert ended(connection)
    wait_until(lambda: locks(observer) == [], "the first lock to be gone with its session")


def test_failure_without_a_name_keeps_the_lock_that_may_be_anothers(connect: Connect, observer: Connection) -> None:
    """PgBouncer does not carry an empty name, so this is what a second client without one finds on the backend."""
    connection = connect()
    acquire(connection, Wish())
    with pytest.raises(psycopg.errors.ObjectInUse, match="holds this lock already"):
        acquire(connection, Wish())
    assert locks(observer) == [key_row(Wish())]
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="may be another client's"):
        run(connection, RELEASE)
    assert locks(observer) == [key_row(Wish())]


def test_a_label_without_its_lock_betrays_a_pooler(connect: Connect) -> None:
    connection = connect()
    acquire(connection, Wish())
    run(connection, "SELECT pg_advisory_unlock_all()")
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="a pooler in transaction mode"):
        acquire(connection, Wish())
    assert ended(connection)


# --- release.sql ------------------------------------------------------------------------------------------------------


def test_release_without_a_lock(connect: Connect) -> None:
    connection = connect()
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="holds no lock"):
        run(connection, RELEASE)
    acquire(connection, Wish())
    run(connection, RELEASE)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="holds no lock"):
        run(connection, RELEASE)


def test_release_of_a_lock_that_somebody_gave_back(connect: Connect) -> None:
    connection = connect()
    acquire(connection, Wish())
    run(connection, "SELECT pg_advisory_unlock_all()")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="given back by somebody else"):
        run(connection, RELEASE)


def test_release_waits_for_the_commit(connect: Connect, observer: Connection) -> None:
    connection = connect()
    acquire(connection, Wish())
    run(connection, "BEGIN")
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="COMMIT first"):
        run(connection, RELEASE)
    assert locks(observer) == [key_row(Wish())]
    run(connection, "ROLLBACK")
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="COMMIT first"):
        run(connection, f"SELECT 1; {RELEASE}")
    assert locks(observer) == [key_row(Wish())]
    run(connection, RELEASE)
    assert locks(observer) == []


def test_release_by_another_name_keeps_the_lock(connect: Connect, observer: Connection) -> None:
    """Behind a pooler in transaction mode the memory is the backend's, but the name is the client's."""
    connection = connect()
    acquire(connection, Wish())
    run(connection, "SET application_name = 'another client'")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="may be another client's"):
        run(connection, RELEASE)
    assert locks(observer) == [key_row(Wish())]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["keys"], ids=lambda vector: f"{vector['target']}-{vector['step']}"[:30])
def test_vectors(connect: Connect, observer: Connection, vector: dict[str, Any]) -> None:
    connection = connect()
    wish = Wish(target=vector["target"], step=vector["step"], more={"key": str(vector["key"])})
    acquire(connection, wish)
    assert locks(observer) == [(1, vector["key"], "ExclusiveLock")]
    run(connection, RELEASE)


def reaches_the_server(name: str) -> bool:
    """NUL and lone surrogates are no text for PostgreSQL: the driver cannot even send them."""
    return "\0" not in name and name.encode(errors="replace").decode() == name


REACHABLE = [v for v in VECTORS["refused"] if reaches_the_server(v["target"]) and reaches_the_server(v["step"])]


@pytest.mark.parametrize("vector", REACHABLE, ids=lambda vector: ascii(f"{vector['target']}-{vector['step']}")[:30])
def test_refused_vectors(connect: Connect, vector: dict[str, Any]) -> None:
    connection = connect()
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=r"dblock: dblock\.(target|step) "):
        acquire(connection, Wish(target=vector["target"], step=vector["step"]))
    assert ended(connection)


def test_every_refused_vector_is_reachable_but_three() -> None:
    assert len(VECTORS["refused"]) - len(REACHABLE) == 3


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP", "SQL_ASCII"])
def test_names_beyond_ascii_need_utf8_all_the_way(connect: Connect, observer: Connection, encoding: str) -> None:
    connection = connect(client_encoding=encoding)
    acquire(connection, Wish())
    assert locks(observer) == [key_row(Wish())]
    run(connection, RELEASE)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="client_encoding UTF8"):
        run(
            connection, "SELECT set_config('dblock.target', U&'w\\00e9b', false), set_config('dblock.step', 'b', false)"
        )
        run(connection, ACQUIRE)
    assert ended(connection)


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP", "SQL_ASCII"])
def test_database_in_another_encoding(url: str, observer: Connection, encoding: str) -> None:
    name = sql.Identifier(f"dblock_{encoding.lower()}")
    observer.execute(
        sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING {} LOCALE 'C'").format(name, sql.Literal(encoding))
    )
    try:
        with psycopg.connect(
            url, dbname=f"dblock_{encoding.lower()}", autocommit=True, client_encoding="UTF8"
        ) as there:
            acquire(there, Wish(tenant="Tü" if encoding == "LATIN1" else "T1"))
            assert locks(observer) == [key_row(Wish())]
            run(there, RELEASE)
            with pytest.raises(psycopg.errors.InvalidParameterValue, match="server_encoding and client_encoding UTF8"):
                run(there, f"SELECT set_config('dblock.target', {ENCODED[encoding]}, false),"
                           f"set_config('dblock.step', 'b', false)")  # fmt: skip
                run(there, ACQUIRE)
            assert ended(there)
    finally:
        observer.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


# A name beyond ASCII, written so that it exists in the database's encoding.
ENCODED = {
    "LATIN1": "convert_from('\\xe9', 'LATIN1')",
    "EUC_JP": "convert_from('\\xa4a2', 'EUC_JP')",
    "SQL_ASCII": "'é'",
}


# --- a hostile schema -------------------------------------------------------------------------------------------------

HOSTILE = """
CREATE SCHEMA evil;
CREATE FUNCTION evil.trap() RETURNS void LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;
CREATE FUNCTION evil.pg_try_advisory_lock(bigint) RETURNS boolean LANGUAGE sql AS 'SELECT true';
CREATE FUNCTION evil.set_config(text, text, boolean) RETURNS text LANGUAGE sql AS 'SELECT evil.trap()::text';
CREATE FUNCTION evil.current_setting(text, boolean) RETURNS text LANGUAGE sql AS 'SELECT evil.trap()::text';
CREATE FUNCTION evil.sha256(bytea) RETURNS bytea LANGUAGE sql AS $$ SELECT '\\x0000000000000000'::bytea $$;
CREATE FUNCTION evil.lies(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT evil.trap() IS NULL';
CREATE FUNCTION evil.joins(text, text) RETURNS text LANGUAGE sql AS 'SELECT evil.trap()::text';
CREATE FUNCTION evil.counts(bigint, bigint) RETURNS boolean LANGUAGE sql AS 'SELECT evil.trap() IS NULL';
CREATE OPERATOR evil.=  (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.lies);
CREATE OPERATOR evil.<> (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.lies);
CREATE OPERATOR evil.~  (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.lies);
CREATE OPERATOR evil.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.joins);
CREATE OPERATOR evil.=  (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = evil.counts);
CREATE VIEW evil.pg_locks AS SELECT 1 AS nothing;
CREATE VIEW evil.pg_database AS SELECT 1 AS nothing;
CREATE DOMAIN evil.text AS pg_catalog.varchar CHECK (value IS NULL);
CREATE DOMAIN evil.jsonb AS pg_catalog.varchar CHECK (value IS NULL);
"""


def test_hostile_schema(connect: Connect, observer: Connection) -> None:
    observer.execute(HOSTILE)
    try:
        connection, waiter = connect(), connect()
        for each in (connection, waiter):
            run(each, set_wishes(Wish(tenant="T1")))
            run(each, "SET search_path = evil, pg_catalog")
        run(connection, ACQUIRE)
        assert locks(observer) == [key_row(Wish())]
        thread = threading.Thread(target=run, args=(waiter, ACQUIRE))
        thread.start()
        wait_until(lambda: len(locks(observer)) == 4, "the waiter in the queue")
        run(connection, RELEASE)
        thread.join()
        run(waiter, RELEASE)
        assert locks(observer) == []
    finally:
        observer.execute("DROP SCHEMA evil CASCADE")


# --- a cancel that meets the grant ------------------------------------------------------------------------------------


def test_cancel_aimed_at_the_grant(connect: Connect, observer: Connection, body: Callable[[], int]) -> None:
    """Either the script says that it holds the lock, and does; or the session is ended, and the body cannot run."""
    wish, random = Wish(), Random(2)
    holder, tally = connect(), Counter[bool]()
    for _ in range(rounds(100)):
        run(holder, f"SELECT pg_advisory_lock({dblock.key(wish.target, wish.step).value})")
        waiter = connect()
        run(waiter, set_wishes(wish))
        errors: list[psycopg.Error] = []
        thread = threading.Thread(target=catching, args=(errors, waiter, ACQUIRE))
        thread.start()
        wait_until(lambda: len(locks(observer)) == 4, "the waiter in the queue")
        run(holder, "SELECT pg_advisory_unlock_all()")
        spin(random.uniform(0, 0.003))
        run(holder, f"SELECT pg_cancel_backend({waiter.info.backend_pid})")
        thread.join()
        tally[bool(errors)] += 1
        if not errors:
            catching([], waiter, "SELECT")  # what a cancel hits that came too late for the script
            assert locks(observer) == [key_row(wish)]
            run(waiter, RELEASE)
        else:
            catching(errors, waiter, BODY)
            wait_until(lambda: locks(observer) == [], "what the cancelled one had taken")
        waiter.close()
    assert body() == 0
    assert min(tally.values()) > 5, tally


def catching(errors: list[psycopg.Error], connection: Connection, text: str) -> None:
    try:
        run(connection, text)
    except psycopg.Error as error:
        errors.append(error)


def spin(seconds: float) -> None:
    """Let a moment pass that is shorter than any sleep."""
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass


def test_a_killed_waiter_leaves_the_queue(postgres: Postgres) -> None:
    """With the setting that the header names; without it only when it is granted."""
    with dblock.lock(postgres.url, target="web-01", step="b"):
        waiter = PSQL.attempt(postgres.url, Wish(), PGOPTIONS="-c client_connection_check_interval=500ms")
        with waiter:
            wait_until(lambda: len(postgres.waiters()) == 1, "the waiter in the queue")
            waiter.kill()
            wait_until(lambda: not postgres.waiters(), "the waiter to be gone")
