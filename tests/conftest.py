"""The servers that the tests run against: real ones only."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from tests import backends
from tests.backends import Backend, Postgres, SqlServer
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
        return
    from dblock.demo.server import find_binaries, postgres_server  # for Unix

    if find_binaries():
        with postgres_server() as server:
            yield server.url
    else:
        from testcontainers.postgres import PostgresContainer

        with PostgresContainer("postgres:18", driver=None).with_command(
            "-c max_connections=200 -c max_prepared_transactions=10"
        ) as container:
            yield container.get_connection_url()


@pytest.fixture(scope="session")
def mssql_url() -> Iterator[str]:
    """A SQL Server, or a server of the same protocol, in which the tests may do as they like.

    The one in DBLOCK_TEST_MSSQL_URL, or a container where Docker runs. Otherwise what needs one is skipped.
    """
    given = os.environ.get("DBLOCK_TEST_MSSQL_URL")
    if given:
        yield given
    elif _docker_runs():
        from testcontainers.mssql import SqlServerContainer

        with SqlServerContainer(_SQL_SERVER_IMAGE, dialect="mssql+pymssql", dbname="master") as container:
            master = container.get_connection_url()
            with backends.sql_server(master) as backend:
                backend.query("CREATE DATABASE shared")
            yield master.removesuffix("master") + "shared"
    else:
        pytest.skip(
            "needs a SQL Server: set DBLOCK_TEST_MSSQL_URL=mssql+pymssql://user:password@host:1433/database, or start "
            "Docker, and run make test again"
        )


_SQL_SERVER_IMAGE = os.environ.get("DBLOCK_TEST_MSSQL_IMAGE", "mcr.microsoft.com/mssql/server:2022-latest")


def _docker_runs() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def postgres(url: str) -> Iterator[Postgres]:
    with backends.postgres(url) as backend:
        _wait_for_no_locks(backend)
        yield backend


@pytest.fixture
def mssql(mssql_url: str) -> Iterator[SqlServer]:
    with backends.sql_server(mssql_url) as backend:
        _wait_for_no_locks(backend)
        yield backend


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a SQL Server, for -m; and let only one process at a time use a server that was given."""
    for item in items:
        if "DBLOCK_TEST_POSTGRES_URL" in os.environ:
            item.add_marker(pytest.mark.xdist_group("a given server"))
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if {"mssql", "mssql_url"} & set(getattr(item, "fixturenames", ())) or any(
            value == "mssql" or getattr(value, "engine", None) == "mssql" for value in parameters
        ):
            item.add_marker("mssql")
            item.add_marker(pytest.mark.xdist_group("a given server"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a pytest-xdist that does not keep the tests of a group in one process, which nobody would see."""
    if getattr(session.config.option, "loadgroup", False):
        for item in session.items:
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid:
                raise pytest.UsageError(f"{item.nodeid} belongs to a group, of which this pytest-xdist is not told")


@pytest.fixture
def target() -> str:
    """A name that no other test has."""
    return f"web {uuid4()}"


@pytest.fixture
def observer(url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    """The server of the engine that the test's door or its parameter names."""
    named = request.node.callspec.params
    engine = named.get("engine") or next(value.engine for value in named.values() if hasattr(value, "engine"))
    found: Backend = request.getfixturevalue(engine)
    return found


@pytest.fixture(autouse=True)
def no_locks_of_an_earlier_test(request: pytest.FixtureRequest) -> None:
    """A closed connection's backend ends a moment later, and until then still shows its locks."""
    if "url" in request.fixturenames:
        with backends.postgres(request.getfixturevalue("url")) as backend:
            _wait_for_no_locks(backend)


def _wait_for_no_locks(backend: Backend) -> None:
    wait_until(lambda: not backend.all_rows(), "the locks of an earlier test to be gone")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was skipped, one line for each reason."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.getreports("skipped"))
    for reason, number in reasons.items():
        terminalreporter.write_line(f"{number} tests: {reason}")
    passed = [dict(report.user_properties).get("matrix") for report in terminalreporter.getreports("passed")]
    _write_matrix(terminalreporter, {tuple(cell) for cell in passed if cell})


def _write_matrix(terminalreporter: pytest.TerminalReporter, passed: set[tuple[str, ...]]) -> None:
    """Show the product of callers and shapes."""
    from tests.callers import CALLERS, SHAPES

    callers = [name for name in map(str, CALLERS) if any(caller == name for caller, _ in passed)]
    if not callers:
        return
    width = max(map(len, callers))
    terminalreporter.write_sep("-", "callers and shapes")
    terminalreporter.write_line(f"{'':{width}}  " + "  ".join(SHAPES))
    for caller in callers:
        cells = (f"{'passed' if (caller, shape) in passed else '-':{len(shape)}}" for shape in SHAPES)
        terminalreporter.write_line(f"{caller:{width}}  " + "  ".join(cells).rstrip())
