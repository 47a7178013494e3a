"""inspect.sql and dblock status: what is said of every holder and waiter, through psql, a driver and Python."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from hashlib import sha256
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import dblock
from dblock import label
from dblock.inspect import Entry, entries
from dblock.names import Key
from tests import hostile
from tests.doors import DRIVER, PSQL, PYTHON, SQL, Door, Wish
from tests.support import wait_until

INSPECT = (SQL / "inspect.sql").read_text()
KEY = dblock.key("web-01", "b").value
HIGH = KEY >> 32

COLUMNS = [name for name in Entry.__dataclass_fields__ if name != "labels"]  # which the script does not know

Connection = psycopg.Connection[Any]
Connect = Callable[..., Connection]


@pytest.fixture(scope="module")
def here(url: str) -> Iterator[str]:
    """A database of its own, in which nobody else holds anything."""
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("CREATE DATABASE dblock_inspect")
        yield make_conninfo(url, dbname="dblock_inspect")
        admin.execute("DROP DATABASE dblock_inspect WITH (FORCE)")


@pytest.fixture
def connect(here: str) -> Iterator[Connect]:
    """Open connections that are closed after the test, and their locks gone before the next one."""
    connections = []

    def open_one(**settings: str) -> Connection:
        connection = psycopg.connect(here, autocommit=True, **settings)  # type: ignore[arg-type]  # conninfo
        connections.append(connection)
        return connection

    yield open_one
    for connection in connections:
        connection.close()
    wait_until(lambda: entries(here) == [], "all locks of the test gone")


@pytest.fixture
def plain_role(connect: Connect) -> Iterator[str]:
    connect().execute("CREATE ROLE dblock_plain LOGIN")
    yield "dblock_plain"
    connect().execute("DROP ROLE dblock_plain")


def run(connection: Connection, text: str) -> list[Any]:
    cursor = connection.execute(text.encode())
    return cursor.fetchall() if cursor.description else []


def see(connection: Connection) -> list[Entry]:
    """Run the script as any driver does, without the settings that dblock's own session has."""
    return [Entry(*row) for row in run(connection, INSPECT)]


