"""A lock that is lost while it is held: noticed at once, said to the holder, and never the end of the body's own error.

How fast it is noticed is measured by ``benchmarks/loss.py``; here only that it is, and that nothing is left behind.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

import dblock
from dblock.blocking import Lock
from dblock.driver_psycopg import PsycopgSession
from dblock.life import release_seconds
from dblock.protocol import Conditions, Wish
from tests.backends import Backend, Postgres
from tests.pooler import swallower
from tests.support import PATIENCE_SECONDS, wait_until

ENGINES = ["postgres", "mssql"]
WISH: dict[str, Any] = {"target": "web-01", "step": "b"}


class BodyFailedError(Exception):
    pass


def watches() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dblock watch"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("body_fails", [False, True])
def test_the_servers_end_of_the_session(backend: Backend, engine: str, body_fails: bool) -> None:
    """Noticed without a question to the server: there is no heartbeat."""
    lock = dblock.lock(backend.url, heartbeat=0, **WISH)
    with pytest.raises(BodyFailedError if body_fails else dblock.LockLost), lock:
        assert not lock.lost.is_set()
        backend.end(backend.holders()[0])
        assert lock.lost.wait(PATIENCE_SECONDS)
        assert not lock.held
        with pytest.raises(dblock.LockLost):
            lock.check()
        if body_fails:
            raise BodyFailedError
    assert watches() == []
    with lock:  # as good as new
        assert not lock.lost.is_set()


def test_a_lock_that_somebody_gave_back(postgres: Postgres) -> None:
    """No socket says that; the heartbeat finds it."""
    sessions: list[psycopg.Connection[Any]] = []

    def connect() -> psycopg.Connection[Any]:
        sessions.append(psycopg.connect(postgres.url))
        return sessions[-1]

    lock = dblock.lock(connect, heartbeat=0.1, **WISH)
    with pytest.raises(dblock.LockLost, match="has it no more"), lock:
        sessions[0].execute("SELECT pg_advisory_unlock_all()")
        assert lock.lost.wait(PATIENCE_SECONDS)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_that_swallows_everything(backend: Backend, engine: str) -> None:
    """It even confirms what it swallows, as some balancers do: only an answer that does not come tells."""
    with swallower(backend.url) as (url, swallow):
        lock = dblock.lock(url, heartbeat=0.5, **WISH)
        with pytest.raises(dblock.LockLost, match="did not answer within 5 s"), lock:
            swallow()
            assert lock.lost.wait(PATIENCE_SECONDS)
    wait_until(lambda: not backend.all_rows(), "the lock to be gone")


def test_a_notice_is_no_loss(postgres: Postgres) -> None:
    sessions: list[psycopg.Connection[Any]] = []

    def connect() -> psycopg.Connection[Any]:
        sessions.append(psycopg.connect(postgres.url, autocommit=True))
        sessions[-1].execute("LISTEN news")
        return sessions[-1]

    with dblock.lock(connect, heartbeat=0, **WISH) as lock, psycopg.connect(postgres.url, autocommit=True) as other:
        for _ in range(5):
            other.execute("NOTIFY news")
        other.execute("SELECT pg_sleep(0.5)")
        assert not lock.lost.is_set()
        lock.check()


def test_held_and_silent(postgres: Postgres) -> None:
    """In steady state nothing is sent between two heartbeats, and on the caller's own connection nothing ever is."""

    def last_message() -> Any:
        found = psycopg_observer.execute("SELECT max(state_change) FROM pg_stat_activity WHERE pid = %s", (holder,))
        return found.fetchone()

    with psycopg.connect(postgres.url, autocommit=True) as psycopg_observer:
        with dblock.lock(postgres.url, heartbeat=0, **WISH):
            (holder,) = postgres.holders()
            before = last_message()
            psycopg_observer.execute("SELECT pg_sleep(0.5)")
            assert last_message() == before
        with (
            psycopg.connect(postgres.url, autocommit=True) as connection,
            dblock.lock(connection, heartbeat=0.1, **WISH),
        ):
            assert watches() == []
            (holder,) = postgres.holders()
            before = last_message()
            psycopg_observer.execute("SELECT pg_sleep(0.5)")
            assert last_message() == before


