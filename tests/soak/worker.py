"""A worker: takes locks through one door, one after the other, in all shapes that the door has, until told to stop.

    python -m tests.soak.worker CONFIGURATION

Says what it believes into the log, and nothing else. On stdin, a line means: take no more locks, but stay, with all
connections as they are. The end of stdin ends it. SIGINT and SIGTERM break off what it is just doing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import dblock
from tests import doors
from tests.soak import plants
from tests.soak.events import GRACE_SECONDS, HEARTBEAT_SECONDS, Inside, Log

STEP = "b"
MOST_SLOTS = 3
TIMEOUTS_SECONDS = (0.0, 0.02, 0.2, 2.0)
LONG_SECONDS = (1.0, 4.0)
LONG_SECONDS_IN_A_CUT = (3.0, 10.0)  # long enough to be told of it
ENDED_SECONDS = 10  # for a client that is told to end


class ToldError(Exception):
    """The holder was told that its lock is lost."""


class EndedError(Exception):
    """A client in a process of its own ended otherwise than it should."""


class BrokenOffError(KeyboardInterrupt):
    """A signal asked for the end of what is being done."""


@dataclass(frozen=True)
class Configuration:
    """What a worker is told, as JSON."""

    number: int
    link: int  # of the network that is cut at times
    door: str
    engine: str
    url: str
    cut_url: str  # the same server, through that link
    targets: list[str]
    log: str
    long_share: float  # of the sections, that last for seconds
    patience: float  # the longest time to wait
    plant: str | None


@dataclass(frozen=True)
class Wish:
    """One attempt to hold a lock."""

    section: str
    targets: list[str]
    shared: bool
    slots: int | None
    in_transaction: bool
    timeout: float
    seconds: float  # to stay inside

    @property
    def shape(self) -> str:
        if self.in_transaction:
            return "transaction"
        if len(self.targets) > 1:
            return "several targets"
        return "shared" if self.shared else "slots" if self.slots else "exclusive"

    def arguments(self) -> dict[str, Any]:
        """As `dblock.lock` and `dblock.alock` want it."""
        return {
            "target": self.targets,
            "step": STEP,
            "tenant": self.section,
            "timeout": self.timeout,
            "shared": self.shared,
            "slots": self.slots,
            "scope": "transaction" if self.in_transaction else "session",
            "heartbeat": HEARTBEAT_SECONDS,
        }

    def scripts(self) -> list[doors.Wish]:
        """As the raw scripts want it: one for each target, in the order of the keys."""
        return [
            doors.Wish(
                target,
                STEP,
                self.section,
                str(self.timeout),
                shared=self.shared,
                slots=None if self.slots is None else str(self.slots),
                in_transaction=self.in_transaction,
            )
            for target in sorted(self.targets, key=lambda target: dblock.key(target, STEP).value)
        ]


class Door:
    """A way of taking locks. Called with each wish; keeps what a caller of its kind would keep."""

    watched = True  # the holder is told of a loss; otherwise it asks
    in_process = True  # the worker's own process is the one that is told
    transactions = False
    pause_seconds = 0.15  # between two sections, at most

    def __init__(self, configuration: Configuration, log: Log) -> None:
        self.engine = configuration.engine
        self.log = log
        self.prepare()

    def prepare(self) -> None: ...

    def choose(self) -> None:
        """Choose what the next section goes through."""

    def hold(self, wish: Wish, inside: Inside, url: str) -> None:
        """Hold the lock for the section's time. Returning means: it was given back, and held until then."""
        raise NotImplementedError


# --- what a holder does inside ----------------------------------------------------------------------------------------


def watch(inside: Inside, lock: dblock.Lock) -> None:
    """Work under a lock that tells of its loss."""
    inside.enter(list(lock.slots))
    for pause in inside.pauses():
        if lock.lost.wait(pause):
            inside.told()
            raise ToldError
        inside.still()
    inside.leave()


def ask_again_and_again(inside: Inside, slots: list[int], ask: Callable[[], object]) -> None:
    """Work on the connection that holds the lock: as long as it answers, the lock was held when it was asked."""
    asked = time.monotonic()
    ask()
    inside.enter(slots, at=asked)
    for pause in inside.pauses():
        time.sleep(pause)
        asked = time.monotonic()
        ask()
        inside.still(at=asked)
    inside.leave()


# --- the doors --------------------------------------------------------------------------------------------------------


