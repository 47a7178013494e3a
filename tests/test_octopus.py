"""A step of Octopus Deploy under the lock: what it takes from its variables, and what its log then says."""

from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

import dblock
from dblock.events import read
from dblock.inspect import entries
from dblock.protocol import REPORT_SECONDS
from tests.backends import Backend, Postgres
from tests.octopus import KEY, Done, Line, Step, bash_step, environment, python_step
from tests.support import wait_until

ENGINES = pytest.mark.parametrize("engine", ["postgres", pytest.param("mssql", marks=pytest.mark.mssql)])

VARIABLES = {
    "Octopus.Machine.Name": "web-01",
    "Octopus.Machine.Id": "Machines-1",
    "Octopus.Deployment.Tenant.Name": "T2",
    "Octopus.Deployment.Id": "Deployments-7",
    "Octopus.Environment.Name": "Production – EU",
    "Octopus.Space.Id": "Spaces-1",
    "Octopus.Task.Id": "ServerTasks-9",
    "Octopus.Web.ServerUri": "https://octopus.example.com/",
}
LABELS = {
    "deployment": "Deployments-7",
    "environment": "Production – EU",
    "task": "https://octopus.example.com/app#/Spaces-1/tasks/ServerTasks-9",
}
UNTENANTED = {name: value for name, value in VARIABLES.items() if "Tenant" not in name}

# The step of a process, as somebody would write it: no name of a tenant, a target or a deployment.
STEP = """
import dblock.octopus

with dblock.octopus.lock(get_octopusvariable("Locks.Url"), step="b"{more}):
    print("the work of step b")
"""
BASH_STEP = """
export DBLOCK_URL="$(get_octopusvariable "Locks.Url")"
dblock run {more} --step b --target "$(get_octopusvariable "Octopus.Machine.Name")" \\
    --tenant "$(get_octopusvariable "Octopus.Deployment.Tenant.Name")" -- echo "the work of step b"
"""
WORK = Line("default", "the work of step b")


