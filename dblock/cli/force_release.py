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
    pids = [holder.pid for holder in holders if holder.pid is not None]
    forbidden = [holder.pid for holder in holders if holder.forbidden and holder.pid is not None]
    if pids and pids == forbidden and args.confirm is None:
        wanted = forbidden  # whoever may end none of them need not be asked which
    else:
        confirmed = _confirmed(args, pids) if pids else None
        if confirmed is None:
            return NOTHING_ENDED
        wanted = [confirmed]
    if set(wanted) <= set(forbidden):
        statements = "; ".join(to_end(url, key, pid) for pid in wanted)
        raise DatabaseError(f"nothing was ended: somebody who may end it runs: {statements}", "42501")
    ended, *_ = force_release(url, key, end=wanted[0], database=database)
    print(printable(ended.outcome))
    if not ended.ended:
        return NOTHING_ENDED
    print(
        "Its client goes on until it notices, and what it did outside this session is as it left it: look there "
        "before the step runs again."
    )
    return 0


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
    # How the script is told to end it is nothing for here.
    print("held" if holder.outcome.startswith("held: to end") else printable(holder.outcome))
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
        try:
            given = input("pid of the session to end, or Enter for none: ").strip()
        except EOFError:
            given = ""
    if given in map(str, pids):
        return int(given)
    say(f"nothing was ended: {given or 'nothing'} is not a holder's pid")
    return None
