"""What dblock says to PostgreSQL, and in which order. Knows no driver and does no I/O.

Each function below the class returns one message of the simple protocol, sent in autocommit, without parameters:
several statements of one message share one implicit transaction, which is what makes ``SET LOCAL`` and
transaction-level locks last exactly as long as the message. The reply is the row of the last statement.

A lock takes two key spaces. The one-bigint form of the key itself is the lock. The queue stands in the two-integer
form, whose first half is the key's high 32 bits ``h``:

    (h,  0)   held shared by everybody who waits
    (h,  n)   the ticket of the waiter who came n-th, held exclusively
    (h, -1)   the gate under which tickets are numbered, held within one message only

A lock with permits is the lock itself, shared, and a permit, whose key is one more bigint. Exclusion never depends on
the queue, only the order does. ``tests/test_server.py`` pins what is relied upon here.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

from dblock.errors import AlreadyHeld, DatabaseError, LockDeadlock, UnsafeConnection
from dblock.label import fields
from dblock.names import Key
from dblock.protocol import (
    KEEP_LABEL,
    REPORT_SECONDS,
    Busy,
    Conditions,
    Engine,
    Granted,
    HangUp,
    Look,
    Pause,
    Report,
    Statement,
    Steps,
    Wish,
    already_held,
    pauses,
)

_LOCK_NOT_AVAILABLE = "55P03"
_DEADLOCK_DETECTED = "40P01"
_NO_SUCH_SAVEPOINT = "3B001"
_QUERY_CANCELED = "57014"

_LABEL_BYTES = 63  # application_name
_TIME_WIDTH = 10  # of an epoch in seconds, until the year 2286

# A waiter keeps a snapshot while it waits inside one statement. That hinders vacuum in the whole database, and
# makes CREATE INDEX CONCURRENTLY in the holder's step wait for the waiter who waits for the holder. So waits are cut
# in slices, and slices stay below deadlock_timeout: above it, the server kills innocent waiters in just that case.
SLICE_SECONDS = 0.9

# But then no wait lasts until the server looks for deadlocks. A caller's session that holds more than its place in the
# queue could be in one, so there every so many slices one is longer than deadlock_timeout.
LONG_SLICE_EVERY = 4

# While it waits a session may be silent for this long; then the server ends it. A frozen or cut-off waiter would
# otherwise keep its ticket, and with it stop everybody behind.
WAITER_SILENCE_SECONDS = 2

# So many cancels in a row do not end the caller's connection.
MOST_CANCELS = 5

# In which a transaction sees what was committed before the grant.
_FRESH_ISOLATION = ("read committed", "read uncommitted")

# In a message of one statement only, search_path is the caller's: operators have whole names there, like functions.
EQUALS = "OPERATOR(pg_catalog.=)"
_JOINED_TO = "OPERATOR(pg_catalog.||)"

_FOUND = "dblock.found_"  # what the names begin with under which a transaction keeps the caller's settings

# How the server finds out that a client is gone without a word: after a silence, by so many probes, at most a fifth of
# the whole time apart. Linux may be late by an eighth of a wait that is longer than 16 s: by default none is.
PROBES = 3
LONGEST_PROBE_SECONDS = 7

ENGINE = Engine(
    name="postgres",
    current_database="SELECT current_database()::text",
    # The script depends on none of these. The driver looks at the session when it reads the times, and knows one date
    # style only; a pooler carries these two settings with the client.
    inspect_settings="""
        SET datestyle = 'ISO';
        SET timezone = 'UTC';
        SET LOCAL search_path = pg_catalog, pg_temp;
    """,
    entry_row=lambda row: row,
    comments="SELECT pid, query FROM pg_catalog.pg_stat_activity WHERE pg_catalog.starts_with(query, '/*')",
    release_settings=lambda key, confirm: (
        f"SELECT set_config('dblock.target', '', false), set_config('dblock.step', '', false),"
        f" set_config('dblock.key', '{key.value}', false), set_config('dblock.confirm', {_quote(confirm)}, false)"
    ),
    to_end=lambda key, pid: (
        f"SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_locks WHERE pid = {pid} AND granted"
        f" AND locktype = 'advisory' AND objsubid = 1 AND classid = {key.postgres.classid}"
        f" AND objid = {key.postgres.objid}"
    ),
)


class AdvisoryLock:
    """One advisory lock in one session: a `dblock.protocol.ServerLock`."""

    def __init__(
        self, wish: Wish, *, server_version: int, client_backend_pid: int, own: bool, fresh: bool = False
    ) -> None:
        """Prepare; nothing is sent.

        Args:
            wish: the lock.
            server_version: as libpq counts it, 150018 for 15.18.
            client_backend_pid: what the driver was told at connecting. A pooler makes that number up.
            own: whether the session is the lock's own; otherwise the caller's, and left as it was found.
            fresh: whether the session was begun for this acquire: if the backend is its own, it holds nothing.
        """
        self.wish = wish
        self.may_hold = False
        self._fresh = fresh
        self._names = LockNames.of(wish)
        self._client_backend_pid = client_backend_pid
        self._surroundings = (
            InTransaction(server_version)
            if wish.in_transaction
            else OwnSession(server_version)
            if own
            else BorrowedSession(server_version)
        )
        self._slice_seconds = SLICE_SECONDS
        self._long_slice_seconds: float | None = None
        self._slices = 0
        self._application_name: Any = KEEP_LABEL
        self._queued = False  # since the first message of the queue was sent
        self._unsettled = False  # the grant came in a message that waited: the caller may have been gone by then
        self._ticket: Ticket | None = None
        self._may_be_callers = True  # what the session has of the lock, until a reply says that it had none before

    def open(self, conditions: Conditions) -> Steps[None]:
        around = self._surroundings
        pid = self._trusted_pid(conditions)
        try:
            row = yield around.opening(_describe_session(self._names), pid, conditions.release_seconds)
        except BaseException:
            if message := around.reopening():
                with suppress(DatabaseError):
                    yield message
            raise
        opened = Opened(*row)
        if pid is not None and opened.backend_pid != pid:
            raise UnsafeConnection(
                "a connection pooler stands between here and the server: in transaction or statement mode it gives "
                "one lock to several callers. Connect to the server itself, or, if the pooler is in session mode for "
                "this database, say so with allow_session_pooler=True (--allow-session-pooler)"
            )
        if opened.in_recovery:
            raise UnsafeConnection(
                "this server is a hot standby: its advisory locks are its own and exclude nobody on the primary. "
                "Connect to the primary (target_session_attrs=read-write)"
            )
        if opened.read_only:
            raise UnsafeConnection(
                "this session is read-only (default_transaction_read_only), as on a server that is no longer the "
                "primary. Connect to the primary, or as a role that may write"
            )
        if conditions.database is not None and opened.database != conditions.database:
            raise UnsafeConnection(
                f"connected to database {opened.database!r}, but {conditions.database!r} was asked for: callers in "
                f"two databases do not exclude each other"
            )
        if self.wish.in_transaction and opened.isolation not in _FRESH_ISOLATION:
            raise UnsafeConnection(
                f"the transaction is {opened.isolation.upper()}: it would go on seeing the data as they were before "
                f"the lock was granted. Use READ COMMITTED"
            )
        if opened.already_held:
            raise self._already_held()

    def acquire(self, conditions: Conditions, timeout: float | None, report: Report | None) -> Steps[Granted | Busy]:
        deadline = None if timeout is None else time.monotonic() + timeout
        if not (conditions.database or "").isascii():
            yield from self.open(conditions)  # the caller's client_encoding may have no such letters
        self._ticket = None
        self._queued = self._unsettled = False
        self._application_name = KEEP_LABEL
        self._may_be_callers = True
        self.may_hold = True
        granted = None
        try:
            attempt = yield from self._try_at_once(conditions, wait=timeout != 0)
            if attempt.outcome == GRANTED:
                granted = Granted(attempt.before, attempt.slot)
            elif timeout != 0:
                granted = yield from self._queue(deadline, report)
            if granted is None:
                return Busy(self.wish, (yield from self.look()))
        except BaseException as error:
            granted = None
            if isinstance(error, DatabaseError) and error.sqlstate == _DEADLOCK_DETECTED:
                raise LockDeadlock(
                    f"the server ended this wait to break a deadlock; nothing is held: {error}"
                ) from error
            raise
        finally:
            if granted is None and self.may_hold:
                yield from self._undo()
        return granted

    def settle(self) -> Steps[None]:
        if message := self._surroundings.settling(waited=self._unsettled):
            yield message

    def withdraw(self) -> Steps[None]:
        yield from self._undo()

    def release(self, granted: Granted) -> Steps[bool]:
        if self.wish.in_transaction:
            return (yield from self.check(granted))
        self._application_name = granted.before
        try:
            *given_back, _ = yield _release(self._names, granted)
            self.may_hold = False
        except DatabaseError as error:
            # Whether it was done before it failed, nobody said. A lock that is still there was not lost; and what is
            # the lock's own session, nobody else gives anything back in.
            if error.sqlstate != _QUERY_CANCELED:
                raise
            given_back = [(yield from self.check(granted)) or not self._surroundings.borrowed]
        finally:
            if self.may_hold:
                yield from self._undo()
        return all(given_back)

    def check(self, granted: Granted) -> Steps[bool]:
        keys = [self._names.key, *(self._names.permits[granted.slot :][:1] if granted.slot is not None else ())]
        question = self._surroundings.errand("SELECT " + " AND ".join(map(_own_lock, keys)))
        try:
            (held,) = yield question
        except DatabaseError as error:
            if error.sqlstate != _QUERY_CANCELED:
                raise
            # Who cancels wants to break off the work, and cannot mean this.
            if message := self._surroundings.reopening():
                with suppress(DatabaseError):  # the transaction failed before there was a savepoint
                    yield message
            (held,) = yield question
        return bool(held)

    def look(self) -> Steps[Look]:
        held, others, pid, name, host, ahead = yield self._surroundings.errand(_look(self._names, self._ticket))
        session = None if pid is None else f"pid {pid}"
        return Look(held, session, says=name, application=name, host=host, others=others, ahead=ahead)

    def _trusted_pid(self, conditions: Conditions) -> int | None:
        """The backend which must reply, or None: any may. A transaction has one, whatever stands in between."""
        any_may = conditions.allow_session_pooler or self.wish.in_transaction
        return None if any_may else self._client_backend_pid

    def _already_held(self) -> AlreadyHeld:
        return AlreadyHeld(already_held(own=not self._surroundings.borrowed))

    def _try_at_once(self, conditions: Conditions, *, wait: bool) -> Steps[Attempt]:
        """Take the lock where the session can be trusted with it, has it not yet, and nobody waits: in one message."""
        around = self._surroundings
        pid = self._trusted_pid(conditions)
        known_free = self._fresh and pid is not None
        kind: Any = type(around)  # mypy looks for the class's own __hash__ among its instances' methods
        text = _try_at_once(self._names, kind, _fit(self.wish, conditions, pid), known_free=known_free)
        row = yield around.first(text, pid, conditions.release_seconds)
        attempt = Attempt(*row[:3])
        self._application_name = attempt.before
        around.found = Settings(*row[3 : 3 + len(around.finding)])
        if attempt.outcome in (UNFIT, ALREADY_HELD) or (attempt.outcome != GRANTED and not wait):
            # Nothing was taken, and what there is of the lock, or of the queue, is somebody else's.
            if message := around.withdrawing():
                yield message
            self.may_hold = False
            if attempt.outcome not in (BUSY, FULL):
                yield from self.open(conditions)  # says what is wrong
            if attempt.outcome in (UNFIT, ALREADY_HELD):
                raise UnsafeConnection(
                    "this session was not fit to be trusted with a lock; now it seems to be: try again"
                )
        self._may_be_callers = attempt.outcome == WAITED_FOR
        return attempt

    def _undo(self) -> Steps[None]:
        """Give back whatever there is of this lock. Where that fails too, the end of the session does it."""
        around = self._surroundings
        try:
            # Before the reply to the first message nobody was in the queue. A transaction has its savepoint.
            if self._queued or self.wish.in_transaction or not self._may_be_callers:
                give_back = _give_back(self._names, queue_only=self._may_be_callers)
                yield from _in_spite_of_cancels(around.undoing(give_back, self._application_name))
            if self._may_be_callers and not self.wish.in_transaction:
                # The message failed that says whether the lock was the caller's before: if it is held, nobody knows.
                (held,) = yield from _in_spite_of_cancels(around.errand(f"SELECT {_own_lock(self._names.key)}"))
                if held:
                    yield HangUp()
            self.may_hold = False
        except DatabaseError as error:
            # Before the savepoint nothing was taken, and after it only what belongs to the transaction: which has now
            # failed, and all its locks are gone.
            if not (self.wish.in_transaction and error.sqlstate == _NO_SUCH_SAVEPOINT):
                yield HangUp()
            self.may_hold = False

    def _queue(self, deadline: float | None, report: Report | None) -> Steps[Granted | None]:
        """Wait in the order of arrival. None: the time is over."""
        next_report = time.monotonic()
        around = self._surroundings
        pause = pauses()
        locked_out = self._names.slots is None  # whether to wait for the lock itself: not for a permit of it
        while (milliseconds := self._slice(deadline)) is not None:
            if self._ticket is None:
                yield from self._join(milliseconds)
            elif self._ticket.predecessor:
                # And no more: a waiter that is frozen or cut off must not come to hold the lock by this message.
                (predecessor,) = yield around.errand(_wait_for_predecessor(self._names, self._ticket, milliseconds))
                self._ticket = Ticket(self._ticket.number, predecessor)
            else:
                wait = _wait_for_lock(self._names, milliseconds) if locked_out else ""
                take = _take_as_head(self._names, self._ticket, around, settled=not wait)
                outcome, slot, *_ = yield around.attempt(wait + take)
                if outcome == GRANTED:
                    self._unsettled = bool(wait)
                    return Granted(self._application_name, slot)
                locked_out = outcome == BUSY
                if outcome == FULL:
                    if message := around.letting_go():
                        yield message
                    yield Pause(min(next(pause), milliseconds / 1000))
            if report and time.monotonic() >= next_report:
                next_report = time.monotonic() + REPORT_SECONDS
                report(self.wish, (yield from self.look()))
        return None

    def _join(self, milliseconds: int) -> Steps[None]:
        """Draw a ticket. Where a foreign lock was in its way, whatever part of it was taken is given back."""
        around = self._surroundings
        self._queued = True
        try:
            arrive = _arrive(self._names, around)
            arrival = Arrival(*(yield around.errand(_join(self._names, milliseconds), lasting=arrive)))
        except DatabaseError as error:
            if error.sqlstate != _LOCK_NOT_AVAILABLE:
                raise
            yield around.errand(_give_back(self._names, queue_only=True))
            return
        if arrival.already_held:
            yield around.undoing(_give_back(self._names, queue_only=True), self._application_name)
            self.may_hold = False
            raise self._already_held()
        self._may_be_callers = False
        self._ticket = Ticket(arrival.number, arrival.predecessor)
        self._slice_seconds = min(SLICE_SECONDS, 0.9 * arrival.deadlock_timeout_seconds)
        # Longer by what the server needs to look.
        may_deadlock = around.borrowed and arrival.holds_others
        self._long_slice_seconds = arrival.deadlock_timeout_seconds + 0.3 if may_deadlock else None

    def _slice(self, deadline: float | None) -> int | None:
        """Milliseconds to wait in the next statement; None when the time is over.

        Never 0, which the server takes for "without limit".
        """
        self._slices += 1
        seconds = self._slice_seconds
        if self._long_slice_seconds is not None and self._slices % LONG_SLICE_EVERY == 0:
            seconds = self._long_slice_seconds
        if deadline is None:
            return ceil(seconds * 1000)
        remaining = deadline - time.monotonic()
        return ceil(min(seconds, remaining) * 1000) if remaining > 0 else None


def _in_spite_of_cancels(message: str) -> Steps[Any]:
    """Send what may be sent again, also where cancels hit it that were meant for the wait: few people cancel once."""
    for _ in range(MOST_CANCELS):
        try:
            return (yield message)
        except DatabaseError as error:
            if error.sqlstate != _QUERY_CANCELED:
                raise
    return (yield message)


class LockNames(NamedTuple):
    """A lock as the statements need it: numbers ready to be inlined, and the label's fitted fields."""

    key: int
    permits: tuple[int, ...]
    slots: int | None
    shared: bool
    waiting_fields: str
    holding_fields: str

    @classmethod
    @lru_cache(maxsize=64)  # one lock after another has the same names
    def of(cls, wish: Wish) -> LockNames:
        def fitted(time_width: int) -> str:
            return fields(wish.tenant, wish.target, wish.step, time_width=time_width, limit=_LABEL_BYTES)

        return cls(
            wish.key.value,
            permits=tuple(permit.value for permit in wish.permits),
            slots=wish.slots,
            shared=wish.shared or wish.slots is not None,
            waiting_fields=fitted(_TIME_WIDTH + 1),
            holding_fields=fitted(_TIME_WIDTH),
        )

    @property
    def high(self) -> int:
        """The first number of the queue's locks: the key's high half as a signed int4."""
        return self.key >> 32

    @property
    def classid(self) -> int:
        return Key(self.key).postgres.classid

    @property
    def objid(self) -> int:
        return Key(self.key).postgres.objid

    @property
    def mode(self) -> str:
        """What ends the names of the functions for the lock itself."""
        return "_shared" if self.shared else ""