@contextmanager
def in_a_thread(connection: Connection, statement: str) -> Iterator[None]:
    """Run a statement that blocks; it is ended with its session, from outside."""

    def body() -> None:
        with suppress(psycopg.errors.AdminShutdown):
            connection.execute(statement.encode())

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield
    finally:
        with psycopg.connect(connection.info.dsn, autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(%s)", (connection.info.backend_pid,))
        thread.join()


def told(entry: Entry, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(entry, name) for name in names)


# --- holders and waiters ----------------------------------------------------------------------------------------------


@contextmanager
def queue_of(here: str, *doors: Door) -> Iterator[None]:
    """The first door holds b@web-01 as tenant T1, the others wait, in this order, as T2, T3, …"""
    with psycopg.connect(here, autocommit=True) as observer, ExitStack() as stack:
        for number, door in enumerate(doors, start=1):
            attempt = stack.enter_context(door.attempt(here, Wish(tenant=f"T{number}")))
            if number == 1:
                assert attempt.held()
            else:
                wait_until(partial(_is_number_waiting, observer, number - 1), f"{door} as waiter {number - 1}")
        yield
        stack.close()
        wait_until(partial(_is_number_waiting, observer, 0), "all of them gone")


def _is_number_waiting(observer: Connection, number: int) -> bool:
    (row,) = run(observer, f"SELECT count(*) FROM pg_locks WHERE objsubid = 2 AND objid = 0 AND classid = {HIGH}")
    return bool(row[0] == number)


def test_a_holder_and_its_queue(here: str, connect: Connect) -> None:
    begin = datetime.now(tz=timezone.utc).replace(microsecond=0)
    with queue_of(here, PSQL, PYTHON, DRIVER, PSQL, PYTHON):
        found = see(connect())
        end = datetime.now(tz=timezone.utc)
    pids = [entry.pid for entry in found]
    names = (
        "state",
        "position",
        "target",
        "step",
        "tenant",
        "mode",
        "key",
        "lock",
        "application",
        "blocked_by",
        "to_free",
    )
    assert [told(entry, *names) for entry in found] == [
        ("held", None, "web-01", "b", "T1", "exclusive", KEY, "dblock", None, None,
         f"SELECT pg_catalog.pg_terminate_backend({pids[0]})"),
        *(("waiting", n, "web-01", "b", f"T{n + 1}", "exclusive", KEY, "dblock", None, pids[:n], None)
          for n in range(1, 5)),
    ]  # fmt: skip
    info = connect().info
    for entry in found:
        assert (entry.host, entry.user) == (info.hostaddr or "local", info.user)
        assert entry.since is not None
        assert begin <= entry.since <= end
        assert entry.seconds is not None
        assert 0 <= entry.seconds <= (end - begin).total_seconds()


def test_to_free_frees(here: str, connect: Connect) -> None:
    with queue_of(here, PYTHON, PSQL):
        holder, waiter = see(connect())
        assert holder.to_free is not None
        run(connect(), holder.to_free)
        wait_until(lambda: [e.state for e in see(connect())] == ["held"], "the lock handed on")
        assert [told(entry, "pid", "tenant", "target") for entry in see(connect())] == [(waiter.pid, "T2", "web-01")]


def test_psql_driver_python_and_command_line_say_the_same(here: str, connect: Connect) -> None:
    with queue_of(here, PYTHON, DRIVER, PSQL):
        connect().execute("SELECT pg_advisory_lock_shared(5), pg_advisory_lock(3, -4)")
        driver = see(connect())
        python = entries(here)
        line = subprocess.run([sys.executable, "-m", "dblock", "status", "--json"],
                              env=environment(here), capture_output=True, check=True)  # fmt: skip
        psql = subprocess.run(["psql", "-X", "-q", "--csv", here, "-f", str(SQL / "inspect.sql")],
                              capture_output=True, check=True)  # fmt: skip
    assert len(driver) == 5
    assert still(python) == still(driver)
    assert [{**entry, "seconds": None} for entry in json.loads(line.stdout)] == [e.as_json() for e in still(driver)]
    heading, *lines = csv.reader(io.StringIO(psql.stdout.decode()))
    assert heading == COLUMNS
    for cells, entry in zip(lines, driver, strict=True):
        said = dict(zip(heading, cells, strict=True))
        for name in (
            "state",
            "position",
            "target",
            "step",
            "tenant",
            "pid",
            "host",
            "user",
            "to_free",
            "mode",
            "key",
            "lock",
        ):
            value = getattr(entry, name)
            assert said[name] == ("" if value is None else str(value))
        assert said["blocked_by"] == ("{" + ",".join(map(str, entry.blocked_by)) + "}" if entry.blocked_by else "")


def still(found: list[Entry]) -> list[Entry]:
    """Leave out what differs from one moment to the next."""
    return [Entry(**{**entry.__dict__, "seconds": None}) for entry in found]


def environment(url: str) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "DBLOCK_URL": url, "PYTHONPATH": ":".join(sys.path), "TZ": "UTC"}


def test_the_longest_wait_first_then_what_nobody_waits_for(connect: Connect) -> None:
    def under_label(step: int, state: str, seconds_ago: int) -> Connection:
        connection = connect()
        connection.execute("SELECT set_config('application_name', %s, false)",
                           (f"dblock1 {state}{int(time.time()) - seconds_ago} - t {step}",))  # fmt: skip
        return connection

    def key(step: int) -> int:
        return dblock.key("t", str(step)).value

    for step, seconds_ago in ((1, 10), (2, 500), (3, 900), (4, 20)):
        under_label(step, "", seconds_ago).execute("SELECT pg_advisory_lock(%s)", (key(step),))
    connect().execute("SELECT pg_advisory_lock(7)")
    with ExitStack() as stack:
        for step, seconds_ago in ((1, 5), (4, 15)):
            waiter = under_label(step, "w", seconds_ago)
            stack.enter_context(in_a_thread(waiter, f"SELECT pg_advisory_lock({key(step)})"))
        observer = connect()
        wait_until(lambda: sum(e.state == "waiting" for e in see(observer)) == 2, "both waiting")
        found = see(observer)
    assert [told(entry, "state", "step") for entry in found] == [
        ("held", "4"), ("waiting", "4"), ("held", "1"), ("waiting", "1"), ("held", "3"), ("held", "2"), ("held", None),
    ]  # fmt: skip
    assert found[-1].key == 7


