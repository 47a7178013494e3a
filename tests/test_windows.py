"""Windows, as far as it can be pretended here: see `tests.windows`, in which the commands run.

What only a Windows can prove: that a job object holds and ends whoever a command starts, and is nested in an agent's;
that Ctrl-Break reaches a group, and what PowerShell and cmd.exe make of it; that a shared socket keeps the connection
of a process that was ended; that the watcher has a console of its own and outlives an agent's cancel; quoting,
PATHEXT, the console's letters. The workflow has a job for that. `make test` checks the types for that platform.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

import dblock
from dblock import aio
from tests.support import ended_afterwards
from tests.test_cli_run import complaint, environment, holders, line, rows

WINDOWS = (sys.executable, str(Path(__file__).with_name("windows.py")))
BREAK = signal.SIGUSR2  # what stands for it here


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAKE_WINDOWS", str(tmp_path))
    return tmp_path


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().split("\n")[:-1]


def python(code: str, *arguments: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WINDOWS, "-c", code, *arguments],
        capture_output=True,
        text=True,
        encoding=encoding,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        check=False,
    )


# --- what needs nothing of Unix ---------------------------------------------------------------------------------------

MAIN = "import sys; from dblock.cli import main; sys.exit(main())"


def test_the_demos_own_server_says_that_it_needs_unix() -> None:
    done = python(MAIN, "demo")
    assert done.returncode == 64
    assert done.stderr.startswith("dblock: the demo starts a server by the means of Unix")
    assert done.stderr.count("\n") == 1


def test_a_lock_needs_nothing_of_unix(url: str) -> None:
    done = python(f"import dblock\nwith dblock.lock({url!r}, target='web-01', step='b') as lock: print(lock.held)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.mark.parametrize(
    "command", ["key --target web-01 --step b", "sql postgres/acquire", "status", "doctor", "--help", "run --help"]
)
def test_the_other_commands_need_nothing_of_unix(url: str, command: str) -> None:
    done = python(f"import os; os.environ['DBLOCK_URL'] = {url!r}; {MAIN}", *command.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize(("encoding", "shown"), [("cp1252", "\\u03a9"), ("cp1253", "Ω")])
def test_a_consoles_letters(url: str, encoding: str, shown: str) -> None:
    """The name is shown, in other letters where the code page has no Greek."""
    with dblock.lock(url, target="Ω", step="b"):
        done = python(f"import os; os.environ['DBLOCK_URL'] = {url!r}; {MAIN}", "status", encoding=encoding)
        assert f"b@{shown}" in done.stdout
        command = ["run", "--target", "Ω", "--step", "b", "--timeout", "0", "--url", url, "--", "true"]
        done = python(MAIN, *command, encoding=encoding)
        assert done.returncode == 75
        assert f"dblock: b@{shown} not acquired" in done.stderr


# --- dblock run, beyond what test_windows_run.py does -----------------------------------------------------------------


@contextmanager
def started(url: str, target: str, *options: str, command: list[str], **more: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*WINDOWS, "run", "--target", target, "--step", "b", *options, "--", *command],
        env=environment(url, **more),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with ended_afterwards(process):
        yield process


def run(url: str, target: str, *options: str, command: list[str], **more: str) -> tuple[int, bytes, bytes]:
    with started(url, target, *options, command=command, **more) as process:
        stdout, stderr = process.communicate(b"in", 60)
        return process.returncode, stdout, stderr


def test_what_is_asked_of_windows_in_which_order(
    url: str, target: str, folder: Path, observer: psycopg.Connection[Any]
) -> None:
    assert run(url, target, command=["sh", "-c", "exit 3"]) == (3, b"", b"")
    # Into the job, and the job in the watcher's hand, before anything runs; and at its end nobody is ended.
    assert calls(folder) == ["give", "assign", "resume", "let go", "close"]
    assert rows(observer, target) == []


def test_what_the_exit_code_says() -> None:
    code = (
        "from dblock.cli.windows import _how; print(*[_how(code, forced=False) for code in (3, 0xC000013A)], sep=';')"
    )
    code += (
        "; print(_how(137, forced=True)); print(_how(0xC0000005, forced=False).exit_code & 0xFFFFFFFF == 0xC0000005)"
    )
    done = python(code)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "the command ended with exit code 3;the command was ended by Ctrl-C or Ctrl-Break",
        "the command was ended by force",
        "True",
    ]


@pytest.mark.parametrize(
    ("refused", "command", "code", "says"),
    [
        ("", "no-such-command", 127, "no-such-command: there is no such program; the command was not run"),
        ("start", "true", 126, "true: %1 is not a valid Win32 application; the command was not run"),
        ("assign", "touch", 70, "the command cannot be put into a job object, and was not run"),
        ("watcher", "touch", 70, "the process that watches over the command could not be started"),
    ],
)
def test_a_command_that_cannot_be_run(  # noqa: PLR0917
    url: str,
    target: str,
    folder: Path,
    observer: psycopg.Connection[Any],
    refused: str,
    command: str,
    code: int,
    says: str,
) -> None:
    result = run(url, target, command=[command, str(folder / "ran")], FAKE_WINDOWS_REFUSES=refused)
    assert (result[0], result[1]) == (code, b"")
    assert says in complaint(result[2])
    assert not (folder / "ran").exists()
    assert rows(observer, target) == []


def test_a_batch_file_gets_no_arguments_that_cmd_would_take_apart(url: str, target: str, folder: Path) -> None:
    batch = folder / "migrate.CMD"
    batch.write_text("#!/bin/sh\necho $1\n")
    batch.chmod(0o755)
    assert run(url, target, command=[str(batch), "a b"]) == (0, b"a b\n", b"")
    code, stdout, stderr = run(url, target, command=[str(batch), "a&b"])
    assert (code, stdout) == (126, b"")
    assert "pass such a one in a variable of the environment" in complaint(stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, BREAK])
def test_an_interrupt_reaches_the_command_as_ctrl_break(
    url: str, target: str, folder: Path, number: signal.Signals
) -> None:
    command = ["sh", "-c", "trap 'echo broken; exit 7' TERM; echo ready; while :; do sleep 0.01; done"]
    with started(url, target, command=command) as process:
        assert line(process) == "ready"
        process.send_signal(number)
        assert process.communicate(timeout=60)[0] == b"broken\n"
        assert process.returncode == 7


def test_an_interrupt_that_cannot_be_passed_on(url: str, target: str, folder: Path) -> None:
    with started(url, target, command=["sh", "-c", "echo ready; read line"], FAKE_WINDOWS_REFUSES="break") as process:
        assert line(process) == "ready"
        process.send_signal(signal.SIGINT)
        assert process.stderr
        assert b"SIGINT cannot be passed on to the command" in process.stderr.readline()
        assert process.communicate(b"\n", 60) == (b"", b"")
        assert process.returncode == 0


def test_a_lost_lock_ends_by_force_at_once_who_cannot_be_told(
    url: str, target: str, folder: Path, observer: psycopg.Connection[Any]
) -> None:
    command = ["sh", "-c", "echo ready; exec sleep 300"]
    with started(url, target, "--grace", "1h", command=command, FAKE_WINDOWS_REFUSES="break") as process:
        assert line(process) == "ready"
        (pid,) = holders(observer, target)
        observer.execute("SELECT pg_terminate_backend(%s)", (pid,))
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 76
        assert stderr.endswith(b"the command was ended by force\n")
    assert calls(folder)[-3:] == ["break", "terminate", "close"]


def test_the_end_of_the_watcher_is_told(url: str, target: str, folder: Path) -> None:
    with started(url, target, command=["sh", "-c", "echo ready; read line; exit 4"]) as process:
        assert line(process) == "ready"
        (watcher,) = (
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if path.read_bytes().endswith(b"\0watch\0")
            and str(folder).encode() in (path.parent / "environ").read_bytes()
        )
        assert b"DBLOCK_URL" not in Path(f"/proc/{watcher}/environ").read_bytes()
        os.kill(watcher, signal.SIGKILL)
        assert process.stderr
        assert b"the watcher process was ended" in process.stderr.readline()
        assert process.communicate(b"\n", 60) == (b"", b"")
        assert process.returncode == 4


# --- asyncio ----------------------------------------------------------------------------------------------------------


class Proactor(asyncio.SelectorEventLoop):
    """Windows' own loop cannot tell that something can be read from a socket."""

    def add_reader(self, *_: object) -> Any:
        raise NotImplementedError

    def remove_reader(self, *_: object) -> Any:
        raise NotImplementedError