# --- whose session it is ----------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """The caller's settings as they were found, as the strings that give them back.

    None of them is known before the reply to the first message. The last three are set for longer than a message in a
    transaction only.
    """

    silence: str = ""
    search_path: str = ""
    statement_timeout: str = "0"
    lock_timeout: str = "0"


class OwnSession:
    """The lock's own session: it is prepared once, and nothing needs to be put back.

    The other two kinds of session are the caller's. What differs between the three is what stands around a message.

    Attributes:
        local: the third argument of set_config, for what lasts as long as the lock.
        scope: what the names of the functions that take a lock have in the middle.
        silence: which setting limits how long the session may be silent while it waits.
        borrowed: whether it is the caller's.
        finding: the settings to be found by the first message: their values are a ``Settings``.
        found: they, as they were before the lock came.
    """

    local = "false"
    scope = ""
    silence = "idle_session_timeout"
    borrowed = False
    finding: tuple[str, ...] = (silence,)
    found = Settings()

    def __init__(self, server_version: int) -> None:
        self._server_version = server_version

    def opening(self, text: str, own_pid: int | None, release_seconds: int) -> str:
        """A message on a session of which nothing is known yet.

        The settings of role and database must not end a wait or an idle holder. search_path comes first: it decides
        which operators and functions every later statement means. Where another backend than own_pid replies, they
        last no longer than this message: the session is a pooler's, and its other clients would go on with it.

        The server gives up a client that it has not heard of for release_seconds: probes find the end of a silent
        network, and what it has sent itself it waits for as long.
        """
        probe_seconds = min(LONGEST_PROBE_SECONDS, release_seconds // 5)
        settings = {
            "search_path": "pg_catalog, pg_temp",
            "statement_timeout": "0",
            "lock_timeout": "0",
            "idle_session_timeout": "0",
            "tcp_keepalives_idle": str(release_seconds - PROBES * probe_seconds),
            "tcp_keepalives_interval": str(probe_seconds),
            "tcp_keepalives_count": str(PROBES),
            "tcp_user_timeout": f"{release_seconds}s",
        }
        if self._server_version >= 170000:
            settings["transaction_timeout"] = "0"
        local = "false" if own_pid is None else f"pg_backend_pid() <> {own_pid}"
        needed = ", ".join(f"set_config('{name}', '{value}', {local})" for name, value in settings.items())
        return f"SET LOCAL search_path = pg_catalog, pg_temp; SELECT {needed}; {text}"

    def reopening(self) -> str:
        """What is to be said when the first message failed, so that the caller's transaction lives on."""
        return ""

    def first(self, text: str, own_pid: int | None, release_seconds: int) -> str:
        """The first message, whose grant lasts. The settings of `finding` are found by it."""
        return self.opening(text, own_pid, release_seconds)

    def withdrawing(self) -> str:
        """What is to be said when the first message took nothing, and no other one shall follow."""
        return ""

    def attempt(self, text: str) -> str:
        """A message whose grant lasts."""
        return text

    def errand(self, text: str, lasting: str = "") -> str:
        """A message of which nothing lasts that belongs to its transaction, except what is set before."""
        return f"{lasting} {text}"

    def letting_go(self) -> str:
        """What is to be said so that nothing is kept of an attempt in vain."""
        return ""

    def settling(self, *, waited: bool) -> str:
        """What is to be said when all of the locks that were asked for are held: that the caller knows of it.

        From now on the session may be silent, where it was told otherwise because it had to wait.
        """
        return f"SELECT {self.own_silence()}" if waited else ""

    def undoing(self, text: str, application_name: Any) -> str:
        """A message after which nothing is left of an acquire, not even where a message before it failed."""
        return f"{text}; {self._restore(application_name)}"

    def _restore(self, application_name: Any) -> str:
        return f"SELECT {_name(application_name, self.local)}, {self.own_silence()}"

    def own_silence(self) -> str:
        """Let the session be silent for as long as it could before."""
        if not self.found.silence:
            return "NULL"  # nothing was found, nothing was set
        return f"pg_catalog.set_config('{self.silence}', {_quote(self.found.silence)}, {self.local})"


