"""A timeline as an SVG: groups of rows, each with bars, and the waits that lead to them.

A card with its own ground, so that it is readable wherever it is shown; dark where the reader's system is dark. Knows
neither locks nor the demo.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import count

import svg

_WIDTH = 960
_MARGIN = 24
_LABELS = 150  # the column of names and notes
_ROW = 22
_BAR = 14
_HEAD = 92  # title and legend
_GROUP_HEAD = 30
_FOOT = 40  # the axis
_MOST_MARKS = 12
_INTERVALS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
_MINUTE, _HOUR = 60, 3600

_STYLE = """
    text { font: 12px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1f2328 }
    .card { fill: #ffffff; stroke: #d1d9e0 }
    .title { font-size: 17px; font-weight: 600 }
    .group { font-weight: 600 }
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


@dataclass(frozen=True)
class Bar:
    """Something that lasted. Times are seconds since the picture's begin.

    Attributes:
        start: its begin.
        end: its end.
        kind: its class in the style: a, b, c or collided; "": only the wait is drawn.
        told: what is told of it where a reader points at it.
        asked: from when on it was waited for; None: nothing is drawn before it.
    """

    start: float
    end: float
    kind: str
    told: str
    asked: float | None = None


@dataclass
class Row:
    """A line of the picture.

    Attributes:
        name: whose it is.
        note: beside the name.
        bars: what happened.
    """

    name: str
    note: str = ""
    bars: list[Bar] = field(default_factory=list)


def draw(title: str, legend: Mapping[str, str], groups: Mapping[str, Sequence[Row]]) -> str:
    """Draw a timeline.

    Args:
        title: what it shows.
        legend: the meaning of each kind of bar, and of ``wait``.
        groups: rows, by what they have in common.

    Returns:
        An SVG document.
    """
    rows = [row for group in groups.values() for row in group]
    last = max((bar.end for row in rows for bar in row.bars), default=1.0) or 1.0
    height = _HEAD + len(groups) * _GROUP_HEAD + len(rows) * _ROW + _FOOT
    scale = (_WIDTH - 2 * _MARGIN - _LABELS) / last
    elements: list[svg.Element] = [
        svg.Style(text=_STYLE),
        svg.Rect(class_=["card"], x=0.5, y=0.5, width=_WIDTH - 1, height=height - 1, rx=8),
        _text(title, _MARGIN, 34, "title"),
        *_legend(legend),
        *_axis(last, scale, top=_HEAD, bottom=height - _FOOT),
    ]
    y = _HEAD
    for name, group in groups.items():
        elements.append(_text(name, _MARGIN, y + 20, "group"))
        y += _GROUP_HEAD
        for row in group:
            elements.append(_text(row.name, _MARGIN, y + 12))
            elements.append(_text(row.note, _MARGIN + 36, y + 12, "quiet"))
            for bar in row.bars:
                elements += _bar(bar, y, scale)
            y += _ROW
    document = svg.SVG(width=_WIDTH, height=height, viewBox=svg.ViewBoxSpec(0, 0, _WIDTH, height), elements=elements)
    return f"{document}\n"


def _bar(bar: Bar, y: int, scale: float) -> Iterator[svg.Element]:
    x, middle = _x(bar.start, scale), y + _BAR / 2
    if bar.asked is not None:
        yield svg.Line(
            class_=["wait"],
            x1=_x(bar.asked, scale),
            x2=x,
            y1=middle,
            y2=middle,
            elements=[svg.Title(text=escape(bar.told))],
        )
    if bar.kind:
        yield svg.Rect(
            class_=["step", bar.kind],
            x=x,
            y=y,
            width=max(1.5, round((bar.end - bar.start) * scale, 1)),
            height=_BAR,
            rx=2,
            elements=[svg.Title(text=escape(bar.told))],
        )


def _legend(legend: Mapping[str, str]) -> list[svg.Element]:
    elements: list[svg.Element] = []
    x, y = _MARGIN, 56
    for kind, meaning in legend.items():
        if kind == "wait":
            elements.append(svg.Line(class_=["wait"], x1=x, x2=x + 22, y1=y + 6, y2=y + 6))
        else:
            elements.append(svg.Rect(class_=[kind], x=x, y=y, width=22, height=12, rx=2))
        elements.append(_text(meaning, x + 28, y + 10, "quiet"))
        x += 28 + 6 * len(meaning) + 24
    return elements


def _axis(last: float, scale: float, *, top: int, bottom: int) -> list[svg.Element]:
    fitting = (seconds for seconds in _INTERVALS if last / seconds <= _MOST_MARKS)
    interval = next(fitting, last / _MOST_MARKS)
    elements: list[svg.Element] = []
    for seconds in count(0, interval):
        if seconds > last:
            return elements
        x = _x(seconds, scale)
        elements.append(svg.Line(class_=["grid"], x1=x, x2=x, y1=top + 8, y2=bottom))
        elements.append(_text(_mark(seconds, interval), x, bottom + 18, "quiet", anchor="middle"))
    return elements


def _mark(seconds: float, interval: float) -> str:
    unit, name = (_HOUR, "h") if interval >= _HOUR else (_MINUTE, "min") if interval >= _MINUTE else (1, "s")
    return f"{seconds / unit:g} {name}"


def _x(seconds: float, scale: float) -> float:
    return round(_MARGIN + _LABELS + seconds * scale, 1)


def _text(text: str, x: float, y: float, *classes: str, anchor: str | None = None) -> svg.Text:
    element = svg.Text(class_=list(classes) or None, x=x, y=y, text=escape(text))
    if anchor == "middle":
        element.text_anchor = "middle"
    return element
