"""Everything that dblock raises of its own; the outcomes of the contract, one class each."""

from __future__ import annotations


class Error(Exception):
    """The base of dblock's own exceptions."""


class LockTimeout(Error, TimeoutError):  # noqa: N818 - the contract's name; a TimeoutError is an error by its base
    """The lock was not acquired in time. The message says who is in the way, as far as the role may see it."""


class LockDeadlock(Error):  # noqa: N818 - the contract's name
    """The server chose this wait as the victim of a deadlock. Nothing is held."""


class LockNotHeld(Error):  # noqa: N818 - the contract's name
    """A release of a lock that this object does not hold."""


class UnsafeConnection(Error):  # noqa: N818 - the contract's name
    """The connection cannot carry a lock that anybody could trust: a pooler, a standby, a read-only server,
    another database than the agreed one, or a transaction that would end after the lock.
    """


class AlreadyHeld(Error):  # noqa: N818 - the contract's name
    """This lock object, or this session, has the lock already. A lock is never taken twice."""


class LockLost(Error):  # noqa: N818 - the contract's name
    """The lock ended while it was held: its connection died, or somebody released it.
    What it guarded may have run beside another holder.
    """


class DatabaseError(Error):
    """The database cannot be reached, refused the call, or cancelled it. Nothing is held.

    Attributes:
        sqlstate: the server's five-character code, or None where no server answered.
    """

    def __init__(self, message: str, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