class BorrowedSession(OwnSession):
    """The caller's session, in autocommit: each message is a transaction, and what is set in it ends with it."""

    borrowed = True

    def opening(self, text: str, own_pid: int | None, release_seconds: int) -> str:  # noqa: ARG002
        # Nothing is set that lasts: the other arguments are for OwnSession. Nor does it wait, so no timeout matters.
        return f"{_set_local('search_path')} {text}"

    def first(self, text: str, own_pid: int | None, release_seconds: int) -> str:  # noqa: ARG002
        return Statement(text)

    def attempt(self, text: str) -> str:
        return f"{self._set_local()} {text}"

    def errand(self, text: str, lasting: str = "") -> str:
        return f"{self._set_local()} {lasting} {text}"

    def undoing(self, text: str, application_name: Any) -> str:
        return f"{self._set_local()} {super().undoing(text, application_name)}"

    def _set_local(self) -> str:
        settings = ["search_path", "statement_timeout", "lock_timeout"]
        return _set_local(*settings, *(["transaction_timeout"] if self._server_version >= 170000 else []))


class InTransaction(OwnSession):
    """The caller's transaction, which lasts as long as the lock.

    All messages from the first attempt to the grant stand on one savepoint: it takes back what a message set and took
    for the transaction, and lets the transaction live on where a message fails. It stays until all locks that were
    asked for are held, since a lock that lasts until the transaction's end can be given back in no other way. The
    queue's locks are the session's: a savepoint does not touch them.
    """

    local = "true"
    scope = "_xact"
    silence = "idle_in_transaction_session_timeout"
    borrowed = True
    _FOR_LONG = ("search_path", "statement_timeout", "lock_timeout")  # set until all locks are held
    finding = (silence, *map(_FOUND.__add__, _FOR_LONG))

    def __init__(self, server_version: int) -> None:
        super().__init__(server_version)
        self._savepoint = f"dblock_{secrets.token_hex(4)}"  # nobody else's name
        self._acquiring = False  # whether there is the savepoint

    def opening(self, text: str, own_pid: int | None, release_seconds: int) -> str:  # noqa: ARG002
        # Nothing is set that lasts: the other arguments are for OwnSession.
        return f"""
            SAVEPOINT {self._savepoint};
            {self._set_local()}
            {text};
            ROLLBACK TO SAVEPOINT {self._savepoint};
            RELEASE SAVEPOINT {self._savepoint}
        """

    def reopening(self) -> str:
        return f"ROLLBACK TO SAVEPOINT {self._savepoint}; RELEASE SAVEPOINT {self._savepoint}"

    def first(self, text: str, own_pid: int | None, release_seconds: int) -> str:  # noqa: ARG002
        self._acquiring = True
        copies = ", ".join(
            f"pg_catalog.set_config('{_FOUND}{name}', pg_catalog.current_setting('{name}'), true)"
            for name in self._FOR_LONG
        )
        return f"SAVEPOINT {self._savepoint}; SELECT {copies}; {self._set_local()} {text}"

    def withdrawing(self) -> str:
        self._acquiring = False
        return self.reopening()

    def attempt(self, text: str) -> str:
        return f"ROLLBACK TO SAVEPOINT {self._savepoint}; {self._set_local()} {text}"

    def errand(self, text: str, lasting: str = "") -> str:
        if not self._acquiring:
            return self.opening(text, None, 0)
        return f"""
            ROLLBACK TO SAVEPOINT {self._savepoint};
            {lasting and f"RELEASE SAVEPOINT {self._savepoint}; {lasting} SAVEPOINT {self._savepoint};"}
            {self._set_local()}
            {text};
            ROLLBACK TO SAVEPOINT {self._savepoint}
        """

    def letting_go(self) -> str:
        return f"ROLLBACK TO SAVEPOINT {self._savepoint}"

    def settling(self, *, waited: bool) -> str:
        self._acquiring = False
        found = self.found
        return f"""
            SELECT set_config('search_path', {_quote(found.search_path)}, true),
                   set_config('statement_timeout', {_quote(found.statement_timeout)}, true),
                   set_config('lock_timeout', {_quote(found.lock_timeout)}, true),
                   {self.own_silence() if waited else "NULL"};
            RELEASE SAVEPOINT {self._savepoint}
        """

    def undoing(self, text: str, application_name: Any) -> str:
        self._acquiring = False
        return f"""
            ROLLBACK TO SAVEPOINT {self._savepoint};
            {self._set_local()}
            {text};
            ROLLBACK TO SAVEPOINT {self._savepoint};
            RELEASE SAVEPOINT {self._savepoint};
            {self._restore(application_name)}
        """

    def _set_local(self) -> str:
        # Not transaction_timeout: how long the transaction may take is the caller's to say.
        return _set_local(*self._FOR_LONG)


