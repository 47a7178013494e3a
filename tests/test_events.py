"""What more than a tenant is told of a lock: labels that status shows, events in a file, the timeline drawn of them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import dblock
from dblock import label
from dblock.inspect import entries
from tests.backends import Postgres, SqlServer
from tests.doors import COMMAND, Wish
from tests.support import wait_until

LABELS = {"deployment": "Deployments-1", "link": "https://o/app#/x?y=1&z='*/ DROP --", "who": "Zoë ##octopus[x]"}
NAMES: dict[str, Any] = {"target": "web-01", "step": "b", "tenant": "T1"}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv("DBLOCK_EVENTS", str(path))
    yield path
    monkeypatch.undo()


def happened(file: Path) -> list[tuple[str, str | None]]:
    return [(event["event"], event["tenant"]) for event in map(json.loads, file.read_text().splitlines())]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dblock", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


# --- labels -----------------------------------------------------------------------------------------------------------


def test_a_comment_is_read_back_and_ends_nowhere_else() -> None:
    written = label.comment(LABELS)
    assert written.isascii()
    assert "*/" not in written
    assert label.read_comment(f"/*{written}*/ SELECT 1") == LABELS
    assert label.read_comment(f"dblock {written}") == LABELS
    assert label.read_comment(f"SELECT '/*{written}*/'") == {}
    assert label.comment({}) == ""


@pytest.mark.parametrize(("labels", "error"), [
    ({"a b": "x"}, ValueError), ({"": "x"}, ValueError), ({"a'": "x"}, ValueError), ({"a": "x" * 500}, ValueError),
    ({"a": 1}, TypeError), ({1: "a"}, TypeError),
])  # fmt: skip
def test_what_is_no_label(labels: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="label"):
        dblock.lock("postgresql://127.0.0.1:1/none", **NAMES, label=labels)


def test_holders_and_waiters_show_their_labels(postgres: Postgres) -> None:
    with (
        dblock.lock(postgres.url, **NAMES, label=LABELS),
        psycopg.connect(postgres.url, autocommit=True) as connection,
    ):
        waiter = COMMAND.attempt(postgres.url, Wish(tenant="T2"))
        with waiter:
            wait_until(postgres.waiters, "the waiter")
            assert [entry.labels for entry in entries(postgres.url)] == [LABELS, {}]
            shown = command("status", DBLOCK_URL=postgres.url).stdout
            assert "T1 deployment=Deployments-1 link=https://o/app#/x?y=1&z='*/ DROP -- who=Zoë #\\x23octopus" in shown
        # On the caller's own connection, too; nothing is left of it there.
        with dblock.lock(connection, target="web-02", step="b", label={"deployment": "D2"}):
            found = {entry.target: entry.labels for entry in entries(postgres.url)}
            assert found["web-02"] == {"deployment": "D2"}
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_labels_from_the_command_line(postgres: Postgres) -> None:
    done = command(
        "run", "--target", "web-01", "--step", "b", "--label", "deployment=D-1", "--label", "a=b=c", "--pass-url", "--",
        sys.executable, "-m", "dblock", "status", "--json", DBLOCK_URL=postgres.url,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [entry["labels"] for entry in json.loads(done.stdout)] == [{"deployment": "D-1", "a": "b=c"}]
    for wrong in ("nothing", "a=1"):
        done = command(
            "run", "--target", "w", "--step", "b", "--label", "a=2", "--label", wrong, "--", "true", DBLOCK_URL="x"
        )
        assert (done.returncode, done.stderr.startswith("dblock: --label")) == (64, True)


def test_labels_on_sql_server(mssql: SqlServer) -> None:
    with dblock.lock(mssql.url, **NAMES, label={"deployment": "D-1", "z": "x" * 300}):
        programs = [
            program
            for (program,) in mssql.query("SELECT program_name FROM sys.dm_exec_sessions")
            if str(program).startswith("dblock deployment")
        ]
    assert [label.read_comment(program)["deployment"] for program in programs] == ["D-1"]


# --- events -----------------------------------------------------------------------------------------------------------


def test_a_life_in_events(postgres: Postgres, file: Path) -> None:
    with dblock.lock(postgres.url, **NAMES, label=LABELS):
        with pytest.raises(dblock.LockTimeout), dblock.lock(postgres.url, **NAMES | {"tenant": "T2"}, timeout=0.1):
            pytest.fail("two inside")
        with pytest.raises(dblock.LockTimeout), dblock.lock(postgres.url, **NAMES | {"tenant": "T3"}, timeout=0):
            pytest.fail("two inside")
    assert happened(file) == [
        ("acquired", "T1"), ("waiting", "T2"), ("timed out", "T2"), ("timed out", "T3"), ("released", "T1"),
    ]  # fmt: skip
    acquired, *_, released = map(json.loads, file.read_text().splitlines())
    assert acquired["key"] == dblock.key("web-01", "b").value
    assert (acquired["target"], acquired["step"], acquired["labels"]) == ("web-01", "b", LABELS)
    assert released["seconds"] > acquired["seconds"] >= 0


def test_losses_are_told_once(postgres: Postgres, file: Path) -> None:
    with pytest.raises(dblock.LockLost), dblock.lock(postgres.url, **NAMES) as held:
        postgres.end(postgres.holders()[0])
        held.lost.wait(60)
    with pytest.raises(dblock.LockLost), dblock.lock(postgres.url, **NAMES, heartbeat=0) as held:
        ((pid,),) = {(pid,) for pid in postgres.holders()}
        postgres._observer.execute("SELECT pg_terminate_backend(%s)", (pid,))
    assert [event for event, _ in happened(file)] == ["acquired", "lost"] * 2
    with pytest.raises(dblock.LockNotHeld), dblock.lock(postgres.url, **NAMES) as held:
        held.release()
    assert [event for event, _ in happened(file)][4:] == ["acquired", "released"]


def test_several_targets_and_asyncio(postgres: Postgres, file: Path) -> None:
    async def main() -> None:
        async with dblock.alock(postgres.url, target=["web-01", "web-02"], step="b"):
            pass

    asyncio.run(main())
    assert happened(file) == [("acquired", None)] * 2 + [("released", None)] * 2


def test_a_file_that_cannot_be_written_harms_no_lock(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, tmp_path / "none" / "events", pipe):
        monkeypatch.setenv("DBLOCK_EVENTS", str(path))
        with dblock.lock(postgres.url, **NAMES) as held:
            assert held.held
    assert "are not written" in caplog.text


# --- the timeline -----------------------------------------------------------------------------------------------------


def test_the_timeline_of_events(postgres: Postgres, file: Path, tmp_path: Path) -> None:
    with dblock.lock(postgres.url, **NAMES):
        for tenant in ("T2", "T3"):
            done = command(
                "run", "--target", "web-01", "--step", "b", "--tenant", tenant, "--timeout", "100ms", "--", "true",
                DBLOCK_URL=postgres.url,
            )  # fmt: skip
            assert done.returncode == 75
    with dblock.lock(postgres.url, target="web-<02>", step="b"):
        pass
    with file.open("a") as lines:
        lines.write("not JSON\n[]\n{}\n")
    picture = tmp_path / "out.svg"
    done = command("timeline", str(file), "-o", str(picture))
    assert done.returncode == 0, done.stderr
    heading, first, second = done.stdout.splitlines()
    assert heading.split()[0] == "LOCK"
    assert (first.split()[:2], first.split()[-2:]) == (["b@web-01", "1"], ["2", "0"])
    assert second.split()[:2] == ["b@web-<02>", "1"]
    root = ET.parse(picture).getroot()  # noqa: S314 - our own file
    space = "{http://www.w3.org/2000/svg}"
    held = [bar for bar in root.iter(f"{space}rect") if "step" in bar.attrib.get("class", "")]
    waits = [line for line in root.iter(f"{space}line") if line.attrib.get("class") == "wait"]
    assert (len(held), len(waits)) == (2, 2 + 2 + 1)  # and one in the legend
    texts = [text.text for text in root.iter(f"{space}text")]
    assert {"T1", "T2", "T3", "b@web-01", "b@web-<02>"} <= set(texts)


def test_a_timeline_of_nothing(tmp_path: Path) -> None:
    assert command("timeline", str(tmp_path / "none")).returncode == 64
    empty = tmp_path / "empty"
    empty.touch()
    assert command("timeline", str(empty)).stdout == "no event is found\n"
