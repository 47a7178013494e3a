"""The little of psql that the demo needs, for machines without it: ``URL [-c COMMAND | -f FILE]…`` in one session.

Each command and each file is sent as it stands, in autocommit. The first error ends it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import psycopg


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dblock.demo.client", allow_abbrev=False)
    parser.add_argument("url")
    parser.add_argument("-c", dest="commands", action="append", metavar="COMMAND")
    parser.add_argument("-f", dest="commands", action="append", type=lambda file: Path(file).read_text("utf-8"))
    args = parser.parse_args()
    try:
        with psycopg.connect(args.url, autocommit=True, client_encoding="UTF8") as connection:
            for command in args.commands or ():
                connection.execute(command.encode())
    except psycopg.Error as error:
        sys.exit(f"ERROR: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