@pytest.mark.parametrize("engine", ENGINES)
def test_asyncio(backend: Backend, engine: str) -> None:
    async def main() -> None:
        lock = dblock.alock(backend.url, heartbeat=0, **WISH)
        with pytest.raises(dblock.LockLost):
            async with lock:
                backend.end(backend.holders()[0])
                await asyncio.wait_for(lock.lost.wait(), PATIENCE_SECONDS)
                assert not lock.held
        beating = dblock.alock(backend.url, heartbeat=0.1, **WISH)
        async with beating:
            await asyncio.sleep(0.5)
            assert not beating.lost.is_set()
        assert [task.get_name() for task in asyncio.all_tasks() if "dblock" in task.get_name()] == []

    asyncio.run(main())


def test_check_on_a_connection_whose_end_nobody_watched(postgres: Postgres) -> None:
    lock = Lock(
        postgres.url, target="web-01", step="b", tenant=None, label=None, timeout=None, shared=False, slots=None,
        scope="session", heartbeat=0, database=None, allow_session_pooler=False, watched=False,
    )  # fmt: skip
    lock.acquire()
    postgres.end(postgres.holders()[0])
    wait_until(lambda: not lock.held, "the end to be noticed")
    with pytest.raises(dblock.LockLost, match="the connection is closed"):
        lock.check()
    assert lock.lost.is_set()
    with pytest.raises(dblock.LockLost):
        lock.release()


def test_a_watch_that_is_told_of_a_loss_lets_go_of_its_copy(postgres: Postgres) -> None:
    """Or the connection would stay open for the server although it is closed here."""
    lock = dblock.lock(postgres.url, heartbeat=0, **WISH)
    lock.acquire()
    hold = lock._hold
    assert hold is not None
    hold.session.close()
    with pytest.raises(dblock.LockLost):
        lock.check()
    wait_until(lambda: not watches(), "the watch to be gone")
    with pytest.raises(dblock.LockLost):
        lock.release()


# --- what the server is told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heartbeat", "grace", "expected"), [(10, 5, 35), (0, 5, 15), (60, 120, 250), (0.1, 0, 11)])
def test_the_server_gives_back_after_the_holder_is_told(heartbeat: float, grace: float, expected: int) -> None:
    """The holder's clock is heartbeat + 5 s + grace after the cut; the server's begins up to a heartbeat before it."""
    assert release_seconds(heartbeat, grace) == expected
    assert release_seconds(heartbeat, grace) - heartbeat >= heartbeat + 5 + grace + 5


@pytest.mark.parametrize(("heartbeat", "silence", "probe"), [(0, 6, 3), (10.0, 14, 7), (60.0, 114, 7)])
def test_the_servers_keepalives(postgres: Postgres, heartbeat: float, silence: int, probe: int) -> None:
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        session = PsycopgSession(connection)
        lock = session.lock(Wish(dblock.key("web-01", "b"), "web-01", "b", None))
        seconds = release_seconds(heartbeat, 5)
        session.run(lock.open(Conditions(release_seconds=seconds)))
        found = [connection.execute(f"SHOW {name}".encode()).fetchone() for name in (
            "tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout",
            "idle_session_timeout")]  # fmt: skip
    assert silence + 3 * probe == seconds
    assert found == [(str(silence),), (str(probe),), ("3",), (str(seconds * 1000),), ("0",)]


@pytest.mark.parametrize("heartbeat", [-1, 0.05, 601, float("nan"), float("inf")])
def test_heartbeats_that_are_none(heartbeat: float) -> None:
    with pytest.raises(ValueError, match="heartbeat must be 0, or from"):
        dblock.lock("postgresql://", heartbeat=heartbeat, **WISH)
    with pytest.raises(TypeError, match="heartbeat must be a number"):
        dblock.lock("postgresql://", heartbeat="10", **WISH)  # type: ignore[arg-type]


# --- dblock run -------------------------------------------------------------------------------------------------------


