"""The life of a lock, made, acquired, held, released, as a blocking lock and one for asyncio have it in common.

It stands here once, in coroutines. A lock for asyncio awaits them. In a blocking lock nothing that they await really
waits: each await is done when it returns, so `at_once` runs such a coroutine from its beginning to its end.

Knows neither engine nor driver.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Hashable, Mapping, Sequence
from datetime import datetime, timezone
from math import ceil
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Protocol, TypedDict, TypeVar

from dblock import events, label, names
from dblock.errors import AlreadyHeld, DatabaseError, LockLost, LockNotHeld, LockTimeout, UnsafeConnection
from dblock.names import Key
from dblock.protocol import (
    ANSWER_SECONDS,
    KEEP_LABEL,
    Busy,
    Conditions,
    Granted,
    Look,
    ServerLock,
    Steps,
    T,
    Wish,
    acquire_all,
    check_all,
    release_all,
)
from dblock.session import AnySession, Scope, claim, unclaim

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from 3.11 only

S = TypeVar("S", bound=AnySession)

MAX_TIMEOUT_SECONDS = 2147483
MAX_SLOTS = 999
MIN_HEARTBEAT_SECONDS = 0.1
MAX_HEARTBEAT_SECONDS = 600

SPARE_SECONDS = 5
GRACE_SECONDS = 5

_FAILED_TRANSACTION = "25P02"

log = logging.getLogger("dblock")


class Unset:
    def __repr__(self) -> str:
        return "the lock's own timeout"


UNSET: Final = Unset()

# A lock that nobody refers to any more would be closed by the garbage collector, and released in the middle of what
# it guards. Held locks with a connection of their own are referred to from here.
_kept: set[Life[Any]] = set()

# All that are held, to notice the one that is taken out of order.
_all: weakref.WeakSet[Life[Any]] = weakref.WeakSet()
_all_guard = threading.Lock()
_numbers = itertools.count()


class Watcher(Protocol):
    """Watches a held lock's connection, until it is stopped."""

    def end(self) -> None:
        """Tell it to end, without waiting for that."""
        ...

    async def stop(self) -> None:
        """End it, and wait until it is gone."""
        ...


class Acquisition(Generic[S]):
    """One call of acquire, and what there is to be undone should its caller be told that nothing is held."""

    def __init__(self, caller: Hashable) -> None:
        self.caller = caller  # the thread or task
        self.session: S | None = None
        self.hold: Hold[S] | None = None


class Hold(Generic[S]):
    """What an acquired lock needs to be given back, and who may do it."""

    def __init__(self, session: S, holds: list[tuple[ServerLock, Granted]], caller: Hashable) -> None:
        self.session = session
        self.holds = holds
        self.caller = caller  # the thread or task
        self.by = os.getpid()
        self.number = next(_numbers)  # in the order of the grants
        self.since = time.monotonic()
        self.watcher: Watcher | None = None
        self.lost = ""  # why, once it is known
        self.told = False  # its end, to those who want to know


class Arguments(TypedDict):
    """What `dblock.lock` and `dblock.alock` are told of the lock."""

    target: str | Sequence[str]
    step: str
    tenant: str | None
    label: Mapping[str, str] | None
    timeout: float | None
    shared: bool
    slots: int | None
    scope: Scope
    heartbeat: float
    database: str | None
    allow_session_pooler: bool


