"""What dblock relies upon in SQL Server and pymssql, asked of the server itself.

Where Babelfish answers otherwise it is said: there only a real SQL Server proves the point.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pymssql
import pytest

from dblock import driver_pymssql
from tests.backends import SqlServer
from tests.support import wait_until

LOCK = "@Resource = N'dblock:42', @LockOwner = N'Session', @DbPrincipal = N'public'"
Connection = Any
Connect = Callable[[], Connection]


@pytest.fixture
def connect(mssql: SqlServer) -> Iterator[Connect]:
    opened = []

    def open_one() -> Connection:
        opened.append(pymssql.connect(**driver_pymssql._arguments(mssql.url), autocommit=True))
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.close()


def ask(connection: Connection, batch: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(batch)
        return cursor.fetchone()[0]


def take(connection: Connection, milliseconds: int = 1, mode: str = "Exclusive", lock: str = LOCK) -> Any:
    return ask(
        connection,
        f"DECLARE @code int; EXEC @code = sys.sp_getapplock {lock}, @LockMode = N'{mode}',"
        f" @LockTimeout = {milliseconds}; SELECT @code",
    )


def give_back(connection: Connection, lock: str = LOCK) -> Any:
    return ask(connection, f"DECLARE @code int; EXEC @code = sys.sp_releaseapplock {lock}; SELECT @code")


def mode(connection: Connection) -> Any:
    return ask(connection, "SELECT APPLOCK_MODE('public', N'dblock:42', 'Session')")


def test_codes_of_a_grant_and_of_a_timeout(mssql: SqlServer, connect: Connect) -> None:
    one, two = connect(), connect()
    assert take(one) == 0
    assert take(two, 1) == -1
    assert take(two, 100) == -1
    assert mode(two) == "NoLock"
    codes: list[int] = []
    waiter = threading.Thread(target=lambda: codes.append(take(two, -1)))
    waiter.start()
    wait_until(mssql.waiters, "the waiter")
    assert give_back(one) == 0
    waiter.join()
    assert codes == [0 if mssql.is_babelfish else 1]


def test_babelfish_takes_do_not_wait_for_a_mistake(mssql: SqlServer, connect: Connect) -> None:
    """Which is why dblock asks for a millisecond instead."""
    one, two = connect(), connect()
    assert take(one) == 0
    assert take(two, 0) == (-999 if mssql.is_babelfish else -1)


def test_the_mode_tells_what_a_session_holds(connect: Connect) -> None:
    one = connect()
    assert mode(one) == "NoLock"
    take(one)
    assert mode(one) == "Exclusive"
    assert mode(connect()) == "NoLock"
    give_back(one)
    assert mode(one) == "NoLock"


def test_a_lock_is_counted(connect: Connect) -> None:
    """So a session must never take it twice."""
    one = connect()
    assert (take(one), take(one)) == (0, 0)
    give_back(one)
    assert mode(one) == "Exclusive"
    give_back(one)
    assert mode(one) == "NoLock"


def test_a_release_of_what_is_not_held_is_an_error(connect: Connect) -> None:
    """So dblock looks before it releases."""
    one = connect()
    with pytest.raises(pymssql.Error):
        give_back(one)


def test_a_waiters_place_is_its_arrival(mssql: SqlServer, connect: Connect) -> None:
    holder = connect()
    take(holder)
    served: list[int] = []
    threads = []
    for number in range(5):
        connection = connect()

        def wait(connection: Connection = connection, number: int = number) -> None:
            take(connection, -1)
            served.append(number)
            give_back(connection)

        threads.append(threading.Thread(target=wait))
        threads[-1].start()
        wait_until(lambda n=number: len(mssql.waiters()) == n + 1, f"waiter {number}")  # type: ignore[misc]
    give_back(holder)
    for thread in threads:
        thread.join()
    assert served == list(range(5))


def test_a_closed_connection_gives_back(mssql: SqlServer, connect: Connect) -> None:
    one = connect()
    take(one)
    one.close()
    wait_until(lambda: not mssql.holders(), "the lock to be free")


def test_a_deadlock_is_a_code(mssql: SqlServer, connect: Connect) -> None:
    one, two = connect(), connect()
    other = LOCK.replace("42", "43")
    take(one)
    take(two, lock=other)
    codes: list[int] = []

    def wait(connection: Connection, lock: str) -> None:
        code = take(connection, 20_000, lock=lock)
        codes.append(code)
        if code < 0:
            connection.close()

    threads = [threading.Thread(target=wait, args=pair) for pair in ((one, other), (two, LOCK))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(codes) == -3
    assert max(codes) >= 0


def test_context_info_is_seen_by_others_and_padded(mssql: SqlServer, connect: Connect) -> None:
    one = connect()
    assert ask(one, "SELECT CONTEXT_INFO()") is None
    spid = ask(one, "SET CONTEXT_INFO 0x64626C6F636B; SELECT @@SPID")
    ((seen,),) = mssql.query(f"SELECT context_info FROM sys.dm_exec_sessions WHERE session_id = {spid}")
    assert bytes(seen) == b"dblock".ljust(128, b"\0")
    assert bytes(ask(one, "SET CONTEXT_INFO 0x; SELECT CONTEXT_INFO()")).strip(b"\0") == b""


def test_the_epoch(connect: Connect) -> None:
    seconds = ask(connect(), "SELECT DATEDIFF_BIG(SECOND, '19700101', SYSUTCDATETIME())")
    assert abs(seconds - time.time()) < 86_400


def test_what_decides_whether_a_session_is_trusted(mssql: SqlServer) -> None:
    ((database, updateability, transactions),) = mssql.query(
        "SELECT DB_NAME(), CAST(DATABASEPROPERTYEX(DB_NAME(), 'Updateability') AS nvarchar(60)), @@TRANCOUNT"
    )
    assert (database, updateability, transactions) == (mssql.database, "READ_WRITE", 0)


def test_pymssql_begins_a_transaction_unless_in_autocommit(mssql: SqlServer) -> None:
    connection = pymssql.connect(**driver_pymssql._arguments(mssql.url))
    try:
        assert ask(connection, "SELECT @@TRANCOUNT") == 1
        connection.autocommit(True)
        assert ask(connection, "SELECT @@TRANCOUNT") == 0
    finally:
        connection.close()
