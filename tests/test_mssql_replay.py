"""The real pymssql, fed with recorded replies of a real endpoint (`tests.tds`): what the driver makes of them."""

from __future__ import annotations

import pytest
from pymssql import _mssql

import dblock
from tests.tds import player, recordings

REPLIES = recordings()


def lock(url: str, tenant: str = "T1") -> dblock.Lock:
    return dblock.lock(url, target="web-01", step="recorded", tenant=tenant)


def test_granted_and_given_back() -> None:
    with player(REPLIES["granted"]) as url, lock(url) as held:
        assert held.held
    assert not held.held


def test_refused() -> None:
    with player(REPLIES["refused"]) as url:
        assert lock(url, "T2").acquire(timeout=1) is False
    assert _mssql.wait_callback is None


def test_still_held() -> None:
    with player(REPLIES["checked"]) as url, lock(url) as held:
        held.check()


@pytest.mark.parametrize("messages", range(1, len(REPLIES["granted"])))
def test_a_server_that_dies_after_each_message(messages: int) -> None:
    """Before the grant nothing is reported as held; after it the loss is told."""
    granted = len(REPLIES["granted"]) - 1  # the last message of all is the release
    with player([*REPLIES["granted"][:messages], b""]) as url:
        ours = lock(url)
        if messages < granted:
            with pytest.raises(dblock.DatabaseError):
                ours.acquire()
            assert not ours.held
        else:
            ours.acquire()
            with pytest.raises(dblock.LockLost):
                ours.release()
