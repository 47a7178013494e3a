"""How soon a lost lock is noticed, and how soon the server lets go: both clocks of each fault, median and worst.

    python benchmarks/loss.py [--rounds 100] [--mssql URL]

On a throw-away PostgreSQL: a backend that is terminated, and a server that crashes. With --mssql: a session that is
killed there. As root on Linux, a network that is cut: between two network namespaces everything is dropped, silently,
and of as many locks as there are rounds each has been in another moment of its heartbeat. Takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psycopg

import dblock
from dblock.demo.server import Server, postgres_server
from dblock.protocol import Steps

HEARTBEAT_SECONDS = 10.0


def lock(url: str, number: int = 0) -> dblock.Lock:
    return dblock.lock(url, target=f"loss-{number}", step="b", heartbeat=HEARTBEAT_SECONDS)


def report(what: str, seconds: list[float], bound: str) -> None:
    median, worst = statistics.median(seconds), max(seconds)
    print(f"{what:48} {len(seconds):4} {median * 1000:10.1f} {worst * 1000:10.1f}   {bound}", flush=True)


def noticed(held: dblock.Lock, fault: Callable[[], object]) -> float:
    """Seconds from a fault until the lock's holder is told."""
    told: list[float] = []
    watching = threading.Thread(target=lambda: told.append(time.monotonic() if held.lost.wait(120) else float("inf")))
    watching.start()
    began = time.monotonic()
    fault()
    watching.join()
    try:
        held.release()
    except dblock.LockLost:
        return told[0] - began
    raise AssertionError("a lock that was lost was given back")


_TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"


def terminated(server: Server, rounds: int) -> list[float]:
    found = []
    with psycopg.connect(server.url, autocommit=True) as other:
        for _ in range(rounds):
            held = lock(server.url)
            held.acquire()
            found.append(noticed(held, lambda: other.execute(_TERMINATE)))
    return found


def crashed(server: Server, rounds: int) -> list[float]:
    found = []
    for _ in range(rounds):
        held = lock(server.url)
        held.acquire()
        found.append(noticed(held, lambda: server.stop("immediate")))
        server.start()
    return found


def _session_id() -> Steps[int]:
    row = yield "SELECT @@SPID"
    return int(row[0])


def killed(url: str, rounds: int) -> list[float]:
    import pymssql

    from dblock.driver_pymssql import _arguments

    found = []
    other = pymssql.connect(**_arguments(url), autocommit=True)
    for _ in range(rounds):
        sessions: list[pymssql.Connection] = []

        def connect(sessions: list[pymssql.Connection] = sessions) -> pymssql.Connection:
            sessions.append(pymssql.connect(**_arguments(url), autocommit=True))
            return sessions[-1]

        held = dblock.lock(connect, target="loss-0", step="b", heartbeat=HEARTBEAT_SECONDS)
        held.acquire()
        assert held._hold is not None
        session = held._hold.session.run(_session_id())
        found.append(noticed(held, partial(other.cursor().execute, f"KILL {session}")))
    other.close()
    return found


# --- a network that is cut --------------------------------------------------------------------------------------------

NAMESPACE, HERE, THERE = "dblock-loss", "dblk-here", "dblk-there"
SERVER_ADDRESS, CLIENT_ADDRESS = "10.203.77.1", "10.203.77.2"


@contextmanager
def network() -> Iterator[Callable[[], None]]:
    """A network namespace, and a function that drops all that goes to it or comes from it."""

    def run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    run("ip", "netns", "add", NAMESPACE)
    try:
        run("ip", "link", "add", HERE, "type", "veth", "peer", "name", THERE, "netns", NAMESPACE)
        run("ip", "addr", "add", f"{SERVER_ADDRESS}/24", "dev", HERE)
        run("ip", "link", "set", HERE, "up")
        run("ip", "-n", NAMESPACE, "addr", "add", f"{CLIENT_ADDRESS}/24", "dev", THERE)
        run("ip", "-n", NAMESPACE, "link", "set", THERE, "up")

        def cut() -> None:
            # To an address of the link layer that nobody has: whatever is sent is dropped, and nobody is told.
            nobody = ("lladdr", "02:00:00:00:00:99", "nud", "permanent")
            run("ip", "neigh", "replace", CLIENT_ADDRESS, *nobody, "dev", HERE)
            run("ip", "-n", NAMESPACE, "neigh", "replace", SERVER_ADDRESS, *nobody, "dev", THERE)

        yield cut
    finally:
        run("ip", "netns", "del", NAMESPACE)


