"""Can this account, on this connection, to this server, hold a lock that excludes? What was found, and what to do.

A lock that nobody uses is really taken, and on a second connection refused; the rest is asked of the server's settings
and views. Nothing is left behind. Knows both engines, and no driver.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dblock.blocking import lock
from dblock.connect import check_source, connect
from dblock.errors import DatabaseError, Error, UnsafeConnection
from dblock.names import Key

if TYPE_CHECKING:
    from dblock.connect import Source
    from dblock.session import Session

Result = Literal["good", "note", "warning", "bad"]

OLDEST_POSTGRES = 140000
OLDEST_SQL_SERVER = 13
LOCKS_A_WAITER = 4  # of the lock table: its ticket, the queue's flag, the lock or the one before it, a virtual id


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: what was looked at.
        result: ``good``; ``note``: some would want it otherwise; ``warning``: locks exclude, but somebody will be
            surprised; ``bad``: no lock can be trusted, or none be had.
        says: what was found.
        remedy: what to do about it; "" where it is good.
    """

    check: str
    result: Result
    says: str
    remedy: str = ""


def examine(
    db: Source, *, database: str | None = None, allow_session_pooler: bool = False, waiters: int = 0
) -> Iterator[Finding]:
    """Check one after the other; a server that cannot be reached is the last finding.

    Args:
        db: a URL, a conninfo string, an engine, or a callable that returns a new connection.
        database: the database that all callers agreed upon, or None.
        allow_session_pooler: the caller's word that the pooler in between is in session mode.
        waiters: for how many who hold or wait at once there must be room.

    Raises:
        ValueError: db cannot be read.
    """
    try:
        with closing(connect(check_source(db))) as session:
            name = session.engine.name
            title, checks = _ENGINES[name]
            ((connected_to,),) = session.rows(session.engine.current_database)
            yield Finding("reachable", "good", title)
            yield _judge(
                "database",
                database in (None, connected_to),
                connected_to if database in (None, connected_to) else f"{connected_to}, and not {database}",
                "callers in two databases do not exclude each other: let the URL name the one that all agreed upon",
                "bad",
            )
            try:
                yield from checks(session, waiters, allow_session_pooler)
            except DatabaseError as error:
                yield Finding("settings", "warning", f"cannot be asked: {error}", "ask as another role")
    except DatabaseError as error:
        yield Finding("reachable", "bad", str(error), "check the URL, the network, the password and pg_hba.conf")
        return
    yield _exclusion(db, database, allow_session_pooler=allow_session_pooler)


def _exclusion(db: Source, database: str | None, *, allow_session_pooler: bool) -> Finding:
    """Whether a lock that one connection holds is refused to another."""
    ours, theirs = (
        lock(
            db,
            target=f"dblock-doctor-{mark}",
            step="doctor",
            timeout=0,
            database=database,
            allow_session_pooler=allow_session_pooler,
        )
        for mark in [secrets.token_hex(8)] * 2
    )
    with ExitStack() as held:
        try:
            held.enter_context(ours)
            if theirs.acquire():
                theirs.release()
                return Finding("exclusion", "bad", "two connections held one lock at once", "do not use this server")
        except UnsafeConnection as error:
            return Finding("exclusion", "bad", str(error), "see the message: until then every door refuses this, too")
        except Error as error:
            return Finding("exclusion", "bad", f"a lock could not be taken: {error}", "see the message")
        return Finding("exclusion", "good", "a lock held by one connection was refused to another")


# --- PostgreSQL -------------------------------------------------------------------------------------------------------

