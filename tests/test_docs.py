"""What the documentation says is run as it stands there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

import dblock

DOCS = Path(__file__).parent.parent / "docs"
Connection = psycopg.Connection[Any]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


# --- fencing.md -------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        (table,) = blocks("fencing.md", "sql")
        connection.execute(table)
        connection.execute("CREATE TABLE stock AS SELECT 10 AS amount")
        yield connection
        connection.execute("DROP TABLE step_fence, stock")


@pytest.fixture
def recipe(url: str) -> dict[str, Any]:
    functions, _ = blocks("fencing.md", "python")
    names: dict[str, Any] = {"dblock": dblock, "psycopg": psycopg, "url": url}
    exec(functions, names)  # noqa: S102 - the page's own
    return names


def test_the_fences_recipe_works(work: Connection, recipe: dict[str, Any]) -> None:
    _, use = blocks("fencing.md", "python")
    for expected in (9, 8):
        exec(use, recipe)  # noqa: S102
        assert work.execute("SELECT amount FROM stock").fetchone() == (expected,)
    assert work.execute("SELECT token FROM step_fence").fetchone() == (2,)


def test_a_late_holder_changes_nothing(work: Connection, recipe: dict[str, Any]) -> None:
    late = recipe["draw_token"](work, "web-01", "b")
    new = recipe["draw_token"](work, "web-01", "b")
    with pytest.raises(RuntimeError, match="another holder has begun"), work.transaction():
        recipe["refuse_if_late"](work, "web-01", "b", late)
        pytest.fail("the late one goes on")
    with work.transaction():
        recipe["refuse_if_late"](work, "web-01", "b", new)
    other_step = recipe["draw_token"](work, "web-01", "c")
    recipe["refuse_if_late"](work, "web-01", "c", other_step)


def test_a_new_holder_waits_for_the_late_ones_transaction(url: str, work: Connection, recipe: dict[str, Any]) -> None:
    late = recipe["draw_token"](work, "web-01", "b")
    with psycopg.connect(url, autocommit=True) as new:
        new.execute("SET lock_timeout = '100ms'")
        with work.transaction():
            recipe["refuse_if_late"](work, "web-01", "b", late)
            with pytest.raises(psycopg.errors.LockNotAvailable):
                recipe["draw_token"](new, "web-01", "b")
        assert recipe["draw_token"](new, "web-01", "b") > late


# --- security.md ------------------------------------------------------------------------------------------------------


def test_a_database_of_its_own_for_the_locks(url: str) -> None:
    (statements,) = re.findall(r"`(CREATE DATABASE locks;.*?)`", (DOCS / "security.md").read_text(encoding="utf-8"))
    with psycopg.connect(url, autocommit=True) as admin:
        for role in ("deploy", "stranger"):
            admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
        try:
            for statement in statements.rstrip(";").split("; "):
                admin.execute(statement)
            with dblock.lock(make_conninfo(url, dbname="locks", user="deploy"), target="web-01", step="b") as lock:
                assert lock.held
            with pytest.raises(dblock.DatabaseError, match="permission denied for database"):
                dblock.lock(make_conninfo(url, dbname="locks", user="stranger"), target="web-01", step="b").acquire(0)
        finally:
            admin.execute("DROP DATABASE IF EXISTS locks WITH (FORCE)")
            admin.execute("DROP ROLE deploy, stranger")