HOLDERS = """
import json, sys, threading, time
sys.path.insert(0, sys.argv[3])
from benchmarks.loss import HEARTBEAT_SECONDS, lock
url, number = sys.argv[1], int(sys.argv[2])
held, told = [], {}
for i in range(number):
    held.append(lock(url, i))
    held[-1].acquire()
    time.sleep(HEARTBEAT_SECONDS / number)
def watch(i):
    held[i].lost.wait(120)
    told[i] = time.monotonic()
threads = [threading.Thread(target=watch, args=(i,)) for i in range(number)]
for thread in threads: thread.start()
print("ready", flush=True)
for thread in threads: thread.join()
print(json.dumps(told), flush=True)
"""


def cut(server: Server, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Both clocks of one cut for as many locks: seconds until told, until the server lets go, and in between."""
    with (server.data / "pg_hba.conf").open("a") as hba:
        hba.write(f"host all all {CLIENT_ADDRESS}/32 trust\n")
    root = str(Path(__file__).resolve().parent.parent)
    with psycopg.connect(server.url, autocommit=True) as observer, network() as cut_network:
        observer.execute("SELECT pg_reload_conf()")
        url = server.url.replace("127.0.0.1", SERVER_ADDRESS)
        command = ["ip", "netns", "exec", NAMESPACE, sys.executable, "-c", HOLDERS, url, str(rounds), root]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as holders:
            assert holders.stdout is not None
            assert holders.stdout.readline() == "ready\n"
            keys = {dblock.key(f"loss-{i}", "b").value: i for i in range(rounds)}
            cut_network()
            began = time.monotonic()
            let_go: dict[int, float] = {}
            while len(let_go) < rounds and time.monotonic() - began < 120:
                found = observer.execute("""
                    SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks
                    WHERE locktype = 'advisory' AND objsubid = 1
                """)
                held = {row[0] for row in found}
                now = time.monotonic()
                for key in keys.keys() - held:
                    let_go.setdefault(keys[key], now)
                time.sleep(0.05)
            told = {int(i): moment for i, moment in json.loads(holders.stdout.readline()).items()}
    return (
        [told[i] - began for i in range(rounds)],
        [let_go[i] - began for i in range(rounds)],
        [let_go[i] - told[i] for i in range(rounds)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--mssql", metavar="URL", help="a SQL Server on which sessions may be killed")
    args = parser.parse_args()
    logging.getLogger("dblock").setLevel(logging.CRITICAL)  # each loss is said, too
    print(f"{'milliseconds':48} {'':>4} {'median':>10} {'worst':>10}   bound")
    with postgres_server({"listen_addresses": "*", "max_connections": str(args.rounds + 20)}) as server:
        report("backend terminated, until told", terminated(server, args.rounds), "50 / 250")
        report("server crashed, until told", crashed(server, args.rounds), "50 / 250")
        if os.name == "posix" and os.geteuid() == 0 and shutil.which("ip"):
            told, let_go, between = cut(server, args.rounds)
            report("network cut, until told", told, f"worst {(HEARTBEAT_SECONDS + 5) * 1000:.0f}")
            report("network cut, until the server lets go", let_go, "25000 to 35000")
            print(f"{'  of that the shortest':48} {'':4} {min(let_go) * 1000:10.1f}")
            print(f"{'  and the shortest time between the two':48} {'':4} {min(between) * 1000:10.1f}   at least 10000")
        else:
            print("network cut: needs root and iproute2")
    if args.mssql:
        report("SQL Server's session killed, until told", killed(args.mssql, args.rounds), "250 / 11000")


if __name__ == "__main__":
    main()
