"""The referee: judges by what the processes said, what was done to them, and what the server shows to anybody.

Does not use dblock. The rules are those of this package's docstring.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

from tests.soak.events import GRACE_SECONDS, HEARTBEAT_SECONDS, PATIENCE_SECONDS, Event

NOTICE_SECONDS = 1.0  # 250 ms at worst on a quiet machine; here some twenty processes share it
ANSWER_SECONDS = 5.0  # how long a silent network may pass for a slow server
LEFT_SECONDS = 5.0  # for what is left of a lock after its section: a waiter that is cut off is ended after 2 s
ARRIVAL_SECONDS = 1.0  # between wanting a lock and standing in its queue
LATE_ARRIVAL_SECONDS = 3.0  # the same, where an interpreter must start first

SERVED_SECONDS = 0.1  # below this nothing can be said of what came first, or whether somebody was frozen

# What may be done to a session or its holder; and how soon, and `NOTICE_SECONDS` more, the holder must know, where that
# ends the session.
TERMINATE, KILL, RESTART, CUT, CANCEL, DISTURB = "terminate", "KILL", "restart", "cut", "cancel", "disturb"
LIMITS = {
    TERMINATE: 0.0,
    KILL: HEARTBEAT_SECONDS + 1,  # SQL Server's, which no socket tells of
    RESTART: 0.0,
    CUT: HEARTBEAT_SECONDS + ANSWER_SECONDS,
}


class Fault(NamedTuple):
    """Something that was done, between two moments.

    Attributes:
        section: whose session or process it was; empty: everybody's.
        worker: whose worker.
        free_at: when the server could give the lock to somebody else, at the earliest.
    """

    what: str
    began: float
    done: float
    section: str
    worker: int
    free_at: float


@dataclass
class Section:
    """One attempt to hold a lock, as far as it is known.

    Attributes:
        watched: the holder is told of a loss; otherwise it asks.
        pids: of the processes that must run for the holder to be told.
        link: the number of the network's link that it goes through, where that can be cut.
        wanted: when it began. Times are on the monotonic clock.
        granted: the permits.
        entered: the first moment at which it was inside.
        last: the last one of which it said so, not having been told otherwise.
        last_told: the last one at which it went on although it had been told.
        left: when it began to give the lock back, not having asked whether it still had it.
        told: when it was told of a loss.
        over: when it ended, however.
    """

    name: str
    worker: int
    door: str
    shape: str
    engine: str
    targets: list[str]
    shared: bool
    slots: int | None
    timeout: float
    watched: bool
    pids: list[int]
    link: int | None
    wanted: float
    granted: list[int] = field(default_factory=list)
    entered: float = inf
    last: float = -inf
    last_told: float = -inf
    left: float = -inf
    told: float = inf
    over: float = inf
    outcome: str = "open"
    faults: list[Fault] = field(default_factory=list)

    @property
    def state(self) -> str:
        return "waiter" if self.entered == inf else "holder"

    @property
    def released(self) -> bool:
        return self.outcome == "released"

    @property
    def until(self) -> float:
        """The last moment at which it was inside and had no right to overlap with anybody.

        Who was told may take its grace; but not if it was a cut that ended its session.
        """
        ended_by = {fault.what for fault in self.faults if fault.what in LIMITS}
        return max(self.last, self.last_told) if ended_by == {CUT} else self.last

    def slot(self, target: str) -> int | None:
        return self.granted[self.targets.index(target)] if self.granted else None

    def __str__(self) -> str:
        asking = "" if self.watched else ", asking"
        faults = "".join(f", {fault.what} at {fault.began:.3f}" for fault in self.faults)
        return (
            f"{self.name} ({self.engine}, {self.door}{asking}, {self.shape}, inside {self.entered:.3f} to "
            f"{self.last:.3f}, told {self.told:.3f}{faults}; {self.outcome})"
        )


class Referee:
    """Reads what happens, and judges when all is over.

    Attributes:
        notice: how long a holder may take to know what it has been told.
        sections: all, by name.
        live: those that are not over.
        faults: how many there were, by name.
        idle: the numbers of the workers that take no more locks.
        violations: a sentence for each.
    """

    def __init__(self, notice: float = NOTICE_SECONDS) -> None:
        self.notice = notice
        self.sections: dict[str, Section] = {}
        self.live: dict[str, Section] = {}
        self.faults: Counter[str] = Counter()
        self.idle: set[int] = set()
        self.violations: list[str] = []
        self._done: list[Fault] = []
        self._stops: dict[int, list[tuple[float, float]]] = defaultdict(list)
        self._cut_until: dict[int, float] = {}  # by worker
        self._left_since: dict[tuple[str, ...], float] = {}

    # --- while it goes on ---------------------------------------------------------------------------------------------

    def read(self, events: Iterable[Event]) -> None:
        for time, kind, name, details in events:
            match kind:
                case "wanted":
                    self.sections[name] = self.live[name] = Section(name=name, wanted=time, **details)
                case "fault":
                    self._note_fault(time, name, details)
                case "stopped":
                    self._stops[details["pid"]].append((time, inf))
                case "continued":
                    self._stops[details["pid"]].append((self._stops[details["pid"]].pop()[0], time))
                case "gone":
                    for section in [live for live in self.live.values() if live.worker == details["worker"]]:
                        self._end(section, time, "worker ended")
                case "idle":
                    self.idle.add(details["number"])
                case _:
                    self._note(self.sections[name], time, kind, details)

    def _note(self, section: Section, time: float, kind: str, details: dict[str, Any]) -> None:  # noqa: C901 - a list
        match kind:
            case "party":
                section.pids.append(details["pid"])
            case "entered":
                section.entered = section.last = time
                section.granted = details["slots"]
            case "left" if not section.watched:
                section.left = time  # if the release says that it was held until then
            case "inside" | "left":
                if section.told == inf:
                    section.last = time
                else:
                    section.last_told = time
            case "told":
                section.told = min(section.told, time)
            case "lost":
                section.told = min(section.told, time)
                self._end(section, time, f"lost: {details['why']}")
            case "failed":
                self._end(section, time, details["why"])
            case "released":
                # The SIGTERM of which a command was told was no loss, then.
                section.told = inf
                section.last = max(section.last, section.last_told, section.left)
                self._end(section, time, "released")
            case "broken":
                self._end(section, time, "broken")
                self.violations.append(f"failed in a way of which dblock says nothing: {section}: {details['why']}")

    def _end(self, section: Section, time: float, outcome: str) -> None:
        section.over, section.outcome = time, outcome
        self.live.pop(section.name, None)

    def _note_fault(self, began: float, section: str, details: dict[str, Any]) -> None:
        what, done, free_in = details["what"], details["done"], details["free_in"]
        worker = self.sections[section].worker if section else 0
        self.faults[details["name"]] += 1
        self._done.append(Fault(what, began, done, section, worker, began + free_in))
        if what == CUT:
            self._cut_until[worker] = done + free_in

    def look(self, now: float, engine: str, rows: Iterable[tuple[str, str]]) -> None:
        """Take note of what the server has of locks.

        Args:
            now: the time.
            engine: the server's.
            rows: of each what it is, and the section of whose session's label it is.
        """
        before, self._left_since = (
            self._left_since,
            {key: since for key, since in self._left_since.items() if key[0] != engine},
        )
        for row, name in rows:
            section = self.sections.get(name)
            if section is not None and max(section.over, self._cut_until.get(section.worker, 0)) > now:
                continue
            key = (engine, row, name)
            since = self._left_since[key] = before.get(key, now)
            if since > 0 and now - since > LEFT_SECONDS:
                self._left_since[key] = -inf  # said once
                self.violations.append(f"left behind: {row} of {section or name or 'nobody who has said so'}")

    # --- when all is over ---------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """Find the violations that need all of the events."""
        for section in self.sections.values():
            section.faults = [fault for fault in self._done if self._concerns(fault, section)]
        for section in self.sections.values():
            if section.last > self._deadline(section):
                self.violations.append(f"not told in time: {section}")
            if section.outcome.startswith("lost"):
                if section.last_told > self._later(section, section.told, GRACE_SECONDS + self.notice):
                    self.violations.append(f"outlived its grace, until {section.last_told:.3f}: {section}")
                if not self._explains_loss(section):
                    self.violations.append(f"lost without a cause: {section}")
        for visits in self._by_target().values():
            for target, first, second in _conflicts(visits):
                if not self._excused(first, second) and not self._excused(second, first):
                    self.violations.append(f"two inside {target}: {first}; {second}")
            self.violations += [f"waited in vain while nobody was inside: {one}" for one in _starved(visits)]

    def _concerns(self, fault: Fault, section: Section) -> bool:
        if not (section.wanted <= fault.done and fault.began <= section.over):
            return False
        if fault.what == RESTART:
            # Who entered when the server was down came with a new session, unless it was told so at once.
            old = section.entered <= fault.done or section.told < section.entered + self.notice
            return section.engine == "postgres" and (old or section.entered == inf)
        if fault.what == CUT:
            return section.worker == fault.worker and section.link is not None
        return section.name == fault.section

    def _deadline(self, section: Section) -> float:
        """Until when it may go on as if nothing had happened."""
        ended = [fault for fault in section.faults if fault.what in LIMITS]
        cut = min((fault.began for fault in ended if fault.what == CUT), default=inf)
        return min(
            (
                self._later(section, max(fault.began, section.entered), LIMITS[fault.what] + self.notice)
                for fault in ended
                # Behind a cut nobody is told of anything else.
                if fault.what == CUT or fault.began + self.notice < cut
            ),
            default=inf,
        )

    def _excused(self, loser: Section, winner: Section) -> bool:
        """Whether the loser had lost its session before the other came in, and cannot have known it yet."""
        if loser.released or not loser.watched:
            return False
        free_at = min((fault.free_at for fault in loser.faults if fault.what in LIMITS), default=inf)
        return free_at <= winner.entered and min(loser.until, winner.until) <= self._deadline(loser)

    def _later(self, section: Section, start: float, seconds: float) -> float:
        """The moment at which the section's processes have run for so long since the start."""
        moment = seen = start
        moment += seconds
        for began, ended in sorted(stop for pid in section.pids for stop in self._stops[pid]):
            began = max(began, seen)  # noqa: PLW2901 - of two processes the stops may overlap
            if began >= moment:
                break
            if ended > began:
                moment += ended - began
                seen = ended
        return moment

    def _explains_loss(self, section: Section) -> bool:
        return any(
            fault.what != CANCEL
            and (fault.worker == section.worker or (fault.what == RESTART and section.engine == "postgres"))
            # A session that is the worker's own goes on from one section to the next.
            and section.wanted - self.notice <= fault.done
            and fault.began <= section.told
            for fault in self._done
        )

    def _by_target(self) -> dict[tuple[str, str], list[Section]]:
        visits = defaultdict(list)
        for section in sorted(self.sections.values(), key=lambda section: section.entered):
            for target in section.targets:
                visits[section.engine, target].append(section)
        return visits

    # --- figures ------------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """What there is to be told beside the violations, ready for JSON."""
        entered = [section for section in self.sections.values() if section.entered < inf]
        held: dict[str, Counter[str]] = defaultdict(Counter)
        for section in entered:
            held[f"{section.door} ({section.engine})"][section.shape] += 1
        noticed: dict[str, list[float]] = defaultdict(list)
        for section in entered:
            ended = sorted((fault.began, fault.what) for fault in section.faults if fault.what in LIMITS)
            # While it was inside: how long a release may take is another question.
            if not section.watched or not ended or section.told > section.last + SERVED_SECONDS:
                continue
            began, what = max(ended[0][0], section.entered), ended[0][1]
            never_frozen = self._later(section, began, section.told - began) < section.told + SERVED_SECONDS
            if began <= section.told and never_frozen and (what == CUT or len(ended) == 1):
                noticed[f"{what} ({section.engine})"].append(section.told - began)
        overtaken = overtakers = waited = 0
        for visits in self._by_target().values():
            served, late, passed = _order(visits)
            waited, overtakers, overtaken = waited + served, overtakers + late, overtaken + passed
        return {
            "sections": len(entered),
            "held": held,
            "outcomes": Counter(section.outcome.partition(":")[0] for section in self.sections.values()),
            "faults": self.faults,
            "noticed": {
                what: {"times": len(times), "median": statistics.median(times), "worst": max(times)}
                for what, times in sorted(noticed.items())
            },
            "order": {"served after a wait": waited, "out of order": overtakers, "overtaken": overtaken},
            "violations": self.violations,
        }


