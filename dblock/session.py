"""One connection that a lock uses, its own or the caller's. Knows no driver and no engine.

It runs the generators that say what is sent. A driver's session says how a text is sent and what the driver's errors
mean. ``aio_session.py`` has the same for asyncio.
"""

from __future__ import annotations

import selectors
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from threading import Lock, RLock, Timer
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dblock.errors import DatabaseError
from dblock.protocol import ANSWER_SECONDS, Engine, HangUp, Message, Pause, Row, ServerLock, Steps, T, Wait, Wish

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


Scope = Literal["session", "transaction"]


# The connections of callers on which a lock is being acquired, by their identities; and by whom.
_claimed: dict[int, object] = {}
_claiming = Lock()


def claim(connection: object, claimant: object) -> bool:
    """Be the only one who acquires a lock on a caller's connection, until `unclaim`.

    To the server all of a session's locks are one holder's: of two who acquire the same one on one connection, both
    would have it; and what one takes back in a transaction would be the other's too.

    Returns:
        False: somebody else does.
    """
    with _claiming:
        return _claimed.setdefault(id(connection), claimant) is claimant


def unclaim(claimant: object) -> None:
    """Let others acquire where the claimant did."""
    with _claiming:
        for connection in [connection for connection, by in _claimed.items() if by is claimant]:
            del _claimed[connection]


class Loan(NamedTuple):
    """The caller's connection, on loan to a lock.

    Attributes:
        connection: the driver's.
        began: the lock's first message begins a transaction, where the caller had none.
        rollback: ends it. Its result is to be awaited where the connection is asynchronous.
        returned: is called when nothing of the lock is left on the connection.
        closed: is called when the connection had to be closed. Its result is to be awaited likewise.
    """

    connection: object
    began: bool
    rollback: Callable[[], Any]
    returned: Callable[[], None] = lambda: None
    closed: Callable[[], Any] = lambda: None


class AnySession(ABC):
    """What both kinds have in common.

    Attributes:
        engine: the server's kind.
        loan: whose connection it is; None: the lock's own.
        comment: what stands before each statement, for those who look at the session.
    """

    engine: Engine
    comment = ""

    def __init__(self, loan: Loan | None) -> None:
        self.loan = loan

    @abstractmethod
    def lock(self, wish: Wish) -> ServerLock:
        """What the engine says about one lock in this session."""

    @abstractmethod
    def fileno(self) -> int:
        """The descriptor of the connection's socket.

        Raises:
            DatabaseError: it has none, or none any more.
        """

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether this side has ended the connection, or the driver has noticed its end."""

    @property
    @abstractmethod
    def in_transaction(self) -> bool | None:
        """Whether a transaction is open, as the driver knows it; None: it does not."""

    @property
    @abstractmethod
    def would_begin(self) -> bool:
        """Whether the connection is not in autocommit, so that a statement begins a transaction."""

    @property
    def backend_pid(self) -> int | None:
        """The server's process as the driver was told at connecting; a pooler makes it up. None: it is not told."""
        return None

    @property
    def busy(self) -> bool:
        """Whether a statement is under way, as far as the driver tells."""
        return False

    @abstractmethod
    def alive(self) -> bool:
        """Whether the connection stands, as far as it can be known without waiting for the server."""


