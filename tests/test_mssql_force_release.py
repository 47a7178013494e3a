"""sql/mssql/force_release.sql: it ends the confirmed session, only while it holds that very lock, and nothing else.

On Babelfish the sessions and their ends are real, and the script reads tables of the documented shape in the place of
the views that Babelfish has not. So only a real server can prove these views, the right to KILL, and KILL's errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymssql
import pytest

from tests.support import wait_until
from tests.test_mssql_inspect import KEY, LOCK, Actor, Stage, permit, plain_login, run, says, write_lock

Row = dict[str, Any]
# In the place of WAITFOR. Within one batch Babelfish sees the sessions as it first did, unless told to look again.
PAUSE = "SELECT @gone = 0 FROM pg_catalog.pg_sleep(0.02) AS p CROSS JOIN pg_catalog.pg_stat_clear_snapshot() AS s"
VECTORS = json.loads(Path(__file__).with_name("key-vectors.json").read_text())


@pytest.fixture(scope="module")
def whole_stage(mssql_url: str) -> Iterator[Stage]:
    stage = Stage(mssql_url)
    yield stage
    stage.close()


@pytest.fixture
def stage(whole_stage: Stage) -> Iterator[Stage]:
    yield whole_stage
    names = ("target", "step", "key", "confirm")
    run(whole_stage.observer, ";".join(f"EXEC sp_set_session_context N'dblock.{name}', NULL" for name in names))
    whole_stage.end_scene()


def script(stage: Stage, *, permitted: bool = True) -> str:
    text = stage.script("force_release")
    if not stage.real:
        for missing, instead in (
            ("HAS_PERMS_BY_NAME(NULL, NULL, N'ALTER ANY CONNECTION')", str(int(permitted))),
            ("WAITFOR DELAY '00:00:00.020'", PAUSE),
        ):
            assert text.count(missing) == 1
            text = text.replace(missing, instead)
    return text


def force_release(stage: Stage, connection: Any = None, *, permitted: bool = True, **settings: object) -> list[Row]:
    """Set the wishes and run the script as any driver does. A wish that is not given is absent, except those kept."""
    connection = connection or stage.observer
    for name, value in settings.items():
        given = str(value) if isinstance(value, int) else "N'{}'".format(str(value).replace("'", "''"))
        run(connection, f"EXEC sp_set_session_context N'dblock.{name}', {given}")
    with connection.cursor(as_dict=True) as cursor:
        cursor.execute(script(stage, permitted=permitted))
        rows: list[Row] = cursor.fetchall()
    return rows


def the_one(rows: list[Row]) -> Row:
    (row,) = rows
    return row


def outcome(stage: Stage, connection: Any = None, **settings: object) -> str:
    said: str = the_one(force_release(stage, connection, **settings))["outcome"]  # type: ignore[arg-type]  # permitted
    return said


def held(pid: int) -> str:
    return f"held: to end this session, EXEC sp_set_session_context N'dblock.confirm', N'{pid}' and run this again"


def alive(actor: Actor) -> bool:
    try:
        run(actor.connection, "SELECT 1")
    except pymssql.Error:
        return False
    return True


# --- look, then end ---------------------------------------------------------------------------------------------------


def test_it_shows_the_holder_and_ends_nothing(stage: Stage) -> None:
    said = says(tenant="T1", ago=50)
    holder = stage.actor(said).holds()
    ((user,),) = run(holder.connection, "SELECT SUSER_NAME()")
    for settings in ({"target": "web-01", "step": "b"}, {"key": KEY}, {"target": "", "step": ""}):
        row = the_one(force_release(stage, **settings))
        assert row["outcome"] == held(holder.pid)
        assert (row["pid"], row["user"], row["application"], row["key"]) == (holder.pid, user, said, KEY)
        assert row["host"]
        assert row["since"].timestamp() == int(said.split()[1])
        assert row["activity"]
        assert abs(row["query_start"].timestamp() - row["since"].timestamp() - 50) < 30
    assert alive(holder)


def test_a_holder_without_a_label(stage: Stage) -> None:
    stage.actor("something else", appname="nightly \x07 run").holds()
    row = the_one(force_release(stage, key=KEY))
    assert row["application"] == ("nightly ? run" if stage.real else r"nightly \x07 run")
    assert row["since"] is None


def test_it_ends_the_confirmed_holder_and_nobody_else(stage: Stage) -> None:
    holder, bystander = stage.actor(says()).holds(), stage.actor().holds("dblock:5")
    waiter = stage.actor().waits(says(tenant="T2", waits=True))
    row = the_one(force_release(stage, target="web-01", step="b", confirm=holder.pid))
    assert (row["outcome"], row["pid"]) == ("ended: the server has given back all that the session held", holder.pid)
    assert not alive(holder)
    assert alive(bystander)
    if stage.real:
        wait_until(lambda: [e.pid for e in stage.see() if e.key == KEY] == [waiter.pid], "the waiter served")


def test_the_confirmation_is_used_up(stage: Stage) -> None:
    first = stage.actor().holds()
    assert outcome(stage, key=5, confirm=first.pid) == (
        f"nothing was ended: pid {first.pid} does not hold this lock, nor does anybody"
    )
    assert outcome(stage, key=KEY) == held(first.pid)
    assert outcome(stage, key="five", confirm=first.pid) == "refused: dblock.key is no key"
    assert outcome(stage, key=KEY) == held(first.pid)
    assert outcome(stage, confirm=str(first.pid)).startswith("ended: ")
    assert outcome(stage) == "nobody holds this lock"
    second = stage.actor().holds()
    assert outcome(stage) == held(second.pid)
    assert alive(second)


def test_one_who_no_longer_holds_it_is_not_ended(stage: Stage) -> None:
    former = stage.actor().holds()
    assert outcome(stage, target="web-01", step="b") == held(former.pid)
    former.gives_back(LOCK)
    assert outcome(stage, confirm=former.pid) == (
        f"nothing was ended: pid {former.pid} does not hold this lock, nor does anybody"
    )
    holder = stage.actor().holds()
    row = the_one(force_release(stage, confirm=former.pid))
    assert row["outcome"] == f"nothing was ended: pid {former.pid} does not hold this lock, this session does"
    assert row["pid"] == holder.pid
    assert alive(former)
    assert alive(holder)


def test_one_who_waits_for_it_is_not_ended(stage: Stage) -> None:
    stage.actor().holds()
    waiter = stage.actor().waits(says(waits=True))
    assert outcome(stage, key=KEY, confirm=waiter.pid) == (
        f"nothing was ended: pid {waiter.pid} does not hold this lock, this session does"
    )
    assert [e.pid for e in stage.see() if e.state == "waiting"] == [waiter.pid]


def test_another_lock_is_not_meant(stage: Stage) -> None:
    others = [f"dblock:{KEY + 1}", f"{LOCK}q", f"DBLOCK:{KEY}", f"{LOCK}0", f"dblock:0{KEY}", f"{LOCK} ", "dblock:%"]
    actors = [stage.actor().holds(name) for name in others]
    for actor in actors:
        assert outcome(stage, key=KEY, confirm=actor.pid) == (
            f"nothing was ended: pid {actor.pid} does not hold this lock, nor does anybody"
        )
    assert all(alive(actor) for actor in actors)


def test_a_name_that_only_looks_like_it_is_not_meant(stage: Stage) -> None:
    actor = stage.actor().holds("dblock:5]:(x")
    assert outcome(stage, key=5, confirm=actor.pid).endswith("does not hold this lock, nor does anybody")
    assert alive(actor)


def test_another_database_another_kind_and_another_principal_are_not_meant(stage: Stage) -> None:
    if stage.real:
        pytest.skip("only where tables stand in the place of the views")
    actor = stage.actor()
    write_lock(stage, actor.pid, LOCK, "X", "GRANT", database="DB_ID() + 1")
    write_lock(stage, actor.pid, LOCK, "X", "GRANT", kind="METADATA")
    write_lock(stage, actor.pid, "", "X", "GRANT", described=f"5:[{LOCK}]:(2579568b)")
    assert outcome(stage, key=KEY, confirm=actor.pid).endswith("does not hold this lock, nor does anybody")
    assert alive(actor)


def test_only_the_confirmed_one_of_several_shared_holders(stage: Stage) -> None:
    several = [stage.actor().holds(mode="S") for _ in range(3)]
    pids = [actor.pid for actor in several]
    first, *others = force_release(stage, key=KEY, confirm=pids[1])
    assert (first["pid"], first["outcome"][:7]) == (pids[1], "ended: ")
    assert [(row["pid"], row["outcome"]) for row in others] == sorted((pid, held(pid)) for pid in (pids[0], pids[2]))
    assert [alive(actor) for actor in several] == [True, False, True]


def test_only_the_confirmed_one_of_several_with_a_slot(stage: Stage) -> None:
    several = [stage.actor(says(tenant=f"T{n}")).holds(mode="S").holds(permit(n)) for n in range(3)]
    head = stage.actor(says(waits=True)).holds(f"{LOCK}q")
    pids = [actor.pid for actor in several]
    assert [row["pid"] for row in force_release(stage, key=KEY)] == sorted(pids)
    first, *others = force_release(stage, key=KEY, confirm=pids[1])
    assert (first["pid"], first["outcome"][:7]) == (pids[1], "ended: ")
    assert [(row["pid"], row["outcome"]) for row in others] == sorted((pid, held(pid)) for pid in (pids[0], pids[2]))
    assert [alive(actor) for actor in (*several, head)] == [True, False, True, True]


def test_a_session_that_holds_it_twice_is_one_holder(stage: Stage) -> None:
    holder = stage.actor().holds(mode="S")
    if stage.real:  # for the transaction too
        run(holder.connection, f"BEGIN TRAN; EXEC sp_getapplock @Resource = N'{LOCK}', @LockMode = 'Exclusive'")
    else:
        holder.holds()
    assert outcome(stage, key=KEY) == held(holder.pid)
    assert outcome(stage, confirm=holder.pid).startswith("ended: ")


def test_the_own_session_is_never_ended(stage: Stage) -> None:
    own = stage.actor(says()).holds()
    said = (
        "nothing was ended: your own session holds it; release.sql gives it back, where it is a transaction's COMMIT or"
        " ROLLBACK, or EXEC sp_releaseapplock"
        f" @Resource = N'{LOCK}', @LockOwner = N'Session', @DbPrincipal = N'public'"
    )
    assert outcome(stage, own.connection, key=KEY) == said
    assert outcome(stage, own.connection, confirm=own.pid) == said
    assert alive(own)


def test_inside_a_transaction_it_only_looks(stage: Stage) -> None:
    holder, dba = stage.actor().holds(), stage.actor()
    run(dba.connection, "BEGIN TRAN")
    assert outcome(stage, dba.connection, key=KEY) == held(holder.pid)
    assert outcome(stage, dba.connection, confirm=holder.pid) == (
        "nothing was ended: the server refuses KILL inside a transaction; COMMIT or ROLLBACK, SET"
        " IMPLICIT_TRANSACTIONS OFF, set dblock.confirm and run this again"
    )
    assert alive(holder)
    run(dba.connection, "ROLLBACK")
    assert outcome(stage, dba.connection) == held(holder.pid)


def test_it_leaves_the_session_as_it_was(stage: Stage) -> None:
    for setting in ("ON", "OFF"):
        run(stage.observer, f"SET NOCOUNT {setting}")
        before = run(stage.observer, "SELECT @@OPTIONS, @@TRANCOUNT")
        assert outcome(stage, key=KEY) == "nobody holds this lock"
        assert run(stage.observer, "SELECT @@OPTIONS, @@TRANCOUNT") == before


# --- who may ----------------------------------------------------------------------------------------------------------

MAY_NOT = (
    "you may not end this session; who has ALTER ANY CONNECTION, or in Azure SQL Database KILL DATABASE CONNECTION,"
    " may: KILL"
)


def test_without_the_right_it_says_so(stage: Stage) -> None:
    holder = stage.actor().holds()
    if not stage.real:
        assert outcome(stage, key=KEY, permitted=False) == f"held: {MAY_NOT} {holder.pid}"
        return
    with plain_login(stage, "VIEW SERVER STATE") as login:
        plain = stage.connect(**login)
        assert outcome(stage, plain, key=KEY) == f"held: {MAY_NOT} {holder.pid}"
        assert outcome(stage, plain, confirm=holder.pid) == f"nothing was ended: {MAY_NOT} {holder.pid}"
        plain.close()
    assert alive(holder)


def test_without_the_right_to_see_it_does_nothing(stage: Stage) -> None:
    if not stage.real:
        pytest.skip("only a real server has the rights")
    holder = stage.actor().holds()
    with plain_login(stage, "ALTER ANY CONNECTION") as login:
        plain = stage.connect(**login)
        with pytest.raises(pymssql.Error, match="permission"):
            force_release(stage, plain, key=KEY, confirm=holder.pid)
        plain.close()
    assert alive(holder)


# --- distributed transactions, bad settings ---------------------------------------------------------------------------


def test_a_distributed_transaction_without_a_session(stage: Stage) -> None:
    if stage.real:
        pytest.skip("only where tables stand in the place of the views")
    guid = "D5499C66-E398-45CA-BF7E-DC9C194B48CF"
    write_lock(stage, -2, LOCK, "X", "GRANT", owner=guid)
    row = the_one(force_release(stage, key=KEY))
    said = "held by a distributed transaction, which has no session to end; to end it: KILL"
    assert row["outcome"].upper() == f"{said} '{guid}'".upper()
    assert row["pid"] is None
    assert outcome(stage, confirm="-2") == "refused: dblock.confirm is no pid"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "neither dblock.target and dblock.step nor dblock.key is set"),
        ({"target": "web-01"}, "dblock.target and dblock.step must both be set"),
        ({"step": "b", "key": KEY}, "dblock.target and dblock.step must both be set"),
        ({"key": "five"}, "dblock.key is no key"),
        ({"key": "-"}, "dblock.key is no key"),
        ({"key": "9223372036854775808"}, "dblock.key is no key"),
        ({"key": "-9223372036854775809"}, "dblock.key is no key"),
        ({"key": "99999999999999999999"}, "dblock.key is no key"),
        ({"key": "1e3"}, "dblock.key is no key"),
        ({"key": "5 "}, "dblock.key is no key"),
        ({"key": "\u0665"}, "dblock.key is no key"),
        ({"key": KEY, "target": "web-02", "step": "b"}, "dblock.target and dblock.step have the key"),
        ({"key": KEY, "confirm": "x"}, "dblock.confirm is no pid"),
        ({"key": KEY, "confirm": "-1"}, "dblock.confirm is no pid"),
        ({"key": KEY, "confirm": "0"}, "dblock.confirm is no pid"),
        ({"key": KEY, "confirm": " "}, "dblock.confirm is no pid"),
        ({"key": KEY, "confirm": "1; DROP"}, "dblock.confirm is no pid"),
        ({"key": KEY, "confirm": "99999999999"}, "dblock.confirm is no pid"),
    ],
    ids=ascii,
)
def test_bad_settings(stage: Stage, settings: dict[str, object], said: str) -> None:
    holder = stage.actor().holds()
    assert outcome(stage, **settings).startswith(f"refused: {said}")
    assert alive(holder)


def test_extreme_keys(stage: Stage) -> None:
    for key in (-(2**63), 2**63 - 1, -1, 0):
        holder = stage.actor().holds(f"dblock:{key}")
        row = the_one(force_release(stage, key=str(key), confirm=holder.pid))
        assert (row["outcome"][:7], row["key"]) == ("ended: ", key)
        assert not alive(holder)


def test_a_pid_that_no_process_has(stage: Stage) -> None:
    stage.actor().holds()
    assert outcome(stage, key=KEY, confirm="4294967295").startswith("nothing was ended: pid 4294967295 does not hold")


def test_all_names_that_have_a_key(stage: Stage) -> None:
    for vector in VECTORS["keys"]:
        row = the_one(force_release(stage, target=vector["target"], step=vector["step"]))
        assert (row["key"], row["outcome"]) == (vector["key"], "nobody holds this lock"), vector


def test_names_must_be_nvarchar(stage: Stage) -> None:
    for target, step, refused in (
        ("N'w\u00e9b'", "N'b'", False),
        ("'web'", "N'b'", True),
        ("N'web'", "'b'", True),
        ("'w\u00e9b'", "N'b'", True),
    ):
        run(stage.observer, f"EXEC sp_set_session_context N'dblock.target', {target}")
        run(stage.observer, f"EXEC sp_set_session_context N'dblock.step', {step}")
        said = outcome(stage)
        assert said.startswith("refused: ") == refused
        assert not refused or said.endswith("must both be set, as nvarchar: N'...'")