class Steps:
    """Runs steps, all on one server."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder, self._numbers = url, folder, itertools.count()

    def start(
        self, more: str = "", variables: Mapping[str, str] = VARIABLES, script: str = STEP, **environment: str
    ) -> Step:
        folder = self._folder / str(next(self._numbers))
        folder.mkdir()
        lay = bash_step if "dblock run" in script else python_step
        text = script.replace("{more}", more)
        return Step(folder, lay(folder, text, {**variables, "Locks.Url": self._url}), **environment)

    def run(self, *arguments: Any, **more: Any) -> Done:
        return self.start(*arguments, **more).finish()


def wait_until_told(step: Step, beginning: str = "waiting for", times: int = 1) -> None:
    wait_until(lambda: step.output().count(f"\n{beginning} b@") >= times, "the step to say that it waits")


@pytest.fixture
def steps(postgres: Postgres, tmp_path: Path) -> Steps:
    return Steps(postgres.url, tmp_path)


@pytest.fixture
def events(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def acquired(file: Path) -> list[tuple[str, str | None, dict[str, str]]]:
    found = map(json.loads, file.read_text().splitlines())
    return [(each["target"], each["tenant"], each["labels"]) for each in found if each["event"] == "acquired"]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "variables", "expected"), [
    ("", VARIABLES, ("web-01", "T2", LABELS)),
    ("", UNTENANTED, ("web-01", None, LABELS)),
    ("", VARIABLES | {"Octopus.Deployment.Tenant.Name": ""}, ("web-01", None, LABELS)),
    ("", {"Octopus.Machine.Name": "web-01"}, ("web-01", None, {})),
    (", target='web-02', tenant='T9', label={'task': 'mine', 'why': 'x'}", VARIABLES,
     ("web-02", "T9", LABELS | {"task": "mine", "why": "x"})),
    ("", {"Octopus.Machine.Name": "w", "Octopus.RunbookRun.Id": "RunbookRuns-3", "Octopus.Task.Id": "ServerTasks-4"},
     ("w", None, {"deployment": "RunbookRuns-3", "task": "ServerTasks-4"})),
    # What has no room is left out, and does not fail the step.
    ("", VARIABLES | {"Octopus.Environment.Name": "Ü" * 80},
     ("web-01", "T2", {name: value for name, value in LABELS.items() if name != "environment"})),
])  # fmt: skip
def test_names_come_from_the_step(steps: Steps, events: Path, more: str, variables: Any, expected: Any) -> None:
    done = steps.run(more, variables, DBLOCK_EVENTS=str(events))
    # Nothing is said where nothing is waited for, and never anything on stderr: it may fail the step.
    assert (done.code, done.stderr, done.log.lines, done.log.progress) == (0, "", [WORK], [])
    assert acquired(events) == [expected]


@pytest.mark.parametrize(
    "variables", [{}, {"Octopus.Machine.Hostname": "worker-7", "Octopus.Machine.Id": "Machines-1"}]
)
def test_without_a_target_nothing_runs(steps: Steps, variables: Any) -> None:
    done = steps.run("", variables)
    assert (done.code, done.stderr, done.log.lines) == (1, "", [])
    (result,) = done.log.results
    assert result.startswith("This step has no target to lock")


@pytest.mark.parametrize(
    "more", [", target=''", ", target='#{Octopus.Machine.Name}'", ", tenant='#{Octopus.Deployment.Tenant.Name}'"]
)
def test_what_octopus_left_as_it_was_is_no_name(steps: Steps, more: str) -> None:
    done = steps.run(more)
    assert (done.code, WORK in done.log.lines) == (1, False)
    assert "ValueError" in done.stderr


# --- the log ----------------------------------------------------------------------------------------------------------

WAITS = "Another deployment has the lock for step b on web-01. This step waits for its turn, and goes on by itself."
TURN = re.compile(r"This step has the lock for step b on web-01 now, after [0-9]+ s of waiting\.")


@ENGINES
@pytest.mark.parametrize("script", [STEP, BASH_STEP], ids=["python", "bash"])
def test_the_log_of_a_waiting_step(backend: Backend, tmp_path: Path, engine: str, script: str) -> None:
    steps = Steps(backend.url, tmp_path)
    with dblock.lock(backend.url, target="web-01", step="b", tenant="T1"):
        step = steps.start(script=script)
        wait_until_told(step)
    done = step.finish()
    assert (done.code, done.stderr, done.log.results) == (0, "", [])
    first, who, turn, work = done.log.lines
    assert (first, work) == (Line("wait", WAITS), WORK)
    assert who.level == turn.level == "wait"
    assert who.text.startswith(f"waiting for b@web-01: {backend.in_the_way('T1')}")
    assert TURN.fullmatch(turn.text)
    assert done.log.progress == [who.text, turn.text]


@ENGINES
@pytest.mark.parametrize("script", [STEP, BASH_STEP], ids=["python", "bash"])
def test_a_timeout_is_the_steps_result(backend: Backend, tmp_path: Path, engine: str, script: str) -> None:
    steps = Steps(backend.url, tmp_path)
    timeout, more = backend.short_wait, ", timeout={}" if script is STEP else "--timeout {}"
    with dblock.lock(backend.url, target="web-01", step="b", tenant="T1"):
        done = steps.run(more.format(timeout), script=script)
    (result,) = done.log.results
    assert result.startswith(f"The step has not run: b@web-01 not acquired in {timeout} s: {backend.in_the_way('T1')}")
    assert WORK not in done.log.lines
    # The command line's code and line are those of its contract everywhere.
    expected = (1, "") if script is STEP else (75, f"dblock: {result.removeprefix('The step has not run: ')}\n")
    assert (done.code, done.stderr) == expected


def test_the_result_is_told_once_and_only_where_the_step_fails(postgres: Postgres, steps: Steps) -> None:
    caught = STEP.replace("with", "try:\n  with").replace("    print", "      print")
    caught += "except dblock.LockTimeout:\n    printhighlight('later')\n"
    with dblock.lock(postgres.url, target="web-01", step="b", tenant="T1"):
        done = steps.run(", timeout=0", script=caught)
        assert (done.code, done.log.lines, done.log.results) == (0, [Line("highlight", "later")], [])
        done = steps.run("--timeout 0 --conflict-exit-code 0", script=BASH_STEP)
        assert (done.code, done.log.lines, done.log.results) == (0, [], [])
    done = steps.run(script=STEP + "    raise KeyError('a fault of the step')\n")
    assert (done.code, done.log.results) == (1, [])
    assert done.stderr.startswith("Traceback")
    assert "KeyError: 'a fault of the step'" in done.stderr


def test_a_loss_is_the_steps_result(postgres: Postgres, steps: Steps) -> None:
    ends = STEP.replace("    print", "    held.lost.wait(60)\n    print").replace("):", ") as held:")
    step = steps.start(script=ends)
    wait_until(postgres.holders, "the step")
    postgres.end(postgres.holders()[0])
    done = step.finish()
    (result,) = done.log.results
    assert (done.code, done.stderr, done.log.lines[1:]) == (1, "", [WORK])
    assert result.startswith("b@web-01 was lost while it was held: ")
    assert done.log.at("warning") == [result]


def test_never_silent_for_a_minute(postgres: Postgres, steps: Steps) -> None:
    assert REPORT_SECONDS <= 30
    hasty = "import dblock.postgres\ndblock.postgres.REPORT_SECONDS = 0.01\n" + STEP
    with dblock.lock(postgres.url, target="web-01", step="b", tenant="T1"):
        step = steps.start(script=hasty)
        wait_until_told(step, times=3)
    assert step.finish().code == 0


@pytest.mark.mssql
@pytest.mark.parametrize("engine", ["mssql"])
def test_never_silent_on_a_connection_that_cannot_ask(backend: Backend, tmp_path: Path, engine: str) -> None:
    """On SQL Server the wait is one statement, and nobody else may ask on the caller's connection."""
    steps = Steps(backend.url, tmp_path)
    hasty = """
import dblock.octopus, dblock.driver_pymssql, pymssql
dblock.driver_pymssql.REPORT_SECONDS = 0.2
url = get_octopusvariable("Locks.Url")
with dblock.octopus.lock(pymssql.connect(**dblock.driver_pymssql._arguments(url), autocommit=True), step="b"):
    pass
"""
    with dblock.lock(backend.url, target="web-01", step="b", tenant="T1"):
        step = steps.start(script=hasty)
        wait_until_told(step, "still waiting for", times=2)
    assert step.finish().code == 0


