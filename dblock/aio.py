"""The lock for asyncio: what its user sees of it.

Cancelling a task is what makes it different: it can arrive at any instant, also together with the grant. So what must
come to its end, be it a release or the giving back after a cancelled wait, runs in a task of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from dblock.aio_session import AsyncSession, until_done
from dblock.connect import check_source, connect_async, is_callers
from dblock.life import GRACE_SECONDS, UNSET, Acquisition, Arguments, Life, Unset, Watcher, check_timeout
from dblock.protocol import ANSWER_SECONDS, Look, ServerLock, Steps, T
from dblock.session import AnswerDue, Scope, duplicate, has_input
from dblock.watch import PAUSE_SECONDS

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from dblock.connect import AsyncSource

P = ParamSpec("P")
R = TypeVar("R")


def alock(
    db: AsyncSource,
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
) -> AsyncLock:
    """Make the lock for one step on one target, for asyncio. Nothing is opened or taken until it is acquired.

    >>> async with dblock.alock(url, target="web-01", step="b", tenant="T1", timeout=600):
    ...     await migrate()

    Args:
        db: a URL, a conninfo string, an ``AsyncEngine``, or a callable that returns a new connection, or an awaitable
            of one: the lock has a connection of its own. Or the caller's: psycopg's ``AsyncConnection``, or an
            SQLAlchemy ``AsyncConnection`` or ``AsyncSession`` on one (``postgresql+psycopg://…``).
        target: as for `dblock.lock`, as is everything below.
        step: …
        tenant: …
        label: …
        timeout: …
        shared: …
        slots: …
        scope: …
        heartbeat: …
        database: …
        allow_session_pooler: …

    Returns:
        A lock that is not held yet, to be used with ``async with``, as a decorator of a coroutine function, or through
        `AsyncLock.acquire`.

    Raises:
        ValueError: a name, the timeout, the shape, the scope or db is not acceptable.
        TypeError: an argument is of the wrong kind.
    """
    return AsyncLock(
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


class AsyncLock(Life[AsyncSession]):
    """One lock, in the hand of one caller. Made by `dblock.alock`; `dblock.Lock` for asyncio.

    Whoever is cancelled while waiting for it does not hold it.

    Attributes:
        targets: where the step runs, one or several.
        step: what runs there.
        tenant: for whom, or None.
        lost: an `asyncio.Event`, set when it becomes known that the lock was lost while it was held.
    """

    def __init__(
        self, db: AsyncSource, *, watched: bool = True, grace: float = GRACE_SECONDS, **arguments: Unpack[Arguments]
    ) -> None:
        super().__init__(watched=watched, grace=grace, **arguments)
        self.lost = asyncio.Event()
        self._db = check_source(db, scope=self._scope)

    async def check(self) -> None:
        """Ask the server whether the lock is still held, as `dblock.Lock.check` does."""
        await _to_its_end(self._check())

    async def acquire(self, timeout: float | Unset | None = UNSET) -> bool:
        """Take the lock, and wait for it in the order of arrival, as `dblock.Lock.acquire` does.

        Raises:
            CancelledError: the task was cancelled. Nothing is held.
        """
        seconds = self._timeout if isinstance(timeout, Unset) else check_timeout(timeout)
        return await self._or_nothing(lambda acquisition: self._acquire(seconds, acquisition)) is None

    async def release(self) -> None:
        """Give the lock back, as `dblock.Lock.release` does.

        Raises:
            CancelledError: the task was cancelled. The lock is given back, or its connection closed.
        """
        await _to_its_end(self._release(), hasten=True)

    async def __aenter__(self) -> Self:
        """Acquire, or raise: the body never runs without the lock."""
        await self._or_nothing(self._enter)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release as `release` does. On a connection that is left inside a transaction, that is closed."""
        await _to_its_end(self._exit(error), hasten=True)

    def __call__(self, function: Callable[P, Awaitable[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        """Decorate a coroutine function: each call takes a fresh lock of its own around its body.

        Raises:
            TypeError: it is none.
        """
        import inspect

        if not inspect.iscoroutinefunction(function):
            raise TypeError("only a coroutine function can run its body within a lock of asyncio's")

        @wraps(function)
        async def locked(*args: P.args, **kwargs: P.kwargs) -> R:
            async with AsyncLock(self._db, **self._arguments):
                return await function(*args, **kwargs)

        return locked

    async def _or_nothing(self, acquire: Callable[[Acquisition[AsyncSession]], Coroutine[Any, Any, T]]) -> T:
        """Acquire, such that nothing is held where the caller is cancelled."""
        acquisition: Acquisition[AsyncSession] = Acquisition(asyncio.current_task())

        async def acquire_or_withdraw() -> T:
            try:
                return await acquire(acquisition)
            except BaseException as error:
                await self._withdraw(acquisition, error)
                raise

        try:
            return await _to_its_end(acquire_or_withdraw(), hasten=True)
        except asyncio.CancelledError as error:
            await _to_its_end(self._withdraw(acquisition, error), hasten=True)  # granted in the same instant
            raise

    async def _connect(self) -> AsyncSession:
        return await connect_async(self._db, self._scope, self._comment)

    async def _run(self, session: AsyncSession, steps: Steps[T], *, may_report: bool = False) -> T:
        return await session.run(steps, self._report_from_outside if may_report else None)

    async def _ask(self, session: AsyncSession, steps: Steps[T]) -> T:
        with AnswerDue(session.fileno()) as due:
            timer = asyncio.get_running_loop().call_later(ANSWER_SECONDS, due.expire)
            try:
                return await session.run(steps)
            finally:
                timer.cancel()

    async def _leave(self, session: AsyncSession, *, granted: bool) -> None:
        await session.leave(granted=granted)

    async def _hang_up(self, session: AsyncSession) -> None:
        await session.close()

    def _start_watcher(self, session: AsyncSession) -> Watcher:
        return _Watch(session.fileno(), self.heartbeat, alive=self.stands, held=self._still_held)

    def _tell_of_loss(self) -> None:
        self.lost.set()

    def _forget_loss(self) -> None:
        self.lost.clear()

    async def _look_from_outside(self, lock: ServerLock) -> Look | None:
        if is_callers(self._db):
            return None
        another = await connect_async(self._db, self._scope, self._comment)
        try:
            return await another.run(lock.look())
        finally:
            await another.close()


async def _to_its_end(coroutine: Coroutine[Any, Any, T], *, hasten: bool = False) -> T:
    """Run a coroutine to its end in a task of its own.

    Args:
        coroutine: what to run.
        hasten: cancel it, once, where the caller is cancelled; it still comes to its end.
    """
    task = asyncio.create_task(coroutine)
    return await until_done(task, on_cancel=task.cancel if hasten else lambda: None)


class _Watch:
    """A task that asks after a held lock, until it is stopped or the lock is lost: `dblock.watch.Watch` for asyncio."""

    def __init__(
        self, descriptor: int, heartbeat: float, *, alive: Callable[[], bool], held: Callable[[], Awaitable[bool]]
    ) -> None:
        """Start watching, as `dblock.watch.Watch` does."""
        self._heartbeat = heartbeat or None
        self._alive = alive
        self._held = held
        self._socket = duplicate(descriptor)
        self._news = asyncio.Event()  # something can be read, or it is stopped
        self._stopped = False
        self._task = asyncio.create_task(self._run(), name="dblock watch")

    def end(self) -> None:
        """Tell it to end, without waiting for that."""
        self._stopped = True
        self._news.set()

    async def stop(self) -> None:
        """End it, and wait until it is gone. Cancelling it would break off a question, and with it the connection."""
        self.end()
        await until_done(self._task, on_cancel=lambda: None)

    async def _run(self) -> None:
        try:
            while not self._stopped:
                if await self._is_news():
                    still = self._stopped or self._alive()
                else:
                    still = await self._held()
                if not still:
                    return
                if self._news.is_set() and not self._stopped:
                    self._news.clear()
                    if has_input(self._socket.fileno()):
                        await asyncio.sleep(PAUSE_SECONDS)
        finally:
            self._socket.close()

    async def _is_news(self) -> bool:
        """Wait for news. False: a heartbeat is over without any."""
        loop = asyncio.get_running_loop()
        asking: asyncio.Task[None] | None = None
        try:
            loop.add_reader(self._socket, self._news.set)
        except NotImplementedError:  # Windows' own loop, on which SQL Server's threads get along
            asking = asyncio.create_task(self._ask_for_news())
        try:
            await asyncio.wait_for(self._news.wait(), self._heartbeat)
        except asyncio.TimeoutError:
            return False
        finally:
            # Or it would call again and again.
            if asking:
                asking.cancel()
            else:
                loop.remove_reader(self._socket)
        return True

    async def _ask_for_news(self) -> None:
        while not has_input(self._socket.fileno()):
            await asyncio.sleep(PAUSE_SECONDS)
        self._news.set()
