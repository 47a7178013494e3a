"""``dblock status``: who holds and who waits, for a person at a terminal or, with --json, for a program."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from dblock.cli import options
from dblock.label import printable

if TYPE_CHECKING:
    from dblock.inspect import Entry

_HEADINGS = ("STATE", "LOCK", "TENANT", "SINCE", "FOR", "PID", "HOST", "USER", "BLOCKED BY", "TO FREE")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "status",
        help="show who holds and who waits",
        description="Show who holds an advisory lock in the database and who waits for one, the most urgent first, "
        "with the statement that would free it. Nothing is changed.",
    )
    parser.add_argument(
        "--url",
        help="the database as a URL (postgresql://…, mssql+pymssql://…) or PostgreSQL conninfo string, without a "
        "password (default: DBLOCK_URL, which may hold one)",
    )
    parser.add_argument("--database", metavar="NAME", help="the database it must be; any other is refused")
    parser.add_argument("--json", action="store_true", help="as a list of objects, one for each holder and waiter")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    from dblock.inspect import entries

    found = entries(options.url(args), database=options.value(args, "database"))
    if args.json:
        print(json.dumps([entry.as_json() for entry in found], indent=1))
    elif found:
        _print_columns([_HEADINGS, *(_cells(entry) for entry in found)])
    else:
        print("nothing is held, nobody waits")
    return 0


def _cells(entry: Entry) -> tuple[str, ...]:
    named = entry.target is not None
    lock = f"{entry.step}@{entry.target}" if named else " ".join(map(str, filter(None, (entry.lock, entry.key))))
    first, *more = entry.blocked_by or ("",)
    return (
        f"waiting {entry.position or ''}" if entry.state == "waiting" else entry.state,
        lock if entry.mode == "exclusive" else f"{lock} ({entry.mode})",
        entry.tenant or (f"({entry.application})" if entry.application else ""),
        f"{entry.since.astimezone():%Y-%m-%d %H:%M:%S}" if entry.since else "",
        "" if entry.seconds is None else _duration(entry.seconds),
        "" if entry.pid is None else str(entry.pid),
        entry.host or "",
        entry.user or "",
        f"{first} and {len(more)} more" if more else str(first),
        entry.to_free or "",
    )


def _print_columns(rows: list[tuple[str, ...]]) -> None:
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _duration(seconds: int) -> str:
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minute:02}m"
    return f"{minute}m {second:02}s" if minute else f"{second}s"