def _conflicts(visits: list[Section]) -> Iterator[tuple[str, Section, Section]]:
    """Who was inside together, against their shapes."""
    inside: list[Section] = []
    for section in visits:
        if section.entered == inf:
            return
        inside = [other for other in inside if other.until > section.entered]
        for other in inside:
            for target in set(section.targets) & set(other.targets):
                slot = section.slot(target)
                exclusive = not (section.shared or section.slots) or not (other.shared or other.slots)
                if exclusive or (slot is not None and slot == other.slot(target)):
                    yield target, other, section
        inside.append(section)


def _starved(visits: list[Section]) -> Iterator[Section]:
    """Who waited to the end of a long time in which nobody at all was inside, and nobody did anything to it."""
    stays = [(section.entered, section.until) for section in visits if section.entered < inf]
    for section in visits:
        patient = section.outcome.startswith("LockTimeout") and section.timeout >= PATIENCE_SECONDS
        alone = len(section.targets) == 1 and not section.faults
        if patient and alone and not any(stay[0] < section.over and stay[1] > section.wanted for stay in stays):
            yield section


def _order(visits: list[Section]) -> tuple[int, int, int]:
    """How many were served after a wait; how many before others who had come earlier; how many of those others."""
    overtakers, overtaken = set(), set()
    waited = 0
    recent: list[Section] = []
    for section in visits:  # by the time of their service
        if section.entered == inf:
            break
        if len(section.targets) > 1:
            continue
        arrived = section.wanted + (LATE_ARRIVAL_SECONDS if section.door == "dblock run" else ARRIVAL_SECONDS)
        if section.entered > arrived and not section.faults:
            waited += 1
            for other in recent:
                if other.wanted > arrived and section.entered > other.entered + SERVED_SECONDS:
                    overtakers.add(other.name)
                    overtaken.add(section.name)
        recent = [other for other in recent if other.entered > section.entered - PATIENCE_SECONDS] + [section]
    return waited, len(overtakers), len(overtaken)
