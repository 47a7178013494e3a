"""After ``kill -9`` of ``dblock run`` nothing of its command is alive when the next holder gets the lock.

The command's grandchild writes to a file as fast as it can; the next holder looks at that file at its grant, and a
little later: whatever was added in between was written beside it.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

import dblock
from tests.test_cli_run import STEP, holders, line, python, rows, started, wait_until, waiters

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks for processes in /proc, which only Linux has"
)

HANDOVER_SECONDS = 1.0  # what the project promises
LOOK_SECONDS = 0.1  # long enough for some thousand writes


# Its child is orphaned at once, and so hangs in no tree of processes, but stays in the group. Both are deaf to what
# can be ignored, and end of themselves only long after the test would have failed.
WRITER = """
import os, signal, sys, time
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
middle = os.fork()
if middle == 0:
    if os.fork() == 0:
        file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            os.write(file, b"x")
    os._exit(0)
os.waitpid(middle, 0)
while not (os.path.exists(sys.argv[1]) and os.path.getsize(sys.argv[1])):
    pass
print("writing", flush=True)
time.sleep(30)
"""

# The next holder through the command line: its size at the start of the command, and a little later.
LOOKER = """
import os, sys, time
before = os.path.getsize(sys.argv[1])
print("granted", flush=True)
time.sleep(float(sys.argv[2]))
print(os.path.getsize(sys.argv[1]) - before, flush=True)
"""


class Next(threading.Thread):
    """The next holder through Python, which looks at the file sooner after the grant than a command could."""

    def __init__(self, url: str, target: str, file: Path) -> None:
        super().__init__(daemon=True)
        self._lock = dblock.lock(url, target=target, step=STEP, timeout=60)
        self._file = file
        self.granted_at = 0.0
        self.written_beside: int | None = None

    def run(self) -> None:
        with self._lock:
            before = self._file.stat().st_size if self._file.exists() else 0
            self.granted_at = time.monotonic()
            time.sleep(LOOK_SECONDS)
            self.written_beside = (self._file.stat().st_size if self._file.exists() else 0) - before


def in_group(group: int) -> list[int]:
    """The processes of a group that are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != b"Z":
                found.append(int(entry.name))
    return found


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def watcher_of(process: subprocess.Popen[bytes]) -> int:
    """The watcher: the same command line as `dblock run`, in another session."""
    own = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    (found,) = (
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
        and int(entry.name) != process.pid
        and (entry / "cmdline").exists()
        and (entry / "cmdline").read_bytes() == own
    )
    return found


def kill_alone(process: subprocess.Popen[bytes]) -> None:
    process.kill()


def kill_own_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """As deployment tools cancel a script: from the top, each process and then its children."""

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        below = children(pid)
        os.kill(pid, signal.SIGKILL)
        for child in below:
            kill(child)

    kill(process.pid)


@pytest.mark.parametrize("kill", [kill_alone, kill_own_group, kill_tree])
def test_nothing_is_written_beside_the_next_holder(
    url: str,
    target: str,
    observer: psycopg.Connection[Any],
    tmp_path: Path,
    kill: Callable[[subprocess.Popen[bytes]], None],
) -> None:
    for attempt in range(10):
        file = tmp_path / str(attempt)
        with started(url, target, command=python(WRITER, str(file)), start_new_session=True) as process:
            assert line(process) == "writing"
            following = Next(url, target, file)
            following.start()
            wait_until(lambda: waiters(observer, target), "the next holder in the queue")
            killed_at = time.monotonic()
            kill(process)
            following.join(60)
        assert following.written_beside == 0
        assert following.granted_at - killed_at < HANDOVER_SECONDS


@pytest.mark.parametrize("attempt", range(3))
def test_nothing_is_written_beside_the_next_dblock_run(
    url: str, target: str, observer: psycopg.Connection[Any], tmp_path: Path, attempt: int
) -> None:
    file = tmp_path / "written"
    with started(url, target, command=python(WRITER, str(file))) as process:
        assert line(process) == "writing"
        with started(url, target, command=python(LOOKER, str(file), str(LOOK_SECONDS))) as following:
            wait_until(lambda: waiters(observer, target), "the next holder in the queue")
            process.kill()
            assert line(following) == "granted"
            assert line(following) == "0"
            assert following.wait(60) == 0


