"""The lock that a caller has in hand, and its life: made, acquired, held, released."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from dblock import label, names
from dblock.connect import Source, check_source, connect
from dblock.errors import AlreadyHeld, DatabaseError, LockLost, LockNotHeld, LockTimeout
from dblock.protocol import Busy, Conditions, Granted, Look, ServerLock, Wish
from dblock.session import Session
from dblock.watch import KeepAlive

if TYPE_CHECKING:
    from typing_extensions import Self  # a type checker knows it; typing has it from 3.11 only

P = ParamSpec("P")
R = TypeVar("R")

MAX_TIMEOUT_SECONDS = 2147483

_log = logging.getLogger("dblock")


class _Unset:
    def __repr__(self) -> str:
        return "the lock's own timeout"


_UNSET: Final = _Unset()

# A lock that nobody refers to any more would be closed by the garbage collector, and released in the middle of what
# it guards. Held locks are referred to from here.
_held_locks: set[Lock] = set()


def lock(
    db: Source,
    *,
    target: str,
    step: str,
    tenant: str | None = None,
    timeout: float | None = None,
    database: str | None = None,
    allow_session_pooler: bool = False,
) -> Lock:
    """Make the lock for one step on one target. Nothing is opened or taken until it is acquired.

    >>> with dblock.lock(url, target="web-01", step="b", tenant="T1", timeout=600):
    ...     migrate()

    Args:
        db: a URL (``postgresql://…``, ``mssql+pymssql://…``), a PostgreSQL conninfo string, or a callable that returns
            a new connection of psycopg or pymssql. The lock has a connection of its own, opened at the acquire and
            closed at the release.
        target: where the step runs. Compared exactly, as is the step; see `dblock.key`.
        step: what may run only once at a time there.
        tenant: for whom; a label that others see while they wait, and no part of the key.
        timeout: seconds to wait for the lock; None: without limit, 0: do not wait. At most 2147483, and anything
            above 0 is at least a millisecond.
        database: the database that all callers agreed upon; any other is refused at the acquire.
        allow_session_pooler: the caller's word that the pooler in between is in session mode for this database
            (PostgreSQL).

    Returns:
        A lock that is not held yet: use it as a context manager, as a decorator, or through `Lock.acquire`.

    Raises:
        ValueError: a name, the timeout or db is not acceptable.
        TypeError: an argument is of the wrong kind.
    """
    return Lock(
        db,
        target=target,
        step=step,
        tenant=tenant,
        timeout=timeout,
        database=database,
        allow_session_pooler=allow_session_pooler,
    )


class Lock:
    """One lock, in the hand of one caller. Made by `dblock.lock`.

    It may be acquired and released again and again, by any thread, but held only once at a time. A child process
    made by fork does not hold its parent's lock.
    """

    def __init__(
        self,
        db: Source,
        *,
        target: str,
        step: str,
        tenant: str | None,
        timeout: float | None,
        database: str | None,
        allow_session_pooler: bool,
        keep_alive: bool = True,
    ) -> None:
        # The arguments are those of `lock`, and one more: whether a thread keeps the held lock's connection alive where
        # the server wants that. Otherwise the caller does, who calls `check` every `keep_alive_seconds`.
        if tenant is not None and not isinstance(tenant, str):
            raise TypeError(f"tenant must be a str or None, not {type(tenant).__name__}")
        if database is not None and not isinstance(database, str):
            raise TypeError(f"database must be a str or None, not {type(database).__name__}")
        self.key = names.key(target, step)
        self.target = target
        self.step = step
        self.tenant = tenant
        self._db = check_source(db)
        self._timeout = check_timeout(timeout)
        self._conditions = Conditions(database, allow_session_pooler)
        self._keep_alive = keep_alive
        self._wish = Wish(self.key, target, step, tenant)
        # Held from the beginning of an acquire to the end of the release: a second entry finds it taken.
        self._entered = threading.Lock()
        self._handover = threading.Lock()
        self._held: _Held | None = None

    def __repr__(self) -> str:
        state = "held" if self._held else "not held"
        return f"<dblock.Lock {self._name} key {self.key.value}, {state}>"

    @property
    def held(self) -> bool:
        """Whether the lock is held, as far as this process can know without asking the server.

        A connection that the server has ended, or that has been closed, holds nothing. One whose network died
        silently still counts as held: see `release`, which asks.
        """
        held = self._held
        return held is not None and held.by == os.getpid() and not held.lost and held.session.alive()

    @property
    def keep_alive_seconds(self) -> float | None:
        """How long the server lets the held lock's connection be silent; None: for ever, or the lock is not held."""
        held = self._held
        return None if held is None else held.session.engine.keep_alive_seconds

    def check(self) -> None:
        """Ask the server whether the lock is still held: before a part of the step that cannot be undone.

        Raises:
            LockNotHeld: it is not held by this object, or not by this process.
            LockLost: it ended: the connection died, or somebody released it.
        """
        held = self._own_hold()
        try:
            if not held.lost and held.session.run(held.lock.check()):
                return
            why = "the server says that this session has it no more"
        except DatabaseError as error:
            why = str(error)
        held.lost = held.lost or why
        raise LockLost(f"{self._name} was lost while it was held: {held.lost}")

    def acquire(self, timeout: float | _Unset | None = _UNSET) -> bool:
        """Take the lock, and wait for it in the order of arrival.

        Args:
            timeout: seconds; None: without limit, 0: do not wait. Left out, the lock's own timeout.

        Returns:
            True: the lock is held. False: it was not acquired in time.

        Raises:
            AlreadyHeld: this object holds the lock already, or another thread is about to acquire it.
            LockDeadlock: the server chose this wait as a deadlock's victim.
            UnsafeConnection: no lock could be trusted on the connection; raised before any waiting.
            DatabaseError: the database cannot be reached, refused the call or cancelled it.
            ValueError: the timeout is out of its limits, or db cannot be read.
        """
        return self._acquire(self._timeout if isinstance(timeout, _Unset) else check_timeout(timeout)) is None

    def release(self) -> None:
        """Give the lock back and close its connection.

        Raises:
            LockNotHeld: it is not held by this object, or not by this process.
            LockLost: it ended before: the connection died, or somebody released it. What it guarded may have run
                beside another holder.
        """
        with self._handover:
            held = self._own_hold()
            self._held = None
        try:
            if held.keeper is not None:
                held.keeper.stop()  # or it could find the lock given back, and take that for a loss
            unlocked = not held.lost and held.session.run(held.lock.release(held.granted))
        except DatabaseError as error:
            raise LockLost(f"{self._name} was lost while it was held: {error}") from error
        finally:
            self._leave(held.session)
        if not unlocked:
            why = held.lost or "the server says that this session has it no more"
            raise LockLost(f"{self._name} was lost while it was held: {why}")

    def fileno(self) -> int:
        """The descriptor of the held lock's socket: the server gives the lock back when its last copy is closed.

        Raises:
            LockNotHeld: the lock is not held by this object.
        """
        held = self._held
        if held is None:
            raise LockNotHeld(f"{self._name} is not held by this lock object")
        return held.session.fileno()

    def __enter__(self) -> Self:
        """Acquire, or raise: the body never runs without the lock."""
        held_before = self._held
        try:
            busy = self._acquire(self._timeout)
            if busy is None:
                return self
        except BaseException:
            # A signal's exception can arrive when the lock is held already and its body not yet begun. What another
            # thread has acquired meanwhile stays.
            held = self._held
            if held is not None and held is not held_before and held.by_thread == threading.get_ident():
                self.release()
            raise
        waited = f"in {_seconds(self._timeout)}" if self._timeout else "without waiting"
        raise LockTimeout(f"{self._name} not acquired {waited}: {self._in_the_way(busy.look)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.release()
        except (LockLost, LockNotHeld) as lost:
            if error is None:
                raise
            # The body's own error is the one to be seen; that the lock was lost too is said beside it.
            _log.error("%s", lost)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function: each call takes a fresh lock of its own around its body.

        Raises:
            TypeError: the function is a generator or a coroutine function, whose body runs after the call.
        """
        import inspect  # slow to import, and needed here only

        if (
            inspect.iscoroutinefunction(function)
            or inspect.isgeneratorfunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            raise TypeError("a generator or coroutine function runs its body after the call, outside the lock")

        @wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._another():
                return function(*args, **kwargs)

        return locked

    @property
    def _name(self) -> str:
        return f"{label.printable(self.step)}@{label.printable(self.target)}"

    def _another(self) -> Lock:
        return lock(
            self._db,
            target=self.target,
            step=self.step,
            tenant=self.tenant,
            timeout=self._timeout,
            database=self._conditions.database,
            allow_session_pooler=self._conditions.allow_session_pooler,
        )

    def _own_hold(self) -> _Held:
        held = self._held
        if held is None or held.by != os.getpid():
            raise LockNotHeld(f"{self._name} is not held by this {'process' if held else 'lock object'}")
        return held

    def _acquire(self, timeout: float | None) -> Busy | None:
        """Take the lock and return None, or return who is in the way."""
        if not self._entered.acquire(blocking=False):
            raise AlreadyHeld(
                f"{self._name} is already held, or being acquired, by this lock object; make one lock for each caller"
            )
        session: Session | None = None
        kept = False
        try:
            session = connect(self._db)
            lock = session.lock(self._wish)
            session.run(lock.open(self._conditions))
            outcome = session.run(lock.acquire(timeout, self._report), lambda: self._report_from_outside(lock))
            if isinstance(outcome, Busy):
                return outcome
            _held_locks.add(self)
            self._held = _Held(session, lock, outcome, os.getpid(), threading.get_ident())
            if self._keep_alive and session.engine.keep_alive_seconds is not None:
                self._held.keeper = KeepAlive(self._still_held, session.engine.keep_alive_seconds)
            kept = True
        except DatabaseError as error:
            raise DatabaseError(f"{self._name} not acquired: {error}", error.sqlstate) from error
        finally:
            if not kept:
                self._held = None
                self._leave(session)
        return None

    def _leave(self, session: Session | None) -> None:
        if session is not None:
            session.close()
        _held_locks.discard(self)
        self._entered.release()

    def _still_held(self) -> bool:
        """What the keep-alive asks. A loss is said at once, and raised where the holder next asks or releases."""
        try:
            self.check()
        except LockNotHeld:
            return False
        except LockLost as lost:
            _log.error("%s", lost)
            return False
        return True

    def _report(self, look: Look) -> None:
        _log.info("waiting for %s: %s", self._name, self._in_the_way(look))

    def _report_from_outside(self, lock: ServerLock) -> None:
        """Report while the lock's own session waits inside one statement, so that another one must ask."""
        try:
            with closing(connect(self._db)) as another:
                self._report(another.run(lock.look()))
        except DatabaseError as error:
            _log.info("waiting for %s; who is in the way cannot be asked: %s", self._name, error)

    def _in_the_way(self, look: Look) -> str:
        """Say who holds the lock since when, and how many wait ahead."""
        ahead = f"; {look.ahead} ahead" if look.ahead else ""
        if look.held is None:
            return "holder not visible to this login" + ahead
        if look.session is None:
            return ("held by a prepared transaction" if look.held else "nobody holds it at this moment") + ahead
        said = label.parse(look.says or "")
        details = [look.session]
        since = ""
        if said and said.may_name(self.target, self.step):
            since = f" since {_clock(said.time)}"
        elif look.application:
            details.append(f"application {label.printable(look.application)}")
        if look.host:
            details.append(f"host {label.printable(look.host)}")
        who = f"tenant {label.printable(said.tenant)} " if since and said and said.tenant else "a session "
        return f"held by {who}({', '.join(details)}){since}{ahead}"


@dataclass
class _Held:
    """What an acquired lock needs to be given back, and the process that may do it."""

    session: Session
    lock: ServerLock
    granted: Granted
    by: int
    by_thread: int
    keeper: KeepAlive | None = None
    lost: str = ""  # why, once it is known


def check_timeout(timeout: float | None) -> float | None:
    """Check a timeout against the contract's limits, which are those of the scripts' setting.

    Args:
        timeout: seconds, or None for "without limit".

    Returns:
        The timeout, at least a millisecond where it is not 0.

    Raises:
        ValueError: it is negative, above 2147483, or not a number.
        TypeError: it is no number at all.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds or None, not {type(timeout).__name__}")
    if not 0 <= timeout <= MAX_TIMEOUT_SECONDS:  # also refuses NaN, which compares false
        raise ValueError(f"timeout must be between 0 and {MAX_TIMEOUT_SECONDS} seconds, or None; it is {timeout}")
    return max(float(timeout), 0.001) if timeout else 0.0


def _seconds(timeout: float) -> str:
    return f"{timeout:.3f}".rstrip("0").rstrip(".") + " s"


def _clock(epoch: int) -> str:
    """The local time of day; with the date where it is not today's."""
    moment = datetime.fromtimestamp(epoch, tz=timezone.utc).astimezone()
    today = datetime.now(tz=timezone.utc).astimezone().date()
    return f"{moment:%H:%M:%S}" if moment.date() == today else f"{moment:%Y-%m-%d %H:%M:%S}"