def _set_local(*names: str) -> str:
    """Set what must not break off a message, nor change what it means, until its transaction or savepoint ends."""
    values = {"search_path": "pg_catalog, pg_temp"}
    return "\n".join(f"SET LOCAL {name} = {values.get(name, '0')};" for name in names)


class Opened(NamedTuple):
    """What a session says of itself, where something is wrong with it."""

    backend_pid: int
    in_recovery: bool
    read_only: bool
    database: str
    isolation: str
    already_held: bool


def _describe_session(lock: LockNames) -> str:
    """Ask what decides whether the session can be trusted with the lock. The reply is an ``Opened``."""
    return f"""
        SELECT pg_backend_pid(),
               pg_is_in_recovery(),
               current_setting('transaction_read_only')::boolean,
               current_database()::text,
               current_setting('transaction_isolation'),
               {_own_lock(lock.key)}
    """


def _fit(wish: Wish, conditions: Conditions, own_pid: int | None) -> str:
    """Whether the session can be trusted with the lock, by what `_describe_session` asks for."""
    checks = [
        "NOT pg_catalog.pg_is_in_recovery()",
        "NOT pg_catalog.current_setting('transaction_read_only')::boolean",
    ]
    if own_pid is not None:
        checks.append(f"pg_catalog.pg_backend_pid() {EQUALS} {own_pid}")
    if conditions.database is not None and conditions.database.isascii():
        checks.append(f"pg_catalog.current_database()::pg_catalog.text {EQUALS} {_quote(conditions.database)}")
    if wish.in_transaction:
        checks.append(f"current_setting('transaction_isolation') IN ({', '.join(map(_quote, _FRESH_ISOLATION))})")
    return " AND ".join(checks)