_POSTGRES = """
    SELECT pg_backend_pid(),
           current_setting('server_version'),
           current_setting('server_version_num')::int,
           current_setting('server_encoding'),
           current_setting('client_encoding'),
           pg_is_in_recovery(),
           current_setting('transaction_read_only')::boolean,
           ARRAY(SELECT name || ' = ' || current_setting(name)
                 FROM pg_settings
                 WHERE name IN ('statement_timeout', 'lock_timeout', 'idle_session_timeout', 'transaction_timeout',
                                'idle_in_transaction_session_timeout') AND setting <> '0'
                 ORDER BY name),
           (SELECT setting::int FROM pg_settings WHERE name = 'tcp_keepalives_idle'),
           inet_client_addr() IS NOT NULL,
           (SELECT setting::int FROM pg_settings WHERE name = 'client_connection_check_interval'),
           pg_has_role('pg_read_all_stats', 'USAGE'),
           pg_has_role('pg_signal_backend', 'USAGE'),
           current_setting('max_locks_per_transaction')::int
               * (current_setting('max_connections')::int + current_setting('max_prepared_transactions')::int)
               - (SELECT count(*)::int FROM pg_locks),
           (SELECT min(free) FROM (
                SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
                       - coalesce(current_setting('reserved_connections', true), '0')::int
                       - (SELECT count(*)::int FROM pg_stat_activity WHERE backend_type = 'client backend')
                UNION ALL
                SELECT rolconnlimit - (SELECT count(*)::int FROM pg_stat_activity WHERE usename = current_user)
                FROM pg_roles WHERE rolname = current_user AND rolconnlimit >= 0
                UNION ALL
                SELECT datconnlimit - (SELECT numbackends FROM pg_stat_database WHERE datname = current_database())
                FROM pg_database WHERE datname = current_database() AND datconnlimit >= 0) AS limits(free))
"""

# A key that is somebody's lock in one database and somebody's in another; a label says that it is dblock's.
_POSTGRES_SPLIT = """
    SELECT (classid::bigint << 32) | objid::bigint, string_agg(DISTINCT datname, ', ' ORDER BY datname)
    FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database
    WHERE locktype = 'advisory' AND objsubid = 1
    GROUP BY classid, objid
    HAVING count(DISTINCT l.database) > 1
       AND bool_or(EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.pid = l.pid AND application_name LIKE 'dblock1 %'))
"""


def _postgres(session: Session, waiters: int, allow_session_pooler: bool) -> Iterator[Finding]:
    (
        (
            backend_pid,
            version,
            number,
            server_encoding,
            client_encoding,
            in_recovery,
            read_only,
            timeouts,
            keepalives,
            over_network,
            check_interval,
            sees_all,
            may_signal,
            free_locks,
            free_connections,
        ),
    ) = session.rows(session.engine.inspect_settings + _POSTGRES)
    yield _judge("version", number >= OLDEST_POSTGRES, version, "dblock needs PostgreSQL 14 or later", "bad")
    pooled = backend_pid != session.backend_pid
    yield _judge(
        "pooler",
        not pooled or allow_session_pooler,
        "none" if not pooled else "one in between" + (", in session mode by your word" if allow_session_pooler else ""),
        "connect to the server itself; or, if it is in session mode for this database, say so: --allow-session-pooler, "
        "allow_session_pooler=True",
        "bad",
    )
    utf8 = (server_encoding, client_encoding) == ("UTF8", "UTF8")
    yield _judge(
        "encodings",
        utf8,
        f"server {server_encoding}, client {client_encoding}",
        "the scripts refuse names beyond ASCII here; Python and the command line do not",
    )
    yield _judge("primary", not in_recovery, "a hot standby" if in_recovery else "yes", "connect to the primary", "bad")
    yield _judge("writable", not read_only, "no" if read_only else "yes", "connect as a role that may write", "bad")
    yield _judge(
        "timeouts",
        not timeouts,
        ", ".join(timeouts) or "none for this role",
        "dblock sets them aside on its own connections, and while a script waits. A script's session that holds a lock "
        "and is silent for longer is ended by idle_session_timeout: ALTER ROLE … RESET what is not needed",
    )
    yield _judge(
        "keepalives",
        not over_network or 0 < keepalives <= 60,
        f"tcp_keepalives_idle = {keepalives}" if over_network else "a local socket",
        "after a cut network a script's lock, or one on a connection of your own, is held for up to two hours: "
        "ALTER SYSTEM SET tcp_keepalives_idle = 30. dblock's own connections set it themselves",
        "note",
    )
    yield _judge(
        "killed clients",
        check_interval > 0,
        f"client_connection_check_interval = {check_interval} ms",
        "a script that is killed while it waits stays in the queue until it is served: ALTER ROLE … SET "
        "client_connection_check_interval = '1s'",
        "note",
    )
    yield _right("sees others", sees_all, "see other roles' hosts", "GRANT pg_read_all_stats TO …")
    yield _right("may end others", may_signal, "end other roles' sessions", "GRANT pg_signal_backend TO …")
    need = max(1, waiters)
    yield _judge(
        "lock table",
        free_locks >= need * LOCKS_A_WAITER,
        f"room for some {free_locks} locks",
        f"{need} at once need {need * LOCKS_A_WAITER}: raise max_locks_per_transaction, with a restart",
    )
    yield _judge(
        "connections",
        free_connections >= need,
        f"{free_connections} free",
        f"{need} at once need as many: raise max_connections, or the limit of the role or the database",
    )
    yield from _split_scope(session.rows(session.engine.inspect_settings + _POSTGRES_SPLIT))


