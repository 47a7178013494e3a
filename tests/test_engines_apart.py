"""Neither engine needs the other: without the modules of one the other works, and its driver is not imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dblock
from tests.tds import player, recordings

PACKAGE = Path(dblock.__file__).parent
MODULES = {"postgres": ("postgres.py", "driver_psycopg.py"), "mssql": ("mssql.py", "driver_pymssql.py")}
SCHEMES = {"postgres": "postgresql://u@127.0.0.1:1/d", "mssql": "mssql://u@127.0.0.1:1/d"}

LOCKED = """
import os, sys, dblock
with dblock.lock(os.environ["DBLOCK_TEST_URL"], target="web-01", step="recorded", tenant="T1") as held:
    assert held.held
print(*sorted({"psycopg", "pymssql"} & set(sys.modules)))
try:
    dblock.lock(os.environ["DBLOCK_TEST_OTHER"], target="web-01", step="b").acquire()
except dblock.DatabaseError as error:
    print(error.__cause__.__cause__.name)
"""


@pytest.fixture
def alone(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the package that has only one engine."""
    (missing,) = {"postgres", "mssql"} - {request.param}
    shutil.copytree(PACKAGE, tmp_path / "dblock", ignore=shutil.ignore_patterns("__pycache__", *MODULES[missing]))
    return tmp_path


def run(package: Path, url: str, other: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOCKED],
        env={**os.environ, "PYTHONPATH": str(package), "DBLOCK_TEST_URL": url, "DBLOCK_TEST_OTHER": other},
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("alone", ["postgres"], indirect=True)
def test_postgres_alone(url: str, alone: Path) -> None:
    assert run(alone, url, SCHEMES["mssql"]) == ["psycopg", "dblock.driver_pymssql"]


@pytest.mark.parametrize("alone", ["mssql"], indirect=True)
def test_mssql_alone(alone: Path) -> None:
    with player(recordings()["granted"]) as url:
        assert run(alone, url, SCHEMES["postgres"]) == ["pymssql", "dblock.driver_psycopg"]


def test_nothing_that_is_shared_names_an_engine() -> None:
    shared = ("protocol.py", "session.py", "blocking.py", "names.py", "watch.py", "errors.py")
    for name in shared:
        lines = (PACKAGE / name).read_text(encoding="utf-8").splitlines()
        imports = [line for line in lines if line.lstrip().startswith(("import ", "from "))]
        assert [line for line in imports if "postgres" in line or "mssql" in line or "psycopg" in line] == [], name
