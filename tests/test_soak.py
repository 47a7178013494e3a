"""A short soak; that the referee finds what is planted; and its rules one by one, on events written by hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.soak.__main__ import DOORS, ROOT, Plan, soak
from tests.soak.events import HEARTBEAT_SECONDS, Event
from tests.soak.referee import ANSWER_SECONDS, CANCEL, CUT, DISTURB, LEFT_SECONDS, RESTART, TERMINATE, Referee
from tests.support import wait_until

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the soak is for Linux: it knows its processes by /proc"),
    pytest.mark.timeout(240),
]


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process and no temporary file outlives a soak."""
    with tempfile.TemporaryDirectory(prefix="dblock-test-soak-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the server runs as somebody else
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield
        monkeypatch.undo()
        wait_until(lambda: not processes(name), "the processes to be gone")
        assert list(folder.iterdir()) == []


def processes(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue  # ended meanwhile
    return found


def test_short() -> None:
    found = soak(Plan(seconds=20, fault_seconds=0.3, mssql_url=os.environ.get("DBLOCK_TEST_MSSQL_URL")))
    assert found["violations"] == []
    assert found["sections"] >= 100
    assert found["faults"].total() >= 20
    assert {f"{door} (postgres)" for door in DOORS} <= set(found["held"])


def test_broken_off() -> None:
    def at_work() -> bool:
        return any('"fault"' in log.read_text() for log in Path(tempfile.gettempdir()).glob("dblock-soak-*/log"))

    argv = [sys.executable, "-m", "tests.soak", "--minutes", "5"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        wait_until(at_work, "the soak to be at work")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate()
    assert (process.returncode, said) == (130, "broken off: nothing is left behind\n")


@pytest.mark.parametrize(("plan", "complaint"), [
    (Plan(seconds=4, plant="release-skipped", doors=["lock"] * 3, faults=["cancel"], patience_seconds=3),
     "left behind: key"),
    (Plan(seconds=4, plant="undo-removed", doors=["connection"] * 4, targets=1, long_share=0.2, faults=["cancel"],
          patience_seconds=3), "left behind: queue"),
    (Plan(seconds=6, plant="watcher-off", doors=["lock"] * 4, targets=4, long_share=1, faults=["terminate"]),
     "not told in time"),
], ids=lambda value: value.plant if isinstance(value, Plan) else "")  # fmt: skip
def test_planted(plan: Plan, complaint: str) -> None:
    found = soak(plan)
    assert any(violation.startswith(complaint) for violation in found["violations"]), found


def test_queue_off() -> None:
    """What is not a violation shows in the count."""

    def share(plant: str | None) -> float:
        found = soak(
            Plan(
                seconds=8,
                plant=plant,
                doors=["lock"] * 8,
                targets=1,
                long_share=0.3,
                patience_seconds=8,
                faults=["cancel"],
            )
        )
        assert found["violations"] == []
        order = found["order"]
        print(found)
        assert order["served after a wait"] >= 5
        return float(order["overtaken"] / order["served after a wait"])

    assert share(None) == 0
    assert share("queue-off") > 0.2
