"""``dblock status``: who holds and who waits, for a person at a terminal or, with --json, for a program."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from importlib.util import find_spec
from itertools import combinations
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from dblock import names
from dblock.cli import options
from dblock.cli.messages import columns, say
from dblock.errors import DatabaseError
from dblock.label import may_be, printable

if TYPE_CHECKING:
    from rich.console import Group

    from dblock.inspect import Entry

_HEADINGS = ("STATE", "LOCK", "TENANT", "SINCE", "FOR", "PID", "HOST", "USER", "BLOCKED BY", "TO FREE")
_FLEXIBLE = {"LOCK", "TENANT", "HOST", "USER", "BLOCKED BY", "TO FREE"}  # are folded where the terminal is narrow
_ALWAYS = 8  # so many columns are shown on every terminal, the others where there is room
_WATCH_SECONDS = 2

# Letters of other scripts, digits and signs that most typefaces draw like these.
_TWINS = str.maketrans("асеорхуіјѕԁһԛԝӏкмтвнοανρτυικ01−", "aceopxyijsdhqwlkmtbhoavptuikol-")

HELD = 1


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "status",
        help="show who holds and who waits",
        description="Show who holds an advisory lock in the database and who waits for one, the most urgent first, "
        "with the statement that would free it where the terminal has room. Nothing is changed. Exit code 0: they are "
        "shown; 1: one is held, under --fail-if-held.",
    )
    options.add_database(parser)
    parser.add_argument(
        "--target", metavar="T", help="only locks of this target, and those of which nobody tells the names"
    )
    parser.add_argument("--step", metavar="S", help="likewise; with --target only that one lock, by its key")
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
    for given in (args.target, args.step):
        if given is not None:
            names.key(given, given)  # a name that no lock can have is a mistake, not a lock that is free

    def ask() -> tuple[list[Entry], list[str]]:
        everybody = entries(url, database=database)
        found = [entry for entry in everybody if _may_be_wanted(entry, args.target, args.step)]
        return found, list(_look_alikes(found, everybody, args))

    if args.watch:
        return _watch(ask, fail_if_held=args.fail_if_held)
    found, notes = ask()
    if args.json:
        print(json.dumps([entry.as_json() for entry in found], indent=1))
    elif found:
        _show(found)
    else:
        print("nothing is held, nobody waits")
    for note in notes:
        say(note)
    return HELD if args.fail_if_held and any(entry.state == "held" for entry in found) else 0


def _may_be_wanted(entry: Entry, target: str | None, step: str | None) -> bool:
    """Whether it is one of the locks asked for, or none can tell: a script must not go on for want of a label."""
    if target and step:
        return entry.key == names.key(target, step).value
    if entry.target is None or entry.step is None:
        return not (target or step) or entry.key is not None
    return all(
        wanted is None or may_be(unquote(shown), unquote(wanted))  # the script shows what is not printable as %XX
        for shown, wanted in ((entry.target, target), (entry.step, step))
    )


def _show(found: Sequence[Entry]) -> None:
    rows = _rows(found)
    if sys.stdout.isatty() and find_spec("rich"):
        from rich.console import Console

        Console().print(_table(rows, ()))
    else:
        print(*columns(rows), sep="\n")


def _rows(found: Sequence[Entry]) -> list[tuple[str, ...]]:
    """Headings and cells. A file or a pipe has a screen without an end; on a terminal the last columns may give way."""
    terminal = sys.stdout.isatty()
    rows = [_HEADINGS, *(_cells(entry, short=terminal) for entry in found)]
    if terminal and max(map(len, columns(rows))) > shutil.get_terminal_size().columns:
        return [row[:_ALWAYS] for row in rows]
    return rows


def _table(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    headings, *cells = rows
    table = Table(box=None, pad_edge=False)
    for heading in headings if cells else ("nothing is held, nobody waits",):
        table.add_column(heading, overflow="fold", no_wrap=heading not in _FLEXIBLE)
    for row in cells:
        table.add_row(*map(Text, row))  # not as rich's own markup
    return Group(table, *map(Text, notes))


def _watch(ask: Callable[[], tuple[list[Entry], list[str]]], *, fail_if_held: bool) -> int:
    if fail_if_held or not sys.stdout.isatty():
        raise options.UsageError("--watch is for somebody at a terminal: scripts ask with --json or --fail-if-held")
    if not find_spec("rich"):
        raise options.UsageError("--watch needs rich: pip install 'dblock[cli]'")
    from rich.live import Live
    from rich.text import Text

    def table() -> Group:
        found, notes = ask()
        return _table(_rows(found), notes)

    with Live(table(), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(_WATCH_SECONDS)
            try:
                shown: Group | Text = table()
            except DatabaseError as error:  # a server that restarts is what somebody may be watching
                shown = Text(printable(f"no answer just now: {error}"))
            live.update(shown, refresh=True)


def _cells(entry: Entry, *, short: bool) -> tuple[str, ...]:
    shown = (entry.step or "", entry.target or "")
    lock = "@".join(shown) if entry.target else entry.lock
    if entry.key is not None and (not entry.target or any(name.endswith("~") for name in shown)):
        lock += f" {entry.key}"  # what dblock key, key.sql and dblock force-release know it by
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
        _moment(entry.since, short=short) if entry.since else "",
        "" if entry.seconds is None else _duration(entry.seconds),
        "" if entry.pid is None else str(entry.pid),
        entry.host or "",
        entry.user or "",
        f"{first} and {len(more)} more" if more else str(first),
        entry.to_free or "",
    )
    return tuple(map(printable, cells))


def _look_alikes(found: Sequence[Entry], everybody: Sequence[Entry], args: argparse.Namespace) -> Iterator[str]:
    """Point out names that a person would take for one that is shown or was asked for."""
    for kind in ("target", "step"):
        asked = getattr(args, kind)
        shown = dict.fromkeys(name for name in (asked, *(getattr(entry, kind) for entry in found)) if name)
        alike: dict[str, list[str]] = {}
        for name in shown | dict.fromkeys(name for entry in everybody if (name := getattr(entry, kind))):
            alike.setdefault(_looks(name), []).append(name)
        for one, other in (pair for group in alike.values() for pair in combinations(group, 2)):
            if one in shown or other in shown:
                yield (
                    f"the {kind}s {one!a} and {other!a} look alike, but are two: who holds a lock of one "
                    f"excludes nobody from the other"
                )


def _looks(name: str) -> str:
    """What is left of a name without case, width, spaces, hidden characters, kinds of dashes and of other scripts."""
    plain = unicodedata.normalize("NFKC", unquote(name)).casefold().translate(_TWINS)
    dashed = ("-" if unicodedata.category(c) == "Pd" else c for c in plain)
    return "".join(c for c in dashed if c.isprintable() and not c.isspace())


def _moment(moment: datetime, *, short: bool) -> str:
    here = moment.astimezone()
    if not short:
        return f"{here:%Y-%m-%d %H:%M:%S}"
    return f"{here:%H:%M:%S}" if here.date() == datetime.now().astimezone().date() else f"{here:%m-%d %H:%M}"


def _duration(seconds: int) -> str:
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minute:02}m"
    return f"{minute}m {second:02}s" if minute else f"{second}s"
