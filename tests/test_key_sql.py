"""key.sql: the same key as everywhere, computed by the server; and the same refusals."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row

import dblock
from tests import hostile
from tests.doors import SQL, Wish, literal, set_wishes

KEY = (SQL / "key.sql").read_text()
VECTORS = json.loads((Path(__file__).parent / "key-vectors.json").read_text())
NOTHING = dict.fromkeys(("key", "classid", "objid", "objsubid", "in_pg_locks", "is_free", "mssql"))

Connection = psycopg.Connection[dict[str, Any]]


def connect(url: str, **settings: str) -> Connection:
    return psycopg.connect(url, autocommit=True, row_factory=dict_row, **settings)  # type: ignore[arg-type]  # conninfo


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    with connect(url) as one:
        yield one


def ask(connection: Connection, target: str, step: str) -> dict[str, Any]:
    connection.execute(set_wishes(Wish(target=target, step=step)).encode())
    return run(connection)


def run(connection: Connection) -> dict[str, Any]:
    (row,) = connection.execute(KEY.encode()).fetchall()
    # Under SQL_ASCII psycopg leaves texts as the bytes they are.
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in row.items()}


def test_every_vector(connection: Connection) -> None:
    for vector in VECTORS["keys"]:
        row = ask(connection, vector["target"], vector["step"])
        expected = dblock.key(vector["target"], vector["step"])
        assert row["key"] == vector["key"] == expected.value
        assert (row["classid"], row["objid"], row["objsubid"]) == expected.postgres
        assert row["mssql"] == expected.mssql
        assert row["refused"] is None


def reaches_the_server(name: str) -> bool:
    """NUL and lone surrogates are no text for PostgreSQL: the driver cannot even send them."""
    return "\0" not in name and name.encode(errors="replace").decode() == name


def test_every_refusal(connection: Connection) -> None:
    refused = [v for v in VECTORS["refused"] if reaches_the_server(v["target"]) and reaches_the_server(v["step"])]
    assert len(VECTORS["refused"]) - len(refused) == 3
    for vector in refused:
        row = ask(connection, vector["target"], vector["step"])
        with pytest.raises(ValueError, match=r"^(target|step) ") as error:
            dblock.key(vector["target"], vector["step"])
        # The same argument is named; the reason reads as in acquire.sql.
        assert row.pop("refused").startswith(f"dblock.{str(error.value).split()[0]} ")
        assert row == NOTHING


@pytest.mark.parametrize("standard_conforming_strings", ["on", "off"])
def test_through_psql(url: str, standard_conforming_strings: str) -> None:
    # One psql for all of them: a pair of commands for each vector.
    commands = ["-c", f"SET standard_conforming_strings = {standard_conforming_strings}"]
    for vector in VECTORS["keys"]:
        for name in ("target", "step"):
            commands += ["-c", f"SET dblock.{name} = {literal(vector[name])}"]
        commands += ["-f", str(SQL / "key.sql")]
    done = subprocess.run(
        ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", url, *commands],
        env={"PATH": "/usr/bin:/bin", "PGCLIENTENCODING": "UTF8"},
        capture_output=True,
        check=True,
    )
    assert [int(line.split(b"|")[0]) for line in done.stdout.splitlines()] == [v["key"] for v in VECTORS["keys"]]
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("commands", "reason"),
    [
        ([], "dblock.target is not set"),
        (["SET dblock.target = 'web-01'"], "dblock.step is not set"),
        (["SET dblock.step = 'b'"], "dblock.target is not set"),
        (["SET dblock.target = ''", "SET dblock.step = 'b'"], "dblock.target is not set"),
    ],
)
def test_without_names(connection: Connection, commands: list[str], reason: str) -> None:
    for command in commands:
        connection.execute(command.encode())
    assert run(connection) == NOTHING | {"refused": reason}


def test_the_wishes_stay(connection: Connection) -> None:
    assert ask(connection, "web-01", "b") == run(connection)


def test_what_it_gives_a_dba_works(url: str, connection: Connection) -> None:
    row = ask(connection, "web-01", "b")
    holders = f"SELECT count(*) AS n FROM pg_locks WHERE {row['in_pg_locks']}".encode()
    free = row["is_free"].encode()
    assert connection.execute(holders).fetchall() == [{"n": 0}]
    assert connection.execute(free).fetchall() == [{"pg_try_advisory_xact_lock": True}]
    with dblock.lock(url, target="web-01", step="b"):
        assert connection.execute(holders).fetchall() == [{"n": 1}]
        assert connection.execute(free).fetchall() == [{"pg_try_advisory_xact_lock": False}]
    assert connection.execute(holders).fetchall() == [{"n": 0}]


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP", "SQL_ASCII"])
def test_beyond_ascii_needs_utf8_all_the_way(url: str, encoding: str) -> None:
    reason = "dblock.target is not ASCII, so an encoding on the way could have made another name of it: that needs"
    with connect(url, client_encoding=encoding) as client:
        assert ask(client, "web-01", "b")["key"] == dblock.key("web-01", "b").value
        client.execute("SELECT set_config('dblock.target', U&'w\\00e9', false)")
        row = run(client)
        assert (
            row.pop("refused")
            == f"{reason} server_encoding and client_encoding UTF8, here they are UTF8 and {encoding}"
        )
        assert row == NOTHING


# A name beyond ASCII, written so that it exists in the database's encoding.
ENCODED = {
    "LATIN1": "convert_from('\\xe9', 'LATIN1')",
    "EUC_JP": "convert_from('\\xa4a2', 'EUC_JP')",
    "SQL_ASCII": "'é'",
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_in_a_database_of_another_encoding(url: str, connection: Connection, encoding: str) -> None:
    name = f"dblock_key_{encoding.lower()}"
    connection.execute(
        sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING {} LOCALE 'C'").format(
            sql.Identifier(name), sql.Literal(encoding)
        )
    )
    try:
        with connect(url, dbname=name, client_encoding="UTF8") as there:
            for vector in VECTORS["keys"]:
                if (vector["target"] + vector["step"]).isascii():
                    assert ask(there, vector["target"], vector["step"])["key"] == vector["key"]
            there.execute(f"SELECT set_config('dblock.step', {ENCODED[encoding]}, false)".encode())
            row = run(there)
            assert row.pop("refused").endswith(f"here they are {encoding} and UTF8")
            assert row == NOTHING
    finally:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def test_hostile_schema(url: str) -> None:
    with hostile.schema(url, KEY), connect(url) as victim:
        before = ask(victim, "web-01", "b")
        refused = ask(victim, "web-01", " ")
        victim.execute("SET search_path = evil, pg_catalog")
        with pytest.raises(psycopg.errors.RaiseException, match="trapped"):
            victim.execute("SELECT 1::bigint = 1::bigint")
        assert run(victim) == refused
        victim.execute("SELECT pg_catalog.set_config('dblock.step', 'b', false)")
        assert run(victim) == before