@pytest.fixture
def proactor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proactor]:
    monkeypatch.setattr(asyncio, "ProactorEventLoop", Proactor, raising=False)
    with closing(Proactor()) as loop:
        yield loop


def test_psycopg_needs_another_loop(url: str, proactor: Proactor) -> None:
    lock = dblock.alock(url, target="web-01", step="b")
    with pytest.raises(dblock.DatabaseError, match=r"loop_factory=asyncio\.SelectorEventLoop"):
        proactor.run_until_complete(lock.acquire())


def test_on_windows_own_loop_news_are_asked_for(proactor: Proactor) -> None:
    """A lock on SQL Server can be there: its thread waits."""
    ours, theirs = socket.socketpair()
    asked: list[str] = []

    async def held() -> bool:
        asked.append("held")
        if len(asked) == 2:
            theirs.close()
        return True

    def alive() -> bool:
        asked.append("alive")
        return False

    async def watch() -> None:
        watching = aio._Watch(ours.fileno(), 0.05, alive=alive, held=held)
        await asyncio.wait_for(watching._task, 30)
        await watching.stop()
        stopped = aio._Watch(ours.fileno(), 0, alive=lambda: True, held=held)
        await asyncio.wait_for(stopped.stop(), 30)

    with ours:
        proactor.run_until_complete(watch())
    assert asked[:2] == ["held", "held"]
    assert asked[-1] == "alive"


