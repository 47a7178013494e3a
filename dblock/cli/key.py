"""``dblock key``: the number that names a lock in the server's views, in logs and in scripts. Needs no database."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dblock.cli import options
from dblock.names import key


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "key",
        help="print the key of a lock",
        description="Print the key of the lock for one step on one target: the number itself, its row in PostgreSQL's "
        "pg_locks, and the resource's name on SQL Server. No database is needed.",
    )
    options.add_names(parser)
    parser.add_argument(
        "--json", action="store_true", help="as an object with target, step, key (an integer), postgres and mssql"
    )
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    target, step = options.required(args, "target"), options.required(args, "step")
    computed = key(target, step)
    row = computed.postgres
    if args.json:
        document = {
            "target": target,
            "step": step,
            "key": computed.value,
            "postgres": row._asdict(),
            "mssql": computed.mssql,
        }
        print(json.dumps(document))
    else:
        print(f"key       {computed.value}")
        print(f"postgres  classid {row.classid}, objid {row.objid}, objsubid {row.objsubid}")
        print(f"mssql     {computed.mssql}")
    return 0
