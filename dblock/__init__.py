"""One step of a deployment at a time on each target, by the advisory locks of the tenants' shared database.

>>> import dblock
>>> with dblock.lock("postgresql://…", target="web-01", step="b", tenant="T1", timeout=600):
...     migrate()

The contract that Python, the command line and the SQL scripts share is told in docs/contract.md.
"""

from importlib import import_module

TYPE_CHECKING = False  # as type checkers know it; typing itself would be the slowest of all imports

if TYPE_CHECKING:
    from dblock.aio import AsyncLock, alock
    from dblock.blocking import Lock, lock
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
    from dblock.names import Key, key

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

_HOMES = {"Lock": "blocking", "lock": "blocking", "AsyncLock": "aio", "alock": "aio", "Key": "names", "key": "names"}

if not TYPE_CHECKING:

    def __getattr__(name):
        """Import what is asked for, and keep it: a step that only computes a key need not wait for the rest."""
        if name not in __all__:
            raise AttributeError(f"module 'dblock' has no attribute {name!r}")
        value = getattr(import_module(f"dblock.{_HOMES.get(name, 'errors')}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