# --- the calls to Windows ---------------------------------------------------------------------------------------------

# ctypes' part that is for Windows alone, with functions that answer 1 and tell what they were asked.
CALLS = """
import ctypes, importlib, subprocess, sys
from types import SimpleNamespace
del sys.modules["dblock.cli.windows_api"]
import signal
signal.CTRL_BREAK_EVENT = 1
answers = {"CreateJobObjectW": 70, "OpenProcess": 80, "GetCurrentProcess": 2**64 - 1, "NtResumeProcess": 0}
class Function:
    def __init__(self, name):
        self.name = name
    def __call__(self, *arguments):
        for value, kind in zip(arguments, self.argtypes, strict=True):
            kind.from_param(value)
        said = [getattr(each, "_obj", each) for each in arguments]
        flags = [each.BasicLimitInformation.LimitFlags for each in said if hasattr(each, "BasicLimitInformation")]
        for each in said:
            if type(each).__name__ == "_Accounting":
                each.ActiveProcesses = 5
            elif type(each).__name__ == "c_void_p":
                each.value = 99
        print(self.name, *[each for each in said if each is None or isinstance(each, int)], *map(hex, flags))
        return answers.get(self.name, 1)
class Library:
    def __init__(self, name, use_last_error=False):
        pass
    def __getattr__(self, name):
        setattr(self, name, Function(name))
        return getattr(self, name)
ctypes.WinDLL, ctypes.get_last_error, ctypes.WinError = Library, lambda: 5, lambda n: PermissionError(13, "denied")
api = importlib.import_module("dblock.cli.windows_api")
"""

MADE = """
with api.Job() as job:
    job.assign(4711)
    api.resume(4711)
    print(api.send_break(4711), job.living(), job.give_to(4712))
    job.let_go()
    job.terminate(137)
print(ctypes.sizeof(api._ExtendedLimits), ctypes.sizeof(api._Accounting), api.Job(71).handle)
for name, call in {
    "CreateJobObjectW": api.Job,
    "OpenProcess": lambda: job.assign(1),
    "GenerateConsoleCtrlEvent": lambda: api.send_break(1),
}.items():
    answers[name] = 0
    try:
        print(call())
    except PermissionError:
        print("refused")
"""


def test_the_calls_are_made_as_windows_wants_them() -> None:
    done = python(CALLS + MADE)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "CreateJobObjectW None None",
        "SetInformationJobObject 70 9 144 0x2800",  # JobObjectExtendedLimitInformation: KILL_ON_JOB_CLOSE, BREAKAWAY_OK
        "OpenProcess 257 0 4711",  # PROCESS_SET_QUOTA, PROCESS_TERMINATE
        "AssignProcessToJobObject 70 80",
        "CloseHandle 80",
        "OpenProcess 2048 0 4711",  # PROCESS_SUSPEND_RESUME
        "NtResumeProcess 80",
        "CloseHandle 80",
        "GenerateConsoleCtrlEvent 1 4711",
        "QueryInformationJobObject 70 1 48 None",  # JobObjectBasicAccountingInformation
        "GetCurrentProcess",
        "OpenProcess 64 0 4712",  # PROCESS_DUP_HANDLE
        f"DuplicateHandle {2**64 - 1} 70 80 0 0 2",  # DUPLICATE_SAME_ACCESS
        "CloseHandle 80",
        "True 5 99",
        "SetInformationJobObject 70 9 144 0x800",
        "TerminateJobObject 70 137",
        "CloseHandle 70",
        "144 48 71",  # what they measure on a 64-bit Windows
        "CreateJobObjectW None None",
        "refused",
        "OpenProcess 257 0 1",
        "refused",
        "GenerateConsoleCtrlEvent 1 1",
        "False",
    ]


FLAGS = """
subprocess.CREATE_NEW_PROCESS_GROUP, subprocess.CREATE_NO_WINDOW = 0x200, 0x8000000
subprocess.CREATE_BREAKAWAY_FROM_JOB = 0x1000000
def start(argv, env, creationflags, **pipes):
    print(argv, hex(creationflags), pipes)
    if creationflags & 0x1000000:
        raise PermissionError(13, "the agent's job does not let it go")
subprocess.Popen = start
api.start_suspended(["migrate"], {})
api.start_detached(["watch"], {}, stdin=-1)
"""


def test_how_processes_are_started() -> None:
    done = python(CALLS + FLAGS)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "['migrate'] 0x204 {}",  # in a group of its own, suspended
        "['watch'] 0x9000200 {'stdin': -1}",
        "['watch'] 0x8000200 {'stdin': -1}",
    ]
