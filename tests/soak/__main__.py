"""The soak from its beginning to its end: servers, workers, faults, the verdict, the table.

    python -m tests.soak [--minutes 20] [--json FILE] [--log FILE]

Exits with 1 where there are violations. On Linux only: it asks /proc, as ``dblock run`` does there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from dblock.demo.server import Server, postgres_server
from tests.soak.events import PATIENCE_SECONDS, Log, Reader
from tests.soak.faults import WEIGHTS, FaultMaker
from tests.soak.referee import LEFT_SECONDS, NOTICE_SECONDS, Referee
from tests.soak.servers import Observer, PostgresObserver, SqlServerObserver
from tests.soak.worker import MOST_SLOTS, STEP

ROOT = Path(__file__).parent.parent.parent
DOORS = ("lock", "lock", "lock", "alock", "alock", "dblock run", "dblock run", "psql", "psql", "script", "script",
         "connection", "connection", "SQLAlchemy", "SQLAlchemy")  # fmt: skip
MSSQL_DOORS = ("lock", "alock", "dblock run", "script", "connection", "SQLAlchemy")
LOOK_SECONDS = 0.5
PAUSE_SECONDS = 0.01
PROGRESS_SECONDS = 30
SHOWN_VIOLATIONS = 20
COMPLAINT_LINES = 30  # of a crash there are many
ENDED_BY_FAULTS = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 130}  # the second and third as it starts
HANG_SECONDS = PATIENCE_SECONDS + 20  # for a worker to end what it is doing: a wait, and more than the longest section


@dataclass(frozen=True)
class Plan:
    """What kind of soak.

    Attributes:
        seconds: how long.
        fault_seconds: between two faults, in the mean.
        faults: their kinds.
        doors: of the workers on PostgreSQL.
        targets: how many.
        long_share: of the sections, that last for seconds.
        patience_seconds: the longest time to wait for a lock.
        notice_seconds: as of the referee.
        plant: a bug to be planted into each worker.
        mssql_url: of a SQL Server, if there is one.
        log: where the events go; None: nowhere that remains.
    """

    seconds: float
    fault_seconds: float = 0.5
    faults: Sequence[str] = tuple(WEIGHTS)
    doors: Sequence[str] = DOORS
    targets: int = 8
    long_share: float = 0.025
    patience_seconds: float = PATIENCE_SECONDS
    notice_seconds: float = NOTICE_SECONDS
    plant: str | None = None
    mssql_url: str | None = None
    log: Path | None = None


class WorkerProcess:
    """A worker's process, started anew whenever it has ended."""

    def __init__(self, configuration: dict[str, Any], log: Log, complaints: Path) -> None:
        self.number = configuration["number"]
        self.door = configuration["door"]
        self._argv = [sys.executable, "-X", "faulthandler", "-m", "tests.soak.worker", json.dumps(configuration)]
        self._log = log
        self._complaints = complaints
        self.start()

    def start(self) -> None:
        with self._complaints.open("a") as complaints:
            self.process = subprocess.Popen(
                self._argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=complaints, stderr=complaints,
                start_new_session=True,
            )  # fmt: skip

    def has_ended(self) -> bool:
        """Whether it has, and if so, end what is left of its clients."""
        # It stays a zombie until its group is killed: so that the group's number is nobody else's.
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self.kill()
        return True

    def kill(self) -> None:
        # Its clients are in its process group; a command of dblock run is ended by dblock run's own watcher.
        if self.process.returncode is not None:
            return
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self._log.write("gone", worker=self.process.pid)

    def complaint(self) -> str:
        return " / ".join(self._complaints.read_text(errors="replace").splitlines()[-COMPLAINT_LINES:])

    def __str__(self) -> str:
        return f"worker {self.number} ({self.door})"

    def tell(self, text: bytes) -> None:
        """Write to its stdin."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(text)
            self.process.stdin.flush()


@contextmanager
def network(url: str, count: int) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The network that can be cut, and the URL of the server through each of its links."""
    server = urlsplit(url)
    argv = [sys.executable, "-m", "tests.soak.network", str(server.hostname), str(server.port), str(count)]
    with subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            credentials, _, _ = server.netloc.rpartition("@")
            ports = json.loads(process.stdout.readline())
            yield process, [server._replace(netloc=f"{credentials}@127.0.0.1:{port}").geturl() for port in ports]
        finally:
            process.kill()


