"""The demo's timeline: one row for each tenant and target, one bar for each step."""

from __future__ import annotations

from dblock.demo.events import Event, collided, collisions
from dblock.demo.play import STEPS, State
from dblock.picture import Bar, Row, draw

_DOORS = {"python": "Python", "run": "dblock run", "sql": "raw SQL"}
_LEGEND = {"a": "step a", "b": "step b, under the lock", "c": "step c", "wait": "waits for the lock"}
_LEGEND_OF_COLLISIONS = {"a": "step a", "c": "step c", "collided": "step b while another step b was running"}


def timeline(state: State) -> str:
    """Draw the demo's end as an SVG document."""
    bad = collided(state.events)
    events = {(event.target, event.tenant, event.step): event for event in state.events}
    groups: dict[str, list[Row]] = {}
    for each in state.deployments:
        found = [events.get((each.target, each.tenant, step)) for step in STEPS]
        bars = [_bar(event, collided=event in bad) for event in found if event is not None]
        groups.setdefault(each.target, []).append(Row(each.tenant, _DOORS[each.door], bars))
    return draw(_title(state), _LEGEND_OF_COLLISIONS if bad else _LEGEND, groups)


def _title(state: State) -> str:
    if collisions(state.events):
        return f"Steps b of several tenants at one time on a target, {'with' if state.locked else 'without'} the lock"
    return "Steps a and c of all tenants side by side, step b for one tenant at a time on each target"


def _bar(event: Event, *, collided: bool) -> Bar:
    told = f"{event.tenant} on {event.target}: step {event.step} from {event.start:.2f} s to {event.end:.2f} s"
    asked = None
    if event.step == "b":
        asked = event.asked
        told += f", through {_DOORS[event.door]}, after {event.start - event.asked:.2f} s of waiting"
    return Bar(event.start, event.end, "collided" if collided else event.step, told, asked)