# --- locks that are not dblock's --------------------------------------------------------------------------------------


def test_foreign_locks_are_shown_as_what_they_are(connect: Connect) -> None:
    holder, second = connect(application_name="billing"), connect()
    holder.execute("SELECT pg_advisory_lock(-1), pg_advisory_lock(5, -7), pg_advisory_lock_shared(0, -2147483648)")
    second.execute("SELECT pg_advisory_lock_shared(0, -2147483648)")
    found = see(connect())
    assert sorted(told(e, "lock", "key", "mode", "pid") for e in found) == sorted([
        ("bigint, names unknown", -1, "exclusive", holder.info.backend_pid),
        ("integers (5, -7)", None, "exclusive", holder.info.backend_pid),
        ("integers (0, -2147483648)", None, "shared", holder.info.backend_pid),
        ("integers (0, -2147483648)", None, "shared", second.info.backend_pid),
    ])  # fmt: skip
    for entry in found:
        assert told(entry, "state", "position", "target", "step", "tenant", "since", "seconds") == ("held", *[None] * 6)
        assert entry.application == ("billing" if entry.pid == holder.info.backend_pid else "")
        assert entry.to_free == f"SELECT pg_catalog.pg_terminate_backend({entry.pid})"


def test_foreign_waiters(connect: Connect) -> None:
    holder, first, second, observer = sessions = connect(), connect(), connect(), connect()
    holder_pid, first_pid, second_pid, _ = (session.info.backend_pid for session in sessions)
    holder.execute("SELECT pg_advisory_lock(5)")
    begin = time.time()
    with in_a_thread(first, "SELECT pg_advisory_lock(5)"):
        wait_until(lambda: len(see(observer)) == 2, "the first waiter")
        with in_a_thread(second, "SELECT pg_advisory_lock_shared(5)"):
            wait_until(lambda: len(see(observer)) == 3, "the second waiter")
            found = see(observer)
    assert [told(e, "state", "pid", "mode", "position", "blocked_by", "key") for e in found] == [
        ("held", holder_pid, "exclusive", None, None, 5),
        ("waiting", first_pid, "exclusive", None, [holder_pid], 5),
        ("waiting", second_pid, "shared", None, [holder_pid, first_pid], 5),
    ]
    for entry in found[1:]:
        assert entry.since is not None
        assert begin - 1 <= entry.since.timestamp() <= time.time()


def test_a_foreign_waiter_of_dblocks_key_is_ahead_of_all_but_the_head(here: str, connect: Connect) -> None:
    foreign, observer = connect(), connect()
    foreign_pid = foreign.info.backend_pid
    with queue_of(here, PYTHON, PYTHON, PYTHON), in_a_thread(foreign, f"SELECT pg_advisory_lock({KEY})"):
        wait_until(lambda: len(see(observer)) == 4, "the foreign waiter")
        found = {entry.pid: entry for entry in see(observer)}
        holder, head, last = (next(p for p, e in found.items() if e.tenant == tenant) for tenant in ("T1", "T2", "T3"))
    entry = found[foreign_pid]
    assert told(entry, "state", "position", "target", "step", "tenant", "lock") == (
        "waiting", None, "web-01", "b", None, "dblock"
    )  # fmt: skip
    assert entry.since is not None
    assert set(found[last].blocked_by or ()) == {holder, head, foreign_pid}
    assert found[last].position == 2


