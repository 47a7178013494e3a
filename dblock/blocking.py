"""The blocking lock: what its user sees of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from dblock.connect import check_source, connect, is_callers
from dblock.life import GRACE_SECONDS, UNSET, Acquisition, Arguments, Life, Unset, Watcher, at_once, check_timeout
from dblock.protocol import Look, ServerLock, Steps, T
from dblock.session import Scope, Session, answered_in_time
from dblock.watch import Watch

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack  # a type checker knows it; typing has it from 3.11 only

    from dblock.connect import Source

P = ParamSpec("P")
R = TypeVar("R")


def lock(
    db: Source,
    *,
    target: str | Sequence[str],
    step: str,
    tenant: str | None = None,
    label: Mapping[str, str] | None = None,
    timeout: float | None = None,
    shared: bool = False,
    slots: int | None = None,
    scope: Scope = "session",
    heartbeat: float = 10,
    database: str | None = None,
    allow_session_pooler: bool = False,
) -> Lock:
    """Make the lock for one step on one target. Nothing is opened or taken until it is acquired.

    >>> with dblock.lock(url, target="web-01", step="b", tenant="T1", timeout=600):
    ...     migrate()

    Args:
        db: a URL (``postgresql://…``, ``mssql+pymssql://…``), a PostgreSQL conninfo string, an SQLAlchemy ``Engine``,
            or a callable that returns a new connection of psycopg or pymssql: the lock has a connection of its own,
            opened at the acquire and closed at the release. Or the caller's connection, on which lock and work live and
            die together: psycopg's, pymssql's, or an SQLAlchemy ``Connection`` or ``Session`` on one of these. Nobody
            else may talk on it while the lock is acquired, and with pymssql no rows of a query may be left to be read,
            since the next statement on the connection drops them. A lock that is forgotten on a connection of
            psycopg_pool goes back to that pool with it; SQLAlchemy's pools take none back.
        target: where the step runs; or several places, of which all are taken or none. Compared exactly, as is the
            step; see `dblock.key`.
        step: what may run only once at a time there.
        tenant: for whom; a label that others see while they wait, and no part of the key.
        label: more that ``dblock status`` and a DBA see of who holds or waits, such as
            ``{"deployment": "Deployments-1234"}``; the names have letters, digits and _ . -, and all of it at most 400
            bytes, encoded. On PostgreSQL it is a comment of dblock's own statements, which the role itself and members
            of pg_read_all_stats see; on SQL Server, where db is a URL, it stands in the 128 characters of program_name.
        timeout: seconds to wait for the lock, or for all of them; None: without limit, 0: do not wait. At most 2147483,
            and anything above 0 is at least a millisecond.
        shared: beside other shared holders, but not beside an exclusive one.
        slots: at most so many at once, from 1 to 999, and none beside an exclusive holder; `Lock.slot` tells which.
        scope: ``"session"``: until the release. ``"transaction"``: until COMMIT or ROLLBACK of the transaction on the
            caller's connection; it works through a pooler in transaction mode too.
        heartbeat: seconds between two questions to the server whether the lock is still held, from 0.1 to 600; 0: none.
            Only on the lock's own connection, whose end is noticed at once without any. After a cut of the network the
            server gives the lock back when it has heard nothing for two heartbeats and 15 seconds.
        database: the database that all callers agreed upon; any other is refused at the acquire.
        allow_session_pooler: the caller's word that the pooler in between is in session mode for this database
            (PostgreSQL).

    Returns:
        A lock that is not held yet, to be used as a context manager, as a decorator, or through `Lock.acquire`.

    Raises:
        ValueError: a name, the timeout, the shape, the scope, the heartbeat or db is not acceptable.
        TypeError: an argument is of the wrong kind.
    """
    return Lock(
        db,
        target=target,
        step=step,
        tenant=tenant,
        label=label,
        timeout=timeout,
        shared=shared,
        slots=slots,
        scope=scope,
        heartbeat=heartbeat,
        database=database,
        allow_session_pooler=allow_session_pooler,
    )


class Lock(Life[Session]):
    """One lock, in the hand of one caller. Made by `dblock.lock`.

    It may be acquired and released again and again, by any thread, but held only once at a time. A child process
    made by fork does not hold its parent's lock.

    Attributes:
        targets: where the step runs, one or several.
        step: what runs there.
        tenant: for whom, or None.
        lost: a `threading.Event`, set when it becomes known that the lock was lost while it was held. Nothing notices
            that by itself on the caller's own connection: see `check`.
    """

    def __init__(
        self, db: Source, *, watched: bool = True, grace: float = GRACE_SECONDS, **arguments: Unpack[Arguments]
    ) -> None:
        super().__init__(watched=watched, grace=grace, **arguments)
        self.lost = threading.Event()
        self._db = check_source(db, scope=self._scope)

    def check(self) -> None:
        """Ask the server whether the lock is still held: before a part of the step that cannot be undone.

        Raises:
            LockNotHeld: it is not held by this object, or not by this process.
            LockLost: it ended: the connection died, or somebody released it.
            DatabaseError: the question was cancelled, or refused. The lock may be held.
        """
        at_once(self._check())

    def acquire(self, timeout: float | Unset | None = UNSET) -> bool:
        """Take the lock, and wait for it in the order of arrival.

        Args:
            timeout: seconds; None: without limit, 0: do not wait. Left out, the lock's own timeout.

        Returns:
            Whether the lock is held; False says that it was not acquired in time.

        Raises:
            AlreadyHeld: this object or this session holds the lock already, or another thread is about to acquire it.
            LockDeadlock: the server chose this wait as a deadlock's victim.
            UnsafeConnection: no lock could be trusted on the connection; raised before any waiting.
            DatabaseError: the database cannot be reached, refused the call or cancelled it.
            ValueError: the timeout is out of its limits, or db cannot be read.
        """
        seconds = self._timeout if isinstance(timeout, Unset) else check_timeout(timeout)
        acquisition: Acquisition[Session] = Acquisition(threading.get_ident())
        try:
            return at_once(self._acquire(seconds, acquisition)) is None
        except BaseException as error:
            at_once(self._withdraw(acquisition, error))
            raise

    def release(self) -> None:
        """Give the lock back, and close its connection where that is its own.

        A lock until the transaction's end is only asked after: it is given back by COMMIT or ROLLBACK.

        Raises:
            LockNotHeld: it is not held by this object, or not by this process.
            LockLost: it ended before: the connection died, or somebody released it. What it guarded may have run
                beside another holder.
            UnsafeConnection: the caller's connection is inside a transaction, so that the next holder would not see
                the work. The lock is still held.
        """
        at_once(self._release())

    def __enter__(self) -> Self:
        """Acquire, or raise: the body never runs without the lock."""
        acquisition: Acquisition[Session] = Acquisition(threading.get_ident())
        try:
            at_once(self._enter(acquisition))
        except BaseException as error:
            at_once(self._withdraw(acquisition, error))
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release as `release` does. On a connection that is left inside a transaction, that is closed."""
        at_once(self._exit(error))

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
            with type(self)(self._db, **self._arguments):
                return function(*args, **kwargs)

        return locked

    async def _connect(self) -> Session:
        return connect(self._db, self._scope, self._comment)

    async def _run(self, session: Session, steps: Steps[T], *, may_report: bool = False) -> T:
        return session.run(steps, (lambda: at_once(self._report_from_outside())) if may_report else None)

    async def _ask(self, session: Session, steps: Steps[T]) -> T:
        with answered_in_time(session.fileno()):
            return session.run(steps)

    async def _leave(self, session: Session, *, granted: bool) -> None:
        session.leave(granted=granted)

    async def _hang_up(self, session: Session) -> None:
        session.close()

    def _start_watcher(self, session: Session) -> Watcher:
        return Watch(session.fileno(), self.heartbeat, alive=self.stands, held=lambda: at_once(self._still_held()))

    def _tell_of_loss(self) -> None:
        self.lost.set()

    def _forget_loss(self) -> None:
        if self.lost.is_set():  # a signal's exception within clear() would leave the event locked
            self.lost.clear()

    async def _look_from_outside(self, lock: ServerLock) -> Look | None:
        if is_callers(self._db):
            return None
        with closing(connect(self._db, self._scope)) as another:
            return another.run(lock.look())