# --- SQL Server -------------------------------------------------------------------------------------------------------

_MSSQL = """
    SELECT CAST(SERVERPROPERTY('ProductVersion') AS nvarchar(60)),
           CAST(SERVERPROPERTY('Babelfish') AS int),
           CAST(DATABASEPROPERTYEX(DB_NAME(), 'Updateability') AS nvarchar(60)),
           CASE WHEN OBJECT_ID(N'sys.dm_tran_locks') IS NULL THEN 0  -- as on Babelfish
                ELSE COALESCE(HAS_PERMS_BY_NAME(NULL, NULL, 'VIEW SERVER STATE'), 0) END,
           COALESCE(HAS_PERMS_BY_NAME(NULL, NULL, 'ALTER ANY CONNECTION'), 0),
           @@MAX_CONNECTIONS - (SELECT COUNT(*) FROM sys.dm_exec_sessions)
"""
_MSSQL_SPLIT = """
    SELECT CAST(SUBSTRING(resource_description, 11, CHARINDEX(']', resource_description) - 11) AS nvarchar(30)),
           CONCAT(MIN(DB_NAME(resource_database_id)), ', ', MAX(DB_NAME(resource_database_id)))
    FROM sys.dm_tran_locks
    WHERE resource_type = 'APPLICATION' AND resource_description LIKE '0:[[]dblock:%[0-9]]:(%)'
    GROUP BY SUBSTRING(resource_description, 11, CHARINDEX(']', resource_description) - 11)
    HAVING COUNT(DISTINCT resource_database_id) > 1
"""


def _mssql(session: Session, waiters: int, _: bool) -> Iterator[Finding]:
    ((version, babelfish, updateability, sees_all, may_end, free_connections),) = session.rows(_MSSQL)
    new_enough = babelfish or int(version.partition(".")[0]) >= OLDEST_SQL_SERVER
    title = f"{version}, as Babelfish says" if babelfish else version
    yield _judge("version", new_enough, title, "dblock needs SQL Server 2016 or later")
    writable = updateability == "READ_WRITE"
    yield _judge("primary", writable, updateability or "?", "connect to the primary, in a writable database", "bad")
    remedy = "GRANT VIEW SERVER STATE TO …, in master: until then a waiter is not told who is in the way"
    yield _right("sees others", sees_all, "see other sessions' locks", remedy)
    yield _right("may end others", may_end, "end other sessions", "GRANT ALTER ANY CONNECTION TO …, in master")
    need = max(1, waiters)
    yield _judge("connections", free_connections >= need, f"{free_connections} free", f"{need} at once need as many")
    if sees_all:
        yield from _split_scope(session.rows(_MSSQL_SPLIT))
    else:
        yield Finding("split scope", "note", "not visible to this login", remedy)


# --- pieces -----------------------------------------------------------------------------------------------------------

_ENGINES: dict[str, tuple[str, Callable[[Session, int, bool], Iterator[Finding]]]] = {
    "postgres": ("PostgreSQL", _postgres),
    "mssql": ("SQL Server", _mssql),
}


def _split_scope(rows: list[tuple[Any, ...]]) -> Iterator[Finding]:
    """Two tenants who name two databases of one server do not exclude each other, and nothing else tells them so."""
    for key, databases in rows:
        yield Finding(
            "split scope",
            "warning",
            f"the lock {Key(int(key)).value} is in use in two databases at once: {databases}. Its holders there do not "
            f"exclude each other",
            "let all callers name one database, and say which: database=, --database, dblock.database",
        )
    if not rows:
        yield Finding("split scope", "good", "no lock is in use in two databases just now")


def _judge(check: str, good: object, says: str, remedy: str, otherwise: Result = "warning") -> Finding:
    return Finding(check, "good", says) if good else Finding(check, otherwise, says, remedy)


def _right(check: str, granted: object, what: str, remedy: str) -> Finding:
    return _judge(check, granted, f"may {'' if granted else 'not '}{what}", remedy, "note")