# --- take, and give back ----------------------------------------------------------------------------------------


# The outcomes of one attempt.
UNFIT = "unfit"  # the session cannot be trusted
WAITED_FOR = "waited for"  # others came before
ALREADY_HELD = "already held"  # by this session
BUSY = "busy"  # the lock itself is not free
FULL = "full"  # no permit is
GRANTED = "granted"

_IS_GRANTED = f"outcome {EQUALS} '{GRANTED}'"


class Attempt(NamedTuple):
    """What became of the first attempt to take the lock."""

    outcome: str
    slot: int | None  # the permit's number
    before: str  # application_name


@lru_cache(maxsize=64)
def _try_at_once(lock: LockNames, kind: type[OwnSession], fit: str, *, known_free: bool = False) -> str:
    """Take the lock if it is free and nobody waits for it: holding (h, 0) for a moment proves that nobody does.

    Within the caller's transaction that moment must not last until the transaction ends.

    Args:
        lock: the names.
        kind: whose session it is.
        fit: whether the session can be trusted with the lock.
        known_free: a session that is fit cannot have the lock: a look into pg_locks costs a new backend a millisecond.
    """
    moment = "" if kind.scope else "_xact"
    conditions = f"""
                WHEN NOT ({fit}) THEN '{UNFIT}'
                WHEN NOT pg_catalog.pg_try_advisory{moment}_lock({lock.high}, 0) THEN '{WAITED_FOR}'
                {"" if known_free else f"WHEN {_own_lock(lock.key)} THEN '{ALREADY_HELD}'"}
    """
    leave_queue = f", CASE WHEN outcome NOT IN ('{UNFIT}', '{WAITED_FOR}') THEN pg_advisory_unlock({lock.high}, 0) END"
    before = ", pg_catalog.current_setting('application_name') AS before"
    return f"""
        WITH {_attempt(lock, kind, conditions, before)}
        SELECT outcome, slot, before,
               {", ".join(f"pg_catalog.current_setting('{name}')" for name in kind.finding)},
               CASE WHEN {_IS_GRANTED} THEN {_label("", lock.holding_fields, kind)} END
               {leave_queue if kind.scope else ""}
        FROM attempt
    """