def test_a_foreign_lock_that_bars_the_queue(here: str, connect: Connect) -> None:
    """Somebody holds the gate at which tickets are drawn: nobody gets on, and it is shown who is to blame."""
    culprit, observer = connect(), connect()
    holder = connect()
    holder.execute(f"SELECT pg_advisory_lock({KEY})".encode())
    culprit.execute(f"SELECT pg_advisory_lock({HIGH}, -1)".encode())
    with PSQL.attempt(here, Wish(tenant="T2")):
        wait_until(lambda: any(e.tenant == "T2" for e in see(observer)), "one who has no ticket yet")
        found = see(observer)
    assert [told(e, "state", "pid", "lock", "tenant", "position") for e in found] == [
        *sorted([
            ("held", holder.info.backend_pid, "dblock", None, None),
            ("held", culprit.info.backend_pid, f"dblock's queue ({HIGH}, -1)", None, None),
        ], key=lambda row: row[1]),
        ("waiting", found[2].pid, "dblock", "T2", None),
    ]  # fmt: skip
    assert sorted(found[2].blocked_by or ()) == sorted([holder.info.backend_pid, culprit.info.backend_pid])


def test_locks_of_another_database_are_not_shown(url: str, connect: Connect) -> None:
    with dblock.lock(url, target="web-01", step="b"):
        assert see(connect()) == []


@pytest.mark.parametrize("gid", ["T1", "o'clock \\ \"", "caf\u00e9", "\x1b[31m\n"], ids=ascii)
def test_a_prepared_transaction(connect: Connect, gid: str) -> None:
    owner, observer, waiter = connect(), connect(), connect()
    owner.execute("BEGIN")
    owner.execute(f"SELECT pg_advisory_xact_lock({KEY}), pg_advisory_xact_lock_shared(1, 2)".encode())
    owner.execute(sql.SQL("PREPARE TRANSACTION {}").format(sql.Literal(gid)))
    owner.close()
    with in_a_thread(waiter, f"SELECT pg_advisory_lock({KEY})"):
        wait_until(lambda: any(e.state == "waiting" for e in see(observer)), "the waiter")
        held, waiting, pair = see(observer)
    assert told(held, "state", "pid", "host", "user", "since", "key") == (
        "held", None, None, observer.info.user, None, KEY
    )  # fmt: skip
    assert told(pair, "lock", "mode", "to_free") == ("integers (1, 2)", "shared", held.to_free)
    assert waiting.blocked_by == [0]
    assert held.application is not None
    assert held.application == "prepared transaction " + "".join(c if c.isprintable() else "?" for c in gid)
    assert held.to_free is not None
    assert held.to_free.isascii()
    assert held.to_free.isprintable()
    run(observer, held.to_free)
    assert see(observer) == []


# --- names ------------------------------------------------------------------------------------------------------------


def held_under(connection: Connection, key: int, application_name: str) -> None:
    connection.execute(
        "SELECT set_config('application_name', %s, false), pg_advisory_lock(%s)", (application_name, key)
    )


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
    ],
    ids=ascii,
)
def test_names_in_clear(here: str, connect: Connect, tenant: str | None, target: str, step: str) -> None:
    with dblock.lock(here, target=target, step=step, tenant=tenant):
        (entry,) = see(connect())
    assert told(entry, "key", "target", "step", "tenant") == (
        dblock.key(target, step).value, harmless(target), harmless(step), tenant and harmless(tenant)
    )  # fmt: skip


def harmless(name: str) -> str:
    """What does not print stays percent-encoded. The no-break space does print, but Python disagrees."""
    return "".join(c if c.isprintable() or c == "\u00a0" else quote(c, safe="") for c in name)