class Life(ABC, Generic[S]):
    """One lock, in the hand of one caller: see `dblock.blocking.Lock` and `dblock.aio.AsyncLock`."""

    def __init__(self, *, watched: bool, grace: float, **arguments: Unpack[Arguments]) -> None:
        # watched: whether the held lock's connection is watched. Otherwise the caller does so, and calls `check` every
        # heartbeat. grace: how long what the lock guards may go on when its loss is known.
        for name in ("tenant", "database"):
            value = arguments[name]
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a str or None, not {type(value).__name__}")
        target = arguments["target"]
        self.targets = (target,) if isinstance(target, str) else _distinct(target)
        self.step = arguments["step"]
        self.tenant = arguments["tenant"]
        self._arguments = arguments
        self._labels = dict(arguments["label"] or {})
        self._comment = label.comment(self._labels)
        self._timeout = check_timeout(arguments["timeout"])
        self._scope = arguments["scope"]
        if self._scope not in ("session", "transaction"):
            raise ValueError(f"scope must be 'session' or 'transaction', not {self._scope!r}")
        _check_shape(arguments["shared"], arguments["slots"])
        self.heartbeat = check_heartbeat(arguments["heartbeat"])
        self._conditions = Conditions(
            arguments["database"],
            arguments["allow_session_pooler"],
            release_seconds(self.heartbeat, grace),
        )
        self._watched = watched
        wishes = [
            Wish(
                names.key(name, self.step),
                name,
                self.step,
                self.tenant,
                shared=arguments["shared"],
                slots=arguments["slots"],
                in_transaction=self._scope == "transaction",
            )
            for name in self.targets
        ]
        # In the contract's order, so that two callers with the same targets never wait for each other.
        self._wishes = sorted(wishes, key=lambda wish: wish.key.value)
        # The acquisition that has the lock object, from its beginning to the end of the release. It gets there by
        # `setdefault`, so that a signal's exception comes before that or after it.
        self._in_use: dict[Literal["by"], Acquisition[S]] = {}
        self._handover = threading.Lock()
        self._locks: Sequence[ServerLock] = ()
        self._asked = 0.0  # when the last acquire began, by the monotonic clock
        self._recorded = False  # whether its events are
        self._waits = False
        self._waiting_for: ServerLock | None = None
        self._hold: Hold[S] | None = None

    def __repr__(self) -> str:
        keys = " ".join(str(key.value) for key in self.keys)
        return f"<dblock.{type(self).__name__} {self._name} key {keys}, {'held' if self._hold else 'not held'}>"

    @property
    def keys(self) -> tuple[Key, ...]:
        """The key for each of the targets, in their order."""
        return tuple(names.key(target, self.step) for target in self.targets)

    @property
    def target(self) -> str:
        """The only target.

        Raises:
            ValueError: there are several: see `targets`.
        """
        return self._only(self.targets, "targets")

    @property
    def key(self) -> Key:
        """The key of the only target.

        Raises:
            ValueError: there are several targets: see `keys`.
        """
        return self._only(self.keys, "keys")

    @property
    def slot(self) -> int | None:
        """Which permit of the lock is held, from 0 to slots - 1; None where the lock has none, or is not held.

        No two holders have the same at one time: it may number a port, or a directory.

        Raises:
            ValueError: there are several targets: see `slots`.
        """
        return self._only(self.slots or (None,) * len(self.targets), "slots")

    @property
    def slots(self) -> tuple[int, ...]:
        """The held permit for each of the targets, in their order; empty where there are none."""
        hold = self._hold
        if hold is None or self._arguments["slots"] is None:
            return ()
        slots = {lock.wish.target: granted.slot for lock, granted in hold.holds if granted.slot is not None}
        return tuple(slots[target] for target in self.targets)

    @property
    def held(self) -> bool:
        """Whether the lock is held, as far as this process can know without asking the server.

        A connection that the server has ended, or that has been closed, holds nothing. One whose network died
        silently still counts as held, and so does a lock of a transaction while any transaction is open on its
        connection: see `check`, which asks.
        """
        hold = self._hold
        if hold is None or hold.by != os.getpid() or hold.lost:
            return False
        return hold.session.alive() and not (self._scope == "transaction" and hold.session.in_transaction is False)

    def fileno(self) -> int:
        """The descriptor of the held lock's socket: the server gives the lock back when its last copy is closed.

        Raises:
            LockNotHeld: the lock is not held by this object.
            DatabaseError: its connection is closed.
        """
        hold = self._hold
        if hold is None:
            raise LockNotHeld(f"{self._name} is not held by this lock object")
        return hold.session.fileno()

    # --- what blocking and asyncio do differently -----------------------------------------------------------------

    @abstractmethod
    async def _connect(self) -> S:
        """Open the lock's connection, or take the caller's."""

    @abstractmethod
    async def _run(self, session: S, steps: Steps[T], *, may_report: bool = False) -> T:
        """Run a generator; where it may, report from outside while it waits within one statement."""

    @abstractmethod
    async def _ask(self, session: S, steps: Steps[T]) -> T:
        """Run a generator that asks a light question; a server that does not answer it in time counts as dead."""

    @abstractmethod
    async def _leave(self, session: S, *, granted: bool) -> None:
        """Be done with the connection."""

    @abstractmethod
    async def _hang_up(self, session: S) -> None:
        """Close the connection, also the caller's."""

    @abstractmethod
    def _start_watcher(self, session: S) -> Watcher:
        """Begin to watch: news on the socket are for `stands`, and every heartbeat asks `_still_held`."""

    @abstractmethod
    def _tell_of_loss(self) -> None:
        """Set the event that the user may wait for."""

    @abstractmethod
    def _forget_loss(self) -> None:
        """Clear it: the lock is acquired anew."""

    @abstractmethod
    async def _look_from_outside(self, lock: ServerLock) -> Look | None:
        """Ask on another connection than the one that waits; None: there is no other."""

    # --- the life -------------------------------------------------------------------------------------------------

    async def _enter(self, acquisition: Acquisition[S]) -> None:
        """Acquire, or raise: the body never runs without the lock."""
        busy = await self._acquire(self._timeout, acquisition)
        if busy is not None:
            waited = f"in {_seconds(self._timeout)}" if self._timeout else "without waiting"
            raise LockTimeout(f"{_name(busy.wish)} not acquired {waited}: {_in_the_way(busy.wish, busy.look)}")

    async def _exit(self, error: BaseException | None) -> None:
        hold = self._hold
        try:
            await self._release(at_exit=True)
        except (LockLost, LockNotHeld, UnsafeConnection) as lost:
            if error is None:
                raise
            # The body's own error is the one to be seen; that the lock was lost too is said beside it, once.
            if hold is None or not hold.lost:
                log.error("%s", lost)  # noqa: TRY400 - what, and not where

    async def _acquire(self, timeout: float | None, acquisition: Acquisition[S]) -> Busy | None:
        """Take the lock and return None, or return who is in the way.

        Whoever calls this withdraws the acquisition on every exception; in a blocking lock in its outermost frame,
        since a signal's exception can come as late as on the way back into that.
        """
        await self._forget_ended_transaction()
        if self._in_use.setdefault("by", acquisition) is not acquisition:
            raise AlreadyHeld(
                f"{self._name} is already held, or being acquired, by this lock object; make one lock for each caller"
            )
        self._locks = ()
        self._asked, self._recorded, self._waits = time.monotonic(), events.wanted(), False
        self._warn_if_out_of_order(acquisition.caller)
        try:
            session = await self._connect()
            if session.loan is not None and not claim(session.loan.connection, self):
                session.loan.returned()
                raise UnsafeConnection("another lock is being acquired on this connection, by another thread or task")
            acquisition.session = session
            self._locks = [session.lock(wish) for wish in self._wishes]
            report = self._report if self._recorded or log.isEnabledFor(logging.INFO) else None
            steps = acquire_all(self._locks, self._conditions, timeout, report)
            outcome = await self._run(session, steps, may_report=True)
        except DatabaseError as error:
            raise DatabaseError(f"{self._name} not acquired: {error}", error.sqlstate) from error
        if isinstance(outcome, Busy):
            self._tell("timed out", self._asked)
            await self._withdraw(acquisition)
            return outcome
        unclaim(self)
        self._forget_loss()
        hold = acquisition.hold = self._hold = Hold(session, outcome, acquisition.caller)
        with _all_guard:
            _all.add(self)
        if session.loan is None:
            _kept.add(self)
            if self._watched:
                hold.watcher = self._start_watcher(session)
        self._tell("acquired", self._asked)
        return None

    async def _withdraw(self, acquisition: Acquisition[S], error: BaseException | None = None) -> None:
        """Undo an acquisition whose caller is told that nothing is held.

        Where an exception breaks this off, a second call does the rest.

        Args:
            acquisition: that of the call that raises.
            error: what its caller is told. No error of the giving back hides it.
        """
        if self._in_use.get("by") is not acquisition:
            return
        unclaim(self)
        session, hold = acquisition.session, acquisition.hold
        if hold is not None and self._scope == "session":
            await self._exit(error)
            return
        self._hold = None
        if session is not None:
            in_callers_transaction = hold is not None and session.loan is not None and not session.loan.began
            unknown = hold is None and any(lock.may_hold for lock in self._locks)
            if in_callers_transaction or unknown:
                await self._hang_up(session)  # nothing less gives it back
            await self._put_away(session, granted=False)
        self._in_use.clear()

    async def _release(self, *, at_exit: bool = False) -> None:
        """Give the lock back, and tell of it.

        Args:
            at_exit: the body is over, so the lock must not outlive this.
        """
        hold = self._hold
        ending: events.Happening = "released"
        began = time.monotonic()  # the next holder's begin may be earlier than this one's end
        try:
            await self._give_up(at_exit=at_exit)
        except LockLost:
            ending = "lost"
            raise
        finally:
            if hold is not None and self._hold is not hold and not hold.told:
                hold.told = True
                self._tell(ending, hold.since, began)

    async def _give_up(self, *, at_exit: bool) -> None:
        hold: Hold[S] | None = None
        refused = False
        try:
            with self._handover:
                hold = self._own_hold()
                self._hold = None
            if hold.watcher is not None:
                await hold.watcher.stop()  # or it could find the lock given back, and take that for a loss
            if hold.lost:
                raise LockLost(f"{self._name} was lost while it was held: {hold.lost}")
            if self._scope == "transaction":
                await self._ask_after_transaction(hold, at_exit=at_exit)
            else:
                await self._give_back(hold)
        except UnsafeConnection:
            if not at_exit:
                self._hold = hold
                refused = True
            raise
        except DatabaseError as error:
            raise LockLost(f"{self._name} was lost while it was held: {error}") from error
        finally:
            if hold is not None and not refused:
                try:
                    if self._scope == "session" and any(lock.may_hold for lock, _ in hold.holds):
                        await self._hang_up(hold.session)  # it was not given back, whatever it was that came in between
                    await self._put_away(hold.session, granted=True)
                finally:
                    self._in_use.clear()

    def _pass_label_on(self, hold: Hold[S]) -> None:
        """Where a lock was taken after this one on the same connection, it is its release that ends the labels."""
        if hold.session.loan is None:
            return
        with _all_guard:
            later = [
                other
                for other in (life._hold for life in _all)
                if other is not None
                and other.number > hold.number
                and other.session.loan is not None
                and other.session.loan.connection is hold.session.loan.connection
            ]
        if later and hold.holds[0][1].before is not KEEP_LABEL:
            above = min(later, key=lambda other: other.number)
            lock, granted = above.holds[0]
            above.holds[0] = (lock, granted._replace(before=hold.holds[0][1].before))
            hold.holds = [(lock, granted._replace(before=KEEP_LABEL)) for lock, granted in hold.holds]

    async def _give_back(self, hold: Hold[S]) -> None:
        if hold.session.loan is not None and (hold.session.in_transaction or hold.session.would_begin):
            raise UnsafeConnection(
                f"{self._name} is held by a connection inside a transaction: the lock would be given back before the "
                f"work is committed. COMMIT or ROLLBACK first"
            )
        self._pass_label_on(hold)
        give_back = self._ask if hold.session.loan is None else self._run
        if not await give_back(hold.session, release_all(hold.holds)):
            raise LockLost(f"{self._name} was lost while it was held: the server says that this session has it no more")

    async def _ask_after_transaction(self, hold: Hold[S], *, at_exit: bool) -> None:
        """The lock ends with the transaction, and before that there is nothing to give back."""
        if hold.session.closed:
            raise LockLost(f"{self._name} was lost while it was held: the connection is closed")
        open_now = hold.session.in_transaction
        if open_now is not False:
            try:
                if all([await self._run(hold.session, lock.release(granted)) for lock, granted in hold.holds]):
                    return
            except DatabaseError as error:
                if error.sqlstate == _FAILED_TRANSACTION:
                    return  # held until the ROLLBACK
                raise
            if open_now:
                raise LockLost(
                    f"{self._name} was lost while it was held: it ended with its transaction (or with a ROLLBACK TO "
                    f"SAVEPOINT), and more was run after that"
                )
        if not at_exit:
            raise LockNotHeld(f"{self._name} is not held any more: it ended with its transaction")

    async def _check(self) -> None:
        hold = self._own_hold()
        if self._scope == "transaction" and hold.session.in_transaction is False:
            raise LockNotHeld(f"{self._name} is not held any more: it ended with its transaction")
        if hold.session.closed:
            why = "the connection is closed"
        else:
            try:
                ask = self._ask if hold.session.loan is None else self._run
                if not hold.lost and await ask(hold.session, check_all(hold.holds)):
                    return
                why = "the server says that this session has it no more"
            except DatabaseError as error:
                if not hold.session.closed:
                    if error.sqlstate == _FAILED_TRANSACTION:
                        return  # which ends no lock
                    raise
                why = str(error)
        self._lose(hold, why)
        raise LockLost(f"{self._name} was lost while it was held: {hold.lost}")

    async def _still_held(self) -> bool:
        """What a watcher asks every heartbeat. A loss is raised where the holder next asks or releases."""
        try:
            await self._check()
        except (LockNotHeld, LockLost):
            return False
        except DatabaseError:
            return True  # somebody has cancelled the question; there will be another one
        return True

    def stands(self) -> bool:
        """Whether the held lock's connection stands, after news on its socket: what a watcher asks. Asks no server."""
        hold = self._hold
        if hold is None or hold.by != os.getpid() or hold.lost:
            return False
        if hold.session.alive():
            return True
        self._lose(hold, "the server has ended its connection")
        return False

    def _lose(self, hold: Hold[S], why: str) -> None:
        """Remember the loss, and say so at once."""
        if not hold.lost:
            hold.lost = why
            if hold.watcher is not None:
                hold.watcher.end()  # its copy of the socket would keep a connection open that is closed here
            log.error("%s was lost while it was held: %s", self._name, why)
            hold.told = True
            self._tell("lost", hold.since)
            self._tell_of_loss()

    async def _forget_ended_transaction(self) -> None:
        """A lock that ended with its transaction is free to be acquired again, released or not."""
        hold = self._hold
        if self._scope == "session" or hold is None or hold.by != os.getpid():
            return
        ended = hold.session.closed or hold.session.in_transaction is False
        if ended or not await self._run(hold.session, check_all(hold.holds)):
            with self._handover:
                if self._hold is not hold:
                    return
                self._hold = None
            try:
                await self._put_away(hold.session, granted=True)
            finally:
                self._in_use.clear()

    async def _put_away(self, session: S, *, granted: bool) -> None:
        """Be done with the connection, and with what is kept of the lock."""
        try:
            await self._leave(session, granted=granted)
        finally:
            with _all_guard:
                _all.discard(self)
            _kept.discard(self)

    # --- pieces ---------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        targets = ", ".join(label.printable(target) for target in self.targets)
        return f"{label.printable(self.step)}@{targets}"

    def _only(self, values: Sequence[T], plural: str) -> T:
        if len(self.targets) > 1:
            raise ValueError(f"{self._name} has several targets: see its {plural}")
        return values[0]

    def _own_hold(self) -> Hold[S]:
        hold = self._hold
        if hold is None or hold.by != os.getpid():
            raise LockNotHeld(f"{self._name} is not held by this {'process' if hold else 'lock object'}")
        return hold

    def _warn_if_out_of_order(self, caller: Hashable) -> None:
        if not _all:
            return
        lowest = self._wishes[0].key.value
        with _all_guard:
            others = list(_all)
        for other in others:
            hold = other._hold
            if hold is None or hold.caller != caller or other._wishes[-1].key.value <= lowest or not other.held:
                continue
            log.warning(
                "%s is taken while %s is held, whose key is higher: with somebody who takes them the other way round "
                "both would wait for ever, and no server sees it. Take locks in the order of their keys (dblock key), "
                "or as one lock with several targets",
                self._name,
                other._name,
            )

    def _tell(self, event: events.Happening, since: float, until: float | None = None) -> None:
        """Append an event for each of the locks, where somebody wants to know."""
        if self._recorded:
            more = {"step": self.step, "tenant": self.tenant, "labels": self._labels}
            about = [{"key": wish.key.value, "target": wish.target, **more} for wish in self._wishes]
            now = time.monotonic()
            until = now if until is None else until
            events.tell(event, until - since, about, ago=now - until)

    def _report(self, wish: Wish, look: Look) -> None:
        if not self._waits:
            self._waits = True
            self._tell("waiting", self._asked)
        # Asked for again, from outside, only while somebody listens.
        self._waiting_for = next((lock for lock in self._locks if lock.wish == wish), None)
        log.info("waiting for %s: %s", _name(wish), _in_the_way(wish, look))

    async def _report_from_outside(self) -> None:
        """Report while the lock's own session waits inside one statement, so that another one must ask."""
        lock = self._waiting_for
        if lock is None:
            return
        try:
            look = await self._look_from_outside(lock)
        except DatabaseError as error:
            log.info("waiting for %s; who is in the way cannot be asked: %s", _name(lock.wish), error)
        else:
            if look is None:
                log.info("still waiting for %s", _name(lock.wish))
            else:
                self._report(lock.wish, look)


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in which nothing really waits, as in a blocking lock."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise RuntimeError("a blocking lock would have waited for an event loop")


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


