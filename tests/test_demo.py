"""The demo through its command line, on a real server: what it claims is computed here again, from its events."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from dblock.demo import steps
from tests.support import wait_until

TIMEOUT_SECONDS = 100

Events = list[dict[str, Any]]


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str
    events: Events
    picture: ET.Element


class Demo:
    """`dblock demo` in a process and a folder of its own."""

    def __init__(self, url: str, folder: Path) -> None:
        settings = conninfo_to_dict(url)
        self.folder = folder
        # A password may not stand in --url; the server that the tests were given may want one.
        self.environment = {**os.environ, "PGPASSWORD": str(settings.pop("password", ""))}
        self.url = make_conninfo("", **settings)

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "dblock", "demo", *options],
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *options: str, **environment: str) -> Ended:
        with self.start(*options, "--json", "events.json", "--svg", "picture.svg", **environment) as process:
            stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
        return Ended(
            process.returncode,
            stdout,
            stderr,
            json.loads((self.folder / "events.json").read_text("utf-8")),
            ET.parse(self.folder / "picture.svg").getroot(),  # noqa: S314 - our own file
        )


@pytest.fixture
def demo(url: str, tmp_path: Path) -> Demo:
    return Demo(url, tmp_path)


@pytest.fixture
def observer(url: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def overlapping(events: Events) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [
        (one, other)
        for one, other in combinations(events, 2)
        if one["start"] < other["end"] and other["start"] < one["end"]
    ]


def collisions(events: Events) -> list[Any]:
    """Pairs of steps b that ran on one target at one time."""
    steps_b = [event for event in events if event["step"] == "b"]
    return [pair for pair in overlapping(steps_b) if pair[0]["target"] == pair[1]["target"]]


def bars(picture: ET.Element) -> list[list[str]]:
    """The classes of the bars in the picture, one bar for each step."""
    rectangles = picture.iter("{http://www.w3.org/2000/svg}rect")
    classes = [rectangle.get("class", "").split() for rectangle in rectangles]
    return [each for each in classes if "step" in each]


def schema_is_there(observer: psycopg.Connection[tuple[Any, ...]]) -> bool:
    return bool(observer.execute("SELECT FROM pg_namespace WHERE nspname = %s", (steps.SCHEMA,)).fetchall())


def advisory_locks(observer: psycopg.Connection[tuple[Any, ...]]) -> int:
    return len(observer.execute("SELECT FROM pg_locks WHERE locktype = 'advisory'").fetchall())


def check_single_file(ended: Ended, *, tenants: int, targets: int) -> None:
    """Everything ran, each target's steps b one after the other, a and c of several tenants at one time."""
    assert ended.code == 0, ended.stdout + ended.stderr
    expected = product(range(1, tenants + 1), range(1, targets + 1), "abc")
    ran = [(event["tenant"], event["target"], event["step"]) for event in ended.events]
    assert sorted(ran) == sorted((f"T{tenant}", f"web-{target:02}", step) for tenant, target, step in expected)
    assert all(0 <= event["asked"] <= event["start"] < event["end"] for event in ended.events)
    assert collisions(ended.events) == []
    assert not any(event["alarm"] for event in ended.events)
    others = [event for event in ended.events if event["step"] != "b"]
    assert any(one["tenant"] != other["tenant"] for one, other in overlapping(others))
    assert len(bars(ended.picture)) == len(ended.events)
    assert not any("collided" in bar for bar in bars(ended.picture))


def test_with_the_lock_b_runs_in_single_file_and_a_and_c_side_by_side(
    demo: Demo, observer: psycopg.Connection[tuple[Any, ...]]
) -> None:
    ended = demo.run("--url", demo.url, "--tenants", "3", "--targets", "2")
    check_single_file(ended, tenants=3, targets=2)
    doors = {(event["target"], event["door"]) for event in ended.events if event["step"] == "b"}
    assert doors == set(product(("web-01", "web-02"), ("python", "run", "sql")))
    assert "none overlapped another on its target" in ended.stdout
    assert not schema_is_there(observer)


def test_without_the_lock_b_collides_and_the_exit_code_says_so(
    demo: Demo, observer: psycopg.Connection[tuple[Any, ...]]
) -> None:
    ended = demo.run("--url", demo.url, "--tenants", "3", "--targets", "1", "--no-lock")
    assert ended.code == 1, ended.stdout + ended.stderr
    assert collisions(ended.events)
    assert any(event["alarm"] for event in ended.events)
    collided = {event["tenant"] for pair in collisions(ended.events) for event in pair}
    assert sum("collided" in bar for bar in bars(ended.picture)) == len(collided)
    assert len(bars(ended.picture)) == len(ended.events)
    assert "overlapped on one target" in ended.stdout
    assert not schema_is_there(observer)


