"""The doors to the lock, each as a real process that says "held", holds until its input ends, then says how it went.

Four of them on each engine: Python, the command line, and the raw scripts through the engine's own client and through a
driver that knows none of its client's commands. One interface, so that the same table and the same races drive all.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from typing_extensions import Self

SQL = Path(__file__).parent.parent / "sql" / "postgres"
TSQL = Path(__file__).parent.parent / "sql" / "mssql"
TIMEOUT_SECONDS = 60

# The contract's table of outcomes: what each door says. Held and given back is "done". The last column is SQL Server's;
# where the connection ends it is the client that says so, in its own way.
OUTCOMES = {
    "timeout": ("LockTimeout", 75, "55P03", "51001"),
    "bad name or setting": ("ValueError", 64, "22023", "51003"),
    "unsafe": ("UnsafeConnection", 77, "0A000", "51005"),
    "already held": ("AlreadyHeld", 77, "55006", "51006"),
    "cancelled": ("DatabaseError", 69, "57014", None),
    "terminated": ("DatabaseError", 69, "57P01", "connection ended"),
    "unreachable": ("DatabaseError", 69, None, None),
    "lost": ("LockLost", 76, None, None),
    "not held": ("LockNotHeld", None, "55000", "51004"),
}


@dataclass(frozen=True)
class Wish:
    """What a caller asks for, as text, since that is how it reaches the command line and the scripts."""

    target: str = "web-01"
    step: str = "b"
    tenant: str | None = None
    timeout: str | None = None
    database: str | None = None
    shared: bool = False
    slots: str | None = None
    in_transaction: bool = False  # on a connection of the caller's, which the command line has not
    more: Mapping[str, str] = field(default_factory=dict)  # further settings, which only the scripts know

    def names(self) -> dict[str, str]:
        named = {"target": self.target, "step": self.step, "tenant": self.tenant, "timeout": self.timeout,
                 "database": self.database, "slots": self.slots}  # fmt: skip
        return {name: value for name, value in named.items() if value is not None}

    def settings(self) -> dict[str, str]:
        more = dict(self.more)
        if self.shared:
            more["shared"] = "on"
        if self.in_transaction:
            more["scope"] = "transaction"
        return self.names() | more


class Attempt:
    """One caller in a process of its own."""

    def __init__(self, door: Door, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self.door = door
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the attempt
        self.process = subprocess.Popen(
            argv,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
        )

    def held(self) -> bool:
        """Wait until the lock is held (True), or the client has said or shown by its end that it is not (False)."""
        assert self.process.stdout is not None
        said = (line.strip() for line in self.process.stdout)
        return next((line for line in said if line in (b"held", b"refused")), b"") == b"held"

    def finish(self) -> object:
        """Let the holder release and end. Returns "done", or what the door said: compare it with ``Door.says``."""
        return self.door.said(self.end(), self.stderr())

    def end(self) -> int:
        """Let the holder release and end. Returns the exit code."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.read()
        return self.process.wait(TIMEOUT_SECONDS)

    def stderr(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")

    def kill(self) -> None:
        """End the process, and those that a client was started in, as a crash would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.kill()
        for stream in (self.process.stdin, self.process.stdout, self._stderr):
            if stream is not None:
                stream.close()


@dataclass(frozen=True)
class Door:
    """A way of taking the lock: how to begin an attempt, and how to read what became of it."""

    name: str
    argv: Callable[[str, Wish], list[str]]
    said: Callable[[int, str], object]
    column: int  # of OUTCOMES
    engine: str = "postgres"

    def attempt(self, url: str, wish: Wish, **environment: str) -> Attempt:
        return Attempt(self, self.argv(url, wish), {"DBLOCK_TEST_URL": url, "DBLOCK_URL": url, **environment})

    def says(self, outcome: str) -> object:
        """What the contract lets this door say."""
        return "done" if outcome == "done" else OUTCOMES[outcome][self.column]

    def __str__(self) -> str:
        return self.name if self.engine == "postgres" else f"{self.name} ({self.engine})"


# --- Python -----------------------------------------------------------------------------------------------------------

_PYTHON = """
import json, os, sys, dblock
url, arguments = os.environ["DBLOCK_TEST_URL"], json.loads(sys.argv[1])
connection = None
if arguments.get("scope") == "transaction":
    if url.startswith("mssql"):
        import pymssql
        from dblock import driver_pymssql
        connection = pymssql.connect(**driver_pymssql._arguments(url))
    else:
        import psycopg
        connection = psycopg.connect(url)
try:
    with dblock.lock(connection or url, **arguments):
        print("held", flush=True)
        sys.stdin.read()
        if connection:
            connection.commit()
except (dblock.Error, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def _python_argv(_url: str, wish: Wish) -> list[str]:
    arguments: dict[str, object] = {**wish.names(), "shared": wish.shared}
    if wish.timeout is not None:
        arguments["timeout"] = float(wish.timeout)
    if wish.slots is not None:
        arguments["slots"] = int(wish.slots)
    if wish.in_transaction:
        arguments["scope"] = "transaction"
    return [sys.executable, "-c", _PYTHON, json.dumps(arguments)]


def _exception(code: int, stderr: str) -> str:
    if code == 0:
        return "done"
    return stderr.strip().splitlines()[-1].partition(":")[0]


# --- the command line -------------------------------------------------------------------------------------------------


def _command_argv(_url: str, wish: Wish) -> list[str]:
    options = [f"--{name}={value}" for name, value in wish.names().items()] + ["--shared"] * wish.shared
    return [sys.executable, "-m", "dblock", "run", *options, "--", "sh", "-c", "echo held; exec cat >/dev/null"]


def _exit_code(code: int, stderr: str) -> object:
    if code == 0:
        return "done"
    assert stderr.splitlines()[-1].startswith("dblock: "), stderr
    return code


# --- the scripts ------------------------------------------------------------------------------------------------------


def literal(text: str) -> str:
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def set_wishes(wish: Wish) -> str:
    calls = (f"set_config('dblock.{name}', {literal(value)}, false)" for name, value in wish.settings().items())
    return "SELECT " + ", ".join(calls)


def _psql_argv(url: str, wish: Wish) -> list[str]:
    begin, commit = (["-c", "BEGIN"], ["-c", "COMMIT"]) if wish.in_transaction else ([], [])
    return ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=verbose", url,
            *begin, "-c", set_wishes(wish), "-f", str(SQL / "acquire.sql"), "-c", "SELECT 'held'",
            "-f", "-", "-f", str(SQL / "release.sql"), *commit]  # fmt: skip


_DRIVER = """
import os, sys, psycopg
wishes, acquire, release = sys.argv[1], open(sys.argv[2]).read(), open(sys.argv[3]).read()
with psycopg.connect(os.environ["DBLOCK_TEST_URL"], autocommit=sys.argv[4] == "session") as connection:
    try:
        for command in (wishes, acquire):
            connection.execute(command)
        print("held", flush=True)
        sys.stdin.read()
        connection.execute(release)
    except psycopg.Error as error:
        sys.exit(f"ERROR:  {error.sqlstate}: {error}")
"""


def _driver_argv(_url: str, wish: Wish) -> list[str]:
    return [sys.executable, "-c", _DRIVER, set_wishes(wish), str(SQL / "acquire.sql"), str(SQL / "release.sql"),
            _scope(wish)]  # fmt: skip


def _scope(wish: Wish) -> str:
    return "transaction" if wish.in_transaction else "session"


def _sqlstate(code: int, stderr: str) -> str | None:
    if code == 0:
        return "done"
    match = re.search(r"(?:ERROR|FATAL):  ([0-9A-Z]{5}):", stderr)
    return match[1] if match else None


# --- the scripts, on SQL Server ---------------------------------------------------------------------------------------


def set_session_context(wish: Wish) -> str:
    """Set the wishes as texts; control characters by their numbers, since fisql swallows some that it reads."""

    def text(value: str) -> str:
        pieces = re.split(r"([\x00-\x1f\x7f])", value.replace("'", "''"))
        return " + ".join(f"N'{piece}'" if i % 2 == 0 else f"NCHAR({ord(piece)})" for i, piece in enumerate(pieces))

    return "\n".join(
        f"DECLARE @{name} nvarchar(4000) = {text(value)}; EXEC sys.sp_set_session_context N'dblock.{name}', @{name};"
        for name, value in wish.settings().items()
    )


# Reads batch after batch from a pipe, as sqlcmd does with -i: an error does not stop it, so it is pointed out.
_FISQL = """
{
    printf '%s\\ngo\\n' "$1"; cat "$2"; printf "\\ngo\\nSELECT CAST('held' AS varchar(4))\\ngo\\n"
    cat > /dev/null
    cat "$3"; printf '\\ngo\\n%s\\ngo\\n' "$8"
} | LC_ALL=C.UTF-8 TDSVER=7.4 stdbuf -oL fisql -S "$4" -U "$5" -P "$6" -D "$7" 2>&1 | tee /dev/stderr |
sed -un 's/^held *$/held/p; s/.*\\b51[0-9]* dblock: .*/refused/p; s/.*INT_EXIT.*/refused/p'
"""


def _fisql_argv(url: str, wish: Wish) -> list[str]:
    server = urlsplit(url)
    begin, commit = ("BEGIN TRANSACTION\n", "COMMIT") if wish.in_transaction else ("", "SELECT 1")
    return ["bash", "-o", "pipefail", "-c", _FISQL, "fisql", begin + set_session_context(wish),
            str(TSQL / "acquire.sql"), str(TSQL / "release.sql"), f"{server.hostname}:{server.port or 1433}",
            unquote(server.username or ""), unquote(server.password or ""), server.path[1:], commit]  # fmt: skip


_PYMSSQL = """
import os, sys, pymssql
from urllib.parse import unquote, urlsplit
url = urlsplit(os.environ["DBLOCK_TEST_URL"])
wishes, acquire, release = sys.argv[1], open(sys.argv[2]).read(), open(sys.argv[3]).read()
connection = pymssql.connect(server=url.hostname, port=str(url.port or 1433), user=unquote(url.username or ""),
                             password=unquote(url.password or ""), database=url.path[1:],
                             autocommit=sys.argv[4] == "session")
cursor = connection.cursor()
try:
    for batch in (wishes, acquire):
        cursor.execute(batch)
        while cursor.nextset():
            pass
    print("held", flush=True)
    sys.stdin.read()
    cursor.execute(release)
    connection.commit()
except pymssql.Error as error:
    sys.exit(str(error))
"""


def _pymssql_argv(_url: str, wish: Wish) -> list[str]:
    return [sys.executable, "-c", _PYMSSQL, set_session_context(wish), str(TSQL / "acquire.sql"),
            str(TSQL / "release.sql"), _scope(wish)]  # fmt: skip


def _error_number(code: int, stderr: str) -> str | None:
    # The number stands in the message: every RAISERROR with a text is a 50000.
    if match := re.search(r"\b(51[0-9]{3}) dblock: ", stderr):
        return match[1]
    if re.search(r"not connected|connection|DBPROCESS is dead|EOF|INT_EXIT", stderr):
        return "connection ended"
    return "done" if code == 0 else None


PYTHON = Door("python", _python_argv, _exception, 0)
COMMAND = Door("command", _command_argv, _exit_code, 1)
PSQL = Door("psql", _psql_argv, _sqlstate, 2)
DRIVER = Door("driver", _driver_argv, _sqlstate, 2)
DOORS = (PYTHON, COMMAND, PSQL, DRIVER)

PYTHON_MSSQL = replace(PYTHON, engine="mssql")
COMMAND_MSSQL = replace(COMMAND, engine="mssql")
FISQL = Door("fisql", _fisql_argv, _error_number, 3, "mssql")
PYMSSQL = Door("pymssql", _pymssql_argv, _error_number, 3, "mssql")
MSSQL_DOORS = (PYTHON_MSSQL, COMMAND_MSSQL, FISQL, PYMSSQL)

ALL_DOORS = (*DOORS, *MSSQL_DOORS)