def test_shortened_names_are_shown_with_a_tilde(here: str, connect: Connect) -> None:
    target, step, tenant = "\u00e9" * 60, "s" * 100, "tenant " * 30
    with dblock.lock(here, target=target, step=step, tenant=tenant):
        (entry,) = see(connect())
    assert entry.lock == "dblock"
    assert entry.since is not None
    for name, shown in ((target, entry.target), (step, entry.step), (tenant, entry.tenant)):
        assert shown is not None
        assert shown.endswith("~")
        assert len(shown) > 2
        assert name.startswith(shown[:-1])


def test_names_are_believed_only_where_the_key_proves_them(connect: Connect) -> None:
    liar, observer = connect(), connect()
    for name in ("dblock1 1795526014 T1 web-01 c", "dblock1 1795526014 T1 - b", "dblock1 w1795526014 T1 web-02 b"):
        held_under(liar, KEY, name)
        (entry,) = see(observer)
        assert told(entry, "target", "step", "tenant", "since", "lock") == (
            None,
            None,
            None,
            None,
            "bigint, names unknown",
        )
        assert entry.application == name
        liar.execute("SELECT pg_advisory_unlock_all()")


def test_a_shortened_label_that_contradicts_known_names_is_not_believed(connect: Connect) -> None:
    liar, honest = connect(), connect()
    held_under(liar, KEY, "dblock1 1795526014 T9 api~ b")
    honest.execute("SELECT set_config('application_name', 'dblock1 w1795526014 T2 web-01 b', false)")
    with in_a_thread(honest, f"SELECT pg_advisory_lock({KEY})"):
        observer = connect()
        wait_until(lambda: len(see(observer)) == 2, "the waiter")
        held, waiting = see(observer)
    assert told(held, "target", "step", "tenant", "application") == (
        "web-01", "b", None, "dblock1 1795526014 T9 api~ b"
    )  # fmt: skip
    assert waiting.tenant == "T2"


def test_a_session_with_several_locks_has_the_label_of_the_last(connect: Connect) -> None:
    holder = connect()
    held_under(holder, dblock.key("web-01", "a").value, "dblock1 1795526014 T1 web-01 a")
    held_under(holder, KEY, "dblock1 1795526015 T1 web-01 b")
    observer = connect()
    assert {told(e, "step", "tenant", "key") for e in see(observer)} == {
        ("b", "T1", KEY), (None, None, dblock.key("web-01", "a").value)
    }  # fmt: skip
    # Somebody else's label can prove the names of the first; for whom it is held stays unknown.
    other = connect(application_name="dblock1 w1795526016 T2 web-01 a")
    with in_a_thread(other, f"SELECT pg_advisory_lock({dblock.key('web-01', 'a').value})"):
        wait_until(lambda: len(see(observer)) == 3, "the waiter")
        assert {told(e, "step", "tenant", "state") for e in see(observer)} == {
            ("a", None, "held"), ("a", "T2", "waiting"), ("b", "T1", "held")
        }  # fmt: skip


def test_a_shortened_label_in_a_session_with_several_locks_names_none(connect: Connect) -> None:
    holder = connect()
    held_under(holder, 5, "dblock1 1795526014 T1 web~ a")
    assert [e.target for e in see(connect())] == ["web~"]
    holder.execute("SELECT pg_advisory_lock(6)")
    assert [e.target for e in see(connect())] == [None, None]


@pytest.mark.parametrize("held", [True, False])
def test_a_waiter_without_a_label(connect: Connect, held: bool) -> None:
    """Its queue's locks alone show what it is; which lock it waits for shows where somebody holds one of that half."""
    if held:
        held_under(connect(), KEY, "dblock1 1795526014 T1 web-01 b")
    waiter = connect(application_name="psql")
    waiter.execute(f"SELECT pg_advisory_lock({HIGH}, 4), pg_advisory_lock_shared({HIGH}, 0)".encode())
    *_, entry = see(connect())
    names = ("state", "position", "pid", "since", "tenant", "application")
    assert told(entry, *names) == ("waiting", 1, waiter.info.backend_pid, None, None, "psql")
    expected = (KEY, "web-01", "b", "dblock") if held else (None, None, None, "dblock, names unknown")
    assert told(entry, "key", "target", "step", "lock") == expected


