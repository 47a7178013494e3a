"""``dblock force-release``: ends the session that holds a lock, after it has been shown and named."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dblock import names
from dblock.cli import options
from dblock.cli.messages import say
from dblock.errors import DatabaseError
from dblock.label import parse, printable
from dblock.names import Key

NOTHING_ENDED = 1


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "force-release",
        help="end the session that holds a lock",
        description="Show who holds a lock, ask for the pid of one of them as confirmation, and end that session, only "
        "if it still holds that lock. What it was doing is rolled back or stays half done: look first whether it is "
        "really gone or stuck. Exit code 0: it was ended; 1: nothing was.",
    )
    options.add_database(parser)
    parser.add_argument(
        "key", metavar="KEY", nargs="?", help="the lock's number, as dblock key and dblock status show it"
    )
    options.add_names(parser)
    parser.add_argument("--confirm", metavar="PID", help="the holder to end, without being asked")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    from dblock.inspect import force_release, to_end

    key = _key(args)
    url, database = options.url(args), options.value(args, "database")
    holders = force_release(url, key, database=database)
    for holder in holders:
        _show(holder)
    ours = [holder.pid for holder in holders if holder.pid is not None]
    confirmed = _confirmed(args, ours) if ours else None
    if confirmed is None:
        return NOTHING_ENDED
    ended, *_ = force_release(url, key, end=confirmed, database=database)
    print(printable(ended.outcome))
    if ended.forbidden:
        raise DatabaseError(f"somebody who may end it runs: {to_end(url, key, confirmed)}", "42501")
    if ended.ended:
        print(
            "Its client goes on until it notices, and what it did outside this session is as it left it: look there "
            "before the step runs again."
        )
    return 0 if ended.ended else NOTHING_ENDED


def _key(args: argparse.Namespace) -> Key:
    if args.key is None:
        return names.key(options.required(args, "target"), options.required(args, "step"))
    if args.target or args.step:
        raise options.UsageError("give the key, or --target and --step, and not both")
    try:
        number = int(args.key)
    except ValueError:
        number = 2**63
    if not -(2**63) <= number < 2**63:
        raise options.UsageError("KEY is no number that a lock can have: dblock key and dblock status show it")
    return Key(number)


def _show(holder: Any) -> None:
    said = parse(holder.application or "")
    lines = {
        "pid": holder.pid,
        "held since": holder.since and f"{holder.since.astimezone():%Y-%m-%d %H:%M:%S}",
        "tenant": said.tenant if said else None,
        "lock": f"{said.step}@{said.target}" if said else None,
        "application": None if said else holder.application,
        "host": holder.host,
        "user": holder.user,
        "activity": holder.activity,
        "mode": holder.mode,
    }
    print(printable(holder.outcome))
    for name, value in lines.items():
        if value:
            print(f"  {name:12}{printable(str(value))}")


def _confirmed(args: argparse.Namespace, pids: list[int]) -> int | None:
    """The pid of the session to end; None: nobody has named one of them."""
    given = args.confirm
    if given is None:
        if not sys.stdin.isatty():
            say(f"nothing was ended: give --confirm and the pid to end, {' or '.join(map(str, pids))}")
            return None
        given = input("pid of the session to end, or Enter for none: ").strip()
    if given in map(str, pids):
        return int(given)
    say(f"nothing was ended: {given or 'nothing'} is not a holder's pid")
    return None
