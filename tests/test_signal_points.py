"""A signal's exception at each point of dblock's code where it can come, one after the other.

Python runs a signal's handler between two steps of the main thread: where a function begins, and where one that is
written in C has returned. A profiler is called at the same points, and what it raises comes out there. (A handler also
runs where a loop begins anew. Aimed signals, in ``test_at_once.py`` and ``test_races.py``, meet whatever they meet.)
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg
import pytest

import dblock
from dblock.driver_pymssql import _arguments, _is_open
from tests.backends import Backend, Postgres
from tests.support import wait_until

PACKAGE = f"{Path(dblock.__file__).parent}{os.sep}"
WISH: dict[str, Any] = {"target": "web-01", "step": "b"}


class Signalled(BaseException):
    """What a signal's handler raises."""


def signalled(action: Callable[[], object], point: int) -> tuple[bool, bool]:
    """Act, and raise at that point. Returns whether it was reached, and whether the exception came out.

    It does not where it meets a destructor: Python only prints such an exception, whose ever it is.
    """
    points = 0

    def is_dblocks(frame: FrameType | None) -> bool:
        return frame is not None and frame.f_code.co_filename.startswith(PACKAGE)

    def goes_on(frame: FrameType) -> bool:
        # A signal's exception finds the generator's handlers there; a profiler's does not, before Python 3.11.
        return bool(frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE))

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal points
        begun = event == "call" and not goes_on(frame) and (is_dblocks(frame) or is_dblocks(frame.f_back))
        if begun or (event == "c_return" and is_dblocks(frame)):
            points += 1
            if points == point:
                raise Signalled

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        action()
    except Signalled:
        return True, True
    finally:
        sys.setprofile(before)
    return points >= point, False


def new_connection(backend: Backend, stack: ExitStack, *, autocommit: bool) -> Any:
    if isinstance(backend, Postgres):
        return stack.enter_context(psycopg.connect(backend.url, autocommit=autocommit))
    import pymssql

    return stack.enter_context(pymssql.connect(**_arguments(backend.url), autocommit=autocommit))


# What a destructor raised, and what is said of a connection that was lost on its way to the lock.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.timeout(1800)  # Babelfish takes a second for the first message of each connection
@pytest.mark.parametrize("engine", ["postgres", "mssql"])
@pytest.mark.parametrize("kind", ["own", "caller's", "transaction"])
@pytest.mark.parametrize("action", ["acquire", "__enter__", "release", "check"])
def test_each_point(backend: Backend, engine: str, kind: str, action: str) -> None:
    """An acquire that raised holds nothing, a check or a release says no false word; and the lock goes on to work."""
    scope: Any = "transaction" if kind == "transaction" else "session"
    connection: Any = None
    point = 0
    reached = True
    with ExitStack() as stack:
        while reached:
            point += 1
            if kind != "own" and (connection is None or not alive(connection)):
                connection = new_connection(backend, stack, autocommit=kind != "transaction")
            lock = dblock.lock(connection or backend.url, scope=scope, **WISH)
            if action in ("release", "check"):
                lock.acquire()
            reached, raised = signalled(getattr(lock, action), point)
            if action in ("acquire", "__enter__"):
                assert lock.held != raised, point
            if lock.held:
                assert len(backend.holders()) == 1, point
                lock.release()
            elif action == "check":
                # A session of pymssql's does not outlive a message that was broken off.
                assert engine == "mssql", point
                with pytest.raises(dblock.LockLost):
                    lock.release()
            if kind == "transaction" and alive(connection):
                connection.rollback()
            wait_until(lambda: not backend.all_rows(), f"nothing to be left after point {point}")
            if kind == "own" or alive(connection):
                assert lock.acquire(0), point
                lock.release()
                if kind == "transaction":
                    connection.rollback()
                wait_until(lambda: not backend.all_rows(), f"nothing to be left after point {point}, and another time")
    assert point > 40
    gc.collect()  # or they would be said of another test


def alive(connection: Any) -> bool:
    return not connection.closed if isinstance(connection, psycopg.Connection) else _is_open(connection)
