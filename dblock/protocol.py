"""What a lock and an engine agree upon: messages, replies, outcomes, and the generators that exchange them.

A generator yields a message for the server and receives the last row of its reply; where the message failed, the
error is thrown in. So the order of things stands once, whoever waits for the socket and however. The one who runs a
generator promises to throw every error in and to go on running what it yields then: that is how whatever was taken
is given back.

Knows no engine and no driver. ``postgres.py`` and ``mssql.py`` fill it in, sessions run it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from dblock import names
from dblock.errors import DatabaseError
from dblock.names import Key

T = TypeVar("T")
Row = tuple[Any, ...]

ANSWER_SECONDS = 5  # how long an answer to a light question may take before the connection counts as dead
REPORT_SECONDS = 30.0  # between two words about who is in the way

# Between two looks for a free permit, by the one waiter who looks: soon at first, then more and more seldom.
FIRST_PAUSE_SECONDS = 0.0002
LONGEST_PAUSE_SECONDS = 0.02
PAUSE_GROWTH = 1.2


class Wait(NamedTuple):
    """A message in which the server waits for the lock, for as long as the caller wants to.

    Attributes:
        text: what is sent.
        deadline: when the caller's time is over, on the monotonic clock; None: never. The server is told too; who
            runs this sees to it where the server does not answer, and then throws ``WaitOver`` in.
    """

    text: str
    deadline: float | None


class Pause(NamedTuple):
    """Nothing is sent for so many seconds. The reply is empty."""

    seconds: float


class HangUp:
    """The connection is closed, whosever it is: what its session holds is not known. The reply is empty."""


class Statement(str):
    """A message of one statement which means the same whatever the session is set to: so a driver may prepare it."""

    __slots__ = ()


Message = str | Wait | Pause | HangUp
Steps = Generator[Message, Row, T]


class WaitOver(DatabaseError):  # noqa: N818 - says what happened
    """The deadline of a ``Wait`` passed without an answer. The session is closed."""


class Wish(NamedTuple):
    """What the caller asks for: one lock, in one shape and scope.

    Attributes:
        key: the lock's.
        target: where the step runs.
        step: what runs there.
        tenant: for whom, or None.
        shared: beside other shared ones.
        slots: how many may be inside at once, each with a permit of its own; None: the lock has no permits.
        in_transaction: until the caller's transaction ends; otherwise until it is released.
    """

    key: Key
    target: str
    step: str
    tenant: str | None
    shared: bool = False
    slots: int | None = None
    in_transaction: bool = False

    @property
    def permits(self) -> tuple[Key, ...]:
        return names.permits(self.target, self.step, self.slots) if self.slots else ()


class Conditions(NamedTuple):
    """What the caller says of the connection.

    Attributes:
        database: the database it must be, or None.
        allow_session_pooler: the caller's word that a pooler in between gives a session of its own.
        release_seconds: when nothing is heard of the holder for so long, the server shall give its lock back.
    """

    database: str | None = None
    allow_session_pooler: bool = False
    release_seconds: int = 35


class Look(NamedTuple):
    """Who holds the lock, and how many wait before the one who asks.

    Attributes:
        held: whether somebody holds it; None: this role or login may not see that.
        session: one holder's session as the engine's people name it, such as ``pid 4123``; None: there is none, as
            with a prepared transaction.
        says: what the holder's session says of itself: dblock's label, or anything.
        application: the name of its program, where that is not the label.
        host: where its client runs.
        others: how many more hold it.
        ahead: how many wait for the lock before the one who asks.
    """

    held: bool | None
    session: str | None = None
    says: str | None = None
    application: str | None = None
    host: str | None = None
    others: int = 0
    ahead: int = 0


KEEP_LABEL: Final = object()


class Granted(NamedTuple):
    """The lock is held.

    Attributes:
        before: where the label stands now, the session had this before; ``KEEP_LABEL``: the label is another lock's.
        slot: the number of the permit, where the lock has some.
    """

    before: Any
    slot: int | None = None


class Busy(NamedTuple):
    """The lock was not acquired in time, and this was in the way."""

    wish: Wish
    look: Look


Report = Callable[[Wish, Look], None]


class ServerLock(Protocol):
    """One lock in one session, as one engine says it."""

    wish: Wish
    may_hold: bool  # from the first attempt until it is known that nothing of the lock is held

    def open(self, conditions: Conditions) -> Steps[None]:
        """Refuse the session where no lock can be trusted on it, and before anything is taken.

        Raises:
            UnsafeConnection: no lock could be trusted on it.
            AlreadyHeld: it holds the lock already.
        """
        ...

    def acquire(self, conditions: Conditions, timeout: float | None, report: Report | None) -> Steps[Granted | Busy]:
        """Take the lock: at once if it is free and nobody waits, otherwise in the queue.

        Unless this returns ``Granted`` nothing of it is held, or the session is closed.

        Args:
            conditions: what the caller says of the connection.
            timeout: seconds to wait; None: without limit; 0: do not wait.
            report: is told who is in the way; None: nobody wants to know.

        Raises:
            UnsafeConnection, AlreadyHeld: as `open` does, before any waiting.
            LockDeadlock: the server chose this wait as a deadlock's victim.
            DatabaseError: the server refused or cancelled a statement.
        """
        ...

    def settle(self) -> Steps[None]:
        """Say what is to be said when all of the locks that were asked for are held, the last one first."""
        ...

    def withdraw(self) -> Steps[None]:
        """Give back what there is of the lock, at any time between the first attempt and `settle`."""
        ...

    def release(self, granted: Granted) -> Steps[bool]:
        """Give the lock back; one that lasts until the transaction's end is only asked after.

        Returns:
            False: the session no longer held it.
        """
        ...

    def check(self, granted: Granted) -> Steps[bool]:
        """Ask the server, with next to no work for it, whether this session still holds the lock."""
        ...

    def look(self) -> Steps[Look]:
        """Ask who is in the way; also on another session than the one that waits."""
        ...


Holds = Sequence[tuple[ServerLock, Granted]]


def acquire_all(
    locks: Sequence[ServerLock],
    conditions: Conditions,
    timeout: float | None,
    report: Report | None,
) -> Steps[list[tuple[ServerLock, Granted]] | Busy]:
    """Take all of the locks, or none: one after the other in one session, within one time.

    Args:
        locks: in the contract's order, which is that of their keys.
        conditions: what the caller says of the connection.
        timeout: seconds for all of them; None: without limit; 0: do not wait.
        report: is told who is in the way of which; None: nobody wants to know.

    Raises:
        Error: as `ServerLock.open` and `ServerLock.acquire` do.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    taken: list[tuple[ServerLock, Granted]] = []
    complete = False
    try:
        for lock in locks[1:]:
            yield from lock.open(conditions)  # before the first one is waited for
        for lock in locks:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            outcome = yield from lock.acquire(conditions, remaining, report)
            if isinstance(outcome, Busy):
                return outcome
            taken.append((lock, outcome))
        for lock, _ in reversed(taken):
            yield from lock.settle()
        complete = True
        return taken
    finally:
        if not complete:
            for lock in reversed(locks):
                if lock.may_hold:
                    with suppress(DatabaseError):  # the session is closed then
                        yield from lock.withdraw()


