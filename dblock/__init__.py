"""One step of a deployment at a time on each target, by the advisory locks of the tenants' shared database.

>>> import dblock
>>> with dblock.lock("postgresql://…", target="web-01", step="b", tenant="T1", timeout=600):
...     migrate()

The contract that Python, the command line and the SQL scripts share is told in docs/contract.md.
"""

from typing import TYPE_CHECKING, Any

from dblock.errors import (
    AlreadyHeld,
    DatabaseError,
    Error,
    LockDeadlock,
    LockLost,
    LockNotHeld,
    LockTimeout,
    UnsafeConnection,
)
from dblock.lock import Lock, lock
from dblock.names import Key, key

if TYPE_CHECKING:
    from dblock.aio import AsyncLock, alock

__all__ = [
    "AlreadyHeld",
    "AsyncLock",
    "DatabaseError",
    "Error",
    "Key",
    "Lock",
    "LockDeadlock",
    "LockLost",
    "LockNotHeld",
    "LockTimeout",
    "UnsafeConnection",
    "alock",
    "key",
    "lock",
]


def __getattr__(name: str) -> Any:
    # asyncio takes longer to import than all of dblock.
    if name in ("AsyncLock", "alock"):
        from dblock import aio

        return getattr(aio, name)
    raise AttributeError(f"module 'dblock' has no attribute {name!r}")
