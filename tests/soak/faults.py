"""The fault maker: does to processes, sessions, the network and the server what can happen to them.

Whatever it does, it writes into the log what, to whom, when at the earliest and when at the latest. It sends signals
only to processes of the soak's own workers.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from dblock.demo.server import Server
from tests.soak.events import GRACE_SECONDS, Log
from tests.soak.referee import CANCEL, CUT, DISTURB, KILL, LIMITS, RESTART, TERMINATE, Referee, Section
from tests.soak.servers import Observer

SHORT_CUT_SECONDS = 2.5  # of one who is not told of it, or waits: longer than a waiter may be silent
SHORT_FREEZE_SECONDS = (0.05, 0.5)
LONG_FREEZE_SECONDS = (2.5, 7.0)  # longer than a waiter may be silent, and than an answer may take

# The kinds of faults, and how frequent they are.
WEIGHTS = {"kill": 6, "terminate": 6, "cancel": 5, "freeze": 4, "interrupt": 5, "cut": 3, "restart": 1}


class FaultMaker:
    def __init__(
        self,
        referee: Referee,
        log: Log,
        server: Server,
        observers: dict[str, Observer],
        networks: dict[str, subprocess.Popen[str]],
        *,
        kinds: Sequence[str],
    ) -> None:
        self._referee = referee
        self._log = log
        self._server = server
        self._observers = observers
        self._networks = networks
        self._frozen: dict[int, float] = {}  # until when
        self._kinds = kinds

    def make(self) -> None:
        """Make a fault, if there is somebody for it to happen to."""
        kind = random.choices(self._kinds, [WEIGHTS[kind] for kind in self._kinds])[0]
        getattr(self, f"_{kind}")()

    def thaw(self, *, all_of_them: bool = False) -> None:
        """Let those go on that have been frozen for as long as they should."""
        for pid, until in list(self._frozen.items()):
            if all_of_them or time.monotonic() >= until:
                del self._frozen[pid]
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                self._log.write("continued", pid=pid)

    # --- whom it happens to -------------------------------------------------------------------------------------------

    def _victim(self, condition: Callable[[Section], bool] = lambda _: True) -> Section | None:
        found: dict[str, list[Section]] = {"holder": [], "waiter": []}
        for live in self._referee.live.values():
            if condition(live):
                found[live.state].append(live)
        some = [sections for sections in found.values() if sections]
        return random.choice(random.choice(some)) if some else None

    def _processes(self, section: Section) -> list[int]:
        return [pid for pid in {section.worker, *section.pids} if pid not in self._frozen and is_ours(pid, section)]

    def _write(self, began: float, what: str, name: str, section: Section | None = None, free_in: float = 0) -> None:
        self._log.write("fault", section.name if section else "", at=began, what=what, name=name,
                        done=time.monotonic(), free_in=free_in)  # fmt: skip

    # --- what happens -------------------------------------------------------------------------------------------------

    def _signal(self, name: str, number: signal.Signals) -> None:
        section = self._victim()
        if section is None or not (processes := self._processes(section)):
            return
        began = time.monotonic()
        os.kill(random.choice(processes), number)
        self._write(began, DISTURB, f"{name}, {section.state}", section)

    def _kill(self) -> None:
        self._signal("kill -9", signal.SIGKILL)

    def _interrupt(self) -> None:
        number = random.choice([signal.SIGINT, signal.SIGTERM])
        self._signal(number.name, number)

    def _freeze(self) -> None:
        section = self._victim()
        if section is None or not (processes := self._processes(section)):
            return
        pid = random.choice(processes)
        length, bounds = random.choice([("short", SHORT_FREEZE_SECONDS), ("long", LONG_FREEZE_SECONDS)])
        began = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        self._log.write("stopped", at=began, pid=pid)
        self._frozen[pid] = began + random.uniform(*bounds)
        self._write(began, DISTURB, f"SIGSTOP, {length}, {section.state}", section)

    def _terminate(self) -> None:
        self._to_session("session terminated", lambda observer, session: observer.end(session))

    def _cancel(self) -> None:
        self._to_session("statement cancelled", lambda observer, session: observer.cancel(session), CANCEL)

    def _to_session(self, name: str, do: Callable[[Observer, int], bool], what: str = "") -> None:
        section = self._victim()
        if section is None:
            return
        observer = self._observers[section.engine]
        session = observer.sessions().get(section.name)
        if session is None:
            return
        began = time.monotonic()
        if do(observer, session):
            what = what or (TERMINATE if section.engine == "postgres" else KILL)
            self._write(began, what, f"{name}, {section.state}", section)

    def _cut(self) -> None:
        # Rather one who is to be told of it.
        seconds = SHORT_CUT_SECONDS
        if section := self._victim(lambda live: live.link is not None and live.watched and live.state == "holder"):
            # When the server would let go at the earliest, were it not for some seconds more that it gives.
            seconds = LIMITS[CUT] + self._referee.notice + (GRACE_SECONDS if section.door == "dblock run" else 0)
        else:
            section = self._victim(lambda live: live.link is not None)
        if section is None:
            return
        network = self._networks[section.engine]
        assert network.stdin is not None
        assert network.stdout is not None
        began = time.monotonic()
        network.stdin.write(f"{section.link} {seconds}\n")
        network.stdin.flush()
        if json.loads(network.stdout.readline()):
            self._write(began, CUT, f"network cut, {section.state}", section, free_in=seconds)

    def _restart(self) -> None:
        mode = random.choice(["fast", "immediate"])
        began = time.monotonic()
        self._server.stop(mode)
        self._write(began, RESTART, f"server restarted, {mode}")
        self._server.start()
        self._observers["postgres"].close()
        self._observers["postgres"].connect()


def is_ours(pid: int, section: Section) -> bool:
    """Whether the process is (still) one of the worker's: each worker has a session of its own."""
    try:
        return os.getsid(pid) == section.worker
    except ProcessLookupError:
        return False
