"""In which order several locks of one session are taken and given back, and within which time.

The locks are scripts that note what is asked of them: what real ones say is tested on servers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import pytest

from dblock.errors import DatabaseError
from dblock.names import key
from dblock.protocol import (
    Busy,
    Conditions,
    Granted,
    Look,
    Report,
    Steps,
    T,
    Wish,
    acquire_all,
    check_all,
    release_all,
)

CONDITIONS = Conditions(database="shared")
GRANTED = Granted(before="", slot=None)


class Scripted:
    """A `dblock.protocol.ServerLock` that does what it is told, and notes what is asked of it."""

    may_hold = False

    def __init__(self, name: str, said: list[str], **outcomes: object) -> None:
        self.wish = Wish(key(name, "b"), name, "b", None)
        self.given: list[tuple[Conditions, float | None, Report | None]] = []
        self._name, self._said, self._outcomes = name, said, outcomes

    def _do(self, what: str) -> Steps[object]:
        yield f"{what} {self._name}"
        self._said.append(f"{what} {self._name}")
        outcome = self._outcomes.get(what, True)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome() if callable(outcome) else outcome

    def open(self, conditions: Conditions) -> Steps[None]:
        assert conditions is CONDITIONS
        yield from self._do("open")

    def acquire(self, conditions: Conditions, timeout: float | None, report: Report | None) -> Steps[Granted | Busy]:
        self.given.append((conditions, timeout, report))
        self.may_hold = True
        outcome = yield from self._do("acquire")
        if isinstance(outcome, Busy):
            self.may_hold = False
            return outcome
        return GRANTED

    def settle(self) -> Steps[None]:
        yield from self._do("settle")

    def withdraw(self) -> Steps[None]:
        yield from self._do("withdraw")

    def release(self, granted: Granted) -> Steps[bool]:
        assert granted is GRANTED
        return bool((yield from self._do("release")))

    def check(self, granted: Granted) -> Steps[bool]:
        assert granted is GRANTED
        return bool((yield from self._do("check")))

    def look(self) -> Steps[Look]:
        yield from self._do("look")
        return Look(None)


def locks(said: list[str], **outcomes: Mapping[str, object]) -> list[Scripted]:
    return [Scripted(name, said, **outcomes.get(name, {})) for name in ("one", "two", "three")]


def finish(steps: Steps[T]) -> T:
    """Run a generator to its end; it needs no replies."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def holds(found: Sequence[Scripted]) -> list[tuple[Scripted, Granted]]:
    return [(lock, GRANTED) for lock in found]


def ignore(wish: Wish, look: Look) -> None:
    """Nobody waits here."""


def test_all_are_looked_at_before_the_first_is_waited_for() -> None:
    said: list[str] = []
    found = locks(said)
    assert finish(acquire_all(found, CONDITIONS, None, ignore)) == holds(found)
    assert said == [
        "open two", "open three", "acquire one", "acquire two", "acquire three",
        "settle three", "settle two", "settle one",
    ]  # fmt: skip
    assert [lock.given for lock in found] == [[(CONDITIONS, None, ignore)]] * 3


def test_one_time_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def later() -> Granted:
        nonlocal now
        now += 7
        return GRANTED

    found = locks([], one={"acquire": later}, two={"acquire": later})
    finish(acquire_all(found, CONDITIONS, 10, None))
    assert [lock.given[0][1] for lock in found] == [10, 3, 0]


def test_no_time_at_all() -> None:
    found = locks([])
    finish(acquire_all(found, CONDITIONS, 0, None))
    assert [lock.given[0][1] for lock in found] == [0, 0, 0]


def test_all_or_none() -> None:
    said: list[str] = []
    busy = Busy(Wish(key("three", "b"), "three", "b", None), Look(True))
    found = locks(said, three={"acquire": busy}, two={"withdraw": DatabaseError("the session is closed")})
    assert finish(acquire_all(found, CONDITIONS, 5, None)) is busy
    assert said[-3:] == ["acquire three", "withdraw two", "withdraw one"]


@pytest.mark.parametrize(("where", "withdrawn"), [
    ("acquire", ["withdraw two", "withdraw one"]),
    ("settle", ["withdraw three", "withdraw two", "withdraw one"]),
])  # fmt: skip
def test_one_that_fails_takes_the_others_back(where: str, withdrawn: list[str]) -> None:
    said: list[str] = []
    found = locks(said, two={where: DatabaseError("refused")})
    with pytest.raises(DatabaseError, match="refused"):
        finish(acquire_all(found, CONDITIONS, 5, None))
    assert said[said.index(f"{where} two") + 1 :] == withdrawn


@pytest.mark.parametrize("lost", ["one", "two", "three", None])
def test_each_is_given_back_the_last_one_first(lost: str | None) -> None:
    said: list[str] = []
    found = locks(said, **({lost: {"release": False}} if lost else {}))
    assert finish(release_all(holds(found))) is (lost is None)
    assert said == ["release three", "release two", "release one"]


def test_the_first_failure_is_told_when_all_have_had_their_turn() -> None:
    said: list[str] = []
    found = locks(said, three={"release": DatabaseError("first")}, one={"release": DatabaseError("second")})
    with pytest.raises(DatabaseError, match="first"):
        finish(release_all(holds(found)))
    assert said == ["release three", "release two", "release one"]


def test_a_release_that_is_broken_off_asks_nothing_more() -> None:
    said: list[str] = []
    steps = release_all(holds(locks(said)))
    next(steps)
    steps.close()
    assert said == []


@pytest.mark.parametrize("lost", ["one", "three", None])
def test_all_must_be_held(lost: str | None) -> None:
    found = locks([], **({lost: {"check": False}} if lost else {}))
    assert finish(check_all(holds(found))) is (lost is None)
