"""``dblock run``: exit codes, the command's surroundings, and signals. Each test has a target of its own."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

import dblock
from tests.support import ended_afterwards

if TYPE_CHECKING:
    from typing_extensions import Self

DBLOCK = (sys.executable, "-m", "dblock")
STEP = "b"
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"in vain waited {seconds} s for {what}"
        time.sleep(0.002)


def argv(target: str, *options: str, command: list[str]) -> list[str]:
    return [*DBLOCK, "run", "--target", target, "--step", STEP, *options, "--", *command]


def environment(url: str, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DBLOCK_")}
    return inherited | {"DBLOCK_URL": url} | more


def run(
    url: str,
    target: str,
    *options: str,
    command: list[str],
    stdin: bytes = b"",
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command under the lock to its end."""
    return subprocess.run(
        argv(target, *options, command=command),
        env=environment(url, **(variables or {})),
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
    )


@contextmanager
def started(
    url: str, target: str, *options: str, command: list[str], **settings: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command under the lock, and see to it that nothing is left of it afterwards."""
    process = subprocess.Popen(
        argv(target, *options, command=command),
        env=environment(url),
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings},
    )
    with ended_afterwards(process):
        yield process


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().rstrip("\n")


def complaint(stderr: bytes | None) -> str:
    (only,) = (stderr or b"").decode().splitlines()
    assert only.startswith("dblock: ")
    return only


def rows(observer: psycopg.Connection[Any], target: str) -> list[tuple[int, int, str]]:
    """The rows of a lock and of its queue in pg_locks: pid, key space, label."""
    return observer.execute(
        "SELECT l.pid, l.objsubid, a.application_name FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
        " WHERE l.locktype = 'advisory' AND l.classid = %s",
        (dblock.key(target, STEP).postgres.classid,),
    ).fetchall()


def waiters(observer: psycopg.Connection[Any], target: str) -> set[int]:
    return {pid for pid, space, label in rows(observer, target) if space == 2 and label.startswith("dblock1 w")}


def holders(observer: psycopg.Connection[Any], target: str) -> set[int]:
    return {pid for pid, space, label in rows(observer, target) if space == 1 and label.startswith("dblock1 1")}


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 3, 64, 69, 75, 76, 77, 126, 127, 143, 255])
def test_the_commands_own_exit_code(url: str, target: str, code: int) -> None:
    result = run(url, target, command=["sh", "-c", f"exit {code}"])
    assert (result.returncode, result.stdout, result.stderr) == (code, b"", b"")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGPIPE, 40])
def test_a_command_ended_by_a_signal(url: str, target: str, number: int) -> None:
    result = run(url, target, command=["sh", "-c", f"kill -{int(number)} $$"])
    assert result.returncode == 128 + number
    assert "ended by" in complaint(result.stderr)


def test_not_found_and_not_executable(url: str, target: str, observer: psycopg.Connection[Any], tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("no program")
    (tmp_path / "strange").write_bytes(b"\0\1\2\3")
    (tmp_path / "strange").chmod(0o755)
    codes = {
        "no-such-command-anywhere": 127,
        str(tmp_path / "absent"): 127,
        str(tmp_path / "plain" / "below"): 127,
        str(tmp_path / "strange"): 126,
        str(tmp_path / "plain"): 126,
        str(tmp_path): 126,
    }
    for command, code in codes.items():
        result = run(url, target, command=[command])
        assert result.returncode == code, command
        assert "not run" in complaint(result.stderr)
    assert rows(observer, target) == []


def test_a_timeout_says_who_holds_the_lock_and_the_code_can_be_chosen(url: str, target: str) -> None:
    with dblock.lock(url, target=target, step=STEP, tenant="T1"):
        for options, code in (((), 75), (("--conflict-exit-code", "9"), 9), (("--conflict-exit-code=0",), 0)):
            for timeout in ("0", "50ms"):
                result = run(url, target, "--timeout", timeout, *options, command=["echo", "never"])
                assert (result.returncode, result.stdout) == (code, b"")
                last = result.stderr.decode().splitlines()[-1]
                assert re.match(rf"dblock: b@{target} not acquired .*: held by tenant T1 \(pid \d+, .*\) since ", last)


def test_dblocks_75_differs_from_the_commands_own(url: str, target: str) -> None:
    own = run(url, target, "--conflict-exit-code", "9", command=["sh", "-c", "exit 75"])
    assert (own.returncode, own.stderr) == (75, b"")


def test_unsafe_and_unreachable(url: str, target: str) -> None:
    other = run(url, target, "--database", "another", command=["echo", "never"])
    assert (other.returncode, other.stdout) == (77, b"")
    assert "another" in complaint(other.stderr)
    for nowhere in ("postgresql://u@127.0.0.1:1/d", "host=127.0.0.1 port=1"):
        gone = run(nowhere, target, command=["echo", "never"])
        assert (gone.returncode, gone.stdout) == (69, b"")
        complaint(gone.stderr)


# --- what the command finds -------------------------------------------------------------------------------------------

SHOW = "import json, os; print(json.dumps({n: v for n, v in os.environ.items() if n.startswith('DBLOCK_')}))"


def test_environment(url: str, target: str) -> None:
    key = str(dblock.key(target, STEP).value)
    held = {"DBLOCK_HELD": "1", "DBLOCK_KEY": key, "DBLOCK_TARGET": target, "DBLOCK_STEP": STEP, "DBLOCK_SLOT": ""}
    outer = {"DBLOCK_TENANT": "", "DBLOCK_KEY": "1", "DBLOCK_HELD": "0", "DBLOCK_TARGET": "another", "DBLOCK_SLOT": "7"}

    result = run(url, target, "--tenant", "T 1", command=python(SHOW), variables=outer)
    assert json.loads(result.stdout) == held | {"DBLOCK_TENANT": "T 1"}
    result = run(url, target, command=python(SHOW), variables=outer)
    assert json.loads(result.stdout) == held | {"DBLOCK_TENANT": ""}
    result = run(url, target, "--pass-url", command=python(SHOW), variables=outer)
    assert json.loads(result.stdout) == held | {"DBLOCK_TENANT": "", "DBLOCK_URL": url}

    result = run(url, target, "--slots", "3", "--target", "a second", command=python(SHOW), variables=outer)
    assert json.loads(result.stdout) == held | {
        "DBLOCK_KEY": f"{key}\n{dblock.key('a second', STEP).value}",
        "DBLOCK_TARGET": f"{target}\na second",
        "DBLOCK_SLOT": "0\n0",
        "DBLOCK_TENANT": "",
    }


def test_options_from_the_environment(url: str, target: str, observer: psycopg.Connection[Any]) -> None:
    del observer
    with dblock.lock(url, target=target, step="s", tenant="T1"):
        result = subprocess.run(
            [*DBLOCK, "run", "--", "echo", "never"],
            env=environment(url, DBLOCK_TARGET=target, DBLOCK_STEP="s", DBLOCK_TENANT="T2", DBLOCK_TIMEOUT="20ms"),
            capture_output=True,
            check=False,
        )
    assert (result.returncode, result.stdout) == (75, b"")
    assert b"in 0.02 s" in result.stderr


def test_everything_after_the_dashes_belongs_to_the_command(url: str, target: str) -> None:
    arguments = ["--timeout", "5", "--url=x", "--", "-h", "--version", "$HOME", "a b", ""]
    result = run(url, target, command=python("import json, sys; print(json.dumps(sys.argv[1:]))", *arguments))
    assert result.returncode == 0
    assert json.loads(result.stdout) == arguments


def test_input_and_output_are_the_commands(url: str, target: str) -> None:
    result = run(url, target, command=["sh", "-c", "cat; echo said >&2"], stdin=b"in\0put\n" * 100_000)
    assert result.stdout == b"in\0put\n" * 100_000
    assert (result.returncode, result.stderr) == (0, b"said\n")


DESCRIPTORS = """
import os, stat
for number in range(256):
    try:
        print(number, "socket" if stat.S_ISSOCK(os.fstat(number).st_mode) else "other", flush=True)
    except OSError:
        pass
"""


def test_the_connection_is_not_inherited(url: str, target: str) -> None:
    result = run(url, target, command=python(DESCRIPTORS))
    assert result.stdout.decode().split("\n") == ["0 other", "1 other", "2 other", ""]


def test_the_connection_does_not_take_the_place_of_a_closed_stderr(url: str, target: str) -> None:
    inner = argv(target, command=python(DESCRIPTORS))
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&- <&-', "sh", *inner], env=environment(url), stdout=subprocess.PIPE, check=False
    )
    assert result.returncode == 0
    assert b"socket" not in result.stdout
    assert b"1 other" in result.stdout


def test_no_shell_and_a_group_of_its_own(url: str, target: str) -> None:
    code = "import os; print(os.getpid(), os.getpgrp(), os.getppid())"
    with started(url, target, command=python(code)) as process:
        pid, group, parent = map(int, line(process).split())
        assert pid == group
        assert parent == process.pid
        assert process.wait(60) == 0


def test_what_the_command_leaves_behind_goes_on_without_the_lock(
    url: str, target: str, observer: psycopg.Connection[Any]
) -> None:
    result = run(url, target, command=["sh", "-c", "sleep 300 >/dev/null 2>&1 & echo $!"])
    left = int(result.stdout)
    try:
        assert rows(observer, target) == []
        os.kill(left, 0)
    finally:
        os.kill(left, signal.SIGKILL)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_wait(
    url: str, target: str, observer: psycopg.Connection[Any], number: signal.Signals
) -> None:
    with dblock.lock(url, target=target, step=STEP) as held:
        before = rows(observer, target)
        with started(url, target, command=["echo", "never"]) as process:
            assert process.stderr is not None
            waiting = process.stderr.readline().decode()
            assert re.match(rf"dblock: waiting for b@{target}: held by a session \(pid \d+, .*\) since ", waiting)
            assert waiters(observer, target)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (128 + number, b"")
        assert complaint(stderr).startswith(f"dblock: interrupted by {number.name} ")
        assert held.held
        assert [row[:2] for row in rows(observer, target)] == [row[:2] for row in before]
    assert rows(observer, target) == []


class Wire:
    """Carries connections to the server, until it is cut: then nothing arrives any more, and nothing is closed."""

    def __init__(self, url: str) -> None:
        server = psycopg.conninfo.conninfo_to_dict(url)
        self._server = (str(server.get("host", "127.0.0.1")), int(server.get("port") or 5432))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._cut = threading.Event()
        self._sockets = [self._listening]
        self.connections = self.lost = 0
        self.url = psycopg.conninfo.make_conninfo(url, host="127.0.0.1", port=self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._cut.set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self._sockets.append(client)
                self.connections += 1
                if not self._cut.is_set():
                    server = socket.create_connection(self._server)
                    self._sockets.append(server)
                    for pair in ((client, server), (server, client)):
                        threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self._cut.is_set():
                    self.lost += len(data)
                else:
                    sink.sendall(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            # A close alone does not end what another thread reads from: the server would never hear of it.
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def test_a_signal_while_connecting(url: str, target: str) -> None:
    with Wire(url) as wire:
        wire.cut()
        with started(wire.url, target, command=["echo", "never"]) as process:
            wait_until(lambda: wire.connections, "the attempt to connect")
            process.terminate()
            stdout, stderr = process.communicate(timeout=60)
            assert (process.returncode, stdout) == (143, b"")
            assert "interrupted by SIGTERM" in complaint(stderr)


def test_a_second_signal_ends_a_wait_for_a_server_that_is_silent(
    url: str, target: str, observer: psycopg.Connection[Any]
) -> None:
    with (
        dblock.lock(url, target=target, step=STEP),
        Wire(url) as wire,
        started(wire.url, target, command=["echo", "never"]) as process,
    ):
        wait_until(lambda: waiters(observer, target), "the waiter")
        wire.cut()
        # The first one may find it inside a statement or between two. Said until it is heard twice: two that arrive at
        # one time are one.
        wait_until(lambda: ended_when_signalled(process), "the end")
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout) == (143, b"")
        assert stderr.splitlines()[-1].startswith(b"dblock: interrupted again by SIGTERM")


def ended_when_signalled(process: subprocess.Popen[bytes]) -> bool:
    process.terminate()
    # psycopg looks for signals when its wait of 0.1 s is over, which each signal begins anew: a flood is never heard.
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)
    return process.poll() is not None


def test_a_signal_ends_a_release_that_hangs_and_the_commands_code_stays(url: str, target: str) -> None:
    with Wire(url) as wire, started(wire.url, target, command=["sh", "-c", "echo held; read line; exit 3"]) as process:
        assert line(process) == "held"
        wire.cut()
        assert process.stdin is not None
        process.stdin.close()
        wait_until(lambda: wire.lost, "the release, which gets no answer")
        process.terminate()
        process.wait(60)
        assert process.stderr is not None
        assert "while giving the lock back" in complaint(process.stderr.read())
        assert process.returncode == 3


# Parent and child both report the signals that they get, and end after the last.
REPORTERS = """
import os, signal
signals = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # kept for sigwait: none can arrive between two calls
who = "child" if os.fork() == 0 else "parent"
os.write(1, b"ready\\n")
number = None
while number != signal.SIGUSR2:
    number = signal.sigwait(signals)
    os.write(1, f"{who} {signal.Signals(number).name}\\n".encode())
os._exit(7)
"""


def test_signals_reach_the_whole_group_and_the_command_may_handle_them(url: str, target: str) -> None:
    with started(url, target, command=python(REPORTERS)) as process:
        assert [line(process), line(process)] == ["ready", "ready"]
        for number in SIGNALS:
            process.send_signal(number)
            assert {line(process), line(process)} == {f"child {number.name}", f"parent {number.name}"}
        assert SIGNALS[-1] is signal.SIGUSR2
        _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (7, b"")


FAMILY = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
child = os.fork()
if child:
    print(child, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_that_dies_of_the_signal(
    url: str, target: str, observer: psycopg.Connection[Any], number: signal.Signals
) -> None:
    with started(url, target, command=python(FAMILY)) as process:
        child = int(line(process))
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert number.name in complaint(stderr)
        assert rows(observer, target) == []
        wait_until(lambda: not _running(child), "the end of the command's child")


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_bytes().rpartition(b")")[2].split()[0] != b"Z"


def test_no_signal_is_lost_between_the_grant_and_the_command(
    url: str, target: str, observer: psycopg.Connection[Any]
) -> None:
    for attempt in range(20):
        with started(url, target, command=["sleep", "300"]) as process:
            wait_until(lambda: holders(observer, target), "the grant")
            time.sleep(attempt * 0.001)  # the moments from the grant to well after the start
            process.terminate()
            assert process.wait(60) == 143
    assert rows(observer, target) == []


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_what_is_ignored_at_the_start_stays_ignored(
    url: str, target: str, observer: psycopg.Connection[Any], number: signal.Signals
) -> None:
    def ignore() -> None:
        signal.signal(number, signal.SIG_IGN)

    held = dblock.lock(url, target=target, step=STEP)
    held.acquire()
    command = ["sh", "-c", f"kill -{int(number)} $$; echo alive; read line"]
    with started(url, target, command=command, preexec_fn=ignore) as process:
        wait_until(lambda: waiters(observer, target), "the waiter")
        process.send_signal(number)
        held.release()
        assert line(process) == "alive"
        process.send_signal(number)
        process.communicate(b"\n", 60)
        assert process.returncode == 0


def test_an_ignored_sigchld_does_not_lose_the_exit_code(url: str, target: str) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    with started(url, target, command=["sh", "-c", "exit 3"], preexec_fn=ignore) as process:
        assert process.wait(60) == 3


# --- the terminal -----------------------------------------------------------------------------------------------------


class Terminal:
    """A process that leads a session on a terminal of its own, and the terminal's other end."""

    def __init__(self, url: str, command: list[str]) -> None:
        self._master, slave = os.openpty()
        self.process = subprocess.Popen(
            command,
            env=environment(url),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )
        os.close(slave)
        self._shown = b""

    def type(self, text: bytes) -> None:
        os.write(self._master, text)

    def expect(self, text: bytes) -> None:
        """Read on until a text is shown."""
        while text not in self._shown:
            assert select.select([self._master], [], [], 30)[0], f"{text!r} is not in {self._shown!r}"
            self._shown += os.read(self._master, 4096)
        self._shown = self._shown.partition(text)[2]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(60)
        os.close(self._master)


def test_the_command_may_read_from_the_terminal_and_gives_it_back(url: str, target: str) -> None:
    code = "import os; print('foreground', os.tcgetpgrp(0) == os.getpgrp()); print('read', input())"
    inner = argv(target, command=python(code))
    # The shell that runs this is in the group that had the terminal before, and reads from it afterwards.
    with Terminal(url, ["sh", "-c", '"$@"; echo code $?; read line; echo "after: $line"', "sh", *inner]) as terminal:
        terminal.expect(b"foreground True")
        terminal.type(b"first\n")
        terminal.expect(b"read first")
        terminal.expect(b"code 0")
        terminal.type(b"second\n")
        terminal.expect(b"after: second")
        assert terminal.process.wait(60) == 0


def test_interrupt_from_the_terminal(url: str, target: str, observer: psycopg.Connection[Any]) -> None:
    with Terminal(url, argv(target, command=["sh", "-c", "echo ready; exec sleep 300"])) as terminal:
        terminal.expect(b"ready")
        terminal.type(b"\x03")
        terminal.expect(b"dblock: the command was ended by SIGINT")
        assert terminal.process.wait(60) == 130
    assert rows(observer, target) == []


# What a shell does with a job: a group of its own in the foreground, and on Ctrl-Z the shell comes back.
SHELL = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
def foreground(group):
    os.tcsetpgrp(0, group)
def prepare():
    os.setpgid(0, 0)
    foreground(os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
job = subprocess.Popen(sys.argv[1:], preexec_fn=prepare)
_, status = os.waitpid(job.pid, os.WUNTRACED)
assert os.WIFSTOPPED(status), status
foreground(os.getpgrp())
print("job stopped", flush=True)
input()
foreground(job.pid)
os.killpg(job.pid, signal.SIGCONT)
_, status = os.waitpid(job.pid, os.WUNTRACED)
foreground(os.getpgrp())
print("job ended", os.waitstatus_to_exitcode(status), flush=True)
"""


def test_stopped_and_continued_from_the_terminal(url: str, target: str, observer: psycopg.Connection[Any]) -> None:
    inner = argv(target, command=["sh", "-c", 'echo ready; read line; echo "got $line"; exit 5'])
    with Terminal(url, python(SHELL, *inner)) as terminal:
        terminal.expect(b"ready")
        terminal.type(b"\x1a")
        terminal.expect(b"job stopped")
        assert holders(observer, target)
        terminal.type(b"fg\n")
        terminal.type(b"more\n")
        terminal.expect(b"got more")
        terminal.expect(b"job ended 5")
        assert terminal.process.wait(60) == 0