# --- labels and names that mean harm ----------------------------------------------------------------------------------

HOSTILE = [
    "dblock1", "dblock1 ", "dblock1 w", "dblock1 1 2 3", "dblock1 1 2 3 4 5", "dblock1 -1 T web-01 b",
    "dblock1 99999999999 T web-01 b", "dblock1 999999999999999999999999 T web-01 b", "dblock1 0 % % %",
    "dblock1 1 %0 %G1 %%%", "dblock1 1 %00 %00 %00", "dblock1 1 %FF %FE%FF %80", "dblock1 1 %C3 %E2%82 %F0%9F%98",
    "dblock1 1 %C3~ %E2%82~ %F0%9F%98~", "dblock1 1 %C0%80 %ED%A0%80 %F4%90%80%80", "dblock1 1 ~ ~ ~",
    "dblock1 1 %E0%80%80 %F0%80%80%80 %F8%88%80%80", "dblock1 1 %1B%5B31m%07 web-01 b", "dblock1 1 %0A%0D web-01 b",
    "dblock1 1 %C2%9B31m web-01 b", "dblock1 1 %E2%80%AE%E2%80%8B web-01 b", "dblock1 1 \\x1b $1 %s",
    "dblock1 1 ' '' E'",
]  # fmt: skip


def is_harmless(found: list[Entry]) -> bool:
    texts = [value for entry in found for value in entry.__dict__.values() if isinstance(value, str)]
    return all(label.printable(text) == text for text in texts)


@pytest.mark.parametrize("encoding", ["UTF8", "LATIN1"])
def test_hostile_labels(connect: Connect, encoding: str) -> None:
    liar, observer = connect(), connect(client_encoding=encoding)
    for name in HOSTILE:
        held_under(liar, KEY, name)
        (entry,) = found = see(observer)
        assert told(entry, "state", "key", "pid") == ("held", KEY, liar.info.backend_pid)
        assert is_harmless(found)
        liar.execute("SELECT pg_advisory_unlock_all()")


def test_random_labels_never_fail_and_say_what_python_reads(connect: Connect) -> None:
    """Names that fit, for their own key, of any characters; and noise of the characters that mean something."""
    generator, liar, observer = random.Random(7), connect(), connect()
    alphabet = "aZ9.-_~% '\"\\\x1b\n\u00e9\u3042\u202e\U0001f642"
    for _ in range(60):
        tenant, target, step = ("".join(generator.choices(alphabet, k=generator.randint(1, 4))) for _ in range(3))
        fields = label.fields(tenant, target, step, time_width=10)
        said = label.parse(f"dblock1 1795526014 {fields}")
        key = Key(int.from_bytes(_digest(target, step), "big", signed=True)).value
        held_under(liar, key, f"dblock1 1795526014 {fields}")
        (entry,) = see(observer)
        assert said is not None
        if "~" not in fields:
            assert told(entry, "target", "step", "tenant") == tuple(map(harmless, (target, step, tenant)))
        liar.execute("SELECT pg_advisory_unlock_all()")

        noise = "".join(generator.choices("%%%%0123456789ABCDEFabcdef~- w", k=generator.randint(0, 50)))
        held_under(liar, KEY, f"dblock1 {generator.choice(['', 'w'])}1795526014 {noise}")
        assert is_harmless(see(observer))
        liar.execute("SELECT pg_advisory_unlock_all()")


def _digest(target: str, step: str) -> bytes:
    """The key's bytes without the judgement of names: a label may hold any."""
    return sha256(target.encode() + b"\x1f" + step.encode()).digest()[:8]