def test_each_message_is_one_write(postgres: Postgres, tmp_path: Path) -> None:
    """A socket that keeps messages apart shows what one write() was."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = python_step(tmp_path, STEP.replace("{more}", ""), VARIABLES | {"Locks.Url": postgres.url})
    with dblock.lock(postgres.url, target="web-01", step="b", tenant="T1" + "Ü" * 50):
        process = subprocess.Popen(command, env=environment(), stdout=theirs.fileno())
        theirs.close()
        wait_until(postgres.waiters, "the step to wait")
    messages = [message.decode() for message in iter(lambda: ours.recv(65536), b"")]
    ours.close()
    assert process.wait(60) == 0
    switched = [message for message in messages if "octopus" in message]
    assert len(switched) == 3
    for message in switched:
        assert re.match(r"##octopus\[stdout-wait\]\n[^\n]+\n##octopus\[stdout-default\]\n", message)


def test_a_message_is_less_than_a_pipe_takes_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    from dblock import octopus

    octopus.write("wait", "\N{GRINNING FACE}" * 5000, progress=True)
    octopus.write("wait", "\ud800\x1b" * 5000, progress=True)
    written = capfd.readouterr().out.split("##octopus[stdout-wait]\n")
    assert [0 < len(each.encode()) < 4000 for each in written[1:]] == [True, True]


HOSTILE = "T##octopus[stdout-error]\r\n##octopus[resultMessage message='eA==']#"


@pytest.mark.parametrize("script", [STEP, BASH_STEP], ids=["python", "bash"])
def test_a_hostile_name_steers_no_log(postgres: Postgres, steps: Steps, script: str) -> None:
    target = "w#" + "#octopus[stdout-error]"
    with dblock.lock(postgres.url, target=target, step="b", tenant=HOSTILE):
        step = steps.start(variables=VARIABLES | {"Octopus.Machine.Name": target}, script=script)
        wait_until(lambda: "\nwaiting for " in step.output(), "the step to say that it waits")
    done = step.finish()
    assert (done.code, done.log.results) == (0, [])
    assert {line.level for line in done.log.lines} == {"wait", "default"}
    assert done.log.lines[-1] == WORK


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_the_key_of_a_python_step_goes_nowhere(postgres: Postgres, steps: Steps, events: Path) -> None:
    """Neither into what is printed or written, nor into what the server shows, nor to a process of the step."""
    script = """
