"""One connection that a lock of asyncio's uses: `dblock.session` for a caller who awaits.

Knows neither driver nor engine.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from contextlib import suppress
from inspect import isawaitable
from typing import Any

from dblock.protocol import HangUp, Message, Pause, Row, Steps, T, Wait
from dblock.session import AnySession, Loan, finished, shut_down


class AsyncSession(AnySession):
    """A connection whose caller awaits."""

    def __init__(self, loan: Loan | None) -> None:
        super().__init__(loan)
        self._turn = asyncio.Lock()
        self._runner: asyncio.Task[Any] | None = None  # whose turn it is

    @abstractmethod
    async def rows(self, text: str) -> list[Row]:
        """Send one text, and return all rows of its last statement that has some.

        Raises:
            DatabaseError: the server or the connection failed it.
        """

    @abstractmethod
    async def _close(self) -> None:
        """Close the connection."""

    async def close(self) -> None:
        """End the session; the server gives back whatever it held. Raises nothing but a cancellation."""
        if self._turn.locked() and self._runner is not asyncio.current_task():
            # Not under another task's message, which would go on with whatever gets the descriptor next.
            with suppress(Exception):
                shut_down(self.fileno())
            async with self._turn:
                pass
        with suppress(Exception):
            await self._close()
        with suppress(Exception):
            if self.loan is not None and isawaitable(ended := self.loan.closed()):
                await ended

    async def run(self, steps: Steps[T], meanwhile: Callable[[], Coroutine[Any, Any, None]] | None = None) -> T:  # noqa: ARG002 - for those that can
        """Run a generator to its end, as `Session.run` does."""
        async with self._turn:
            self._runner = asyncio.current_task()
            try:
                message = next(steps)
                while True:
                    try:
                        row = await self._execute(message)
                    except BaseException as error:  # noqa: BLE001 - the generator re-raises it after giving back
                        message = steps.throw(error)
                    else:
                        message = steps.send(row)
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                if not finished(steps):
                    await self.close()
                    with suppress(RuntimeError):
                        steps.close()

    async def leave(self, *, granted: bool) -> None:
        """The lock is done with the connection, as in `Session.leave`."""
        if self.loan is None or self.busy:
            await self.close()
        elif not self.closed:
            self.loan.returned()
            if self.loan.began and not granted:
                try:
                    await self.loan.rollback()
                except BaseException as error:
                    await self.close()  # whatever it was, a cancellation too: the transaction may be open
                    if not isinstance(error, Exception):
                        raise

    async def _execute(self, message: Message) -> Row:
        if isinstance(message, Pause):
            await asyncio.sleep(message.seconds)
            return ()
        if isinstance(message, HangUp):
            await self.close()
            return ()
        rows = await self.rows(message.text if isinstance(message, Wait) else message)
        return rows[0] if rows else ()


async def until_done(future: asyncio.Future[T], on_cancel: Callable[[], object]) -> T:
    """Await something to its very end, whatever cancels the awaiting task meanwhile.

    Args:
        future: what is awaited. It goes on when the awaiting task is cancelled.
        on_cancel: is called then, the first time: to hasten the end.

    Raises:
        CancelledError: the awaiting task was cancelled, whatever became of the future.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            if cancelled is None:
                on_cancel()
            cancelled = error
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # or the event loop would complain that nobody has seen it
        raise cancelled
    return future.result()
