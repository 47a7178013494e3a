"""How each kind of caller is typed. ``mypy --strict`` reads this; an ignore that is not needed would be an error."""

from __future__ import annotations

from typing import Any

import psycopg
import pymssql
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

import dblock


def blocking(
    psycopg_connection: psycopg.Connection[Any],
    pymssql_connection: pymssql.Connection,
    engine: sqlalchemy.Engine,
    connection: sqlalchemy.Connection,
    session: Session,
) -> None:
    with dblock.lock("postgresql://", target="web-01", step="b") as held:
        slot: int | None = held.slot
        del slot
    dblock.lock(lambda: psycopg.connect("dbname=shared"), target="web-01", step="b", shared=True)
    dblock.lock(psycopg_connection, target=["web-01", "web-02"], step="b", slots=3)
    dblock.lock(pymssql_connection, target="web-01", step="b", scope="transaction")
    dblock.lock(engine, target="web-01", step="b")
    dblock.lock(connection, target="web-01", step="b")
    dblock.lock(session, target="web-01", step="b", timeout=1.5)

    @dblock.lock(engine, target="web-01", step="b")
    def step(number: int) -> str:
        return str(number)

    done: str = step(1)
    del done

    dblock.lock(engine, target="web-01", step="b", scope="statement")  # type: ignore[arg-type]
    dblock.lock(42, target="web-01", step="b")  # type: ignore[arg-type]
    dblock.alock(psycopg_connection, target="web-01", step="b")  # type: ignore[arg-type]
    dblock.alock(engine, target="web-01", step="b")  # type: ignore[arg-type]
    dblock.alock(session, target="web-01", step="b")  # type: ignore[arg-type]


async def for_asyncio(
    psycopg_connection: psycopg.AsyncConnection[Any],
    engine: AsyncEngine,
    connection: AsyncConnection,
    session: AsyncSession,
) -> None:
    async with dblock.alock("postgresql://", target="web-01", step="b") as held:
        slot: int | None = held.slot
        await held.check()
        del slot
    dblock.alock(lambda: psycopg.AsyncConnection.connect("dbname=shared"), target="web-01", step="b")
    dblock.alock(psycopg_connection, target="web-01", step="b", slots=3)
    dblock.alock(engine, target="web-01", step="b")
    dblock.alock(connection, target=("web-01", "web-02"), step="b")
    acquired: bool = await dblock.alock(session, target="web-01", step="b", scope="transaction").acquire(timeout=0)
    del acquired

    @dblock.alock(engine, target="web-01", step="b")
    async def step(number: int) -> str:
        return str(number)

    done: str = await step(1)
    del done

    dblock.lock(psycopg_connection, target="web-01", step="b")  # type: ignore[arg-type]
    dblock.lock(engine, target="web-01", step="b")  # type: ignore[arg-type]
    dblock.lock(connection, target="web-01", step="b")  # type: ignore[arg-type]
    dblock.lock(session, target="web-01", step="b")  # type: ignore[arg-type]
