"""Step b as a Python script that locks for itself: what ``dblock demo`` runs for the tenants of the Python door.

``python -m dblock.demo.step_b TENANT TARGET [--no-lock]``, with the database in DBLOCK_URL.
"""

from __future__ import annotations

import os
import sys

import psycopg

import dblock
from dblock.demo import steps


def main() -> None:
    tenant, target, *options = sys.argv[1:]
    url = os.environ["DBLOCK_URL"]
    try:
        if "--no-lock" in options:
            migrate(url, tenant, target)
        else:
            with dblock.lock(url, target=target, step="b", tenant=tenant):
                migrate(url, tenant, target)
    except (dblock.Error, psycopg.Error) as error:
        sys.exit(f"ERROR: {str(error).splitlines()[0]}")


def migrate(url: str, tenant: str, target: str) -> None:
    """Do the step's work, on a connection that knows nothing of the lock."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in steps.step("b", tenant, target, "python"):
            connection.execute(statement.encode())


if __name__ == "__main__":
    main()