def check_heartbeat(heartbeat: float) -> float:
    """Check the seconds between two questions to the server.

    Raises:
        ValueError: it is neither 0 nor from 0.1 to 600.
        TypeError: it is no number at all.
    """
    if isinstance(heartbeat, bool) or not isinstance(heartbeat, (int, float)):
        raise TypeError(f"heartbeat must be a number of seconds, not {type(heartbeat).__name__}")
    if heartbeat and not MIN_HEARTBEAT_SECONDS <= heartbeat <= MAX_HEARTBEAT_SECONDS:
        raise ValueError(
            f"heartbeat must be 0, or from {MIN_HEARTBEAT_SECONDS} to {MAX_HEARTBEAT_SECONDS} seconds; it is "
            f"{heartbeat}"
        )
    return float(heartbeat)


def release_seconds(heartbeat: float, grace: float) -> int:
    """How long the server shall wait for a sign of life before it gives the lock back.

    After a cut the holder knows within a heartbeat and `ANSWER_SECONDS`, and what the lock guards is at its end within
    the grace after that. The server has last heard of the holder up to a heartbeat before the cut. So the lock goes to
    nobody else before all is over, and some seconds more.
    """
    return ceil(2 * heartbeat + ANSWER_SECONDS + grace + SPARE_SECONDS)


