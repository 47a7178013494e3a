"""What happened when: one event for each step that ran, and the judgement whether steps b ever ran together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True)
class Event:
    """One run of one step. Times are seconds since the demo's begin, by the database server's clock.

    Attributes:
        tenant: for whom it ran.
        target: where.
        step: a, b or c.
        door: how step b's lock was taken for this tenant: python, run or sql.
        start: taken inside the lock.
        end: taken inside the lock; so far, while it is running.
        asked: when the process of the step was started; from there to the start it came up and waited for the lock.
        running: it has not ended yet.
        alarm: it found another step b's guard row.
    """

    tenant: str
    target: str
    step: str
    door: str
    start: float
    end: float
    asked: float
    running: bool
    alarm: bool

    def overlaps(self, other: Event) -> bool:
        """Whether there was a moment at which both ran."""
        return self.start < other.end and other.start < self.end


def collisions(events: Iterable[Event]) -> list[tuple[Event, Event]]:
    """Return the pairs of steps b that ran on one target at one time: what the lock is there to prevent."""
    steps = (event for event in events if event.step == "b")
    return [(one, other) for one, other in combinations(steps, 2) if one.target == other.target and one.overlaps(other)]


def side_by_side(events: Iterable[Event]) -> list[tuple[Event, Event]]:
    """Return the pairs of steps a or c that ran at one time for different tenants: what the lock leaves alone."""
    steps = (event for event in events if event.step != "b")
    return [(one, other) for one, other in combinations(steps, 2) if one.tenant != other.tenant and one.overlaps(other)]


def collided(events: Sequence[Event]) -> set[Event]:
    """Return the steps b that ran together with another on their target, or met its guard row."""
    return {event for pair in collisions(events) for event in pair} | {event for event in events if event.alarm}


def as_json(events: Iterable[Event]) -> str:
    """Write the events as a JSON list, in the order in which they started."""
    fields = ("tenant", "target", "step", "door", "asked", "start", "end", "alarm")
    rows = ({name: getattr(event, name) for name in fields} for event in sorted(events, key=lambda event: event.start))
    return json.dumps(list(rows), indent=1) + "\n"