import dblock.octopus, logging, subprocess, sys
url = get_octopusvariable("Locks.Url")
try:
    with dblock.octopus.lock(url, step="b", timeout=0.1):
        pass
except dblock.LockTimeout as error:
    print(repr(error), vars(error))
lock = dblock.octopus.lock(url, step="c")
print(lock, vars(lock), logging.getLogger("dblock").handlers)
with lock:
    subprocess.run([sys.executable, "-c", "import os, sys; print(os.environ, sys.argv)"], check=True)
    print(sys.stdin.read())
with lock:
    raise dblock.LockLost("as if")
"""
    with (
        psycopg.connect(postgres.url, autocommit=True) as connection,
        dblock.lock(postgres.url, target="web-01", step="b", tenant="T1"),
    ):
        step = steps.start(script=script, DBLOCK_EVENTS=str(events))
        wait_until(lambda: len(postgres.holders()) == 2, "the step to hold the second lock")
        shown = connection.execute("SELECT * FROM pg_stat_activity").fetchall()
        labels = [entry.labels for entry in entries(postgres.url)]
        done = step.finish()
    assert LABELS in labels
    assert len(done.log.results) == 1
    for text in (str(shown), done.output, done.stderr, events.read_text()):
        assert KEY.lower() not in text.lower()


# --- dblock run -------------------------------------------------------------------------------------------------------


def test_no_octopus_turns_it_off(postgres: Postgres, steps: Steps) -> None:
    with dblock.lock(postgres.url, target="web-01", step="b", tenant="T1"):
        done = steps.run("--no-octopus --timeout 100ms", script=BASH_STEP)
        outside = steps.run("--timeout 100ms", script=BASH_STEP, TentacleHome="")
    for each in (done, outside):
        assert (each.code, each.output) == (75, "")
        assert [line.partition(":")[0] for line in each.stderr.splitlines()] == ["dblock", "dblock"]


@pytest.mark.parametrize(("more", "code", "reason"), [
    ("--url postgresql://127.0.0.1:1/none", 69, "b@web-01 not acquired: "),
    ("--database other", 77, "b@web-01 not acquired: "),
    ("--timeout 1y", 64, "'1y' is no duration"),
    ("--target '#{Octopus.Machine.Name}'", 64, "'#{Octopus.Machine.Name}' is a variable that Octopus does not know"),
])  # fmt: skip
def test_every_failure_of_the_command_is_the_steps_result(steps: Steps, more: str, code: int, reason: str) -> None:
    done = steps.run(more, script=BASH_STEP)
    (result,) = done.log.results
    assert (done.code, done.stderr, WORK in done.log.lines) == (code, f"dblock: {result}\n", False)
    assert result.startswith(reason) or code == 77


# --- the whole process ------------------------------------------------------------------------------------------------

TENANTS = [f"T{number}" for number in range(1, 9)]
TARGETS = ["web-01", "web-02"]
# Steps a and c of all deployments meet inside: they end only if they all run at one time. They are under a lock for the
# timeline's sake, a shared one. A step b that finds another one inside fails.
MEET = """
import dblock.octopus, pathlib, time