class Session(AnySession):
    """A connection whose caller blocks."""

    def __init__(self, loan: Loan | None) -> None:
        super().__init__(loan)
        # Whoever keeps a held lock's connection alive is another thread than its holder.
        self._turn = RLock()

    @abstractmethod
    def rows(self, text: str) -> list[Row]:
        """Send one text, and return all rows of its last statement that has some.

        Raises:
            DatabaseError: the server or the connection failed it.
        """

    @abstractmethod
    def _close(self) -> None:
        """Close the connection."""

    def close(self) -> None:
        """End the session; the server gives back whatever it held. Raises nothing."""
        # Not under another thread's message, such as a watch's: with psycopg that would go on with whatever gets the
        # descriptor next, and with pymssql it would end the process.
        if not self._turn.acquire(blocking=False):
            with suppress(Exception):
                shut_down(self.fileno())
            self._turn.acquire()
        try:
            # This runs while errors are on their way.
            with suppress(Exception):
                self._close()
            with suppress(Exception):
                if self.loan is not None:
                    self.loan.closed()
        finally:
            self._turn.release()

    def wait(self, message: Wait, meanwhile: Callable[[], None] | None) -> list[Row]:  # noqa: ARG002 - for those that can
        """Send a message in which the server waits. Where a session can do so, meanwhile is called now and then."""
        return self.rows(message.text)

    def run(self, steps: Steps[T], meanwhile: Callable[[], None] | None = None) -> T:
        """Run a generator to its end: send what it yields, hand it the replies, throw errors in.

        Args:
            steps: the generator.
            meanwhile: is called now and then while one statement waits for long.
        """
        with self._turn:
            step: Callable[[Any], Message] = steps.send
            value: Any = None
            try:
                while True:
                    try:
                        value = self._execute(step(value), meanwhile)
                        step = steps.send
                    except BaseException as error:
                        if finished(steps):
                            raise  # its own
                        step, value = steps.throw, error  # it gives back, and raises it again
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                if not finished(steps):
                    # A signal's exception came in between, and what had been taken could not be given back.
                    self.close()
                    with suppress(RuntimeError):
                        steps.close()

    def leave(self, *, granted: bool) -> None:
        """The lock is done with the connection: its own is closed, the caller's is as it was.

        Args:
            granted: the lock was held, and given back; otherwise it was not acquired.
        """
        if self.loan is None or self.busy:
            self.close()  # busy: an exception left a statement behind, whose outcome nobody will read
        elif not self.closed:
            self.loan.returned()
            if self.loan.began and not granted:
                try:
                    self.loan.rollback()
                except Exception:  # noqa: BLE001 - whatever it was, the transaction may be open
                    self.close()

    def _execute(self, message: Message, meanwhile: Callable[[], None] | None) -> Row:
        if isinstance(message, Pause):
            time.sleep(message.seconds)
            return ()
        if isinstance(message, HangUp):
            self.close()
            return ()
        rows = self.wait(message, meanwhile) if isinstance(message, Wait) else self.rows(message)
        return rows[0] if rows else ()


def finished(steps: Steps[Any]) -> bool:
    """Whether a generator has come to its end: it is only run to that."""
    return getattr(steps, "gi_frame", None) is None


def has_input(descriptor: int) -> bool:
    """Whether something can be read from a socket, be it its end."""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(timeout=0))


def duplicate(descriptor: int) -> socket.socket:
    """Another descriptor of the same socket: the connection's own may be closed, and its number become another's."""
    return socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM)


def shut_down(descriptor: int) -> None:
    """End a connection for whoever waits for it, and leave it to the driver to be closed."""
    with closing(duplicate(descriptor)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


class AnswerDue:
    """Ends a connection on which an answer has not come in time: whoever waits for it then gets the driver's error.

    As a context manager it stands around the waiting; somebody else calls `expire` after ``ANSWER_SECONDS``.
    """

    def __init__(self, descriptor: int) -> None:
        try:
            self._socket = duplicate(descriptor)
        except OSError as error:
            raise DatabaseError(f"the connection is closed ({error})") from error
        self._expired = False

    def expire(self) -> None:
        """End the connection. It is still the driver's to be closed."""
        self._expired = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()
        if self._expired and isinstance(error, DatabaseError):
            raise DatabaseError(f"the server did not answer within {ANSWER_SECONDS} s") from error


@contextmanager
def answered_in_time(descriptor: int) -> Iterator[None]:
    """Stand around a wait for an answer in a thread that blocks: see `AnswerDue`."""
    with AnswerDue(descriptor) as due:
        timer = Timer(ANSWER_SECONDS, due.expire)
        timer.daemon = True
        try:
            timer.start()
            yield
        finally:
            timer.cancel()
            if timer.is_alive():  # or a signal's exception came while it was started
                timer.join()


def notice_dead_network(descriptor: int) -> None:
    """Let the operating system end a connection whose other side has fallen silent, as far as it can.

    Data that nobody confirms and probes that nobody answers count, and not how long the server thinks.

    Args:
        descriptor: a connection's socket.
    """
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        *(
            (socket.IPPROTO_TCP, getattr(socket, name), value)
            for name, value in (
                ("TCP_KEEPIDLE", ANSWER_SECONDS),
                ("TCP_KEEPINTVL", 2),
                ("TCP_KEEPCNT", 3),
                ("TCP_USER_TIMEOUT", ANSWER_SECONDS * 1000),
            )
            if hasattr(socket, name)
        ),
    ]
    with closing(duplicate(descriptor)) as connection:
        for option in options:
            with suppress(OSError):  # not TCP, but a socket of the file system
                connection.setsockopt(*option)


def one_line(text: str) -> str:
    """A driver's or a server's message on one line."""
    return " ".join(text.split())


def hide_password(text: str, password: str | None) -> str:
    """Take a password out of a text that is about to be shown."""
    return text.replace(password, "***") if password else text
