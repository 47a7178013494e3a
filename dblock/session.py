"""One connection that a lock owns, from its opening to its closing. Knows no driver and no engine.

A driver's session says how a text is sent and what the driver's errors mean; what all of them share stands here.
"""

from __future__ import annotations

import selectors
from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import RLock
from typing import TYPE_CHECKING

from dblock.errors import DatabaseError
from dblock.protocol import Engine, Message, Row, ServerLock, Steps, T, Wait, Wish

if TYPE_CHECKING:
    from types import ModuleType


class Session(ABC):
    """A connection on which one message is sent after the other."""

    engine: Engine

    def __init__(self) -> None:
        # Whoever keeps a held lock's connection alive is another thread than its holder.
        self._turn = RLock()

    @abstractmethod
    def lock(self, wish: Wish) -> ServerLock:
        """What the engine says about one lock in this session."""

    @abstractmethod
    def rows(self, text: str) -> list[Row]:
        """Send one text, and return all rows of its last statement that has some.

        Raises:
            DatabaseError: the server or the connection failed it.
        """

    @abstractmethod
    def fileno(self) -> int:
        """The descriptor of the connection's socket."""

    @abstractmethod
    def close(self) -> None:
        """End the session; the server gives back whatever it held. Raises nothing."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether this side has ended the connection, or the driver has noticed its end."""

    def wait(self, message: Wait, meanwhile: Callable[[], None] | None) -> list[Row]:  # noqa: ARG002 - for those that can
        """Send a message in which the server waits. Where a session can do so, meanwhile is called now and then."""
        return self.rows(message.text)

    def run(self, steps: Steps[T], meanwhile: Callable[[], None] | None = None) -> T:
        """Run a generator of a `ServerLock` to its end: send what it yields, hand it the replies, throw errors in.

        Args:
            steps: the generator.
            meanwhile: is called now and then while one statement waits for long.
        """
        with self._turn:
            try:
                message = next(steps)
                while True:
                    try:
                        row = self._execute(message, meanwhile)
                    except BaseException as error:  # noqa: BLE001 - the generator re-raises it after giving back
                        message = steps.throw(error)
                    else:
                        message = steps.send(row)
            except StopIteration as end:
                result: T = end.value
                return result

    def alive(self) -> bool:
        """Tell whether the connection stands, without traffic as long as the server has said nothing unasked."""
        with self._turn:
            if self.closed:
                return False
            with selectors.DefaultSelector() as selector:
                selector.register(self.fileno(), selectors.EVENT_READ)
                unasked = selector.select(timeout=0)
            if unasked:
                # Unasked for, the server says that it ends the session; or it is a mere notice. One more message tells.
                try:
                    self.rows("SELECT 1")
                except DatabaseError:
                    return False
            return True

    def _execute(self, message: Message, meanwhile: Callable[[], None] | None) -> Row:
        rows = self.wait(message, meanwhile) if isinstance(message, Wait) else self.rows(message)
        return rows[0] if rows else ()


def one_line(text: str) -> str:
    """A driver's or a server's message on one line."""
    return " ".join(text.split())


def hide_password(text: str, password: str | None) -> str:
    """Take a password out of a text that is about to be shown."""
    return text.replace(password, "***") if password else text


def import_driver(name: str, extra: str) -> ModuleType:
    """Import a driver, only now that it is needed.

    Raises:
        DatabaseError: it is not installed. The message names the extra that brings it.
    """
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise DatabaseError(
            f"the driver {name} cannot be imported ({error}); install it with: pip install 'dblock[{extra}]'"
        ) from error