def test_a_role_with_control_characters_in_its_name(here: str, connect: Connect) -> None:
    admin, name = connect(), "evil\x1b[31m\nrole"
    admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    try:
        with psycopg.connect(here, user=name, autocommit=True) as holder:
            holder.execute("SELECT pg_advisory_lock(5)")
            (entry,) = see(connect())
        assert entry.user == "evil?[31m?role"
    finally:
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def test_a_name_that_the_readers_encoding_does_not_have(here: str, connect: Connect) -> None:
    with dblock.lock(here, target="\u3042", step="b", tenant="\u20ac"):
        (entry,) = see(connect(client_encoding="LATIN1"))
    assert told(entry, "target", "step", "tenant") == ("%E3%81%82", "b", "%E2%82%AC")


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP", "SQL_ASCII"])
def test_a_database_of_another_encoding(url: str, encoding: str) -> None:
    name = f"dblock_inspect_{encoding.lower()}"
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING {} LOCALE 'C'").format(
                sql.Identifier(name), sql.Literal(encoding)
            )
        )
        there = make_conninfo(url, dbname=name)
        try:
            with (
                psycopg.connect(there, autocommit=True) as liar,
                psycopg.connect(there, autocommit=True, client_encoding="UTF8") as observer,
            ):
                for hostile_name in HOSTILE:
                    held_under(liar, KEY, hostile_name)
                    assert is_harmless(see(observer))
                    liar.execute("SELECT pg_advisory_unlock_all()")
            wait_until(lambda: entries(there) == [], "the liar gone")
            with dblock.lock(there, target="\u00e9\u3042", step="b", tenant="T\u20ac"):
                (entry,) = entries(there)
            assert told(entry, "target", "step", "tenant", "key") == (
                "%C3%A9%E3%81%82", "b", "T%E2%82%AC", dblock.key("\u00e9\u3042", "b").value
            )  # fmt: skip
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


# --- rights, and a hostile schema -------------------------------------------------------------------------------------


def test_no_rights_are_needed(here: str, connect: Connect, plain_role: str) -> None:
    with queue_of(here, PSQL, PYTHON):
        full = see(connect())
        with psycopg.connect(here, user=plain_role, autocommit=True) as reader:
            found = see(reader)
    assert [entry.host for entry in found] == [None, None]
    assert still([Entry(**{**entry.__dict__, "host": None}) for entry in full]) == still(found)


def test_hostile_schema(here: str, connect: Connect) -> None:
    with hostile.schema(here, INSPECT), queue_of(here, PSQL, PYTHON, DRIVER):
        foreign, owner = connect(), connect()
        foreign.execute("SELECT pg_advisory_lock(5), pg_advisory_lock(6, 7)")
        owner.execute("BEGIN")
        owner.execute("SELECT pg_advisory_xact_lock(8)")
        owner.execute("PREPARE TRANSACTION 'dblock o''clock'")
        try:
            expected = see(connect())
            assert len(expected) == 6
            reader = connect(options="-c search_path=evil,pg_catalog")
            with pytest.raises(psycopg.errors.RaiseException, match="trapped"):
                reader.execute("SELECT 'a'::pg_catalog.text = 'a'::pg_catalog.text")
            assert still(see(reader)) == still(expected)
        finally:
            owner.execute("ROLLBACK PREPARED 'dblock o''clock'")


@pytest.mark.parametrize("standard_conforming_strings", ["on", "off"])
def test_readable_in_psql(here: str, standard_conforming_strings: str) -> None:
    options = f"-c standard_conforming_strings={standard_conforming_strings} -c escape_string_warning=off"
    with queue_of(here, PYTHON, PSQL):
        done = subprocess.run(
            ["psql", "-X", "-v", "ON_ERROR_STOP=1", here, "-f", str(SQL / "inspect.sql")],
            env={"PATH": "/usr/bin:/bin", "PGOPTIONS": options},
            capture_output=True,
            text=True,
            check=True,
        )
    heading, _, held, waiting, count, _ = done.stdout.split("\n", 5)
    assert [cell.strip() for cell in heading.split("|")] == COLUMNS
    assert [cell.strip() for cell in held.split("|")][:5] == ["held", "", "web-01", "b", "T1"]
    assert [cell.strip() for cell in waiting.split("|")][:5] == ["waiting", "1", "web-01", "b", "T2"]
    assert count == "(2 rows)"
    assert done.stderr == ""


