"""``dblock doctor``: whether locks can be trusted on this connection, and what to do where they cannot."""

from __future__ import annotations

import argparse
import os
from typing import Any

from dblock.cli import options
from dblock.label import printable

WARNINGS = 1
UNTRUSTED = 77


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check whether locks can be trusted on this connection",
        description="Check whether this account, on this connection, to this server, can hold a lock that excludes: a "
        "lock of its own is taken for a moment. Exit code 0: it can; 1: it can, but somebody will be surprised; 77: no "
        "lock can be trusted, or none be had.",
    )
    options.add_connection(parser)
    parser.add_argument(
        "--waiters",
        metavar="N",
        type=_number,
        default=0,
        help="for so many who hold or wait at once there must be room",
    )
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    from dblock.doctor import examine

    os.environ.pop("DBLOCK_EVENTS", None)  # what is tried here is nobody's deployment
    results = set()
    for finding in examine(
        options.url(args),
        database=options.value(args, "database"),
        allow_session_pooler=args.allow_session_pooler,
        waiters=args.waiters,
    ):
        results.add(finding.result)
        print(f"{finding.result:8} {finding.check:15} {printable(finding.says)}", flush=True)
        if finding.remedy:
            print(f"{'':24} {finding.remedy}")
    return UNTRUSTED if "bad" in results else WARNINGS if "warning" in results else 0


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 6:
        raise argparse.ArgumentTypeError("must be a number of callers")
    return int(text)