def _attempt(lock: LockNames, kind: type[OwnSession], conditions: str = "", before: str = "") -> str:
    """Take the lock where no condition comes before, in its shape. Where no permit is free, the lock goes back.

    Args:
        lock: the names.
        kind: whose session it is.
        conditions: cases with outcomes of their own.
        before: what is read beside it, before anything else is set.
    """
    take = f"""
                SELECT CASE
                {conditions}
                WHEN pg_catalog.pg_try_advisory{kind.scope}_lock{lock.mode}({lock.key}) THEN '{GRANTED}'
                ELSE '{BUSY}' END AS outcome{before}
    """
    if lock.slots is None:
        return f"attempt AS MATERIALIZED ({take}, NULL::int AS slot)"
    is_full = f"{_IS_GRANTED} AND slot IS NULL"
    leave_again = f", CASE WHEN {is_full} THEN pg_catalog.pg_advisory_unlock_shared({lock.key}) END AS left_again"
    return f"""
             entry AS MATERIALIZED ({take}),
             choice AS MATERIALIZED (
                SELECT entry.*, CASE WHEN {_IS_GRANTED} THEN (
                            SELECT (place OPERATOR(pg_catalog.-) 1)::int
                            FROM pg_catalog.unnest(ARRAY[{", ".join(map(str, lock.permits))}]::bigint[])
                                 WITH ORDINALITY AS permit(key, place)
                            WHERE pg_catalog.pg_try_advisory{kind.scope}_lock(key)
                            LIMIT 1) END AS slot
                FROM entry),
             attempt AS MATERIALIZED (
                SELECT CASE WHEN {is_full} THEN '{FULL}' ELSE outcome END AS outcome, slot
                       {", before" if before else ""}
                       {"" if kind.scope else leave_again}
                FROM choice)
    """