@pytest.mark.parametrize("attempt", range(15))
def test_killed_between_the_grant_and_the_command(
    url: str, target: str, observer: psycopg.Connection[Any], tmp_path: Path, attempt: int
) -> None:
    file = tmp_path / "written"
    following = Next(url, target, file)
    with started(url, target, command=python(WRITER, str(file))) as process:
        wait_until(lambda: holders(observer, target), "the grant")
        following.start()
        time.sleep(attempt * 0.002)  # from the grant to after the command's start
        process.kill()
        following.join(60)
    assert following.written_beside == 0
    size = file.stat().st_size if file.exists() else 0
    time.sleep(LOOK_SECONDS)
    assert (file.stat().st_size if file.exists() else 0) == size


def test_a_stopped_member_of_the_group_dies_too(url: str, target: str, observer: psycopg.Connection[Any]) -> None:
    with started(url, target, command=["sh", "-c", "echo $$; kill -STOP $$"]) as process:
        group = int(line(process))
        process.kill()
        wait_until(lambda: not holders(observer, target), "the end of the session")
        assert in_group(group) == []


EXIT_THREAD = {"x86_64": 60, "aarch64": 93}  # the system call that ends the calling thread only
THREADED = """
import ctypes, os, sys, threading, time
def write():
    file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        os.write(file, b"x")
threading.Thread(target=write).start()
print("writing", flush=True)
ctypes.CDLL(None).syscall(int(sys.argv[2]), 0)
"""


@pytest.mark.skipif(platform.machine() not in EXIT_THREAD, reason="the number of the system call is not known here")
def test_a_process_whose_first_thread_has_ended_is_no_zombie(
    url: str, target: str, observer: psycopg.Connection[Any], tmp_path: Path
) -> None:
    file = tmp_path / "written"
    command = python(THREADED, str(file), str(EXIT_THREAD[platform.machine()]))
    with started(url, target, command=command) as process:
        assert line(process) == "writing"
        (pid,) = children(process.pid)
        stat = Path(f"/proc/{pid}/stat")
        wait_until(lambda: stat.read_bytes().rpartition(b")")[2].split()[0] == b"Z", "the end of the first thread")
        following = Next(url, target, file)
        following.start()
        wait_until(lambda: waiters(observer, target), "the next holder in the queue")
        process.kill()
        following.join(60)
    assert following.written_beside == 0


def test_the_watcher_ends_with_the_command(url: str, target: str, observer: psycopg.Connection[Any]) -> None:
    with started(url, target, command=["sh", "-c", "echo held; read line"]) as process:
        assert line(process) == "held"
        watcher = watcher_of(process)
        assert os.getsid(watcher) not in (os.getsid(0), os.getsid(process.pid))
        assert os.getpgid(watcher) != os.getpgid(process.pid)
        # Who reads what the command writes must not wait for the watcher, and it keeps nothing else open.
        open_files = sorted(os.readlink(entry) for entry in Path(f"/proc/{watcher}/fd").iterdir())  # noqa: PTH115
        assert [name.partition(":")[0] for name in open_files] == ["socket", "socket"]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            os.kill(watcher, number)
        assert process.communicate(b"\n", 60) == (b"", b"")
        assert process.returncode == 0
        assert not Path(f"/proc/{watcher}/fd/0").exists()
        assert rows(observer, target) == []


def test_a_killed_watcher_is_reported_and_the_command_goes_on(
    url: str, target: str, observer: psycopg.Connection[Any]
) -> None:
    with started(url, target, command=["sh", "-c", "echo held; read line; exit 3"]) as process:
        assert line(process) == "held"
        os.kill(watcher_of(process), signal.SIGKILL)
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"dblock: the watcher process was ended")
        assert holders(observer, target)
        process.communicate(b"\n", 60)
        assert process.returncode == 3


def test_a_waiter_that_is_killed_leaves_the_queue(url: str, target: str, observer: psycopg.Connection[Any]) -> None:
    with dblock.lock(url, target=target, step=STEP), started(url, target, command=["echo", "never"]) as process:
        wait_until(lambda: waiters(observer, target), "the waiter")
        process.kill()
        wait_until(lambda: not waiters(observer, target), "the end of the waiter's session")
        assert process.communicate()[0] == b""
