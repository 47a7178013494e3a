"""``dblock status``: who holds and who waits, for a person at a terminal or, with --json, for a program."""

from __future__ import annotations

import argparse
import json
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import combinations
from typing import TYPE_CHECKING, Any

from dblock import names
from dblock.cli import options
from dblock.cli.messages import say
from dblock.label import printable

if TYPE_CHECKING:
    from rich.table import Table

    from dblock.inspect import Entry

_HEADINGS = ("STATE", "LOCK", "TENANT", "SINCE", "FOR", "PID", "HOST", "USER", "BLOCKED BY", "TO FREE")
_FLEXIBLE = {"LOCK", "TENANT", "HOST", "USER", "TO FREE"}  # are folded where the terminal is narrow
_WATCH_SECONDS = 2

HELD = 1


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "status",
        help="show who holds and who waits",
        description="Show who holds an advisory lock in the database and who waits for one, the most urgent first, "
        "with the statement that would free it. Nothing is changed.",
    )
    options.add_database(parser)
    parser.add_argument("--target", metavar="T", help="only locks of this target")
    parser.add_argument("--step", metavar="S", help="only locks of this step")
    parser.add_argument(
        "--fail-if-held", action="store_true", help="exit with 1 if one of the locks that are shown is held"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as a list of objects, one for each holder and waiter")
    form.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C (needs dblock[cli])")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    from dblock.inspect import entries

    url, database = options.url(args), options.value(args, "database")

    def ask() -> list[Entry]:
        return [entry for entry in entries(url, database=database) if _is_wanted(entry, args.target, args.step)]

    if args.watch:
        return _watch(ask)
    found = ask()
    if args.json:
        print(json.dumps([entry.as_json() for entry in found], indent=1))
    elif found:
        _show(found)
        for note in _look_alikes(found):
            say(note)
    else:
        print("nothing is held, nobody waits")
    return HELD if args.fail_if_held and any(entry.state == "held" for entry in found) else 0


def _is_wanted(entry: Entry, target: str | None, step: str | None) -> bool:
    if target and step:
        return entry.key == names.key(target, step).value  # also where the names are not known
    return (not target or entry.target == target) and (not step or entry.step == step)


def _show(found: Sequence[Entry]) -> None:
    if sys.stdout.isatty() and find_spec("rich"):
        from rich.console import Console

        Console().print(_table(found))
        return
    # What reads this is a program, or has a screen without an end: nothing is folded.
    rows = [_HEADINGS, *map(_cells, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _table(found: Sequence[Entry]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD if found else None, pad_edge=False, show_edge=False)
    for heading in _HEADINGS if found else ("nothing is held, nobody waits",):
        table.add_column(heading, overflow="fold", no_wrap=heading not in _FLEXIBLE)
    for entry in found:
        table.add_row(*map(Text, _cells(entry)))  # not as rich's own markup
    return table


def _watch(ask: Callable[[], list[Entry]]) -> int:
    if not find_spec("rich"):
        raise options.UsageError("--watch needs rich: pip install 'dblock[cli]'")
    from rich.live import Live

    with Live(_table(ask()), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(_WATCH_SECONDS)
            live.update(_table(ask()), refresh=True)


def _cells(entry: Entry) -> tuple[str, ...]:
    named = entry.target is not None
    lock = f"{entry.step}@{entry.target}" if named else " ".join(map(str, filter(None, (entry.lock, entry.key))))
    first, *more = entry.blocked_by or ("",)
    cells = (
        f"waiting {entry.position or ''}" if entry.state == "waiting" else entry.state,
        lock if entry.mode == "exclusive" else f"{lock} ({entry.mode})",
        " ".join(
            (
                entry.tenant or (f"({entry.application})" if entry.application else ""),
                *(f"{name}={value}" for name, value in entry.labels.items()),
            )
        ).strip(),
        f"{entry.since.astimezone():%Y-%m-%d %H:%M:%S}" if entry.since else "",
        "" if entry.seconds is None else _duration(entry.seconds),
        "" if entry.pid is None else str(entry.pid),
        entry.host or "",
        entry.user or "",
        f"{first} and {len(more)} more" if more else str(first),
        entry.to_free or "",
    )
    return tuple(map(printable, cells))


def _look_alikes(found: Sequence[Entry]) -> Iterator[str]:
    """Point out names that a person would take for one: in case, spaces, width or shape."""
    for kind in ("target", "step"):
        seen = dict.fromkeys(name for entry in found if (name := getattr(entry, kind)))
        for one, other in combinations(seen, 2):
            if _looks(one) == _looks(other):
                yield (
                    f"the {kind}s {one!a} and {other!a} look alike, but are two: who holds a lock of one "
                    f"excludes nobody from the other"
                )


def _looks(name: str) -> str:
    plain = unicodedata.normalize("NFKC", name).casefold()
    return "".join(c for c in plain if c.isprintable() and not c.isspace())


def _duration(seconds: int) -> str:
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minute:02}m"
    return f"{minute}m {second:02}s" if minute else f"{second}s"
