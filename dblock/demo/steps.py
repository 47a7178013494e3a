"""What the steps do, as SQL: lists of statements, each sent as a command of its own by psql or by a driver.

Steps a and c work on what is the tenant's own. Step b migrates a table that all tenants of a target share. Every
step writes its start and its end into a table, by the server's clock, so that what is shown does not depend on how
fast a process starts or a client reads.
"""

# ruff: noqa: S608 - the statements are put together from names made by the demo itself

from __future__ import annotations

SCHEMA = "dblock_demo"

_ROWS_PER_TENANT = 4000
_BATCHES = 4
_PAUSE_SECONDS = 0.1
_VERIFY_PAUSE_SECONDS = 0.3


def set_up(tenants: list[str], targets: list[str]) -> list[str]:
    """What the demo needs before the first step: for each target a table with rows of every tenant."""
    statements = [
        f"CREATE SCHEMA {SCHEMA}",
        f"""CREATE TABLE {SCHEMA}.events (
                tenant text, target text, step text, door text, began timestamptz, ended timestamptz, alarm boolean,
                PRIMARY KEY (tenant, target, step))""",
        # One row for each target on which a step b runs. The key is what makes a second one fail.
        f"CREATE TABLE {SCHEMA}.guard (target text PRIMARY KEY, tenant text NOT NULL)",
    ]
    names = ", ".join(f"'{tenant}'" for tenant in tenants)
    for target in targets:
        table = _orders(target)
        statements += [
            f"CREATE TABLE {table} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant text, cents bigint)",
            f"""INSERT INTO {table} (tenant, cents)
                SELECT tenant, n FROM unnest(ARRAY[{names}]) AS tenant, generate_series(1, {_ROWS_PER_TENANT}) AS n""",
        ]
    return statements


def tear_down() -> list[str]:
    """Remove all that the demo made; steps that were cut off and still run lose their sessions first."""
    return [
        # Numbers of tables are a database's own: another database's session may lock a table of the same number.
        f"""SELECT pg_terminate_backend(pid) FROM (
                SELECT DISTINCT pid
                FROM pg_locks
                JOIN pg_stat_activity AS session USING (pid)
                JOIN pg_class AS class ON class.oid = relation
                WHERE class.relnamespace = to_regnamespace('{SCHEMA}')
                  AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                  AND session.backend_type = 'client backend' AND session.usename = current_user
                  AND pid <> pg_backend_pid()) AS left_over""",
        f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE",
    ]


def step(name: str, tenant: str, target: str, door: str) -> list[str]:
    """Return the statements of one run of step a, b or c."""
    work = {"a": _load_release, "b": _migrate, "c": _verify}[name]
    this = f"tenant = '{tenant}' AND target = '{target}' AND step = '{name}'"
    return [
        f"""INSERT INTO {SCHEMA}.events (tenant, target, step, door, began, alarm)
            VALUES ('{tenant}', '{target}', '{name}', '{door}', clock_timestamp(), false)""",
        *work(tenant, target),
        f"UPDATE {SCHEMA}.events SET ended = clock_timestamp() WHERE {this}",
        # Told at the end, so that a collision is seen in its full length.
        f"""DO $$ BEGIN
                IF (SELECT alarm FROM {SCHEMA}.events WHERE {this}) THEN
                    RAISE 'step b ran for {tenant} on {target} while it was running there for another tenant';
                END IF;
            END $$""",
    ]


def _load_release(tenant: str, target: str) -> list[str]:
    release = _release(tenant, target)
    statements = [f"CREATE TABLE {release} (id bigint PRIMARY KEY, article text)"]
    for batch in range(_BATCHES):
        statements += [
            f"""INSERT INTO {release}
                SELECT n * {_BATCHES} + {batch}, md5(n::text) FROM generate_series(1, {_ROWS_PER_TENANT}) AS n""",
            _pause(),
        ]
    return statements


def _migrate(tenant: str, target: str) -> list[str]:
    table, column = _orders(target), f"total_{tenant.lower()}"
    statements = [
        f"""DO $$ BEGIN
                INSERT INTO {SCHEMA}.guard VALUES ('{target}', '{tenant}');
            EXCEPTION WHEN unique_violation THEN
                UPDATE {SCHEMA}.events SET alarm = true
                WHERE tenant = '{tenant}' AND target = '{target}' AND step = 'b';
            END $$""",
        f"ALTER TABLE {table} ADD COLUMN {column} numeric",
    ]
    for batch in range(_BATCHES):
        statements += [
            f"""UPDATE {table} SET {column} = cents / 100.0
                WHERE tenant = '{tenant}' AND id % {_BATCHES} = {batch}""",
            _pause(),
        ]
    return [
        *statements,
        # Waits for every older snapshot in the database: with a lock whose waiters keep theirs, it would never end.
        f"CREATE INDEX CONCURRENTLY ON {table} ({column})",
        f"DELETE FROM {SCHEMA}.guard WHERE target = '{target}' AND tenant = '{tenant}'",
    ]


def _verify(tenant: str, target: str) -> list[str]:
    release, column = _release(tenant, target), f"total_{tenant.lower()}"
    statements = [f"ANALYZE {release}"]
    for batch in range(_BATCHES):
        statements += [
            f"""DO $$ BEGIN
                    IF (SELECT count(*) FROM {_orders(target)}
                        WHERE tenant = '{tenant}' AND id % {_BATCHES} = {batch} AND {column} IS NULL) > 0 THEN
                        RAISE 'orders of {tenant} on {target} were not migrated';
                    END IF;
                END $$""",
            _pause(_VERIFY_PAUSE_SECONDS),
        ]
    return statements


def _pause(seconds: float = _PAUSE_SECONDS) -> str:
    """Between batches, as one does on a table that is in use."""
    return f"SELECT pg_sleep({seconds})"


def _orders(target: str) -> str:
    return f"{SCHEMA}.orders_{target.replace('-', '_')}"


def _release(tenant: str, target: str) -> str:
    return f"{SCHEMA}.release_{tenant.lower()}_{target.replace('-', '_')}"