def test_a_machine_without_psql(demo: Demo, tmp_path: Path) -> None:
    empty = tmp_path / "path"
    empty.mkdir()
    check_single_file(
        demo.run("--url", demo.url, "--tenants", "3", "--targets", "1", PATH=str(empty)), tenants=3, targets=1
    )


def test_a_server_of_its_own_and_the_picture_where_one_stands(demo: Demo) -> None:
    """DBLOCK_URL and libpq's variables are for deployments: the demo does not play in their database."""
    elsewhere = {"DBLOCK_URL": "host=nowhere.invalid", "PGHOSTADDR": "192.0.2.1", "PGSSLMODE": "require"}
    with demo.start("--tenants", "2", "--targets", "1", **elsewhere) as process:
        stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, stdout + stderr
    assert len(bars(ET.parse(demo.folder / "dblock-demo.svg").getroot())) == 6  # noqa: S314 - our own file


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_everything_and_leaves_nothing(
    demo: Demo, observer: psycopg.Connection[tuple[Any, ...]], number: signal.Signals, code: int
) -> None:
    before = advisory_locks(observer)
    with demo.start("--url", demo.url, "--tenants", "4", "--targets", "1") as process:
        assert process.stdout is not None
        assert any(" b begins" in line for line in process.stdout)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert not schema_is_there(observer)
    # The backend of a client that was killed while it waited ends at the end of its slice.
    wait_until(lambda: advisory_locks(observer) == before, "the locks to be gone")


def test_the_guard_row_is_an_alarm_of_its_own(url: str, observer: psycopg.Connection[tuple[Any, ...]]) -> None:
    """Step b fails by itself where another step b's guard row is there, and only there."""

    def step_b(tenant: str, target: str) -> subprocess.CompletedProcess[str]:
        commands = [part for statement in steps.step("b", tenant, target, "sql") for part in ("-c", statement)]
        argv = [sys.executable, "-m", "dblock.demo.client", url, *commands]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)

    for statement in steps.set_up(["T1", "T2"], ["web-01", "web-02"]):
        observer.execute(statement.encode())
    try:
        observer.execute(f"INSERT INTO {steps.SCHEMA}.guard VALUES ('web-01', 'T2')")
        met = step_b("T1", "web-01")
        assert met.returncode == 1
        assert "step b ran for T1 on web-01 while it was running there for another tenant" in met.stderr
        assert observer.execute(f"SELECT tenant FROM {steps.SCHEMA}.guard").fetchall() == [("T2",)]
        alone = step_b("T1", "web-02")
        assert (alone.returncode, alone.stderr) == (0, "")
        alarms = observer.execute(f"SELECT target, alarm FROM {steps.SCHEMA}.events ORDER BY target").fetchall()
        assert alarms == [("web-01", True), ("web-02", False)]
    finally:
        for statement in steps.tear_down():
            observer.execute(statement.encode())


def test_a_second_demo_in_one_database_is_refused(demo: Demo, observer: psycopg.Connection[tuple[Any, ...]]) -> None:
    observer.execute(f"CREATE SCHEMA {steps.SCHEMA}")
    try:
        with demo.start("--url", demo.url) as process:
            _, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 69
        assert stderr.startswith("dblock: ")
        assert f"DROP SCHEMA {steps.SCHEMA} CASCADE" in stderr
        assert schema_is_there(observer)
    finally:
        observer.execute(f"DROP SCHEMA {steps.SCHEMA}")


@pytest.mark.parametrize("missing", ["rich", "svg", "psycopg"])
def test_missing_extras_are_named(missing: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from dblock.cli import main; sys.exit(main(['demo']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
    )
    assert done.returncode == 69
    assert done.stderr.startswith(f"dblock: the demo needs the package {missing}")
    assert done.stderr.endswith("pip install 'dblock[demo]'\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ("--tenants", "0"),
        ("--targets", "x"),
        ("--tenants", "10", "--targets", "10"),
        ("--svg", "no/such/folder.svg"),
        ("--url", "postgresql://postgres:secret@127.0.0.1/postgres"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_started(demo: Demo, options: tuple[str, ...]) -> None:
    with demo.start(*options) as process:
        _, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 64
    assert stderr.startswith("dblock: ")
    assert "secret" not in stderr
