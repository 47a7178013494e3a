"""Plays the deployment: for each tenant and target a → b → c, each step a process of its own, all of them at once.

Nothing here keeps steps b apart: each tenant's own process takes the lock, through the door that is its turn, as
deployments on different machines would. Without the lock the very same processes run side by side.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from dblock import scripts
from dblock.demo import steps
from dblock.demo.events import Event
from dblock.errors import DatabaseError

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS = ("a", "b", "c")
DOORS = ("python", "run", "sql")

_LOOK_SECONDS = 0.1
_END_SECONDS = 5

_Connection = psycopg.Connection[Any]


@dataclass
class Deployment:
    """One tenant's deployment on one target, and how far it has come.

    Attributes:
        tenant: for whom.
        target: where.
        door: how its step b takes the lock.
        asked: when each step's process was started, in seconds since the demo's begin.
        failure: what the step that failed said last; the steps after it did not run.
    """

    tenant: str
    target: str
    door: str
    asked: dict[str, float] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class State:
    """What is known at one moment: the deployments, the steps that have begun, and whether steps b take the lock."""

    deployments: Sequence[Deployment]
    events: Sequence[Event]
    locked: bool

    @property
    def complete(self) -> bool:
        """Whether every step of every deployment has come to its end, and none failed."""
        ended = sum(not event.running for event in self.events)
        return ended == len(STEPS) * len(self.deployments) and not any(each.failure for each in self.deployments)


class Play:
    """One run of the demo on one database.

    Args:
        url: the database, without a password.
        tenants: how many.
        targets: how many.
        locked: whether steps b take the lock.
        psql: the program, or None where there is none.
    """

    def __init__(self, url: str, *, tenants: int, targets: int, locked: bool, psql: Path | None) -> None:
        self._url = url
        self._locked = locked
        self._psql = psql
        self._tenants = [f"T{n}" for n in range(1, tenants + 1)]
        self._targets = [f"web-{n:02}" for n in range(1, targets + 1)]
        self._deployments = [
            Deployment(tenant, target, DOORS[(i + j) % len(DOORS)])
            for (j, target), (i, tenant) in product(enumerate(self._targets), enumerate(self._tenants))
        ]
        self._processes: set[subprocess.Popen[str]] = set()
        self._gate = threading.Lock()  # between "no more" and a process that is just being started
        self._stopped = False
        self._begin = 0.0

    def run(self, watch: Callable[[State], None]) -> State:
        """Play it to its end.

        Args:
            watch: called some ten times a second with what is known so far.

        Returns:
            What is known at the end.

        Raises:
            DatabaseError: the database cannot be reached, or refused; or another demo is running in it.
        """
        try:
            with (
                psycopg.connect(self._url, autocommit=True) as connection,
                tempfile.TemporaryDirectory(prefix="dblock-demo-") as folder,
            ):
                for name in ("acquire", "release"):
                    Path(folder, f"{name}.sql").write_text(scripts.script(f"postgres/{name}"), encoding="utf-8")
                with _schema(connection, self._tenants, self._targets):
                    return self._play(connection, Path(folder), watch)
        except psycopg.Error as error:
            raise DatabaseError(f"the demo's database failed: {error}", error.sqlstate) from error

    def _play(self, connection: _Connection, folder: Path, watch: Callable[[State], None]) -> State:
        began = connection.execute("SELECT clock_timestamp()").fetchall()[0][0]
        self._begin = time.monotonic()
        threads = [threading.Thread(target=self._deploy, args=(each, folder)) for each in self._deployments]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(_LOOK_SECONDS)
                watch(self._look(connection, began))
        finally:
            self._stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        return self._look(connection, began)

    def _look(self, connection: _Connection, began: datetime) -> State:
        for each in self._deployments:
            if each.failure is not None:
                # A step that failed did not come to tell its end.
                connection.execute(
                    f"UPDATE {steps.SCHEMA}.events SET ended = clock_timestamp() "  # noqa: S608 - a constant
                    "WHERE tenant = %s AND target = %s AND ended IS NULL",
                    (each.tenant, each.target),
                )
        rows = connection.execute(
            f"""SELECT tenant, target, step, door,
                       round(extract(epoch FROM began - %(began)s), 3)::float8,
                       round(extract(epoch FROM coalesce(ended, clock_timestamp()) - %(began)s), 3)::float8,
                       ended IS NULL, alarm
                FROM {steps.SCHEMA}.events ORDER BY target, tenant, step""",  # noqa: S608 - a constant
            {"began": began},
        ).fetchall()
        asked = {(each.tenant, each.target): each.asked for each in self._deployments}
        events = [
            Event(
                tenant,
                target,
                step,
                door,
                start,
                end,
                # Without the lock nothing is waited for.
                asked=min(asked[tenant, target][step], start) if self._locked else start,
                running=running,
                alarm=alarm,
            )
            for tenant, target, step, door, start, end, running, alarm in rows
        ]
        return State(self._deployments, events, self._locked)

    def _deploy(self, deployment: Deployment, folder: Path) -> None:
        for step in STEPS:
            argv = self._argv(deployment, step, folder)
            deployment.asked[step] = round(time.monotonic() - self._begin, 3)
            try:
                process = self._start(argv)
            except OSError as error:
                deployment.failure = f"step {step}: its process could not be started: {error}"
                return
            if process is None:
                return
            _, stderr = process.communicate()
            with self._gate:
                self._processes.discard(process)
            if process.returncode:
                deployment.failure = f"step {step}: {_error(stderr) or f'exit code {process.returncode}'}"
                return

    def _argv(self, deployment: Deployment, step: str, folder: Path) -> list[str]:
        """The command line of one step; that of step b depends on the tenant's door."""
        tenant, target, door = deployment.tenant, deployment.target, deployment.door
        work = [part for statement in steps.step(step, tenant, target, door) for part in ("-c", statement)]
        if step != "b" or (not self._locked and door != "python"):
            return [*self._client(), *work]
        if door == "python":
            return [
                sys.executable,
                "-m",
                "dblock.demo.step_b",
                tenant,
                target,
                *([] if self._locked else ["--no-lock"]),
            ]
        if door == "run":
            names = [f"--target={target}", "--step=b", f"--tenant={tenant}"]
            return [sys.executable, "-m", "dblock", "run", *names, "--", *self._client(), *work]
        wishes = (f"set dblock.{name} = '{value}'" for name, value in
                  {"target": target, "step": "b", "tenant": tenant}.items())  # fmt: skip
        set_wishes = [part for wish in wishes for part in ("-c", wish)]
        return [*self._client(), *set_wishes, "-f", str(folder / "acquire.sql"), *work, "-f",
                str(folder / "release.sql")]  # fmt: skip

    def _client(self) -> list[str]:
        if self._psql is None:
            return [sys.executable, "-m", "dblock.demo.client", self._url]
        return [str(self._psql), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", self._url]

    def _start(self, argv: list[str]) -> subprocess.Popen[str] | None:
        with self._gate:
            if self._stopped:
                return None
            process = subprocess.Popen(
                argv,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for the demo, which then ends them all
            )
            self._processes.add(process)
            return process

    def _environment(self) -> dict[str, str]:
        """The caller's own environment, without the wishes that somebody's deployment may have left in it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DBLOCK_")}
        return {**kept, "DBLOCK_URL": self._url}

    def _stop(self) -> None:
        """End what still runs; without effect where everything has come to its end."""
        with self._gate:
            self._stopped = True
            running = list(self._processes)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _END_SECONDS
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()


def _error(stderr: str) -> str:
    """The line that says why, among hints, contexts and what was logged before."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line.partition("ERROR:")[2].strip() for line in lines if "ERROR:" in line]
    return (errors or lines[-1:] or [""])[0]


@contextmanager
def _schema(connection: _Connection, tenants: list[str], targets: list[str]) -> Iterator[None]:
    """The demo's schema, made and removed."""
    with connection.transaction():
        try:
            for statement in steps.set_up(tenants, targets):
                connection.execute(statement.encode())
        except psycopg.errors.DuplicateSchema as error:
            raise DatabaseError(
                f"the schema {steps.SCHEMA} is there already: another demo runs in this database, or one was killed "
                f"and left it behind; if so, DROP SCHEMA {steps.SCHEMA} CASCADE"
            ) from error
    try:
        yield
    finally:
        for statement in steps.tear_down():
            connection.execute(statement.encode())