def release_all(holds: Holds) -> Steps[bool]:
    """Give all of the locks back, the last one first, whatever becomes of the others.

    Returns:
        False: the session no longer held one of them.

    Raises:
        BaseException: what the first failed release raised.
    """
    held = True
    failure: BaseException | None = None
    for lock, granted in reversed(holds):
        try:
            held = (yield from lock.release(granted)) and held
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - raised below, after the others had their turn
            failure = failure or error
    if failure is not None:
        raise failure
    return held


def check_all(holds: Holds) -> Steps[bool]:
    """Ask the server whether the session still holds all of the locks."""
    for lock, granted in holds:
        if not (yield from lock.check(granted)):
            return False
    return True


def already_held(*, own: bool) -> str:
    """What is wrong where the session has the lock, from whichever door."""
    advice = "a callable must return a new connection each time" if own else "a lock is never taken twice"
    return f"the session of this connection holds the lock already; {advice}"


def pauses() -> Iterator[float]:
    """Seconds between looks for a permit: at first none is long, later each is the longest."""
    seconds = FIRST_PAUSE_SECONDS
    while True:
        yield seconds
        seconds = min(seconds * PAUSE_GROWTH, LONGEST_PAUSE_SECONDS)


class Engine(NamedTuple):
    """What is the same for all sessions of one engine.

    Attributes:
        name: the folder of its raw scripts.
        current_database: a message whose reply is the database's name.
        inspect_settings: a message that makes the session ready for ``inspect.sql``.
        entry_row: from a row of ``inspect.sql``, as the driver returns it, to the values of ``inspect.Entry``.
        comments: a message whose rows are a session and the text where its comment may stand.
        release_settings: a message that tells ``force_release.sql`` the key, and the session to end or "".
        to_end: the statement with which an administrator ends a session of that number, while it holds the key.
    """

    name: str
    current_database: str
    inspect_settings: str
    entry_row: Callable[[Row], Row]
    comments: str
    release_settings: Callable[[Key, str], str]
    to_end: Callable[[Key, int], str]
