"""A short soak; that the referee finds what is planted; and its rules one by one, on events written by hand."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.soak.__main__ import DOORS, MSSQL_DOORS, ROOT, Plan, soak
from tests.soak.events import HEARTBEAT_SECONDS, Event
from tests.soak.referee import ANSWER_SECONDS, CANCEL, CUT, LEFT_SECONDS, RESTART, TERMINATE, Referee
from tests.support import wait_until

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the soak is for Linux: it knows its processes by /proc"),
    pytest.mark.timeout(240),
    pytest.mark.xdist_group("a given server"),  # some use it; and many processes are at work in each
]

NOTICE_SECONDS = 3.0  # beside whatever other tests may run


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


def check_short(mssql_url: str | None) -> dict[str, Any]:
    found = soak(Plan(seconds=20, fault_seconds=0.3, notice_seconds=NOTICE_SECONDS, mssql_url=mssql_url))
    assert found["violations"] == []
    assert found["sections"] >= 100
    assert found["faults"].total() >= 20
    assert {f"{door} (postgres)" for door in DOORS} <= set(found["held"])
    return found


def test_short() -> None:
    check_short(None)


def test_short_with_sql_server(mssql_url: str) -> None:
    held = check_short(mssql_url)["held"]
    assert sum(held[f"{door} (mssql)"].total() for door in MSSQL_DOORS) >= 5


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

    def overtaken(plant: str | None) -> int:
        plan = Plan(seconds=5, plant=plant, doors=["lock"] * 8, targets=1, long_share=0.3, patience_seconds=5,
                    faults=["cancel"])  # fmt: skip
        found = soak(plan)
        assert found["violations"] == []
        return int(found["order"]["overtaken"])

    # Beside other tests a soak has few who meet: so more than one, until it shows.
    planted = next(filter(None, (overtaken("queue-off") for _ in range(5))), 0)
    assert overtaken(None) < planted / 2


# --- the rules, one by one --------------------------------------------------------------------------------------------

CUT_SECONDS = HEARTBEAT_SECONDS + ANSWER_SECONDS
Told = list[Event]


def stay(name: str, began: float, ended: float, *, outcome: str = "released", **details: Any) -> Told:
    """A section that says once a second that it is inside."""
    known: dict[str, Any] = {
        "worker": int(name), "door": "lock", "shape": "exclusive", "engine": "postgres", "targets": ["web-01"],
        "shared": False, "slots": None, "timeout": 20.0, "watched": True, "pids": [int(name)], "link": 0, **details,
    }  # fmt: skip
    granted = known.pop("granted", [])
    moments = [moment for moment in range(int(began) + 1, int(ended) + 1) if began < moment < ended]
    return [
        Event(began - 0.1, "wanted", name, known),
        Event(began, "entered", name, {"slots": granted}),
        *(Event(moment, "inside", name, {}) for moment in moments),
        Event(ended, "told" if outcome == "lost" else "left", name, {}),
        Event(ended + 0.01, outcome, name, {"why": "of the network"}),
    ]


def fault(at: float, what: str, section: str = "", free_in: float = 0) -> Event:
    return Event(at, "fault", section, {"what": what, "name": what, "done": at + 0.05, "free_in": free_in})


def frozen(worker: int, began: float, ended: float) -> Told:
    return [Event(began, "stopped", "", {"pid": worker}), Event(ended, "continued", "", {"pid": worker})]


def judged(*events: Event | Told) -> list[str]:
    referee = Referee()
    told = [one for event in events for one in (event if isinstance(event, list) else [event])]
    referee.read(sorted(told, key=lambda event: event.time))
    referee.judge()
    return [violation.partition(":")[0] for violation in referee.violations]


TWO, LATE, LOST, GRACE = "two inside web-01", "not told in time", "lost without a cause", "outlived its grace, until"
SLOTS: dict[str, Any] = {"shape": "slots", "slots": 2}


@pytest.mark.parametrize(("events", "violations"), [
    ([stay("1", 10, 12), stay("2", 12.1, 14)], []),
    ([stay("1", 10, 12), stay("2", 11.5, 14)], [TWO]),
    ([stay("1", 10, 12), stay("2", 11, 14, targets=["web-02"])], []),
    ([stay("1", 10, 12), stay("2", 11, 14, engine="mssql")], []),
    ([stay("1", 10, 12, shared=True), stay("2", 11, 14, shared=True)], []),
    ([stay("1", 10, 12, shared=True), stay("2", 11, 14)], [TWO]),
    ([stay("1", 10, 12, granted=[0], **SLOTS), stay("2", 11, 14, granted=[1], **SLOTS)], []),
    ([stay("1", 10, 12, granted=[1], **SLOTS), stay("2", 11, 14, granted=[1], **SLOTS)], [TWO]),
    ([stay("1", 10, 12, shared=True), stay("2", 11, 14, granted=[1], **SLOTS)], []),
    # A session that is terminated: told in time, told late, and never told.
    ([stay("1", 10, 12.2, outcome="lost"), fault(12, TERMINATE, "1"), stay("2", 12.1, 14)], []),
    ([stay("1", 10, 14, outcome="lost"), fault(11.5, TERMINATE, "1")], [LATE]),
    ([stay("1", 10, 14, outcome="lost"), fault(11.5, TERMINATE, "1"), stay("2", 12.1, 15)], [LATE, TWO]),
    ([stay("1", 10, 12.4), fault(12, TERMINATE, "1"), stay("2", 12.1, 14)], [TWO]),
    ([stay("1", 10, 12.4, outcome="lost"), fault(12, CANCEL, "1"), stay("2", 11.9, 14)], [LOST, TWO]),
    ([stay("1", 10, 12.2, outcome="lost"), fault(12, RESTART), stay("2", 12.1, 14)], []),
    ([stay("1", 10, 11), fault(9.85, RESTART)], []),
    ([stay("1", 9.9, 13, outcome="lost"), fault(9.85, RESTART)], [LATE]),
    # Somebody who asks has no excuse: what the server says is so.
    ([stay("1", 10, 12.5, outcome="lost", watched=False), fault(11.9, TERMINATE, "1"), stay("2", 11.95, 14)], [TWO]),
    # Frozen: cannot be told, as long as it is; and must be, soon after.
    ([stay("1", 10, 16.5, outcome="lost"), frozen(1, 11, 16.2), fault(12, TERMINATE, "1"), stay("2", 12.1, 14)], []),
    ([stay("1", 10, 18.5, outcome="lost"), frozen(1, 11, 16.2), fault(12, TERMINATE, "1")], [LATE]),
    ([stay("1", 10, 14), frozen(1, 11, 13), stay("2", 12, 13)], [TWO]),
    # A cut that is silent: a heartbeat and 5 s, and the lock goes to nobody before.
    ([stay("1", 10, 11 + CUT_SECONDS, outcome="lost"), fault(11, CUT, "1", CUT_SECONDS + 1), stay("2", 17.6, 19)], []),
    ([stay("1", 10, 13 + CUT_SECONDS, outcome="lost"), fault(11, CUT, "1", CUT_SECONDS + 1)], [LATE]),
    ([stay("1", 10, 16.2, outcome="lost"), fault(11, CUT, "1", CUT_SECONDS + 1), stay("2", 15, 16)], [TWO]),
    ([stay("1", 10, 16.2, outcome="lost"), fault(11, CUT, "1", CUT_SECONDS + 1), fault(12, TERMINATE, "1"),
      stay("2", 12.5, 13)], []),
    # A command may take its grace.
    ([stay("1", 10, 12, outcome="lost"), fault(11.9, TERMINATE, "1"), Event(12.005, "inside", "1", {}),
      stay("2", 11.95, 14)], []),
    ([stay("1", 10, 12, outcome="lost"), fault(11.9, TERMINATE, "1"), Event(15, "inside", "1", {})], [GRACE]),
])  # fmt: skip
def test_rules(events: list[Event | Told], violations: list[str]) -> None:
    assert [violation.removesuffix(" 15.000") for violation in judged(*events)] == violations


def test_left_behind() -> None:
    referee = Referee()
    referee.read(stay("1", 10, 12))
    row = [("key 0 ExclusiveLock in session 7", "1")]
    looks: list[Callable[[], None]] = [lambda at=at: referee.look(at, "postgres", row) for at in (11, 13, 14)]  # type: ignore[misc]
    for look in looks:
        look()
    referee.look(14, "postgres", [])
    referee.look(15, "postgres", row)
    assert referee.violations == []
    referee.look(15 + LEFT_SECONDS + 0.1, "postgres", row)
    referee.look(15 + LEFT_SECONDS + 0.2, "postgres", row)
    assert len(referee.violations) == 1


def test_waited_in_vain() -> None:
    waiter = [
        Event(time, kind, "2", details)
        for (time, kind, _, details) in stay("2", 20, 40, outcome="failed")
        if kind in ("wanted", "failed")
    ]
    waiter[-1] = Event(40, "failed", "2", {"why": "LockTimeout: of all others"})
    assert judged(stay("1", 10, 12), waiter) == ["waited in vain while nobody was inside"]
    assert judged(stay("1", 10, 21), waiter) == []


def test_order() -> None:
    referee = Referee()
    late, early = stay("1", 20, 21, timeout=20.0), stay("2", 22, 23)
    early[0] = early[0]._replace(time=12.0)
    referee.read(early + late)
    assert referee.figures()["order"] == {"served after a wait": 1, "out of order": 1, "overtaken": 1}