class Soak:
    def __init__(self, plan: Plan, server: Server, folder: Path, stack: ExitStack) -> None:
        self._plan = plan
        self._referee = Referee(plan.notice_seconds)
        path = str(plan.log or folder / "log")
        Path(path).unlink(missing_ok=True)
        self._log = Log(path)
        self._reader = Reader(path)
        stack.callback(self._reader.close)
        stack.callback(self._log.close)
        self._targets = [f"web-{number:02}" for number in range(plan.targets)]
        self._observers: dict[str, Observer] = {"postgres": PostgresObserver(server.url)}
        urls, doors = {"postgres": server.url}, {"postgres": tuple(plan.doors)}
        if plan.mssql_url:
            self._observers["mssql"] = SqlServerObserver(plan.mssql_url)
            urls["mssql"], doors["mssql"] = plan.mssql_url, MSSQL_DOORS
        for observer in self._observers.values():
            stack.callback(observer.close)
        self._workers: list[WorkerProcess] = []
        stack.callback(self._end_all)
        networks = {}
        for engine, url in urls.items():
            networks[engine], cut_urls = stack.enter_context(network(url, len(doors[engine])))
            for link, door in enumerate(doors[engine]):
                number = len(self._workers)
                configuration = {
                    "number": number, "door": door, "engine": engine, "url": url, "cut_url": cut_urls[link],
                    "link": link, "targets": self._targets, "log": path, "long_share": plan.long_share,
                    "patience": plan.patience_seconds, "plant": plan.plant,
                }  # fmt: skip
                self._workers.append(WorkerProcess(configuration, self._log, folder / f"worker-{number}"))
        self._faults = FaultMaker(self._referee, self._log, server, self._observers, networks, kinds=plan.faults)
        self._next_look = 0.0

    def run(self, console: Console) -> dict[str, Any]:
        began = time.monotonic()
        next_fault = began + 2  # when the first workers are at work
        next_progress = began + PROGRESS_SECONDS
        while time.monotonic() < began + self._plan.seconds:
            self._step(restart=True)
            now = time.monotonic()
            if now >= next_fault:
                self._faults.make()
                next_fault = now + random.expovariate(1 / self._plan.fault_seconds)
            if now >= next_progress:
                next_progress += PROGRESS_SECONDS
                sections, faults = len(self._referee.sections), self._referee.faults.total()
                console.print(f"{now - began:6.0f} s: {sections} tries, {faults} faults")
        self._finish()
        self._referee.judge()
        return {"seconds": round(time.monotonic() - began), **self._referee.figures()}

    def _step(self, *, restart: bool) -> None:
        """What is to be done all the time."""
        time.sleep(PAUSE_SECONDS)
        self._referee.read(self._reader.new())
        self._faults.thaw()
        for worker in self._workers:
            if worker.process.returncode is None and worker.has_ended():
                if worker.process.returncode not in ENDED_BY_FAULTS:
                    code = worker.process.returncode
                    self._referee.violations.append(f"{worker} ended by itself with {code}: {worker.complaint()}")
                if restart:
                    worker.start()
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            for engine, observer in self._observers.items():
                self._referee.look(time.monotonic(), engine, observer.rows())

    def _finish(self) -> None:
        """Let all come to their end, and see what is left, while all the sessions still live."""
        self._faults.thaw(all_of_them=True)
        for worker in self._workers:
            worker.tell(b"\n")
        deadline = time.monotonic() + HANG_SECONDS
        while waited_for := [
            worker
            for worker in self._workers
            if worker.number not in self._referee.idle and worker.process.returncode is None
        ]:
            self._step(restart=False)
            if time.monotonic() > deadline:
                self._referee.violations += [f"{worker} hangs" for worker in waited_for]
                break
        # What is left behind is known by then.
        deadline = time.monotonic() + LEFT_SECONDS + 1
        while any(observer.rows() for observer in self._observers.values()) and time.monotonic() < deadline:
            self._step(restart=False)
        for engine, observer in self._observers.items():
            self._referee.violations += [
                f"{STEP}@{target} on {engine} cannot be had any more"
                for target in self._targets
                if not observer.free(target, STEP, MOST_SLOTS)
            ]
        self._referee.read(self._reader.new())

    def _end_all(self) -> None:
        for worker in self._workers:
            worker.kill()


def soak(plan: Plan, console: Console | None = None) -> dict[str, Any]:
    """Run a soak.

    Returns:
        What was done and what was found, ready for JSON.
    """
    folder = Path(tempfile.mkdtemp(prefix="dblock-soak-"))
    try:
        with postgres_server() as server, ExitStack() as stack:
            return Soak(plan, server, folder, stack).run(console or Console(stderr=True))
    finally:
        shutil.rmtree(folder)


def show(found: dict[str, Any], console: Console) -> None:
    held = found["held"]
    shapes = sorted({shape for counts in held.values() for shape in counts})
    table = Table("critical sections", *shapes, "all", title=f"{found['sections']} in {found['seconds']} s")
    for door, counts in sorted(held.items()):
        table.add_row(door, *(str(counts[shape]) for shape in shapes), str(counts.total()))
    console.print(table)
    table = Table("faults", "", title=f"{found['faults'].total()} faults")
    for name, count in sorted(found["faults"].items()):
        table.add_row(name, str(count))
    console.print(table)
    table = Table("a loss, until the holder was told", "times", "median, ms", "worst, ms")
    for what, times in found["noticed"].items():
        table.add_row(what, str(times["times"]), f"{times['median'] * 1000:.0f}", f"{times['worst'] * 1000:.0f}")
    console.print(table)
    console.print("order:", ", ".join(f"{count} {what}" for what, count in found["order"].items()))
    console.print("violations:", len(found["violations"]))
    for violation in found["violations"][:SHOWN_VIOLATIONS]:
        console.print(f"  {violation.splitlines()[0]}", markup=False, highlight=False, soft_wrap=True)


def interrupted(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    parser.add_argument("--log", type=Path, metavar="FILE", help="write all events there")
    args = parser.parse_args()
    for file in filter(None, (args.json, args.log)):
        file.parent.mkdir(parents=True, exist_ok=True)  # before the work of many minutes, and not after it
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one is ignored in the background
        signal.signal(number, interrupted)
    plan = Plan(seconds=args.minutes * 60, log=args.log, mssql_url=os.environ.get("DBLOCK_TEST_MSSQL_URL"))
    console = Console()
    try:
        found = soak(plan, console)
    except KeyboardInterrupt:
        console.print("broken off: nothing is left behind")
        return 130
    show(found, console)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
