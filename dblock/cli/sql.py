"""``dblock sql``: the raw scripts, at hand where only the package was installed."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dblock import scripts


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "sql",
        help="print a raw SQL script",
        description="Print a raw SQL script byte for byte, such as postgres/acquire. Its header says how it is used.",
    )
    parser.add_argument("name", nargs="?", help="the script; left out, the names of all are listed")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    if args.name is None:
        print(*scripts.names(), sep="\n")
        return 0
    # As bytes: print would translate line ends and encode as the terminal likes it.
    sys.stdout.buffer.write(scripts.script(args.name).encode())
    return 0