def _release(lock: LockNames, granted: Granted) -> str:
    """Give the lock back, and the session its old name. False means that the session did not hold it."""
    permit = "" if granted.slot is None else f"pg_catalog.pg_advisory_unlock({lock.permits[granted.slot]}),"
    return Statement(f"""
        SELECT {permit}
               pg_catalog.pg_advisory_unlock{lock.mode}({lock.key}),
               {_name(granted.before, "false")}
    """)


def _give_back(lock: LockNames, *, queue_only: bool) -> str:
    """Give back whatever pg_locks shows of this lock's queue as this session's; and of the lock and its permits.

    An error does not mean "not held": where a cancel meets the grant, the statement fails and the lock stays. So
    the server is asked, rather than the client's memory.
    """
    return f"""
        SELECT CASE WHEN objsubid = 1 AND mode = 'ShareLock' THEN pg_advisory_unlock_shared(key)
                    WHEN objsubid = 1                        THEN pg_advisory_unlock(key)
                    WHEN mode = 'ShareLock'                  THEN pg_advisory_unlock_shared({lock.high}, low)
                    ELSE                                          pg_advisory_unlock({lock.high}, low)
               END
        FROM (SELECT objsubid, mode, classid, (classid::bigint << 32) | objid::bigint AS key,
                     CASE WHEN objid::bigint < 2147483648 THEN objid::bigint::int END AS low
              FROM pg_locks
              WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid()) AS own
        WHERE objsubid = 2 AND classid = {lock.classid} AND low IS NOT NULL
              {"" if queue_only else f"OR objsubid = 1 AND key IN ({', '.join(map(str, (*lock.permits, lock.key)))})"}
    """


# --- the queue --------------------------------------------------------------------------------------------------


class Ticket(NamedTuple):
    """A place in the queue: the own number, and the nearest one before it (0: none, this waiter is the head)."""

    number: int
    predecessor: int


class Arrival(NamedTuple):
    """What a waiter learns as it joins the queue. Where it has the lock already, it has not joined."""

    number: int
    predecessor: int
    already_held: bool
    holds_others: bool
    deadlock_timeout_seconds: float


def _arrive(lock: LockNames, around: OwnSession) -> str:
    """Label the session as a waiter's, and let the server end it should it fall silent."""
    return f"""
        SELECT {_label("w", lock.waiting_fields, type(around))},
               set_config('{around.silence}', '{WAITER_SILENCE_SECONDS}s', {around.local});
    """


def _join(lock: LockNames, gate_milliseconds: int) -> str:
    """Draw the next ticket, under the gate. The reply is an ``Arrival``.

    The gate is held within this message only, so waiting for it is short, unless somebody foreign holds it: then
    this ends after gate_milliseconds with 55P03, before anything was taken. A look into pg_locks is what costs the
    server most, so there is one. It takes the weakest lock only itself.
    """
    return f"""
        SET LOCAL lock_timeout = '{gate_milliseconds}ms';
        SELECT pg_advisory_xact_lock({lock.high}, -1);
        WITH queue AS MATERIALIZED (
                SELECT coalesce(max(objid::bigint) FILTER (WHERE {_is_ticket(lock)} AND objid::bigint < 2147483647), 0)
                           AS last,
                       count(*) FILTER (WHERE {_is_own_lock(lock.key)}) > 0 AS already_held,
                       count(*) FILTER (WHERE pid = pg_backend_pid() AND mode <> 'AccessShareLock'
                                          AND locktype IN ('advisory', 'relation', 'transactionid')
                                          AND (classid, objsubid) IS DISTINCT FROM ({lock.classid}, 2)
                       ) > 0 AS holds_others
                FROM pg_locks
                WHERE granted),
             mine AS MATERIALIZED (
                SELECT queue.*,
                       CASE WHEN NOT already_held THEN pg_advisory_lock({lock.high}, (last + 1)::int)::text END,
                       CASE WHEN NOT already_held THEN pg_advisory_lock_shared({lock.high}, 0)::text END
                FROM queue)
        SELECT last + 1, last, already_held, holds_others,
               extract(epoch FROM current_setting('deadlock_timeout')::interval)::float8
        FROM mine
    """


