"""``make bench``: dblock beside the raw driver and beside its peers, on one server, in one run.

    python -m benchmarks [--rounds 40] [--output .bench] [--mssql URL]

Rounds are interleaved, so that noise hits all alike; what is shown are medians, and ratios of medians. Each peer is
pinned and has an environment of its own. A table in Markdown and JSON and the plots land in the output folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg

import dblock
from benchmarks import slots
from dblock.demo.server import Server, postgres_server

PINS = {
    "postgresql-lock": ["postgresql-lock==0.1.9", "psycopg[binary]>=3.2"],
    "sqlalchemy-dlock": ["sqlalchemy-dlock==0.9.0", "psycopg[binary]>=3.2", "pymssql>=2.3"],
    "pals": ["PALs==0.4.0", "psycopg2-binary>=2.9"],
    "django-pglock": ["django-pglock==1.8.0", "psycopg[binary]>=3.2"],
    "tooz": ["tooz==9.1.0", "psycopg2-binary>=2.9"],
}
OURS = ("raw", "raw SQLAlchemy", "dblock", "dblock's statements", "dblock SQLAlchemy")
WAIT_IN_THE_SERVER = ("pals", "django-pglock")  # with a timeout; none of the peers names its holder
PAIRS = 20  # in each round
CROWDS = (2, 10, 100, 400)
HANDOFFS = 15
REST_SECONDS = 10
CONTESTANT = Path(__file__).with_name("contestant.py")


@dataclass
class Result:
    """A row of the table.

    Attributes:
        what: what was measured.
        figure: what came of it.
        target: what it should be.
        met: whether it is.
    """

    what: str
    figure: str
    target: str
    met: bool

    @classmethod
    def ratio(cls, what: str, ours: list[float], theirs: list[float], most: float, unit: float = 1e6) -> Result:
        """Judge a ratio of medians."""
        mine, raw = statistics.median(ours), statistics.median(theirs)
        named = "µs" if unit > 1e3 else "ms"
        figure = f"{mine / raw:.2f} × ({mine * unit:.0f} {named} to {raw * unit:.0f} {named}, {_spread(ours, unit)})"
        return cls(what, figure, f"≤ {most:g} ×", mine <= most * raw)


def _spread(seconds: list[float], unit: float) -> str:
    low, _, high = statistics.quantiles(seconds, n=4)
    return f"quartiles {low * unit:.0f} to {high * unit:.0f}"


# --- contestants ------------------------------------------------------------------------------------------------------


class Contestant:
    """A process that does what it is told."""

    def __init__(self, python: str, name: str, url: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, str(CONTESTANT), name, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin
        assert self.process.stdout
        self._in, self._out = self.process.stdin, self.process.stdout
        self.answer()

    def tell(self, command: str) -> None:
        self._in.write(f"{command}\n")
        self._in.flush()

    def answer(self) -> Any:
        return json.loads(self._out.readline())

    def ask(self, command: str) -> Any:
        self.tell(command)
        return self.answer()

    def close(self) -> None:
        self._in.close()
        self.process.wait(30)
        self._out.close()


def environments(folder: Path) -> dict[str, str]:
    """The interpreters of the contestants; peers that cannot be installed here are left out, and said so."""
    found = dict.fromkeys(OURS, sys.executable)
    for peer, pins in PINS.items():
        python = folder / peer / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder / peer)], check=True)
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode == 0:
            found[peer] = str(python)
        else:
            print(f"{peer} is left out: it cannot be installed here")
    return found


@contextmanager
def playing(pythons: dict[str, str], names: list[str], url: str) -> Iterator[dict[str, Contestant]]:
    with ExitStack() as stack:
        players = {}
        for name in names:
            players[name] = Contestant(pythons[name], name, url)
            stack.callback(players[name].close)
        yield players


def interleaved(players: dict[str, Contestant], command: str, rounds: int) -> dict[str, list[float]]:
    """Let all of them take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in players}
    for player in players.values():
        player.ask(f"{command} 5")
    for _ in range(rounds):
        for name, player in players.items():
            seconds[name] += player.ask(f"{command} {PAIRS}")
    return seconds


