"""What a lock and an engine agree upon: messages, replies, outcomes, and the generators that exchange them.

A generator yields a message for the server and receives the last row of its reply; where the message failed, the
error is thrown in. So the order of things stands once, whoever waits for the socket and however. The one who runs a
generator promises to throw every error in and to go on running what it yields then: that is how whatever was taken
is given back.

Knows no engine and no driver. ``postgres.py`` and ``mssql.py`` fill it in, sessions run it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from dblock.errors import DatabaseError
from dblock.names import Key

T = TypeVar("T")
Row = tuple[Any, ...]

REPORT_SECONDS = 30.0  # between two words about who is in the way


@dataclass(frozen=True)
class Wait:
    """A message in which the server waits for the lock, for as long as the caller wants to.

    Attributes:
        text: what is sent.
        deadline: when the caller's time is over, on the monotonic clock; None: never. The server is told too; who
            runs this sees to it where the server does not answer, and then throws ``WaitOver`` in.
    """

    text: str
    deadline: float | None


Message = str | Wait
Steps = Generator[Message, Row, T]


class WaitOver(DatabaseError):  # noqa: N818 - says what happened
    """The deadline of a ``Wait`` passed without an answer. The session is closed."""


@dataclass(frozen=True)
class Wish:
    """What the caller asks for."""

    key: Key
    target: str
    step: str
    tenant: str | None


@dataclass(frozen=True)
class Conditions:
    """What the caller says of the connection.

    Attributes:
        database: the database it must be, or None.
        allow_session_pooler: the caller's word that a pooler in between gives a session of its own.
    """

    database: str | None = None
    allow_session_pooler: bool = False


@dataclass(frozen=True)
class Look:
    """Who holds the lock, and how many wait before the one who asks.

    Attributes:
        held: whether somebody holds it; None: this role or login may not see that.
        session: the holder's session as the engine's people name it, such as ``pid 4123``; None: there is none, as
            with a prepared transaction.
        says: what the holder's session says of itself: dblock's label, or anything.
        application: the name of its program, where that is not the label.
        host: where its client runs.
        ahead: how many wait for the lock before the one who asks.
    """

    held: bool | None
    session: str | None = None
    says: str | None = None
    application: str | None = None
    host: str | None = None
    ahead: int = 0


@dataclass(frozen=True)
class Granted:
    """The lock is held.

    Attributes:
        before: where the label stands now, the session had this before.
    """

    before: Any


@dataclass(frozen=True)
class Busy:
    """The lock was not acquired in time, and this was in the way."""

    look: Look


class ServerLock(Protocol):
    """One lock in one session, as one engine says it."""

    def open(self, conditions: Conditions) -> Steps[None]:
        """Make the session ready for the lock, or refuse it.

        Raises:
            UnsafeConnection: no lock could be trusted on it.
            AlreadyHeld: it holds the lock already.
        """
        ...

    def acquire(self, timeout: float | None, report: Callable[[Look], None]) -> Steps[Granted | Busy]:
        """Take the lock: at once if it is free and nobody waits, otherwise in the queue.

        Unless this returns ``Granted`` the session must be closed.

        Args:
            timeout: seconds to wait; None: without limit; 0: do not wait.
            report: is told who is in the way.

        Raises:
            LockDeadlock: the server chose this wait as a deadlock's victim.
            DatabaseError: the server refused or cancelled a statement.
        """
        ...

    def release(self, granted: Granted) -> Steps[bool]:
        """Give the lock back. False: the session no longer held it."""
        ...

    def check(self) -> Steps[bool]:
        """Ask the server, with next to no work for it, whether this session still holds the lock."""
        ...

    def look(self) -> Steps[Look]:
        """Ask who is in the way; also on another session than the one that waits."""
        ...


@dataclass(frozen=True)
class Engine:
    """What is the same for all sessions of one engine.

    Attributes:
        name: the folder of its raw scripts.
        current_database: a message whose reply is the database's name.
        inspect_settings: a message that makes the session ready for ``inspect.sql``.
        entry_row: from a row of ``inspect.sql``, as the driver returns it, to the values of ``inspect.Entry``.
        keep_alive_seconds: how long a session that holds a lock may be silent; None: for ever.
    """

    name: str
    current_database: str
    inspect_settings: str
    entry_row: Callable[[Row], Row]
    keep_alive_seconds: float | None