# --- the command line, and Python -------------------------------------------------------------------------------------


def status(here: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dblock", "status", *options],
        env=environment(here),
        capture_output=True,
        text=True,
        check=False,
    )


def test_status_of_nothing(here: str, connect: Connect) -> None:
    assert status(here).stdout == "nothing is held, nobody waits\n"
    assert json.loads(status(here, "--json").stdout) == []


def test_status_in_columns(here: str, connect: Connect) -> None:
    with queue_of(here, PYTHON, PSQL):
        connect(application_name="billing").execute("SELECT pg_advisory_lock_shared(5), pg_advisory_lock(3, 4)")
        done = status(here)
        found = see(connect())
    heading, held, waiting, *foreign = done.stdout.splitlines()
    assert re.split("  +", heading) == [
        "STATE", "LOCK", "TENANT", "SINCE", "FOR", "PID", "HOST", "USER", "BLOCKED BY", "TO FREE",
    ]  # fmt: skip
    assert held.split()[:3] == ["held", "b@web-01", "T1"]
    assert held.endswith(f"  SELECT pg_catalog.pg_terminate_backend({found[0].pid})")
    assert waiting.split()[:4] == ["waiting", "1", "b@web-01", "T2"]
    assert waiting.endswith(f"  {found[0].pid}")
    assert found[0].since is not None
    assert f"{found[0].since.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S}" in held
    # Columns are aligned: each begins where its heading begins.
    for name, text in (("LOCK", "b@web-01"), ("TENANT", "T1"), ("PID", str(found[0].pid))):
        assert heading.index(name) == held.index(text)
    assert sorted(" ".join(line.split()[:5]) for line in foreign) == [
        "held bigint, names unknown 5", "held integers (3, 4) (billing)"
    ]  # fmt: skip
    assert done.stderr == ""


def test_json(here: str) -> None:
    with queue_of(here, PYTHON, PSQL):
        held, waiting = json.loads(status(here, "--json").stdout)
    assert datetime.fromisoformat(held["since"]).utcoffset() is not None
    assert held["blocked_by"] == []
    assert waiting["blocked_by"] == [held["pid"]]
    assert isinstance(held["seconds"], int)
    assert {"key", "target", "step", "tenant", "mode", "state", "position", "pid", "host", "user", "since", "seconds",
            "blocked_by"} <= held.keys()  # fmt: skip


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--database", "elsewhere"), 77, "connected to database 'dblock_inspect', but 'elsewhere' was asked for"),
        (("--url", "postgresql://127.0.0.1:1/none"), 69, "cannot connect"),
        (("--url", "postgresql://u:secret@127.0.0.1/none"), 64, "--url holds a password"),
    ],
)
def test_status_fails_with_the_contracts_codes(here: str, options: tuple[str, ...], code: int, said: str) -> None:
    done = status(here, *options)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"dblock: {said}")
    assert "secret" not in done.stderr


def test_python_takes_a_callable_and_checks_the_database(here: str, connect: Connect) -> None:
    name = conninfo_to_dict(here)["dbname"]
    assert entries(lambda: psycopg.connect(here), database=str(name)) == []
    with pytest.raises(dblock.UnsafeConnection, match="was asked for"):
        entries(here, database="elsewhere")


def test_date_styles_and_time_zones_of_the_role_do_not_matter(here: str, connect: Connect, plain_role: str) -> None:
    connect().execute(f"ALTER ROLE {plain_role} SET datestyle = 'SQL, DMY'")
    connect().execute(f"ALTER ROLE {plain_role} SET timezone = 'Asia/Tokyo'")
    with dblock.lock(here, target="web-01", step="b"):
        (entry,) = entries(make_conninfo(here, user=plain_role))
        (expected,) = entries(here)
    assert entry.since == expected.since