def handoffs(python: str, name: str, url: str, count: int, acquire: str = "acquire") -> list[float]:
    """From the release in one process to the grant in another one, in seconds."""
    seconds = []
    with ExitStack() as stack:
        holder, waiter = (Contestant(python, name, url) for _ in range(2))
        stack.callback(holder.close)
        stack.callback(waiter.close)
        for number in range(count):
            holder.ask(acquire)
            waiter.tell(acquire)
            time.sleep(0.3 + number * 0.013)  # those who poll are somewhere between two looks
            released = holder.ask("release")
            seconds.append(waiter.answer() - released)
            waiter.ask("release")
    return seconds


# --- the rows ---------------------------------------------------------------------------------------------------------


def uncontended(url: str, pythons: dict[str, str], rounds: int) -> Iterator[Result]:
    names = [name for name in pythons if "SQLAlchemy" not in name]
    with playing(pythons, names, url) as players:
        pairs = interleaved(players, "pairs", rounds)
        timed = interleaved({n: p for n, p in players.items() if n in ("dblock", *WAIT_IN_THE_SERVER)}, "timed", rounds)
    yield _with_floor(
        Result.ratio("acquire + release, open connection, label included", pairs["dblock"], pairs["raw"], 1.25), pairs
    )
    medians = {name: statistics.median(seconds) for name, seconds in pairs.items() if name not in OURS}
    if medians:
        fastest = min(medians, key=lambda name: medians[name])
        yield Result.ratio(f"the same beside the fastest peer, {fastest}", pairs["dblock"], pairs[fastest], 1.15)
    for peer in WAIT_IN_THE_SERVER:
        if peer in timed:
            yield Result.ratio(f"timed, beside {peer}, which waits in the server too", timed["dblock"], timed[peer], 1)
    yield Result.ratio("timed acquire + release", timed["dblock"], pairs["raw"], 1.3)
    with playing(pythons, ["raw SQLAlchemy", "dblock SQLAlchemy"], url) as players:
        pairs = interleaved(players, "pairs", rounds)
    yield Result.ratio("through SQLAlchemy", pairs["dblock SQLAlchemy"], pairs["raw SQLAlchemy"], 1.1)
    with playing(pythons, ["raw", "dblock", "dblock's statements"], url) as players:
        lives = interleaved(players, "lives", max(3, rounds // 10))
    yield _with_floor(Result.ratio("from a URL, whole life", lives["dblock"], lives["raw"], 1.15), lives)


def _with_floor(row: Result, seconds: dict[str, list[float]]) -> Result:
    """Add what is left of a row where the driver alone says what dblock says."""
    least = statistics.median(seconds["dblock's statements"]) / statistics.median(seconds["raw"])
    return replace(row, figure=f"{row.figure}; its statements by the driver alone: {least:.2f} ×")


def to_the_next(url: str, pythons: dict[str, str]) -> Iterator[Result]:
    raw = handoffs(pythons["raw"], "raw", url, HANDOFFS)
    ours = handoffs(pythons["dblock"], "dblock", url, HANDOFFS)
    yield Result.ratio("handoff, 2 processes", ours, raw, 2)
    if "sqlalchemy-dlock" in pythons:
        theirs = handoffs(pythons["sqlalchemy-dlock"], "sqlalchemy-dlock", url, 9, "acquire-timed")
        behind = statistics.median(theirs) / statistics.median(ours)
        yield Result(
            "handoff of sqlalchemy-dlock with a timeout, which polls",
            f"{behind:.0f} × ours",
            "≥ 50 ×",
            behind >= 50,
        )


def on_sql_server(url: str, pythons: dict[str, str], rounds: int) -> Iterator[Result]:
    """The rows that apply there. What server it is, the table says: another one of the same protocol is not as fast."""
    names = ["raw pymssql", "dblock pymssql", *(["sqlalchemy-dlock pymssql"] if "sqlalchemy-dlock" in pythons else [])]
    pythons = dict.fromkeys(OURS, sys.executable) | dict.fromkeys(names[:2], sys.executable) | pythons
    if len(names) > 2:
        pythons[names[2]] = pythons["sqlalchemy-dlock"]
    with playing(pythons, names, url) as players:
        pairs, timed = (interleaved(players, command, rounds) for command in ("pairs", "timed"))
        ours = {name: player for name, player in players.items() if name in names[:2]}
        lives = interleaved(ours, "lives", max(3, rounds // 10))
    where = _server_name(url)
    yield Result.ratio(f"{where}: acquire + release, open connection", pairs[names[1]], pairs[names[0]], 1.25)
    yield Result.ratio(f"{where}: timed acquire + release", timed[names[1]], timed[names[0]], 1.3)
    for peer in names[2:]:
        yield Result.ratio(f"{where}: timed, beside sqlalchemy-dlock", timed[names[1]], timed[peer], 1)
    yield Result.ratio(f"{where}: from a URL, whole life", lives[names[1]], lives[names[0]], 1.15)
    raw, dblocks = (handoffs(pythons[name], name, url, HANDOFFS) for name in names[:2])
    yield Result.ratio(f"{where}: handoff, 2 processes", dblocks, raw, 2)


def _server_name(url: str) -> str:
    from benchmarks.contestant import RawPymssql

    with RawPymssql(url).connection as connection, connection.cursor() as cursor:
        cursor.execute("SELECT CAST(SERVERPROPERTY('babelfish') AS int)")
        ((babelfish,),) = cursor.fetchall()
    return "Babelfish" if babelfish else "SQL Server"


@contextmanager
def crowd(url: str, size: int, served: list[tuple[int, float]]) -> Iterator[dblock.Lock]:
    """A holder, and so many waiters in one process, in the order of their numbers; and who was served when."""
    holder = dblock.lock(url, target="crowd", step="b")
    holder.acquire()

    def wait(number: int) -> None:
        with dblock.lock(url, target="crowd", step="b"):
            served.append((number, time.monotonic()))

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(size)]
    with psycopg.connect(url, autocommit=True) as observer:
        for number, thread in enumerate(threads):
            thread.start()
            while _waiting(observer) <= number:
                time.sleep(0.002)
    yield holder
    for thread in threads:
        thread.join()


def _waiting(observer: psycopg.Connection[Any]) -> int:
    row = observer.execute(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND mode = 'ExclusiveLock'"
        " AND granted AND objid BETWEEN 1 AND 2147483647"
    ).fetchone()
    return int(row[0]) if row else 0


def crowds(server: Server) -> Iterator[Result | tuple[str, dict[int, float]]]:
    medians: dict[int, float] = {}
    rest: dict[int, Rest] = {}
    ordered = True
    for size in CROWDS:
        order: list[tuple[int, float]] = []
        with crowd(server.url, size, order) as holder:
            rest[size] = at_rest(server, size)
            released = time.monotonic()
            holder.release()
        moments = [released, *(moment for _, moment in order)]
        medians[size] = statistics.median(later - earlier for earlier, later in pairwise(moments))
        ordered = ordered and [number for number, _ in order] == list(range(size))
    most, least = medians[CROWDS[-1]], medians[CROWDS[0]]
    told = ", ".join(f"{size}: {seconds * 1e3:.2f} ms" for size, seconds in medians.items())
    yield Result("handoff with waiters behind", f"{told}: {most / least:.2f} ×", "400 ≤ 2 × 2", most <= 2 * least)
    yield Result("their order", "kept" if ordered else "broken", "kept", ordered)
    most_waiters = rest[CROWDS[-1]]
    yield Result(
        f"{CROWDS[-1]} waiters at rest",
        f"{most_waiters.core:.0%} of a core, {most_waiters.messages:.2f} messages a second each, "
        f"{most_waiters.log} characters of log",
        "≤ 25 %, ≤ 1.2, 0",
        most_waiters.core <= 0.25 and most_waiters.messages <= 1.2 and most_waiters.log == 0,
    )
    yield "handoff with waiters behind (ms)", {size: seconds * 1e3 for size, seconds in medians.items()}
    yield "what waiters cost the server (% of a core)", {size: found.core * 100 for size, found in rest.items()}
    yield "memory of a waiting backend (MB)", {size: found.megabytes for size, found in rest.items()}


@dataclass
class Rest:
    """What waiters cost the server while nothing happens.

    Attributes:
        core: the part of one core that all backends use.
        messages: a second, of each waiter.
        log: characters written into the server's log.
        megabytes: of each backend, what it shares with others counted in parts.
    """

    core: float
    messages: float
    log: int
    megabytes: float


def at_rest(server: Server, size: int) -> Rest:
    with psycopg.connect(server.url, autocommit=True) as observer:
        pids = [
            pid
            for (pid,) in observer.execute(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
        ]

        def cost() -> tuple[float, int, int]:
            return sum(map(_cpu_seconds, pids)), next(sent), len(server.log)

        time.sleep(2)  # for all to have settled
        with counted_messages() as sent:
            before, began = cost(), time.monotonic()
            time.sleep(REST_SECONDS)
            after, took = cost(), time.monotonic() - began
    return Rest(
        core=(after[0] - before[0]) / took,
        messages=(after[1] - before[1]) / took / size,
        log=after[2] - before[2],
        megabytes=statistics.mean(map(_megabytes, pids)),
    )


@contextmanager
def counted_messages() -> Iterator[Iterator[int]]:
    """How many messages this process, whose threads are the waiters, has sent since."""
    sent = itertools.count()
    execute = psycopg.Cursor.execute

    def counted(self: psycopg.Cursor[Any], *args: Any, **more: Any) -> psycopg.Cursor[Any]:
        next(sent)
        return execute(self, *args, **more)

    psycopg.Cursor.execute = counted  # type: ignore[assignment, method-assign]
    try:
        yield sent
    finally:
        psycopg.Cursor.execute = execute  # type: ignore[method-assign]


def _megabytes(pid: int) -> float:
    found = re.search(r"^Pss:\s*(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def starts(url: str, rounds: int) -> Iterator[Result]:
    python = [sys.executable, "-c"]
    codes = ("pass", "import dblock", "import dblock; dblock.lock")
    bare, ours, used = map(statistics.median, _alternating([[*python, code] for code in codes], rounds, url))
    figure = f"{(ours - bare) * 1e3:.1f} ms, and {(used - ours) * 1e3:.1f} at the first use of dblock.lock"
    yield Result("import dblock, over a bare interpreter", figure, "≤ 20 ms", (ours - bare) * 1e3 <= 20)
    hand = (
        "import os, subprocess, psycopg\n"
        "with psycopg.connect(os.environ['DBLOCK_URL'], autocommit=True) as c:\n"
        "    c.execute('SELECT pg_advisory_lock(1)')\n"
        "    subprocess.run(['true'])\n"
        "    c.execute('SELECT pg_advisory_unlock(1)')"
    )
    run = [str(Path(sys.executable).with_name("dblock")), "run", "--target", "t", "--step", "s", "--", "true"]
    by_hand, by_us = _alternating([[*python, hand], run], rounds, url)
    yield Result.ratio("dblock run -- true, beside a Python that does the same by hand", by_us, by_hand, 1.3, 1e3)


def _alternating(commands: list[list[str]], rounds: int, url: str) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in commands]
    for number in range(rounds + 1):
        for command, taken in zip(commands, seconds, strict=True):
            began = time.perf_counter()
            # What was compiled once is not compiled again, as with every package that was installed.
            env = os.environ | {"DBLOCK_URL": url, "PYTHONDONTWRITEBYTECODE": ""}
            subprocess.run(command, check=True, env=env)
            if number:  # the first time files are read from the disk
                taken.append(time.perf_counter() - began)
    return seconds


def permits(url: str) -> Iterator[Result]:
    connections = [psycopg.connect(url, autocommit=True) for _ in range(slots.CALLERS)]
    reached: dict[str, list[float]] = {"raw statements": [], "dblock": []}
    longest = 0.0
    slots.crowd(connections, 2, slots.with_dblock)  # each backend's first time is its own
    for _ in range(5):
        for name, slot in (("raw statements", slots.with_statements), ("dblock", slots.with_dblock)):
            part, wait = slots.crowd(connections, 12, slot)
            reached[name].append(part)
            longest = max(longest, wait if name == "dblock" else 0.0)
    for connection in connections:
        connection.close()
    ours, raw = (statistics.median(reached[name]) for name in ("dblock", "raw statements"))
    fair = slots.CALLERS / slots.SLOTS * slots.WORK_SECONDS
    yield Result("slots=8, 64 callers, 20 ms of work", f"{ours:.0%} (raw statements {raw:.0%})", "≥ 85 %", ours >= 0.85)
    yield Result("their longest wait", f"{longest / fair:.2f} × the fair one", "≤ 1.5 ×", longest <= 1.5 * fair)


def messages() -> Iterator[Result]:
    with postgres_server({"log_statement": "all", "log_line_prefix": "[%p] "}) as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            pid = connection.info.backend_pid

            def said(pid: int) -> int:
                return len(re.findall(rf"\[{pid}\] LOG:  ", server.log))

            before = said(pid)
            with dblock.lock(connection, target="web-01", step="b", tenant="T1"):
                pass
            pair = said(pid) - before
        with dblock.lock(server.url, target="web-01", step="b", heartbeat=4) as held:
            with psycopg.connect(server.url) as observer:
                row = observer.execute("SELECT pid FROM pg_locks WHERE locktype = 'advisory'").fetchone()
            before = said(row[0]) if row else 0
            time.sleep(3)
            steady = said(row[0]) - before if row else -1
            assert held.held
    yield Result("round trips of an uncontended pair", str(pair), "2", pair == 2)
    yield Result("messages of a held lock between heartbeats", str(steady), "0", steady == 0)


def acquire_by_locks_held(url: str) -> dict[int, float]:
    """Milliseconds of a pair while the server holds so many other locks."""
    found = {}
    with psycopg.connect(url, autocommit=True) as other, psycopg.connect(url, autocommit=True) as connection:
        held = 0
        for number in (0, 100, 1000, 5000):
            other.execute(
                "SELECT pg_advisory_lock(7, i) FROM generate_series(%s::int, %s::int) AS i", (held + 1, number)
            )
            held = number
            seconds = []
            for _ in range(100):
                began = time.perf_counter()
                with dblock.lock(connection, target="web-01", step="b"):
                    seconds.append(time.perf_counter() - began)
            found[number] = statistics.median(seconds) * 1e3
    return found


# --- the report -------------------------------------------------------------------------------------------------------


def report(results: list[Result], curves: dict[str, dict[int, float]], server: str, folder: Path) -> None:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    machine = (
        f"{os.cpu_count()} cores ({model[1] if model else platform.machine()}), PostgreSQL {server}, "
        f"Python {platform.python_version()}"
    )
    when = f"{datetime.now(tz=timezone.utc):%Y-%m-%d}"
    lines = [f"Measured {when} on {machine}.", "", "| what | result | target | |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.what} | {row.figure} | {row.target} | {'met' if row.met else 'missed'} |" for row in results]
    text = "\n".join(lines) + "\n"
    print(text)
    (folder / "result.md").write_text(text, encoding="utf-8")
    document = {"date": when, "machine": machine, "rows": [asdict(row) for row in results], "curves": curves}
    (folder / "result.json").write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")

    from matplotlib import pyplot as plt

    for number, (title, curve) in enumerate(curves.items()):
        figure, axes = plt.subplots(figsize=(6, 3.5))
        axes.plot(list(curve), list(curve.values()), marker="o")
        axes.set_title(title)
        axes.set_xlabel("other locks" if "other locks" in title else "waiters")
        axes.set_ylim(bottom=0)
        figure.tight_layout()
        figure.savefig(folder / f"plot-{number + 1}.svg")
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path(".bench"))
    parser.add_argument("--mssql", metavar="URL", default=os.environ.get("DBLOCK_TEST_MSSQL_URL"), help="a SQL Server")
    args = parser.parse_args()
    args.output.mkdir(exist_ok=True)
    pythons = environments(args.output)
    results: list[Result] = []
    curves: dict[str, dict[int, float]] = {}
    # A look into pg_locks takes the longer the more connections there may be: so only crowds meet on the larger server.
    with postgres_server() as server, postgres_server({"max_connections": "500"}) as for_crowds:
        measured: list[Iterator[Any]] = [
            uncontended(server.url, pythons, args.rounds),
            to_the_next(server.url, pythons),
            permits(server.url),
            starts(server.url, 15),
            crowds(for_crowds),
            messages(),
            *([on_sql_server(args.mssql, pythons, args.rounds)] if args.mssql else []),
        ]
        for rows in measured:
            for row in rows:
                if isinstance(row, Result):
                    results.append(row)
                    print(f"{row.what}: {row.figure}", flush=True)
                else:
                    curves[row[0]] = row[1]
        curves["acquire while the server holds other locks (ms)"] = acquire_by_locks_held(for_crowds.url)
        with psycopg.connect(server.url) as connection:
            version = connection.info.parameter_status("server_version") or "unknown"
    report(results, curves, version.split()[0], args.output)


if __name__ == "__main__":
    main()
