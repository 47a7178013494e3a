"""The two messages of an uncontended pair are statements that psycopg may prepare on the caller's own connection.

So they mean the same whatever search_path says, and are right as often as they are repeated: what was planned once must
not be taken for what is so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

import dblock
from tests import hostile
from tests.backends import Postgres

Connection = psycopg.Connection[Any]
WISH: dict[str, Any] = {"target": "web-01", "step": "b", "tenant": "T1"}
SHAPES: list[dict[str, Any]] = [{}, {"shared": True}, {"slots": 2}]
OFTEN = 8  # psycopg prepares what it sees for the sixth time

# What the statements are made of, for the traps.
USED = """
    pg_catalog.pg_is_in_recovery( pg_catalog.current_setting( pg_catalog.pg_backend_pid( pg_catalog.current_database(
    pg_catalog.pg_try_advisory_xact_lock( pg_catalog.pg_try_advisory_lock( pg_catalog.pg_try_advisory_lock_shared(
    pg_catalog.pg_advisory_unlock( pg_catalog.pg_advisory_unlock_shared( pg_catalog.set_config( pg_catalog.floor(
    pg_catalog.clock_timestamp( pg_catalog.extract( pg_catalog.unnest( pg_catalog.concat( pg_catalog.pg_lock_status(
"""


@pytest.fixture
def connection(postgres: Postgres) -> Iterator[Connection]:
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        yield connection


def prepared(connection: Connection) -> int:
    row = connection.execute(
        "SELECT count(*) FROM pg_prepared_statements WHERE statement ~ 'advisory'", prepare=False
    ).fetchone()
    assert row
    return int(row[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prepared_where_the_connection_prepares(
    postgres: Postgres, connection: Connection, shape: dict[str, Any]
) -> None:
    for _ in range(OFTEN):
        with dblock.lock(connection, **WISH, **shape):
            assert len(set(postgres.holders())) == 1
        assert postgres.all_rows() == []
    assert prepared(connection) == 2


def test_not_prepared_where_the_connection_does_not(postgres: Postgres) -> None:
    with psycopg.connect(postgres.url, autocommit=True, prepare_threshold=None) as connection:
        for _ in range(OFTEN):
            with dblock.lock(connection, **WISH):
                pass
        assert prepared(connection) == 0


def test_prepared_by_an_asynchronous_connection(postgres: Postgres) -> None:
    async def work() -> int:
        async with await psycopg.AsyncConnection.connect(postgres.url, autocommit=True) as connection:
            for _ in range(OFTEN):
                async with dblock.alock(connection, **WISH):
                    assert len(set(postgres.holders())) == 1
            cursor = await connection.execute("SELECT count(*) FROM pg_prepared_statements", prepare=False)
            (number,) = await cursor.fetchone() or (0,)
            return int(number)

    assert asyncio.run(work()) == 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_outcome_as_often_as_it_comes(postgres: Postgres, connection: Connection, shape: dict[str, Any]) -> None:
    """Held by somebody else, by this session, by nobody, in turns, long after the statement was planned."""
    with psycopg.connect(postgres.url, autocommit=True) as other:
        for _ in range(OFTEN):
            with dblock.lock(other, **WISH):
                assert not dblock.lock(connection, **WISH, **shape).acquire(timeout=0)
            with (
                dblock.lock(connection, **WISH, **shape),
                pytest.raises(dblock.AlreadyHeld),
                dblock.lock(connection, **WISH, **shape),
            ):
                pass
            assert postgres.all_rows() == []


@pytest.mark.parametrize("forget", ["DISCARD ALL", "DEALLOCATE ALL"])
def test_a_pool_that_forgets_what_was_prepared(postgres: Postgres, connection: Connection, forget: str) -> None:
    for _ in range(3):
        for _ in range(OFTEN):
            with dblock.lock(connection, **WISH):
                assert len(set(postgres.holders())) == 1
        connection.execute(forget)


def test_what_was_prepared_is_forgotten_unseen(postgres: Postgres, connection: Connection) -> None:
    forget = "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"
    for _ in range(OFTEN):
        with dblock.lock(connection, **WISH):
            pass
    assert prepared(connection) == 2
    connection.execute(forget)
    for _ in range(3):
        with dblock.lock(connection, **WISH):
            assert len(set(postgres.holders())) == 1
            connection.execute(forget)
        assert postgres.all_rows() == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_search_path_full_of_traps(postgres: Postgres, connection: Connection, shape: dict[str, Any]) -> None:
    with hostile.schema(postgres.url, USED):
        connection.execute("SET search_path = evil, pg_catalog")
        for _ in range(OFTEN):
            with dblock.lock(connection, **WISH, **shape, database=postgres.database):
                assert len(set(postgres.holders())) == 1
            with psycopg.connect(postgres.url, autocommit=True) as other, dblock.lock(other, **WISH):
                assert not dblock.lock(connection, **WISH, **shape).acquire(timeout=0)
        assert postgres.all_rows() == []
        assert connection.info.parameter_status("application_name") == ""