def _check_shape(shared: bool, slots: int | None) -> None:
    if not isinstance(shared, bool):
        raise TypeError(f"shared must be True or False, not {type(shared).__name__}")
    if slots is None:
        return
    if isinstance(slots, bool) or not isinstance(slots, int):
        raise TypeError(f"slots must be an int or None, not {type(slots).__name__}")
    if not 1 <= slots <= MAX_SLOTS:
        raise ValueError(f"slots must be between 1 and {MAX_SLOTS}; it is {slots}")
    if shared:
        raise ValueError("shared and slots exclude each other")


def _distinct(targets: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(targets, (list, tuple)):
        raise TypeError(f"target must be a str, or a list or tuple of them, not {type(targets).__name__}")
    found = tuple(targets)
    if not found:
        raise ValueError("target is empty: at least one is needed")
    if len(set(found)) < len(found):
        raise ValueError("target names the same target twice")
    return found


def _name(wish: Wish) -> str:
    return f"{label.printable(wish.step)}@{label.printable(wish.target)}"


def _in_the_way(wish: Wish, look: Look) -> str:
    """Say who holds the lock since when, and how many wait ahead."""
    more = f" and {look.others} {'other' if look.others == 1 else 'others'}" if look.others else ""
    more += f"; {look.ahead} ahead" if look.ahead else ""
    if look.held is None:
        return "holder not visible to this login" + more
    if look.session is None:
        return ("held by a prepared transaction" if look.held else "nobody holds it at this moment") + more
    said = label.parse(look.says or "")
    details = [look.session]
    since = ""
    if said and said.may_name(wish.target, wish.step):
        since = f" since {_clock(said.time)}"
    elif look.application:
        details.append(f"application {label.printable(look.application)}")
    if look.host:
        details.append(f"host {label.printable(look.host)}")
    who = f"tenant {label.printable(said.tenant)} " if since and said and said.tenant else "a session "
    return f"held by {who}({', '.join(details)}){since}{more}"


def _seconds(timeout: float) -> str:
    return f"{timeout:.3f}".rstrip("0").rstrip(".") + " s"


def _clock(epoch: int) -> str:
    """The local time of day; with the date where it is not today's."""
    moment = datetime.fromtimestamp(epoch, tz=timezone.utc).astimezone()
    today = datetime.now(tz=timezone.utc).astimezone().date()
    return f"{moment:%H:%M:%S}" if moment.date() == today else f"{moment:%Y-%m-%d %H:%M:%S}"
