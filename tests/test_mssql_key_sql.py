"""sql/mssql/key.sql: the same key as everywhere, computed by the server; and the same refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pymssql
import pytest

import dblock
from tests.backends import SqlServer
from tests.doors import TSQL
from tests.test_mssql_scripts import expression

KEY = (TSQL / "key.sql").read_text("ascii")
VECTORS = json.loads((Path(__file__).parent / "key-vectors.json").read_text())


def wish(mssql: SqlServer, **names: str) -> None:
    for name, value in names.items():
        # By its code units only where it must be: Babelfish has no NCHAR for a half of a surrogate pair.
        plain = all(" " <= character < "\ud800" or character > "\udfff" for character in value)
        text = "N'{}'".format(value.replace("'", "''")) if plain else expression(value)
        mssql.query(f"DECLARE @value nvarchar(4000) = {text};EXEC sys.sp_set_session_context N'dblock.{name}', @value")


def ask(mssql: SqlServer, target: str, step: str) -> tuple[Any, ...]:
    wish(mssql, target=target, step=step)
    (row,) = mssql.query(KEY)
    return tuple(row)


def test_every_vector(mssql: SqlServer) -> None:
    for vector in VECTORS["keys"]:
        key, resource, _, _, refused = ask(mssql, vector["target"], vector["step"])
        expected = dblock.key(vector["target"], vector["step"])
        assert key == vector["key"] == expected.value
        assert (resource, refused) == (expected.mssql, None)


def test_every_refusal(mssql: SqlServer) -> None:
    """Babelfish's texts have no lone surrogates, and a NUL makes the whole name one that is not set."""
    reached = 0
    for vector in VECTORS["refused"]:
        try:
            *nothing, refused = ask(mssql, vector["target"], vector["step"])
        except pymssql.Error:
            assert mssql.is_babelfish
            continue
        reached += 1
        with pytest.raises(ValueError, match=r"^(target|step) ") as error:
            dblock.key(vector["target"], vector["step"])
        assert refused.startswith(f"dblock.{str(error.value).split()[0]} "), vector
        assert nothing == [None] * 4
    assert len(VECTORS["refused"]) - reached == (2 if mssql.is_babelfish else 0)


@pytest.mark.parametrize("name", ["target", "step"])
def test_without_a_name(mssql: SqlServer, name: str) -> None:
    assert ask(mssql, **{"target": "web-01", "step": "b", name: ""})[-1] in (
        f"dblock.{name} is empty",
        f"dblock.{name} is not set",
    )


def test_the_wishes_stay(mssql: SqlServer) -> None:
    assert ask(mssql, "web-01", "b") == tuple(mssql.query(KEY)[0])


def test_a_name_that_came_through_a_code_page_is_refused(mssql: SqlServer) -> None:
    wish(mssql, target="web-01")
    mssql.query("DECLARE @value varchar(10) = 'é'; EXEC sys.sp_set_session_context N'dblock.step', @value")
    ((*_, refused),) = mssql.query(KEY)
    assert refused.startswith("dblock.step ")


def test_what_it_gives_a_dba_works(mssql: SqlServer) -> None:
    _, resource, in_dm_tran_locks, is_free, _ = ask(mssql, "web-01", "b")
    assert mssql.query(is_free) == [(1,)]
    with dblock.lock(mssql.url, target="web-01", step="b") as held:
        assert resource == held.key.mssql
        assert mssql.query(is_free) == [(0,)]
        # Babelfish has no view for this condition.
        if not mssql.is_babelfish:
            ((status,),) = mssql.query(f"SELECT request_status FROM sys.dm_tran_locks WHERE {in_dm_tran_locks}")
            assert status == "GRANT"