@contextmanager
def running(backend: Backend, *command: str, options: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "dblock", "run", "--target", "web-01", "--step", "b", *options, "--", *command]
    with subprocess.Popen(
        argv, env=os.environ | {"DBLOCK_URL": backend.url}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


STUBBORN = "trap 'echo TERM' TERM; sh -c 'trap \"\" TERM; echo held; while :; do sleep 0.1; done' & wait; wait"
WILLING = "trap 'echo TERM; exit 0' TERM; echo held; while :; do sleep 0.1; done"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("command", "outcome"), [
    (WILLING, "the command ended with exit code 0"), (STUBBORN, "the command was ended by SIGKILL"),
])  # fmt: skip
def test_the_command_is_ended(backend: Backend, engine: str, command: str, outcome: str) -> None:
    """By TERM; all of its group by KILL, when the grace is over. Also where it ends well the exit code is 76."""
    with running(backend, "sh", "-c", command, options=("--grace", "500ms", "--heartbeat", "0")) as process:
        backend.end(backend.holders()[0])
        said, complaint = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 76
    assert said == "TERM\n"
    first, *_, last = complaint.splitlines()
    assert first == "dblock: b@web-01 was lost while it was held: the server has ended its connection"
    assert last.endswith(outcome)
    wait_until(lambda: not running_commands("while :; do sleep 0.1; done"), "the last of the group to be gone")