target, tenant = get_octopusvariable("Octopus.Machine.Name"), get_octopusvariable("Octopus.Deployment.Tenant.Name")
with dblock.octopus.lock(get_octopusvariable("Locks.Url"), step="{more}", shared=True):
    place = pathlib.Path(get_octopusvariable("Test.Folder"))
    (place / f"{more}-{target}-{tenant}").touch()
    deadline = time.monotonic() + 60
    while len(list(place.glob("{more}-*"))) < 16:
        assert time.monotonic() < deadline
        time.sleep(0.02)
"""
ALONE = """
import dblock.octopus, os

with dblock.octopus.lock(get_octopusvariable("Locks.Url"), step="b", timeout=60):
    inside = get_octopusvariable("Test.Folder") + "/b-inside-" + get_octopusvariable("Octopus.Machine.Name")
    os.mkdir(inside)
    os.rmdir(inside)
"""
ALONE_IN_BASH = BASH_STEP.replace("--", "--timeout 60 --", 1).replace(
    'echo "the work of step b"',
    'sh -c \'mkdir "$1" && rmdir "$1"\' - '
    '"$(get_octopusvariable Test.Folder)/b-inside-$(get_octopusvariable Octopus.Machine.Name)"',
)


def test_eight_tenants_on_two_targets(postgres: Postgres, steps: Steps, events: Path, tmp_path: Path) -> None:
    def deploy(tenant: str, target: str) -> list[Done]:
        variables = VARIABLES | {
            "Octopus.Machine.Name": target,
            "Octopus.Deployment.Tenant.Name": tenant,
            "Octopus.Deployment.Id": f"Deployments-{tenant[1:]}",
            "Test.Folder": str(tmp_path),
        }
        alone = ALONE if int(tenant[1:]) % 2 else ALONE_IN_BASH
        process = [("a", MEET), ("", alone), ("c", MEET)]
        return [steps.run(more, variables, script, DBLOCK_EVENTS=str(events)) for more, script in process]

    def has_waited() -> list[dict[str, Any]]:
        return [each for each in read([str(events)]) if (each["step"], each["event"]) == ("b", "waiting")]

    events.touch()
    with ThreadPoolExecutor(16) as pool:
        with ExitStack() as others:
            for target in TARGETS:
                others.enter_context(dblock.lock(postgres.url, target=target, step="b", tenant="T0"))
            deployments = [pool.submit(deploy, tenant, target) for target in TARGETS for tenant in TENANTS]
            wait_until(lambda: len(has_waited()) == 16, "all step b to wait")
        done = [each.result() for each in deployments]

    assert {(each.code, each.stderr) for each in itertools.chain.from_iterable(done)} == {(0, "")}
    for target, deployment in zip([target for target in TARGETS for _ in TENANTS], done, strict=True):
        _, b, _ = deployment
        first, who, *_, turn = b.log.at("wait")
        assert first == WAITS.replace("web-01", target)
        assert who.startswith(f"waiting for b@{target}: held by tenant T")
        assert TURN.fullmatch(turn.replace(target, "web-01"))

    held: dict[str, list[tuple[float, float]]] = {}
    for event in read([str(events)]):
        if event["event"] == "released":
            held.setdefault(event["lock"], []).append((event["moment"] - event["seconds"], event["moment"]))
    for target in TARGETS:
        assert [len(held[f"{name}@{target}"]) for name in "abc"] == [8, 8, 8]
        one_by_one = sorted(held[f"b@{target}"])
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(one_by_one))
        for name in "ac":
            begins, ends = zip(*held[f"{name}@{target}"], strict=True)
            assert max(begins) < min(ends)

    picture = tmp_path / "out.svg"
    command = [sys.executable, "-m", "dblock", "timeline", str(events), "-o", str(picture)]
    timeline = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split()[:2] for line in timeline.stdout.splitlines()[1:]] == [
        [f"{name}@{target}", "8"] for name in "abc" for target in TARGETS
    ]
    drawn = picture.read_text(encoding="utf-8")
    assert all(f">{tenant}<" in drawn for tenant in TENANTS)