def _wait_for_predecessor(lock: LockNames, ticket: Ticket, milliseconds: int) -> str:
    """Wait until the predecessor's ticket is given back, at most for one slice. The reply is the new predecessor.

    The wait is caught inside a DO block: an error that left the message would write two lines into the server's
    log for each slice of each waiter.
    """
    return f"""
        SET LOCAL lock_timeout = '{milliseconds}ms';
        DO $$
        BEGIN
            PERFORM pg_advisory_xact_lock_shared({lock.high}, {ticket.predecessor});
        EXCEPTION WHEN lock_not_available THEN NULL;
        END $$;
        SELECT CASE WHEN pg_try_advisory_xact_lock_shared({lock.high}, {ticket.predecessor})
                    THEN {_last_ticket_below(lock, ticket.number)}
                    ELSE {ticket.predecessor}
               END
    """


def _wait_for_lock(lock: LockNames, milliseconds: int) -> str:
    """Wait for the lock itself, at most for one slice, and have it until the end of the transaction.

    A cancel or a timeout that meets the grant of this wait leaves nothing behind.
    """
    return f"""
        SET LOCAL lock_timeout = '{milliseconds}ms';
        DO $$
        BEGIN
            PERFORM pg_advisory_xact_lock{lock.mode}({lock.key});
        EXCEPTION WHEN lock_not_available THEN NULL;
        END $$;
    """


def _take_as_head(lock: LockNames, ticket: Ticket, around: OwnSession, *, settled: bool) -> str:
    """Take the lock if it is free. With the grant the ticket goes back, so that the next becomes head.

    After a wait the session is still ended if it falls silent: whoever was frozen or cut off meanwhile must not keep
    the lock. Otherwise that is settled at once.
    """
    return f"""
        WITH {_attempt(lock, type(around))}
        SELECT outcome, slot,
               CASE WHEN {_IS_GRANTED} THEN pg_advisory_unlock({lock.high}, {ticket.number}) END,
               CASE WHEN {_IS_GRANTED} THEN pg_advisory_unlock_shared({lock.high}, 0) END,
               CASE WHEN {_IS_GRANTED} THEN {_label("", lock.holding_fields, type(around))} END
               {f", CASE WHEN {_IS_GRANTED} THEN {around.own_silence()} END" if settled else ""}
        FROM attempt
    """


# --- who is in the way ------------------------------------------------------------------------------------------


def _look(lock: LockNames, ticket: Ticket | None) -> str:
    """Ask who holds the lock and how many wait ahead.

    The reply: whether it is held, by how many more than one, and of that one pid, application_name and host; how many
    are ahead. A holder without a pid is a prepared transaction.
    """
    limit = 2147483648 if ticket is None else ticket.number
    return f"""
        SELECT holder.held IS TRUE, coalesce(holder.others, 0), holder.pid, holder.application_name, holder.host,
               queue.ahead
        FROM (SELECT count(*) AS ahead
              FROM pg_locks
              WHERE {_is_ticket(lock)} AND objid::bigint < {limit}) AS queue
        LEFT JOIN LATERAL (
              SELECT true AS held, count(*) OVER () - 1 AS others, l.pid, a.application_name::text,
                     coalesce(a.client_hostname, host(a.client_addr),
                              CASE WHEN a.client_port = -1 THEN 'local' END) AS host
              FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
              WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
                AND l.classid = {lock.classid} AND l.objid = {lock.objid}
                AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                AND l.pid IS DISTINCT FROM pg_backend_pid()
              ORDER BY l.pid
              LIMIT 1) AS holder ON true
    """


# --- pieces -----------------------------------------------------------------------------------------------------


def _label(state: str, fitted_fields: str, kind: type[OwnSession]) -> str:
    """Set the label, with the server's own clock: at the grant it is the moment of the grant.

    In the words which a new backend knows soonest: it looks up each function and operator that it has not met.
    """
    seconds = "pg_catalog.floor(pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()))::bigint::pg_catalog.text"
    text = f"'dblock1 {state}' {_JOINED_TO} {seconds} {_JOINED_TO} ' {fitted_fields}'"
    return f"pg_catalog.set_config('application_name', {text}, {kind.local})"


def _name(before: Any, local: str) -> str:
    """Give the session back the name that it had before."""
    if before is KEEP_LABEL:
        return "NULL"
    return f"pg_catalog.set_config('application_name', {_quote(before)}, {local})"


def _quote(text: str) -> str:
    """Write a text as an SQL literal that means the same whatever standard_conforming_strings says."""
    return " E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


def _own_lock(key: int) -> str:
    return f"EXISTS (SELECT FROM pg_catalog.pg_locks WHERE {_is_own_lock(key)})"


def _is_own_lock(key: int) -> str:
    classid, objid, _ = Key(key).postgres
    return (
        f"locktype {EQUALS} 'advisory' AND objsubid {EQUALS} 1 AND pid {EQUALS} pg_catalog.pg_backend_pid()"
        f" AND granted AND classid {EQUALS} {classid} AND objid {EQUALS} {objid}"
    )


def _is_ticket(lock: LockNames) -> str:
    return (
        f"locktype = 'advisory' AND objsubid = 2 AND granted AND mode = 'ExclusiveLock'"
        f" AND classid = {lock.classid} AND objid::bigint BETWEEN 1 AND 2147483647"
        f" AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )


def _last_ticket_below(lock: LockNames, limit: int) -> str:
    return (
        f"(SELECT coalesce(max(objid::bigint), 0) FROM pg_locks WHERE {_is_ticket(lock)} AND objid::bigint < {limit})"
    )
