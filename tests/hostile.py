"""A schema full of traps, to stand first in search_path before the raw scripts run.

It holds a function, an operator or a type of the same name and the same argument types for everything of PostgreSQL's
own that the scripts could mean: so the trap is the better match wherever a name is not qualified.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql

_OPERATORS = [
    "=",
    "<>",
    "<",
    "<=",
    ">",
    ">=",
    "+",
    "-",
    "||",
    "|",
    "&",
    "<<",
    ">>",
    "~",
    "!~",
    "~~",
    "->",
    "->>",
    "#>>",
]
_TYPES = ["text", "name", "oid", "bytea", "jsonb", "xid", "inet", "int8", "timestamptz"]
_VIEWS = ["pg_locks", "pg_database", "pg_stat_activity", "pg_roles", "pg_prepared_xacts", "locks", "here", "labels"]

_SPRING = """
    CREATE FUNCTION evil.{name}({arguments}) RETURNS {result} LANGUAGE plpgsql
    AS $$ BEGIN RAISE EXCEPTION 'trapped by {name}({arguments})'; END $$
"""


@contextmanager
def schema(url: str, script: str) -> Iterator[None]:
    """Create the schema ``evil`` with traps for what a script uses; it is dropped afterwards."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO public")
        try:
            _set_traps(connection, sorted(set(re.findall(r"pg_catalog\.(\w+)\s*\(", script))))
            yield
        finally:
            connection.execute("DROP SCHEMA evil CASCADE")


def _set_traps(connection: psycopg.Connection[Any], functions: list[str]) -> None:
    for name, arguments, result in connection.execute(
        """
        SELECT proname, replace(pg_get_function_identity_arguments(oid), '"any"', 'text[]'), prorettype::regtype
        FROM pg_proc
        WHERE pronamespace = 'pg_catalog'::regnamespace AND proname = ANY (%s)
          AND prorettype <> 'internal'::regtype AND COALESCE(proargmodes <@ '{i,v}', true)
        """,
        (functions,),
    ).fetchall():
        connection.execute(_SPRING.format(name=name, arguments=arguments, result=result))
    for number, (operator, left, right, result) in enumerate(
        connection.execute(
            """
            SELECT oprname, oprleft::regtype, oprright::regtype, oprresult::regtype
            FROM pg_operator
            WHERE oprnamespace = 'pg_catalog'::regnamespace AND oprkind = 'b' AND oprname = ANY (%s)
            """,
            (_OPERATORS,),
        ).fetchall()
    ):
        connection.execute(_SPRING.format(name=f"spring_{number}", arguments=f"{left}, {right}", result=result))
        connection.execute(
            f"CREATE OPERATOR evil.{operator} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = evil.spring_{number})"
        )
    for name in _TYPES:
        connection.execute(
            sql.SQL("CREATE DOMAIN evil.{} AS pg_catalog.varchar CHECK (value IS NULL)").format(sql.Identifier(name))
        )
    for name in _VIEWS:
        connection.execute(sql.SQL("CREATE VIEW evil.{} AS SELECT 1 AS trapped").format(sql.Identifier(name)))
