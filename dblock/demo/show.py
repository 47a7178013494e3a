"""The demo on a terminal: live while it plays, and the timeline when it is over. Plain lines where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dblock.demo.events import Event, collided, collisions, side_by_side
from dblock.demo.play import STEPS, Deployment, State

# Letters, so that a terminal without colours or block characters shows the same.
_STYLES = {"a": "black on bright_black", "b": "bold white on blue", "c": "black on bright_black"}
_WAITING = "yellow"
_COLLIDED = "bold white on red"
_DOORS = {"python": "Python", "run": "dblock run", "sql": "raw SQL"}

_Watch = Callable[[State], None]


@contextmanager
def watching(console: Console, title: str) -> Iterator[_Watch]:
    """Give the function that shows a state: in place on a terminal, as lines of what is new elsewhere."""
    if not console.is_terminal:
        console.print(title)
        yield _Lines(console)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda state: live.update(Group(Text(title, "bold"), _progress(state)), refresh=True)


class _Lines:
    """Tells each beginning and end of a step once, as a line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: set[tuple[str, str, str, str]] = set()

    def __call__(self, state: State) -> None:
        news: list[tuple[float, str]] = []
        for event in state.events:
            for what, when in (("begins", event.start), ("ends", None if event.running else event.end)):
                key = (event.tenant, event.target, event.step, what)
                if when is None or key in self._told:
                    continue
                self._told.add(key)
                door = f" ({_DOORS[event.door]})" if event.step == "b" else ""
                news.append((when, f"{event.target} {event.tenant:<3} {event.step} {what}{door}"))
        for when, text in sorted(news):
            self._console.print(f"{when:7.2f} s  {text}", highlight=False)


def _progress(state: State) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("target", "tenant", "door of step b", "a", "b", "c"):
        table.add_column(column, min_width=12 if column in "abc" else None)
    bad = collided(state.events)
    events = {(event.target, event.tenant, event.step): event for event in state.events}
    now = max((event.end for event in state.events), default=0.0)
    for each in state.deployments:
        cells = [_cell(each, step, events.get((each.target, each.tenant, step)), bad=bad, now=now) for step in STEPS]
        table.add_row(each.target, each.tenant, _DOORS[each.door], *cells)
    return table


def _cell(deployment: Deployment, step: str, event: Event | None, *, bad: set[Event], now: float) -> Text:
    if event is None:
        asked = deployment.asked.get(step)
        waits = step == "b" and asked is not None and deployment.failure is None
        return Text(f"waits {max(0.0, now - asked):.1f} s" if waits and asked is not None else "", _WAITING)
    seconds = f"{event.end - event.start:.1f} s"
    if event in bad:
        return Text(f"collides {seconds}", _COLLIDED)
    if event.running:
        return Text(f"runs {seconds}", _STYLES["b"] if step == "b" else "")
    return Text(f"done {seconds}", "dim")


def timeline(console: Console, state: State) -> None:
    """Print one line for each tenant and target: when its steps ran, and when its step b waited."""
    bad = collided(state.events)
    last = max((event.end for event in state.events), default=1.0)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("target")
    table.add_column("tenant")
    table.add_column("door of step b")
    width = max(20, console.width - 36)
    table.add_column(f"0 s{f'{last:.0f} s':>{width - 3}}", no_wrap=True)
    for each in state.deployments:
        own = [event for event in state.events if (event.tenant, event.target) == (each.tenant, each.target)]
        table.add_row(each.target, each.tenant, _DOORS[each.door], _bars(own, bad, width / last, width))
    console.print(table)
    legend = Text.assemble(
        ("aaa", _STYLES["a"]), " ", ("ccc", _STYLES["c"]), " side by side   ", ("BBB", _STYLES["b"]),
        " one at a time on each target   ", ("...", _WAITING), " waits",
    )  # fmt: skip
    if bad:
        legend.append("   ").append("BBB", _COLLIDED).append(" collided")
    console.print(legend)


def _bars(events: list[Event], bad: set[Event], scale: float, width: int) -> Text:
    line = [(" ", "")] * width
    for event in sorted(events, key=lambda event: event.start):
        first, end = (min(width, int(moment * scale)) for moment in (event.start, event.end))
        style = _COLLIDED if event in bad else _STYLES[event.step]
        if event.step == "b":
            waited = int(event.asked * scale)
            line[waited:first] = [(".", _WAITING)] * (first - waited)
        end = min(width, max(end, first + 1))
        line[first:end] = [(event.step.upper() if event.step == "b" else event.step, style)] * (end - first)
    runs = (("".join(letter for letter, _ in run), style) for style, run in groupby(line, key=lambda cell: cell[1]))
    return Text.assemble(*runs)


def verdict(console: Console, state: State) -> None:
    """Print what came of it, in words."""
    together, pairs = collisions(state.events), side_by_side(state.events)
    runs = sum(event.step == "b" for event in state.events)
    lines: list[RenderableType] = [
        Text(f"Steps a and c: {len(pairs)} pairs of runs for different tenants overlapped, as they may."),
        Text(f"Step b: {runs} runs, {len(together)} pairs of them overlapped on one target.", "bold red")
        if together
        else Text(f"Step b: {runs} runs, and none overlapped another on its target.", "bold green"),
    ]
    lines += [
        Text(f"{each.tenant} on {each.target} failed in {each.failure}", "red")
        for each in state.deployments
        if each.failure is not None
    ]
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True)