class LockDoor(Door):
    """`dblock.lock` with a URL."""

    def hold(self, wish: Wish, inside: Inside, url: str) -> None:
        with dblock.lock(url, **wish.arguments()) as lock:
            watch(inside, lock)


class AsyncDoor(Door):
    """`dblock.alock` with a URL, or on psycopg's asynchronous connection."""

    transactions = True

    def choose(self) -> None:
        self.watched = self.engine == "mssql" or random.random() < 0.7

    def hold(self, wish: Wish, inside: Inside, url: str) -> None:
        try:
            asyncio.run(self._main(wish, inside, url))
        finally:
            handle_signals()  # the loop has put the default ones back

    async def _main(self, wish: Wish, inside: Inside, url: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        if self.watched:
            async with dblock.alock(url, **wish.arguments()) as lock:
                await self._watch(inside, lock)
            return
        import psycopg

        connection = await psycopg.AsyncConnection.connect(url, autocommit=not wish.in_transaction)
        async with connection, dblock.alock(connection, **wish.arguments()) as lock:
            await self._ask(inside, list(lock.slots), lock.check)
            await connection.commit()

    async def _watch(self, inside: Inside, lock: dblock.AsyncLock) -> None:
        inside.enter(list(lock.slots))
        for pause in inside.pauses():
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(lock.lost.wait(), pause)
            if lock.lost.is_set():
                inside.told()
                raise ToldError
            inside.still()
        inside.leave()

    async def _ask(self, inside: Inside, slots: list[int], ask: Callable[[], Awaitable[object]]) -> None:
        asked = time.monotonic()
        await ask()
        inside.enter(slots, at=asked)
        for pause in inside.pauses():
            await asyncio.sleep(pause)
            asked = time.monotonic()
            await ask()
            inside.still(at=asked)
        inside.leave()


class RunDoor(Door):
    """``dblock run``: the holder is the command."""

    in_process = False
    pause_seconds = 1.5  # two interpreters for each section: there is not much room for more

    def hold(self, wish: Wish, inside: Inside, url: str) -> None:  # noqa: ARG002 - the command has its own
        shape = ["--shared"] if wish.shared else ["--slots", str(wish.slots)] if wish.slots else []
        targets = [option for target in wish.targets for option in ("--target", target)]
        manner = "stubborn" if random.random() < 0.3 else "willing"
        argv = [sys.executable, "-m", "dblock", "run", *targets, "--step", STEP, "--tenant", wish.section, "--timeout",
                str(wish.timeout), "--heartbeat", f"{HEARTBEAT_SECONDS}s", "--grace", f"{GRACE_SECONDS}s", *shape, "--",
                sys.executable, "-E", "-S", "-m", "tests.soak.command", self.log.path, wish.section, str(wish.seconds),
                manner]  # fmt: skip
        with subprocess.Popen(
            argv,
            env=os.environ | {"DBLOCK_URL": url},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                self.log.write("party", wish.section, pid=process.pid)
                _, said = process.communicate()
            finally:
                end(process)
        if process.returncode == doors.COMMAND.says("lost"):
            raise dblock.LockLost(said)
        if process.returncode:
            raise EndedError(f"exit code {process.returncode}")


class PsqlDoor(Door):
    """The raw scripts, through psql. The worker plays the step's author, who sits at its other end."""

    watched = False
    in_process = False
    transactions = True

    def hold(self, wish: Wish, inside: Inside, url: str) -> None:
        begin, commit = (["-c", "BEGIN"], ["-c", "COMMIT"]) if wish.in_transaction else ([], [])
        acquire = [
            option
            for script in wish.scripts()
            for option in ("-c", doors.set_wishes(script), "-f", str(doors.SQL / "acquire.sql"))
        ]
        release = ["-f", str(doors.SQL / "release.sql")] * len(wish.targets)
        argv = ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", url, "-c", CHECK_INTERVAL, *begin,
                *acquire, "-c", SHOW_SLOT, "-f", "-", *release, *commit]  # fmt: skip
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            try:
                self.log.write("party", wish.section, pid=process.pid)
                while not (line := self._line(process)).startswith("slot"):
                    pass  # what set the wishes has rows
                ask_again_and_again(inside, [int(slot) for slot in line.split()[1:]], lambda: self._ask(process))
                process.communicate()
            finally:
                end(process)
        if process.returncode:
            raise self._ended(process)

    def _ask(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write("SELECT 'here';\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(process) from None
        if self._line(process) != "here":
            raise EndedError("psql said something else")

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise self._ended(process)
        return line.strip()

    def _ended(self, process: subprocess.Popen[str]) -> EndedError:
        return EndedError(f"exit code {process.wait()}")


class ScriptDoor(Door):
    """The raw scripts, through a driver that knows nothing of them."""

    watched = False
    transactions = True

    def hold(self, wish: Wish, inside: Inside, url: str) -> None:
        connect, folder, set_wishes, slot = (
            (connect_psycopg, doors.SQL, doors.set_wishes, "SHOW dblock.slot")
            if self.engine == "postgres"
            else (connect_pymssql, doors.TSQL, doors.set_session_context,
                  "SELECT CAST(SESSION_CONTEXT(N'dblock.slot') AS nvarchar(9))")
        )  # fmt: skip
        with closing(connect(url, autocommit=not wish.in_transaction)) as connection:
            cursor = connection.cursor()
            if self.engine == "postgres":
                cursor.execute(CHECK_INTERVAL)

            def say(text: str) -> None:
                cursor.execute(text)
                while cursor.nextset():
                    pass

            for script in wish.scripts():
                say(set_wishes(script))
                say((folder / "acquire.sql").read_text())

            def ask() -> str:
                cursor.execute(slot)
                (found,) = cursor.fetchone()
                return found.decode() if isinstance(found, bytes) else found or ""

            ask_again_and_again(inside, [int(ask())] if wish.slots else [], ask)
            for _ in wish.targets:
                say((folder / "release.sql").read_text())
            connection.commit()


class ConnectionDoor(Door):
    """The caller's own connections of the driver, which go on from section to section as long as they can."""

    watched = False
    transactions = True

    def prepare(self) -> None:
        self._connections: dict[tuple[str, bool], Any] = {}

    def hold(self, wish: Wish, inside: Inside, url: str) -> None:
        connection = self._usable((url, wish.in_transaction))
        try:
            with dblock.lock(connection, **wish.arguments()) as lock:
                ask_again_and_again(inside, list(lock.slots), lock.check)
                connection.commit()
        except BaseException:
            with suppress(Exception):
                connection.rollback()  # or the transaction would go on, and its lock with it
            raise

    def _usable(self, kind: tuple[str, bool]) -> Any:
        url, in_transaction = kind
        if kind in self._connections:
            try:
                self._connections[kind].cursor().execute("SELECT 1")
                self._connections[kind].rollback()
                return self._connections[kind]
            except Exception:  # noqa: BLE001 - it is not usable
                self._connections.pop(kind).close()
        connect = connect_psycopg if self.engine == "postgres" else connect_pymssql
        self._connections[kind] = connect(url, autocommit=not in_transaction)
        return self._connections[kind]


class AlchemyDoor(Door):
    """SQLAlchemy's engine, from which the lock takes a connection of its own; or its connection, or its session."""

    transactions = True

    def prepare(self) -> None:
        import sqlalchemy.orm  # noqa: F401 - now, and not in the first section

        self._engines: dict[tuple[str, bool], Any] = {}

    def choose(self) -> None:
        self.watched = random.random() < 0.3

    def hold(self, wish: Wish, inside: Inside, url: str) -> None:
        engine = self._engine(url, autocommit=not wish.in_transaction)
        if self.watched:
            with dblock.lock(engine, **wish.arguments()) as lock:
                watch(inside, lock)
            return
        from sqlalchemy.orm import Session

        opened = engine.connect() if random.random() < 0.5 else Session(engine)
        with opened as connection, dblock.lock(connection, **wish.arguments()) as lock:
            ask_again_and_again(inside, list(lock.slots), lock.check)
            if wish.in_transaction:
                connection.commit()

    def _engine(self, url: str, *, autocommit: bool) -> Any:
        import sqlalchemy

        if (url, autocommit) not in self._engines:
            options = {"isolation_level": "AUTOCOMMIT"} if autocommit else {}
            self._engines[url, autocommit] = sqlalchemy.create_engine(
                url.replace("postgresql://", "postgresql+psycopg://"), pool_size=1, max_overflow=0, **options
            )
        return self._engines[url, autocommit]


DOORS: dict[str, type[Door]] = {
    "lock": LockDoor,
    "alock": AsyncDoor,
    "dblock run": RunDoor,
    "psql": PsqlDoor,
    "script": ScriptDoor,
    "connection": ConnectionDoor,
    "SQLAlchemy": AlchemyDoor,
}

SHOW_SLOT = "SELECT 'slot ' || current_setting('dblock.slot')"

# As acquire.sql advises, so that a waiter whose client is killed leaves.
CHECK_INTERVAL = "SET client_connection_check_interval = '500ms'"


def connect_psycopg(url: str, *, autocommit: bool) -> Any:
    import psycopg

    return psycopg.connect(url, autocommit=autocommit)


def connect_pymssql(url: str, *, autocommit: bool) -> Any:
    import pymssql

    from dblock import driver_pymssql

    return pymssql.connect(**driver_pymssql._arguments(url), autocommit=autocommit)


def end(process: subprocess.Popen[str]) -> None:
    """End a client that is still there because the worker was broken off."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(ENDED_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


# --- one after the other ----------------------------------------------------------------------------------------------


class Worker:
    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration
        self._log = Log(configuration.log)
        self._door = DOORS[configuration.door](configuration, self._log)
        self._count = 0

    def run(self) -> None:
        while not (ready := select.select([sys.stdin], [], [], random.uniform(0, self._door.pause_seconds))[0]):
            with suppress(KeyboardInterrupt):  # what was being done is broken off, and the next thing begins
                self._section()
        self._log.write("idle", number=self._configuration.number)
        while ready and sys.stdin.readline():
            pass

    def _section(self) -> None:
        self._door.choose()
        cut = random.random() < 0.4
        wish = self._wish(LONG_SECONDS_IN_A_CUT if cut and self._door.watched else LONG_SECONDS)
        pids = [os.getpid()] if self._door.in_process else []
        self._log.write(
            "wanted", wish.section, worker=os.getpid(), door=self._configuration.door, shape=wish.shape,
            engine=self._configuration.engine, targets=wish.targets, shared=wish.shared, slots=wish.slots,
            timeout=wish.timeout, watched=self._door.watched, pids=pids,
            link=self._configuration.link if cut else None,
        )  # fmt: skip
        inside = Inside(self._log, wish.section, wish.seconds)
        try:
            self._door.hold(wish, inside, self._configuration.cut_url if cut else self._configuration.url)
        except (ToldError, dblock.LockLost) as error:
            self._log.write("lost", wish.section, why=f"{type(error).__name__}: {error}")
        except (KeyboardInterrupt, asyncio.CancelledError):
            self._log.write("failed", wish.section, why="broken off")
            raise BrokenOffError from None
        except Exception as error:  # noqa: BLE001 - judged by what it is
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if expected(error):
                self._log.write("failed", wish.section, why=why)
            else:
                self._log.write("broken", wish.section, why=f"{why}\n{traceback.format_exc()}")
        else:
            self._log.write("released", wish.section)

    def _wish(self, long_seconds: tuple[float, float]) -> Wish:
        self._count += 1
        targets = self._configuration.targets
        number = random.choices([1, 2, 3], [16, 1, 1])[0]
        shape = random.choice(["exclusive", "exclusive", "shared", "slots"]) if number == 1 else "exclusive"
        long = random.random() < self._configuration.long_share
        return Wish(
            section=f"{os.getpid()}-{self._count}",
            targets=random.sample(targets, min(number, len(targets))),
            shared=shape == "shared",
            slots=random.randint(2, MOST_SLOTS) if shape == "slots" else None,
            in_transaction=self._door.transactions and not self._door.watched and random.random() < 0.4,
            timeout=random.choice(TIMEOUTS_SECONDS) if random.random() < 0.5 else self._configuration.patience,
            seconds=random.uniform(*long_seconds) if long else random.uniform(0, 0.02),
        )


def expected(error: Exception) -> bool:
    """Whether it is what a lock that was not acquired, or a server that is gone, may say."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, (dblock.Error, EndedError, OSError)) or package in {"psycopg", "pymssql", "sqlalchemy"}


def handle_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, broken_off)


def broken_off(_number: int, _frame: object) -> NoReturn:
    raise BrokenOffError


def main() -> None:
    configuration = Configuration(**json.loads(sys.argv[1]))
    logging.getLogger("dblock").setLevel(logging.CRITICAL)  # each loss is said, too
    if configuration.plant is not None:
        plants.PLANTS[configuration.plant]()
    worker = Worker(configuration)
    handle_signals()
    worker.run()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
