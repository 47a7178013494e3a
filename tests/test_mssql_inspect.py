"""sql/mssql/inspect.sql: what is said of every holder and waiter.

The scenes play on a real SQL Server with real locks, and the script as it stands. Babelfish has none of the views of
locks, waits and requests: there the sessions, their labels and their ends are real, and the script reads the rest from
tables of the documented shape in the place of those views. So only a real server can prove the views themselves: what
stands in them, when, and who may read them.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from typing import Any
from urllib.parse import quote

import pymssql
import pytest

import dblock
from dblock import doctor, driver_pymssql, label, mssql, scripts
from dblock.inspect import Entry
from dblock.names import Key
from tests.support import wait_until

KEY = dblock.key("web-01", "b").value
LOCK = f"dblock:{KEY}"
NOBODY = "00000000-0000-0000-0000-000000000000"
GHOST = 100_000_000  # the number of a session that needs no connection, where the views are tables

# The columns that the scripts read, in Microsoft's types; but Babelfish's sessions, numbered as processes, need an int.
# A lock ends with its session.
VIEWS = f"""
    CREATE TABLE views.locks (
        resource_type nvarchar(60), resource_database_id int, resource_description nvarchar(256),
        request_mode nvarchar(60), request_status nvarchar(60), request_session_id int,
        request_owner_guid uniqueidentifier, lock_owner_address varbinary(8));
    CREATE TABLE views.dm_os_waiting_tasks (session_id int, wait_duration_ms bigint, resource_address varbinary(8));
    CREATE TABLE views.dm_exec_requests (session_id int, request_id int, context_info varbinary(128));
    EXEC (N'CREATE VIEW views.dm_tran_locks AS
        SELECT * FROM views.locks AS l
        WHERE l.request_session_id NOT BETWEEN 0 AND {GHOST}
           OR l.request_session_id IN (SELECT s.session_id FROM sys.dm_exec_sessions AS s)');
"""


class Stage:
    """A database of its own, in which nobody else holds anything."""

    def __init__(self, url: str) -> None:
        self._arguments = driver_pymssql._arguments(url)
        self.database = f"dblock_{secrets.token_hex(4)}"
        self._admin = self.connect(database="master")
        run(self._admin, f"CREATE DATABASE {self.database}")
        ((babelfish,),) = run(self._admin, "SELECT CAST(SERVERPROPERTY('Babelfish') AS int)")
        self.real = babelfish is None
        self.observer = self.connect()
        self.actors: list[Actor] = []
        if not self.real:
            run(self.observer, "CREATE SCHEMA views")
            run(self.observer, VIEWS)

    def connect(self, **settings: Any) -> Any:
        return pymssql.connect(**{**self._arguments, "database": self.database, **settings}, autocommit=True)

    def script(self, name: str) -> str:
        text = scripts.script(f"mssql/{name}")
        if not self.real:
            for view in ("dm_tran_locks", "dm_os_waiting_tasks", "dm_exec_requests"):
                text = text.replace(f"sys.{view}", f"views.{view}")
        return text

    def see(self) -> list[Entry]:
        cursor = self.observer.cursor()
        cursor.execute(self.script("inspect"))
        assert [column[0] for column in cursor.description] == [
            name for name in Entry.__dataclass_fields__ if name != "labels"
        ]
        return [Entry(*mssql.ENGINE.entry_row(row)) for row in cursor.fetchall()]

    def actor(self, said: str | bytes = b"", **settings: Any) -> Actor:
        actor = Actor(self, said, **settings)
        self.actors.append(actor)
        return actor

    def end_scene(self) -> None:
        for actor in self.actors:
            actor.leave()
        self.actors.clear()
        if not self.real:
            run(self.observer, "DELETE FROM views.locks; DELETE FROM views.dm_os_waiting_tasks; "
                               "DELETE FROM views.dm_exec_requests")  # fmt: skip
        wait_until(lambda: self.see() == [], "all locks of the scene gone")

    def close(self) -> None:
        self.observer.close()
        wait_until(self._dropped, "the database dropped")
        self._admin.close()

    def _dropped(self) -> bool:
        try:
            run(self._admin, f"DROP DATABASE {self.database}")
        except pymssql.Error:
            return False
        return True


class Actor:
    """A session that holds and waits."""

    def __init__(self, stage: Stage, said: str | bytes, **settings: Any) -> None:
        self.stage = stage
        self.connection = stage.connect(**settings)
        ((self.pid,),) = run(self.connection, "SELECT CAST(@@SPID AS int)")
        self._waiting: threading.Thread | None = None
        self.says(said)

    def says(self, said: str | bytes) -> None:
        said = said.encode() if isinstance(said, str) else said
        run(self.connection, f"SET CONTEXT_INFO 0x{said.ljust(128, bytes(1)).hex()}")

    def holds(self, resource: str = LOCK, mode: str = "X") -> Actor:
        if self.stage.real:
            run(self.connection, getapplock(resource, mode))
        else:
            write_lock(self.stage, self.pid, resource, mode, "GRANT")
        return self

    def gives_back(self, resource: str) -> None:
        if self.stage.real:
            run(self.connection, f"EXEC sp_releaseapplock @Resource = N'{resource}', @LockOwner = 'Session'")
        else:
            run(self.stage.observer, f"DELETE FROM views.locks WHERE request_session_id = {self.pid}")

    def waits(
        self, said: str = "", *, resource: str = LOCK, mode: str = "X", since: int = 0, convert: bool = False
    ) -> Actor:
        """Wait, after those who wait already: where that is not so by itself, for some seconds."""
        status = "CONVERT" if convert else "WAIT"
        context = said.encode().ljust(128, bytes(1)).hex()
        if self.stage.real:
            statement = f"SET CONTEXT_INFO 0x{context}; {getapplock(resource, mode)}"
            self._waiting = threading.Thread(target=self._wait, args=(statement,))
            self._waiting.start()
            look = (
                f"SELECT 1 FROM sys.dm_tran_locks WHERE request_session_id = {self.pid} AND request_status = '{status}'"
            )
            wait_until(lambda: bool(run(self.stage.observer, look)), "the waiter")
        else:
            write_lock(self.stage, self.pid, resource, mode, status, waited_ms=since * 1000 + 500)
            run(self.stage.observer, f"INSERT INTO views.dm_exec_requests VALUES ({self.pid}, 0, 0x{context})")
        return self

    def _wait(self, statement: str) -> None:
        with suppress(pymssql.Error):
            run(self.connection, statement)

    def leave(self) -> None:
        if self._waiting:
            with suppress(pymssql.Error):
                run(self.stage.observer, f"KILL {self.pid}")
            self._waiting.join()
        with suppress(pymssql.Error):
            self.connection.close()


def run(connection: Any, statement: str) -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return list(cursor.fetchall()) if cursor.description else []


def getapplock(resource: str, mode: str) -> str:
    mode = {"X": "Exclusive", "S": "Shared", "U": "Update", "IX": "IntentExclusive"}[mode]
    return f"""
        DECLARE @r int;
        EXEC @r = sp_getapplock @Resource = N'{resource}', @LockMode = '{mode}', @LockOwner = 'Session',
             @LockTimeout = -1, @DbPrincipal = 'public';
        IF @r < 0 RAISERROR ('refused', 16, 1)"""


def write_lock(
    stage: Stage, pid: int, resource: str, mode: str, status: str, *, waited_ms: int | None = None, owner: str = NOBODY,
    described: str | None = None, kind: str = "APPLICATION", database: str = "DB_ID()",
) -> None:  # fmt: skip
    """Write what the views would show of a lock."""
    described = described or f"0:[{resource[:32]}]:({sha256(resource.encode()).hexdigest()[:8]})"
    address = f"0x{secrets.token_hex(8)}"
    described = described.replace("'", "''")
    values = f"'{kind}', {database}, N'{described}', '{mode}', '{status}', {pid}, '{owner}', {address}"
    run(stage.observer, f"INSERT INTO views.locks VALUES ({values})")
    if waited_ms is not None:
        run(stage.observer, f"INSERT INTO views.dm_os_waiting_tasks VALUES ({pid}, {waited_ms}, {address})")


@pytest.fixture(scope="module")
def whole_stage(mssql_url: str) -> Iterator[Stage]:
    stage = Stage(mssql_url)
    yield stage
    stage.close()


@pytest.fixture
def stage(whole_stage: Stage) -> Iterator[Stage]:
    yield whole_stage
    whole_stage.end_scene()


@pytest.fixture
def tables(stage: Stage) -> Stage:
    if stage.real:
        pytest.skip("only where tables stand in the place of the views")
    return stage


def told(entry: Entry, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(entry, name) for name in names)


def says(
    target: str = "web-01", step: str = "b", tenant: str | None = None, *, ago: int = 0, waits: bool = False
) -> str:
    """The label of somebody who holds, or waits, since so many seconds ago."""
    moment = f"{'w' if waits else ''}{int(time.time()) - ago}"
    return f"dblock1 {moment} {label.fields(tenant, target, step, time_width=len(moment), limit=128)}"


# --- holders and waiters ----------------------------------------------------------------------------------------------


def test_a_holder_and_its_queue(stage: Stage) -> None:
    begin = datetime.now(tz=timezone.utc).replace(microsecond=0)
    holder = stage.actor(says(tenant="T1", ago=50)).holds()
    waiters = [stage.actor().waits(says(tenant=f"T{n + 1}", waits=True), since=9 - n) for n in range(1, 5)]
    found = stage.see()
    end = datetime.now(tz=timezone.utc)
    pids = [holder.pid, *(waiter.pid for waiter in waiters)]
    ((user,),) = run(holder.connection, "SELECT SUSER_NAME()")
    names = ("state", "position", "target", "step", "tenant", "pid", "to_free", "mode", "key", "lock", "blocked_by")
    assert [told(entry, *names) for entry in found] == [
        ("held", None, "web-01", "b", "T1", pids[0], f"KILL {pids[0]}", "exclusive", KEY, "dblock", None),
        *(("waiting", n, "web-01", "b", f"T{n + 1}", pids[n], None, "exclusive", KEY, "dblock", pids[:n])
          for n in range(1, 5)),
    ]  # fmt: skip
    for entry in found:
        assert (entry.user, entry.application) == (user, "dblock")
        assert entry.host
        assert entry.since is not None
        assert entry.since.utcoffset() is not None
        assert entry.seconds is not None
        ago = 50 if entry is found[0] else 0
        assert begin <= entry.since + timedelta(seconds=ago) <= end
        assert ago <= entry.seconds <= ago + (end - begin).total_seconds() + 1


def test_to_free_frees(stage: Stage) -> None:
    stage.actor(says()).holds()
    (entry,) = stage.see()
    assert entry.to_free is not None
    run(stage.observer, entry.to_free)
    wait_until(lambda: stage.see() == [], "the session and its lock gone")


def test_the_longest_wait_first_then_what_nobody_waits_for(stage: Stage) -> None:
    def lock(step: int) -> str:
        return f"dblock:{dblock.key('t', str(step)).value}"

    for step, ago in ((1, 10), (2, 500), (3, 900), (4, 20)):
        stage.actor(says("t", str(step), ago=ago)).holds(lock(step))
    stage.actor().holds("billing")
    for step, ago in ((1, 5), (4, 15)):
        stage.actor().waits(says("t", str(step), ago=ago, waits=True), resource=lock(step))
    assert [told(entry, "state", "step", "lock") for entry in stage.see()][:-1] == [
        (state, step, "dblock")
        for state, step in (
            ("held", "4"),
            ("waiting", "4"),
            ("held", "1"),
            ("waiting", "1"),
            ("held", "3"),
            ("held", "2"),
        )
    ]


def test_shared_holders_and_a_conversion_that_is_served_first(stage: Stage) -> None:
    first, second = (stage.actor().holds(mode="S") for _ in range(2))
    waiter = stage.actor().waits(since=9)
    first.waits(convert=True, since=3)
    found = stage.see()
    assert {told(e, "state", "pid", "mode") for e in found} >= {("held", second.pid, "shared"),
                                                                ("waiting", waiter.pid, "exclusive")}  # fmt: skip
    assert [told(e, "pid", "position", "blocked_by") for e in found if e.state == "waiting"] == [
        (first.pid, 1, [second.pid]),
        (waiter.pid, 2, sorted([first.pid, second.pid])),
    ]
    assert [e.pid for e in found if e.state == "held"] == sorted([first.pid, second.pid])


def test_a_lock_held_twice_is_one_row(tables: Stage) -> None:
    actor = tables.actor(says())
    actor.holds(mode="S").holds(mode="X")
    (entry,) = tables.see()
    assert told(entry, "pid", "mode", "step") == (actor.pid, "exclusive", "b")


def test_the_queue_for_permits_is_counted(stage: Stage) -> None:
    """The head holds the queue, and looks for a permit; one who wants the whole lock waits for it and comes first."""
    holder = stage.actor(says(tenant="T1")).holds(mode="S").holds(permit(0))
    head = stage.actor(says(tenant="T2", waits=True)).holds(f"{LOCK}q")
    second = stage.actor().waits(says(tenant="T3", waits=True), resource=f"{LOCK}q", since=5)
    whole = stage.actor().waits(says(tenant="T4", waits=True), since=1)
    found = stage.see()
    assert [told(e, "tenant", "state", "position", "mode", "blocked_by") for e in found if e.key == KEY] == [
        ("T1", "held", None, "slot 0", None),
        ("T4", "waiting", 1, "exclusive", [holder.pid]),
        ("T2", "waiting", 2, "shared", [holder.pid, whole.pid]),
        ("T3", "waiting", 3, "shared", [holder.pid, whole.pid, head.pid]),
    ]
    assert [e.pid for e in found] == [holder.pid, whole.pid, head.pid, second.pid]


def permit(number: int, target: str = "web-01", step: str = "b") -> str:
    preimage = b"\x1f".join(part.encode() for part in (target, step, str(number)))
    return f"dblock:{int.from_bytes(sha256(preimage).digest()[:8], 'big', signed=True)}"


def test_a_lock_and_its_permit_are_one_row(stage: Stage) -> None:
    numbers = [0, 7, 10, 42, 100, 998]
    holders = [stage.actor(says(tenant=f"T{n}")).holds(mode="S").holds(permit(n)) for n in numbers]
    plain = stage.actor(says(tenant="T1")).holds(mode="S")
    assert sorted(told(e, "pid", "mode", "tenant", "step", "state", "key") for e in stage.see()) == sorted(
        [(h.pid, f"slot {n}", f"T{n}", "b", "held", KEY) for n, h in zip(numbers, holders, strict=True)]
        + [(plain.pid, "shared", "T1", "b", "held", KEY)]
    )


def test_a_permit_is_known_by_the_names_that_anybody_proves(stage: Stage) -> None:
    """A session with several locks carries the label of the last."""
    other = dblock.key("web-01", "a").value
    holder = stage.actor(says("web-01", "a", "T1")).holds(mode="S").holds(permit(3)).holds(f"dblock:{other}")
    waiter = stage.actor().waits(says(tenant="T2", waits=True))
    assert sorted(told(e, "pid", "mode", "step", "tenant", "key") for e in stage.see()) == sorted(
        [(holder.pid, "slot 3", "b", None, KEY), (holder.pid, "exclusive", "a", "T1", other),
         (waiter.pid, "exclusive", "b", "T2", KEY)]
    )  # fmt: skip


def test_what_is_no_permit_of_the_lock_stays_a_lock_of_its_own(stage: Stage) -> None:
    """Another lock, the permit of another one, a permit without its lock, and one of a lock whose names nobody says."""
    other = dblock.key("web-01", "a").value
    holds = [
        (stage.actor(says()).holds(mode="S"), f"dblock:{other}"),
        (stage.actor(says()).holds(mode="S"), permit(0, step="a")),
        (stage.actor(says()), permit(0)),
        (stage.actor().holds(f"dblock:{dblock.key('t', 's').value}", mode="S"), permit(0, "t", "s")),
    ]
    for actor, resource in holds:
        actor.holds(resource)
    found = [told(e, "pid", "mode", "key") for e in stage.see()]
    for actor, resource in holds:
        assert (actor.pid, "exclusive", int(resource.partition(":")[2])) in found
    assert sorted(mode for _, mode, _ in found) == ["exclusive"] * 4 + ["shared"] * 3


def test_the_head_that_has_the_lock_in_its_hand_still_waits(stage: Stage) -> None:
    head = stage.actor(says(tenant="T2", waits=True)).holds(f"{LOCK}q").holds(mode="S")
    (entry,) = stage.see()
    assert told(entry, "state", "position", "tenant", "pid") == ("waiting", 1, "T2", head.pid)
    assert entry.blocked_by is None


def test_a_queue_longer_than_a_recursion_may_be(tables: Stage) -> None:
    holder = tables.actor(says()).holds()
    for n in range(150):
        write_lock(tables, GHOST + n + 1, LOCK, "X", "WAIT", waited_ms=1000 - n)
    found = tables.see()
    assert [told(e, "pid", "position") for e in found[1:]] == [(GHOST + n + 1, n + 1) for n in range(150)]
    assert found[-1].blocked_by == [holder.pid, *(GHOST + n + 1 for n in range(149))]


# --- locks that are not dblock's --------------------------------------------------------------------------------------


def test_foreign_locks_are_shown_as_what_they_are(stage: Stage) -> None:
    actor = stage.actor(says(), appname="billing")
    names = [
        "nightly", "DBLOCK:5", "dblock:", "dblock:q", "dblock:-", "dblock:007", "dblock:+5", "dblock:-0", "dblock: 5",
        "dblock:5 ", "dblock:5.0", "dblock:1e3", "dblock:9223372036854775808", "dblock:-9223372036854775809",
        "dblock:99999999999999999999", "dblock:5Q", "dblock:5qq", "dblock:q5", "dblock:5]:(x", "dblock:\u0665",
        "a name that has more than thirty-two characters",
    ]  # fmt: skip
    for name in names:
        actor.holds(name, mode="IX")
    found = stage.see()
    assert all(e.lock.startswith("application lock 0:[") and e.lock.endswith(")") for e in found)
    assert sorted(e.lock[len("application lock 0:[") :].rpartition("]:(")[0] for e in found) == sorted(
        name[:32] for name in names
    )
    for entry in found:
        assert told(entry, "state", "position", "target", "step", "tenant", "since", "seconds", "key") == (
            "held", *[None] * 7)  # fmt: skip
        assert told(entry, "application", "to_free", "mode") == ("billing", f"KILL {actor.pid}", "IX")


def test_extreme_keys(stage: Stage) -> None:
    actor = stage.actor()
    keys = [-(2**63), 2**63 - 1, -1, 0]
    for key in keys:
        actor.holds(f"dblock:{key}")
    assert sorted(told(e, "key", "lock") for e in stage.see()) == sorted((key, "dblock, names unknown") for key in keys)


def test_foreign_waiters(stage: Stage) -> None:
    holder = stage.actor().holds("nightly")
    begin = datetime.now(tz=timezone.utc)
    first = stage.actor().waits(resource="nightly", since=0)
    second = stage.actor().waits(resource="nightly", mode="S")
    found = stage.see()
    assert [told(e, "state", "pid", "mode", "position", "blocked_by") for e in found] == [
        ("held", holder.pid, "exclusive", None, None),
        ("waiting", first.pid, "exclusive", 1, [holder.pid]),
        ("waiting", second.pid, "shared", 2, [holder.pid, first.pid]),
    ]
    for entry in found[1:]:
        assert entry.since is not None
        assert abs((entry.since - begin).total_seconds()) < 5


def test_what_is_not_an_application_lock_of_this_database(tables: Stage) -> None:
    actor = tables.actor(says())
    write_lock(tables, actor.pid, LOCK, "X", "GRANT", database="DB_ID() + 1")
    write_lock(tables, actor.pid, LOCK, "S", "GRANT", kind="DATABASE")
    assert tables.see() == []
    write_lock(tables, actor.pid, "", "X", "GRANT", described=f"5:[{LOCK}]:(2579568b)")
    (entry,) = tables.see()
    assert told(entry, "key", "lock") == (None, f"application lock 5:[{LOCK}]:(2579568b)")


def test_a_distributed_transaction_without_a_session(tables: Stage) -> None:
    guid = "D5499C66-E398-45CA-BF7E-DC9C194B48CF"
    write_lock(tables, -2, LOCK, "X", "GRANT", owner=guid)
    tables.actor().waits(says(tenant="T2", waits=True))
    held, waiting = tables.see()
    assert told(held, "state", "pid", "host", "user", "since") == ("held", *[None] * 4)
    assert (held.to_free or "").upper() == f"KILL '{guid}'"
    assert (held.application or "").upper() == f"DISTRIBUTED TRANSACTION {guid}"
    assert told(waiting, "blocked_by", "target") == ([0], "web-01")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tenant", "target", "step"),
    [
        ("T1", "web-01", "b"),
        (None, "-", "%"),
        ("-", "a'b\"c", "$(x)"),
        ("~", "a~", "~"),
        ("100 %", "\u00e9", "\U0001f642"),
        ("\u3042\u3044", "\u00a0x\u0085", "x\u2028"),
        ("\x1b[31m\n\x07", "web-01", "b"),
        ("\u202egnp.exe", "web-01", "b"),
        ("\U0010ffff\uffff", "\U000e0041", "<&>"),
    ],
    ids=ascii,
)
def test_names_in_clear(stage: Stage, tenant: str | None, target: str, step: str) -> None:
    key = dblock.key(target, step).value
    stage.actor(says(target, step, tenant)).holds(f"dblock:{key}")
    (entry,) = stage.see()
    assert told(entry, "key", "target", "step", "tenant") == (
        key, harmless(target), harmless(step), tenant and harmless(tenant)
    )  # fmt: skip


def harmless(name: str) -> str:
    """What does not print stays percent-encoded. These three do print, or nobody has given them a meaning yet."""
    return "".join(c if c.isprintable() or c in "\u00a0\uffff\U0010ffff" else quote(c, safe="") for c in name)


def test_shortened_names_are_shown_with_a_tilde(stage: Stage) -> None:
    target, step, tenant = "\u00e9" * 60, "s" * 200, "tenant " * 30
    key = dblock.key(target, step).value
    stage.actor(says(target, step, tenant)).holds(f"dblock:{key}")
    (entry,) = stage.see()
    assert entry.lock == "dblock"
    assert entry.since is not None
    for name, shown in ((target, entry.target), (step, entry.step), (tenant, entry.tenant)):
        assert shown is not None
        assert shown.endswith("~")
        assert len(shown) > 2
        assert name.startswith(shown[:-1])


@pytest.mark.parametrize("kept", ["%C3", "%E3", "%E3%81", "%F0", "%F0%9F", "%F0%9F%99"])
def test_a_cut_in_the_middle_of_a_character(stage: Stage, kept: str) -> None:
    stage.actor(f"dblock1 1795526014 %41{kept}~ a%C3%A9{kept}~ b").holds()
    (entry,) = stage.see()
    assert told(entry, "tenant", "target", "step") == ("A~", "a\u00e9~", "b")


def test_names_are_believed_only_where_the_key_proves_them(stage: Stage) -> None:
    liar = stage.actor().holds()
    for said in ("dblock1 1795526014 T1 web-01 c", "dblock1 1795526014 T1 - b", "dblock1 w1795526014 T1 web-02 b",
                 "dblock1 1795526014 T1 web-01 B"):  # fmt: skip
        liar.says(said)
        (entry,) = stage.see()
        assert told(entry, "target", "step", "tenant", "since", "lock") == (*[None] * 4, "dblock, names unknown")


def test_a_label_of_another_state_proves_the_names_only(stage: Stage) -> None:
    """Between the grant and the label of the grant."""
    stage.actor(says(tenant="T1", waits=True)).holds()
    (entry,) = stage.see()
    assert told(entry, "target", "step", "tenant", "since", "lock") == ("web-01", "b", None, None, "dblock")


def test_a_shortened_label_that_contradicts_known_names_is_not_believed(stage: Stage) -> None:
    liar = stage.actor("dblock1 1795526014 T9 api~ b").holds()
    stage.actor().waits(says(tenant="T2", waits=True))
    held, waiting = stage.see()
    assert told(held, "target", "step", "tenant") == ("web-01", "b", None)
    assert waiting.tenant == "T2"
    liar.says("dblock1 1795526014 T9 web~ b")
    held, waiting = stage.see()
    assert told(held, "target", "step", "tenant") == ("web-01", "b", "T9")


def test_a_session_with_several_locks_has_the_label_of_the_last(stage: Stage) -> None:
    other = dblock.key("web-01", "a").value
    stage.actor(says(tenant="T1")).holds().holds(f"dblock:{other}")
    assert {told(e, "step", "tenant", "key") for e in stage.see()} == {("b", "T1", KEY), (None, None, other)}
    # Somebody else's label can prove the names of the first; for whom it is held stays unknown.
    stage.actor().waits(says("web-01", "a", "T2", waits=True), resource=f"dblock:{other}")
    assert {told(e, "step", "tenant", "state") for e in stage.see()} == {
        ("a", None, "held"), ("a", "T2", "waiting"), ("b", "T1", "held")
    }  # fmt: skip


def test_a_shortened_label_in_a_session_with_several_locks_names_none(stage: Stage) -> None:
    holder = stage.actor("dblock1 1795526014 T1 web~ a").holds("dblock:5")
    assert [e.target for e in stage.see()] == ["web~"]
    holder.holds("nightly")
    assert sorted(e.target or "" for e in stage.see()) == ["", "web~"]
    holder.holds("dblock:6")
    assert [e.target for e in stage.see()] == [None, None, None]


@pytest.mark.parametrize(("moment", "known"), [("0", True), ("1795526014", True), ("4102444800", False),
                                               ("99999999999", False)])  # fmt: skip
def test_the_time_of_the_label(stage: Stage, moment: str, known: bool) -> None:
    """From its first second to a year in which seconds are no longer an int; one that lies ahead is not believed."""
    stage.actor(f"dblock1 {moment} T1 web-01 b").holds()
    (entry,) = stage.see()
    assert entry.tenant == "T1"
    assert entry.since == (datetime.fromtimestamp(int(moment), tz=timezone.utc) if known else None)
    if known:
        assert entry.seconds is not None
        assert abs(time.time() - int(moment) - entry.seconds) < 60


# --- labels and names that mean harm ----------------------------------------------------------------------------------

HOSTILE = [
    b"dblock1", b"dblock1 ", b"dblock1 w", b"dblock1 1 2 3", b"dblock1 1 2 3 4 5", b"dblock1 -1 T web-01 b",
    b"dblock1 999999999999 T web-01 b", b"dblock1 ww1 T web-01 b", b"dblock1 %31 T web-01 b", b"dblock1 1~ T web-01 b",
    b"dblock1  1 T web-01 b", b"dblock1 1 T web-01 ", b"dblock1 1 T  b", b"dblock2 1 T web-01 b",
    b"DBLOCK1 1 T web-01 b",
    b"dblock1 0 % % %", b"dblock1 1 %0 %G1 %%%", b"dblock1 1 %00 %00 %00", b"dblock1 1 %FF %FE%FF %80",
    b"dblock1 1 %C3 %E2%82 %F0%9F%98", b"dblock1 1 %C3~ %E2%82~ %F0%9F%98~", b"dblock1 1 %C0%80 %ED%A0%80 %F4%90%80%80",
    b"dblock1 1 ~ ~ ~", b"dblock1 1 %E0%80%80 %F0%80%80%80 %F8%88%80%80", b"dblock1 1 %1B%5B31m%07 web-01 b",
    b"dblock1 1 %0A%0D web-01 b", b"dblock1 1 %C2%9B31m web-01 b", b"dblock1 1 %E2%80%AE%E2%80%8B web-01 b",
    b"dblock1 1 %c3%a9 [a-z]% _%_", b"dblock1 1 ' '' N'", b"dblock1 1 T \xffweb-01 b", b"dblock1 1 T web-01\n b",
    b"dblock1 1 T web-01 \x1b[31m", b"\xff" * 128, b"dblock1 1 " + b"x" * 118, b"%" * 128,
]  # fmt: skip


def is_harmless(found: list[Entry]) -> bool:
    texts = [value for entry in found for value in entry.__dict__.values() if isinstance(value, str)]
    return all(label.printable(text) == text for text in texts)


def test_hostile_labels(stage: Stage) -> None:
    liar = stage.actor().holds()
    for said in HOSTILE:
        liar.says(said)
        (entry,) = found = stage.see()
        assert told(entry, "state", "key", "pid") == ("held", KEY, liar.pid)
        assert is_harmless(found), said


def test_random_labels_never_fail_and_say_what_python_reads(stage: Stage) -> None:
    """Names that fit, for their own key, of any characters; and noise of the characters that mean something."""
    generator, teller, liar = random.Random(7), stage.actor(), stage.actor().holds()
    alphabet = "aZ9.-_~% '\"\\\x1b\n\u00e9\u3042\u202e\U0001f642"
    for _ in range(30):
        tenant, target, step = ("".join(generator.choices(alphabet, k=generator.randint(1, 4))) for _ in range(3))
        key = Key(int.from_bytes(_digest(target, step), "big", signed=True)).value
        teller.says(f"dblock1 1795526014 {label.fields(tenant, target, step, time_width=10, limit=128)}")
        teller.holds(f"dblock:{key}")
        noise = "".join(generator.choices("%%%%0123456789ABCDEFabcdef~- w", k=generator.randint(0, 117)))
        liar.says(f"dblock1 {generator.choice(['', 'w'])}{noise}"[:128])
        found = stage.see()
        assert is_harmless(found)
        (entry,) = (e for e in found if e.pid == teller.pid)
        assert told(entry, "key", "target", "step", "tenant") == (key, *map(harmless, (target, step, tenant)))
        teller.gives_back(f"dblock:{key}")


def _digest(target: str, step: str) -> bytes:
    """The key's bytes without the judgement of names: a label may hold any."""
    return sha256(target.encode() + b"\x1f" + step.encode()).digest()[:8]


def test_texts_that_a_terminal_would_obey(stage: Stage) -> None:
    actor = (
        stage.actor(says(), appname="caf\u00e9 \x1b[31m\n\u202e\u0085 ~").holds().holds("a\x07\u200b\u3042b \x1b[m~")
    )
    named, foreign = stage.see()
    assert foreign.lock.startswith("application lock 0:[a??\u3042b ?[m~]:(")
    assert told(foreign, "application", "pid") == (named.application, actor.pid)
    if stage.real:
        assert named.application == "caf\u00e9 ?[31m??? ~"
    else:  # Babelfish keeps what is not printable ASCII as \x..
        assert named.application == r"caf\xc3\xa9 \x1b[31m\x0a\xe2\x80\xae\xc2\x85 ~"


# --- the session that looks -------------------------------------------------------------------------------------------


def test_it_leaves_the_session_as_it_was(stage: Stage) -> None:
    for setting in ("ON", "OFF"):
        run(stage.observer, f"SET NOCOUNT {setting}")
        before = run(stage.observer, "SELECT @@OPTIONS, @@TRANCOUNT")
        stage.see()
        assert run(stage.observer, "SELECT @@OPTIONS, @@TRANCOUNT") == before


def test_without_the_right_to_see_others(stage: Stage) -> None:
    if not stage.real:
        pytest.skip("only a real server has the rights")
    stage.actor(says()).holds()
    with plain_login(stage) as login:
        plain = stage.connect(**login)
        with pytest.raises(pymssql.Error, match="permission"):
            run(plain, stage.script("inspect"))
        plain.close()


@contextmanager
def plain_login(stage: Stage, *grants: str) -> Iterator[dict[str, str]]:
    name, password = f"{stage.database}_plain", secrets.token_urlsafe(20) + "aA1!"
    run(stage.observer, f"CREATE LOGIN {name} WITH PASSWORD = '{password}'; CREATE USER {name} FOR LOGIN {name}")
    for grant in grants:
        run(stage.observer, f"USE master; GRANT {grant} TO {name}; USE {stage.database}")
    yield {"user": name, "password": password}
    look = f"SELECT 1 FROM sys.dm_exec_sessions WHERE login_name = '{name}'"
    wait_until(lambda: not run(stage.observer, look), "its sessions gone")
    run(stage.observer, f"DROP USER {name}; DROP LOGIN {name}")


# --- what dblock doctor asks of these views ---------------------------------------------------------------------------


def test_a_lock_in_use_in_two_databases(stage: Stage) -> None:
    """A waiter of one is enough; queues for permits, and other people's locks, are nobody's business."""

    def found() -> list[Any]:
        asked = doctor._MSSQL_SPLIT
        return run(stage.observer, asked if stage.real else asked.replace("sys.dm_tran_locks", "views.dm_tran_locks"))

    for resource in (LOCK, f"{LOCK}q", "another's"):
        stage.actor(says()).holds(resource)
    stage.actor(says()).holds("dblock:5")
    assert found() == []
    elsewhere = stage.actor(says(), database="master")
    for resource in (LOCK, f"{LOCK}q", "another's"):
        if stage.real:
            elsewhere.holds(resource)
        else:
            write_lock(stage, elsewhere.pid, resource, "X", "GRANT", database="1")
    assert found() == [(str(KEY), ", ".join(sorted(("master", stage.database))))]
