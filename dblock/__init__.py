"""One step of a deployment at a time on each target, by the advisory locks of the tenants' shared database.

>>> import dblock
>>> with dblock.lock("postgresql://…", target="web-01", step="b", tenant="T1", timeout=600):
...     migrate()

The contract that Python, the command line and the SQL scripts share is told in docs/contract.md.
"""

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

__all__ = [
    "AlreadyHeld",
    "DatabaseError",
    "Error",
    "Key",
    "Lock",
    "LockDeadlock",
    "LockLost",
    "LockNotHeld",
    "LockTimeout",
    "UnsafeConnection",
    "key",
    "lock",
]