def test_a_cancelled_question_does_not_end_the_command(postgres: Postgres) -> None:
    """Somebody may cancel what the heartbeat asks; that says nothing of the lock."""
    over = threading.Event()

    def cancel_again_and_again(session: int) -> None:
        while not over.is_set():
            postgres.cancel(session)

    command = "echo held; read line; echo done"
    argv = [sys.executable, "-m", "dblock", "run", "--target", "web-01", "--step", "b", "--heartbeat", "100ms",
            "--", "sh", "-c", command]  # fmt: skip
    with subprocess.Popen(
        argv, env=os.environ | {"DBLOCK_URL": postgres.url}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        canceller = threading.Thread(target=cancel_again_and_again, args=(postgres.holders()[0],))
        canceller.start()
        assert not over.wait(2)  # some twenty heartbeats
        over.set()
        canceller.join()
        said, complaint = process.communicate("\n", PATIENCE_SECONDS)
    assert (process.returncode, said) == (0, "done\n"), complaint


def running_commands(part: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if arguments[:2] == [b"sh", b"-c"] and part.encode() in arguments[2]:
            found.append(int(entry.parent.name))
    return found


def test_the_heartbeat_of_dblock_run(postgres: Postgres) -> None:
    """It finds what no socket says: a lock that is not the session's any more."""
    command = f"{RELEASED_BY_HAND}\nimport dblock.cli, sys\nsys.exit(dblock.cli.main(sys.argv[1:]))"
    argv = [sys.executable, "-c", command, "run", "--target", "web-01", "--step", "b", "--heartbeat", "100ms",
            "--", "sleep", "60"]  # fmt: skip
    result = subprocess.run(
        argv, env=os.environ | {"DBLOCK_URL": postgres.url}, capture_output=True, text=True,
        timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    assert result.returncode == 76
    assert "the server says that this session has it no more; the command was ended by SIGTERM" in result.stderr


# As somebody with access to the connection would.
RELEASED_BY_HAND = """
from dblock.postgres import AdvisoryLock
check = AdvisoryLock.check
def releasing(self, granted):
    yield "SELECT pg_advisory_unlock_all()"
    return (yield from check(self, granted))
AdvisoryLock.check = releasing
"""


@pytest.mark.parametrize(("option", "value"), [("--heartbeat", "1ms"), ("--heartbeat", "11m"), ("--grace", "-1")])
def test_durations_that_are_none(option: str, value: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dblock", "run", "--url", "postgresql://127.0.0.1:1/d", "--target", "a", "--step", "b",
         option, value, "--", "true"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 64
    assert result.stderr.startswith("dblock: ")


# --- other threads, other processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_released_by_another_thread_and_twice(backend: Backend, engine: str) -> None:
    lock = dblock.lock(backend.url, **WISH)
    lock.acquire()
    releasing = threading.Thread(target=lock.release)
    releasing.start()
    releasing.join()
    with pytest.raises(dblock.LockNotHeld):
        lock.release()
    wait_until(lambda: not backend.all_rows(), "the lock to be gone")


def said_by(code: str, backend: Backend) -> list[str]:
    """The lines that a program prints which ends well."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=os.environ | {"DBLOCK_TEST_URL": backend.url},
        capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


FORKED = """
import os, sys, json, dblock
lock = dblock.lock(os.environ["DBLOCK_TEST_URL"], target="web-01", step="b")
lock.acquire()
child = os.fork()
if child == 0:
    said = [lock.held]
    for call in (lock.release, lock.check):
        try:
            call()
            said.append("done")
        except dblock.LockNotHeld as error:
            said.append("not held")
    print(json.dumps(said), flush=True)
    del lock
    sys.exit(0)  # with all that an interpreter does at its end
os.waitpid(child, 0)
lock.check()
print(json.dumps([lock.held]), flush=True)
lock.release()
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_forked_child_has_no_part_in_it(backend: Backend, engine: str) -> None:
    """It neither holds the lock nor ends it by its own end."""
    child, parent = map(json.loads, said_by(FORKED, backend))
    assert child == [False, "not held", "not held"]
    assert parent == [True]


FORKED_AND_ALIVE = """
import os, dblock
lock = dblock.lock(os.environ["DBLOCK_TEST_URL"], target="web-01", step="b", heartbeat=0)
lock.acquire()
waiting, parents = os.pipe()
child = os.fork()
if child == 0:
    os.close(parents)
    os.read(waiting, 1)  # until the parent has released, or ended
    os._exit(0)
lock.release()
ended, _ = os.waitpid(child, os.WNOHANG)
print("the child lives" if ended == 0 else "the child has ended", flush=True)
os.close(parents)
os.waitpid(child, 0)
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_release_does_not_wait_for_a_forked_child(backend: Backend, engine: str) -> None:
    """Which has copies of all sockets: closing one of them ends nobody's waiting on its other side."""
    assert said_by(FORKED_AND_ALIVE, backend) == ["the child lives"]


SPAWNED = """
import multiprocessing, os, sys, dblock
def child(queue):
    lock = dblock.lock(os.environ["DBLOCK_TEST_URL"], target="web-01", step="b")
    queue.put((lock.held, lock.acquire(timeout=0)))
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with dblock.lock(os.environ["DBLOCK_TEST_URL"], target="web-01", step="b") as lock:
        process = context.Process(target=child, args=(queue,))
        process.start()
        print(queue.get(), flush=True)
        process.join()
        assert lock.held
"""


def test_a_spawned_child_competes(postgres: Postgres, tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    result = subprocess.run(
        [sys.executable, script], env=os.environ | {"DBLOCK_TEST_URL": postgres.url, "PYTHONPATH": str(Path.cwd())},
        capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "(False, False)\n"), result.stderr


def test_a_subprocess_does_not_keep_the_lock(postgres: Postgres) -> None:
    """It inherits no descriptor: when the holder is killed the lock is free, though the subprocess lives."""
    code = """
import os, subprocess, sys, dblock
dblock.lock(os.environ["DBLOCK_TEST_URL"], target="web-01", step="b").acquire()
print(subprocess.Popen(["sleep", "60"], close_fds=False).pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"DBLOCK_TEST_URL": postgres.url},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        sleeper = int(process.stdout.readline())
        process.kill()
        wait_until(lambda: not postgres.all_rows(), "the lock to be gone")
        os.kill(sleeper, signal.SIGKILL)


# --- a release that cannot be done ------------------------------------------------------------------------------------


def test_a_release_that_is_not_answered_is_a_loss(postgres: Postgres) -> None:
    with swallower(postgres.url) as (url, swallow):
        lock = dblock.lock(url, target="web-01", step="b", heartbeat=0)
        lock.acquire()
        swallow()
        with pytest.raises(dblock.LockLost, match="did not answer within 5 s"):
            lock.release()
        assert not lock.held


def test_a_release_that_is_interrupted_leaves_no_watch_on_somebody_elses_descriptor(postgres: Postgres) -> None:
    """The watch still waits for its answer; the next connection would get the number of the closed one."""
    with swallower(postgres.url) as (url, swallow):
        lock = dblock.lock(url, target="web-01", step="b", heartbeat=0.1)
        lock.acquire()
        hold = lock._hold
        assert hold
        swallow()
        wait_until(lambda: hold.session.busy, "the watch to ask")
        interrupting = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            lock.release()
        interrupting.join()
        with dblock.lock(postgres.url, target="web-02", step="b") as other:
            wait_until(lambda: len(watches()) == 1, "the end of the old watch")
            other.check()
    wait_until(lambda: not watches(), "the end of all watches")


def test_a_watch_whose_beginning_is_interrupted_is_none(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal's exception can come while its thread starts. Nothing of it is left, nor of the lock."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "dblock watch":
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dblock.lock(postgres.url, target="web-01", step="b").acquire()
    wait_until(lambda: not watches() and not postgres.all_rows(), "nothing to be left")
    gc.collect()  # an unclosed socket is an error here
