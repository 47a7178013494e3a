"""Options that several subcommands share, and where their values come from: the command line or the environment.

An empty variable counts as absent, since deployment tools leave them empty; an option that is given but empty is a
mistake, most often a variable that was not set in the shell.
"""

from __future__ import annotations

import argparse
import os
import re

from dblock.life import check_timeout

_DURATION = re.compile(r"(?P<number>[0-9]{1,7}(?:\.[0-9]{1,3})?)(?P<unit>[smh]?)|(?P<milliseconds>[0-9]{1,10})ms")
_UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


class UsageError(ValueError):
    """The command line, or the environment in its place, cannot be understood. Exit code 64."""


def add_database(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which database, for `url`."""
    parser.add_argument(
        "--url",
        help="the database as a URL (postgresql://…, mssql+pymssql://…) or PostgreSQL conninfo string, without a "
        "password (default: DBLOCK_URL, which may hold one)",
    )
    parser.add_argument("--database", metavar="NAME", help="the database it must be; any other is refused")


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which database it is, and what stands in between."""
    add_database(parser)
    parser.add_argument(
        "--allow-session-pooler",
        action="store_true",
        help="the connection pooler in between is in session mode for this database: your word, as it cannot be seen",
    )


def add_names(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add the options that name a lock, for `value`; where there may be several targets, for `targets`."""
    if several:
        parser.add_argument(
            "--target",
            metavar="T",
            action="append",
            help="where the step runs (default: DBLOCK_TARGET); given several times, all of them are taken or none",
        )
    else:
        parser.add_argument("--target", metavar="T", help="where the step runs (default: DBLOCK_TARGET)")
    parser.add_argument("--step", metavar="S", help="what runs only once at a time there (default: DBLOCK_STEP)")


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how many may hold the lock at once."""
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--shared", action="store_true", help="beside other shared holders, not beside an exclusive one")
    shape.add_argument(
        "--slots",
        metavar="N",
        type=_slots,
        help="at most N at once; which of 0 to N-1 this one is, the command finds in DBLOCK_SLOT",
    )


def targets(args: argparse.Namespace) -> str | list[str]:
    """Return the targets that are given, or that of DBLOCK_TARGET.

    Raises:
        UsageError: there is none, or one is empty.
    """
    if args.target is None:
        found = os.environ.get("DBLOCK_TARGET")
        if not found:
            raise UsageError("--target is missing: give it, or set DBLOCK_TARGET")
        return found
    given: list[str] = args.target
    if "" in given:
        raise UsageError("--target is empty")
    return given[0] if len(given) == 1 else given


def labels(args: argparse.Namespace) -> dict[str, str]:
    """Return what --label gives.

    Raises:
        UsageError: one has no name, or is given twice.
    """
    found: dict[str, str] = {}
    for given in args.label:
        name, separator, text = given.partition("=")
        if not separator or name in found:
            raise UsageError(f"--label {given!r} is {'given twice' if separator else 'not of the form NAME=VALUE'}")
        found[name] = text
    return found


def value(args: argparse.Namespace, name: str) -> str | None:
    """Return an option's value, or that of its variable ``DBLOCK_NAME``, or None where neither is given.

    Raises:
        UsageError: the option is given, but empty.
    """
    given: str | None = getattr(args, name)
    if given == "":
        raise UsageError(f"--{name} is empty")
    return given or os.environ.get(f"DBLOCK_{name.upper()}") or None


def required(args: argparse.Namespace, name: str) -> str:
    """Return a value as `value` does.

    Raises:
        UsageError: it is neither given as an option nor in the environment.
    """
    found = value(args, name)
    if found is None:
        raise UsageError(f"--{name} is missing: give it, or set DBLOCK_{name.upper()}")
    return found


def url(args: argparse.Namespace) -> str:
    """Return the database's URL or conninfo string, from --url or DBLOCK_URL.

    Raises:
        UsageError: there is none, or --url holds a password. The message does not show it.
    """
    found = value(args, "url")
    if found is None:
        raise UsageError("no database: give --url, or set DBLOCK_URL where it holds a password")
    if args.url is not None:
        _refuse_secrets(found)
    return found


def duration(text: str | None) -> float | None:
    """Read a duration: ``600``, ``600s``, ``1.5s``, ``10m``, ``1h``, ``250ms`` or ``0``.

    Returns:
        Seconds, within the limits of a lock's timeout; None for None.

    Raises:
        UsageError: it is none.
        ValueError: it is above the limit.
    """
    if text is None:
        return None
    match = _DURATION.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no duration: write 600, 600s, 1.5s, 10m, 1h, 250ms, or 0 for not waiting")
    if match["milliseconds"]:
        return check_timeout(int(match["milliseconds"]) / 1000)
    return check_timeout(float(match["number"]) * _UNIT_SECONDS[match["unit"]])


def _slots(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,2}", text):
        raise argparse.ArgumentTypeError("must be a number from 1 to 999")
    return int(text)


def _refuse_secrets(found: str) -> None:
    from dblock.connect import secret_in

    try:
        secret = secret_in(found)
    except ValueError as error:
        raise UsageError(f"--url: {error}") from None
    if secret:
        raise UsageError(
            f"--url holds a {secret}, which everybody on this machine can read in the list of processes: change "
            f"it, and put the URL into DBLOCK_URL, or, for PostgreSQL, the password into a password file (passfile=, "
            f"~/.pgpass) or a service file (service=)"
        )
