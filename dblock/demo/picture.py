"""The timeline as an SVG: one row for each tenant and target, one bar for each step.

A card with its own ground, so that it is readable wherever it is shown; dark where the reader's system is dark.
"""

from __future__ import annotations

from html import escape
from itertools import count

import svg

from dblock.demo.events import Event, collided, collisions
from dblock.demo.play import STEPS, Deployment, State

_WIDTH = 960
_MARGIN = 24
_LABELS = 150  # the column of tenants and doors
_ROW = 22
_BAR = 14
_HEAD = 92  # title and legend
_TARGET_HEAD = 30
_FOOT = 40  # the axis

_DOORS = {"python": "Python", "run": "dblock run", "sql": "raw SQL"}

_STYLE = """
    text { font: 12px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1f2328 }
    .card { fill: #ffffff; stroke: #d1d9e0 }
    .title { font-size: 17px; font-weight: 600 }
    .target { font-weight: 600 }
    .quiet { fill: #59636e }
    .grid { stroke: #d1d9e0; stroke-width: 1 }
    .a { fill: #b6d7c9 } .c { fill: #d5c8ea }
    .b { fill: #0550ae }
    .wait { stroke: #8c959f; stroke-width: 1.5; stroke-dasharray: 2 3 }
    .collided { fill: #cf222e }
    @media (prefers-color-scheme: dark) {
        text { fill: #f0f6fc }
        .card { fill: #0d1117; stroke: #3d444d }
        .quiet { fill: #9198a1 }
        .grid { stroke: #2a313c }
        .a { fill: #2f5d4c } .c { fill: #4f4370 }
        .b { fill: #58a6ff }
        .wait { stroke: #6e7681 }
        .collided { fill: #ff7b72 }
    }
"""


def draw(state: State) -> str:
    """Draw the timeline.

    Args:
        state: the demo's end.

    Returns:
        An SVG document.
    """
    targets: dict[str, list[Deployment]] = {}
    for each in state.deployments:
        targets.setdefault(each.target, []).append(each)
    last = max((event.end for event in state.events), default=1.0)
    height = _HEAD + len(targets) * _TARGET_HEAD + len(state.deployments) * _ROW + _FOOT
    scale = (_WIDTH - 2 * _MARGIN - _LABELS) / last
    bad = collided(state.events)
    events = {(event.target, event.tenant, event.step): event for event in state.events}

    elements: list[svg.Element] = [
        svg.Style(text=_STYLE),
        svg.Rect(class_=["card"], x=0.5, y=0.5, width=_WIDTH - 1, height=height - 1, rx=8),
        _text(_title(state), _MARGIN, 34, "title"),
        *_legend(bool(bad)),
        *_axis(last, scale, top=_HEAD, bottom=height - _FOOT),
    ]
    y = _HEAD
    for target, deployments in targets.items():
        elements.append(_text(target, _MARGIN, y + 20, "target"))
        y += _TARGET_HEAD
        for each in deployments:
            elements.append(_text(each.tenant, _MARGIN, y + 12))
            elements.append(_text(_DOORS[each.door], _MARGIN + 36, y + 12, "quiet"))
            for step in STEPS:
                event = events.get((target, each.tenant, step))
                if event is not None:
                    elements += _bar(event, y, scale, collided=event in bad)
            y += _ROW
    document = svg.SVG(width=_WIDTH, height=height, viewBox=svg.ViewBoxSpec(0, 0, _WIDTH, height), elements=elements)
    return f"{document}\n"


def _title(state: State) -> str:
    if collisions(state.events):
        return f"Steps b of several tenants at one time on a target, {'with' if state.locked else 'without'} the lock"
    return "Steps a and c of all tenants side by side, step b for one tenant at a time on each target"


def _bar(event: Event, y: int, scale: float, *, collided: bool) -> list[svg.Element]:
    x, width = _x(event.start, scale), max(1.5, round((event.end - event.start) * scale, 1))
    told = f"{event.tenant} on {event.target}: step {event.step} from {event.start:.2f} s to {event.end:.2f} s"
    if event.step == "b":
        told += f", through {_DOORS[event.door]}, after {event.start - event.asked:.2f} s of waiting"
    bar = svg.Rect(
        class_=["step", "collided" if collided else event.step],
        x=x,
        y=y,
        width=width,
        height=_BAR,
        rx=2,
        elements=[svg.Title(text=escape(told))],
    )
    if event.step != "b":
        return [bar]
    middle = y + _BAR / 2
    return [svg.Line(class_=["wait"], x1=_x(event.asked, scale), x2=x, y1=middle, y2=middle), bar]


def _legend(collided: bool) -> list[svg.Element]:
    entries = [("a", "step a"), ("b", "step b, under the lock"), ("c", "step c"), ("wait", "waits for the lock")]
    if collided:
        entries = [("a", "step a"), ("c", "step c"), ("collided", "step b while another step b was running")]
    elements: list[svg.Element] = []
    x, y = _MARGIN, 56
    for class_, meaning in entries:
        if class_ == "wait":
            elements.append(svg.Line(class_=["wait"], x1=x, x2=x + 22, y1=y + 6, y2=y + 6))
        else:
            elements.append(svg.Rect(class_=[class_], x=x, y=y, width=22, height=12, rx=2))
        elements.append(_text(meaning, x + 28, y + 10, "quiet"))
        x += 28 + 6 * len(meaning) + 24
    return elements


def _axis(last: float, scale: float, *, top: int, bottom: int) -> list[svg.Element]:
    interval = next(seconds for seconds in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if last / seconds <= 12)
    elements: list[svg.Element] = []
    for seconds in count(0, interval):
        if seconds > last:
            return elements
        x = _x(seconds, scale)
        elements.append(svg.Line(class_=["grid"], x1=x, x2=x, y1=top + 8, y2=bottom))
        elements.append(_text(f"{seconds} s", x, bottom + 18, "quiet", anchor="middle"))
    return elements


def _x(seconds: float, scale: float) -> float:
    return round(_MARGIN + _LABELS + seconds * scale, 1)


def _text(text: str, x: float, y: float, *classes: str, anchor: str | None = None) -> svg.Text:
    element = svg.Text(class_=list(classes) or None, x=x, y=y, text=escape(text))
    if anchor == "middle":
        element.text_anchor = "middle"
    return element
