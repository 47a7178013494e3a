"""Names and their keys in Python: every vector of the contract, and every refusal with the argument and the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dblock
from dblock.names import permits as permits_of

VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("key-vectors.json").read_text("utf-8"))
NAME = "web-01"


def short(vector: dict[str, Any]) -> str:
    return f"{vector['target']!a:.20}-{vector['step']!a:.20}"


@pytest.mark.parametrize("vector", VECTORS["keys"], ids=short)
def test_key(vector: dict[str, Any]) -> None:
    key = dblock.key(vector["target"], vector["step"])
    assert key.value == vector["key"]
    assert key.mssql == f"dblock:{vector['key']}"
    assert len(key.mssql) <= 27
    high, low, form = key.postgres
    assert form == 1
    assert 0 <= high < 2**32
    assert 0 <= low < 2**32
    # Put together as the contract does it in SQL, in 64 bits that may overflow into the sign.
    assert int.from_bytes(((high << 32) | low).to_bytes(8, "big"), "big", signed=True) == vector["key"]


@pytest.mark.parametrize("vector", VECTORS["keys"], ids=short)
def test_permits(vector: dict[str, Any]) -> None:
    permits = permits_of(vector["target"], vector["step"], 11)
    assert len(permits) == 11
    assert {number: permits[int(number)].value for number in vector["slots"]} == vector["slots"]


@pytest.mark.parametrize(("target", "step", "argument"), [("", "b", "target"), ("web-01", " b", "step")])
def test_a_name_that_is_none_has_no_permits(target: str, step: str, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument} "):
        permits_of(target, step, 1)


def test_every_name_has_a_key_of_its_own() -> None:
    keys = [key for vector in VECTORS["keys"] for key in (vector["key"], *vector["slots"].values())]
    assert len(set(keys)) == len(keys)


# What the reason is called in the vectors, and how the error says it.
REASONS = {
    "empty": "is empty",
    "leading space": "begins or ends with a space",
    "trailing space": "begins or ends with a space",
    "control character": r"holds the control character U\+00[0-9A-F]{2} \(at byte \d+\)",
    "lone surrogate": r"holds a lone surrogate \(at position \d+\)",
}


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=lambda vector: f"{vector['why']}-{short(vector)}")
def test_refused(vector: dict[str, Any]) -> None:
    argument = "target" if vector["step"] == "b" else "step"
    size = len(vector[argument].encode(errors="surrogatepass"))
    reason = REASONS.get(vector["why"], rf"has {size} bytes in UTF-8; at most 255 are allowed")
    with pytest.raises(ValueError, match=rf"^{argument} {reason}$"):
        dblock.key(vector["target"], vector["step"])


@pytest.mark.parametrize("code", [*range(0x20), 0x7F])
@pytest.mark.parametrize("place", ["{}x", "x{}x", "x{}"])
def test_every_control_character_is_refused(code: int, place: str) -> None:
    name = place.format(chr(code))
    position = name.index(chr(code))
    said = rf"holds the control character U\+{code:04X} \(at byte {position}\)"
    with pytest.raises(ValueError, match=f"target {said}"):
        dblock.key(name, NAME)
    with pytest.raises(ValueError, match=f"step {said}"):
        dblock.key(NAME, name)


@pytest.mark.parametrize("ordinary", ["\x80", "\x85", "\xa0", "\xad", "\u200b", "\u2028", "\u3000", "\ufeff", "\uffff"])
def test_other_blanks_are_ordinary_at_the_edges(ordinary: str) -> None:
    """What str.strip() and other engines' classes take for blanks or controls."""
    plain = dblock.key(NAME, NAME)
    assert len({plain, dblock.key(ordinary + NAME, NAME), dblock.key(NAME + ordinary, NAME)}) == 3


def test_nothing_is_normalized() -> None:
    names = ("é", "e\u0301", "É", "ß", "ss", "ﬁ", "fi", "a b", "a  b")
    assert len({dblock.key(name, NAME).value for name in names}) == len(names)


@pytest.mark.parametrize("character", ["x", "é", "€", "🙂"])
def test_255_bytes_are_the_limit(character: str) -> None:
    size = len(character.encode())
    longest = character * (255 // size) + "x" * (255 % size)
    assert dblock.key(longest, longest).value
    with pytest.raises(ValueError, match=r"^target has 256 bytes"):
        dblock.key(longest + "x", NAME)
    with pytest.raises(ValueError, match=r"^step has 256 bytes"):
        dblock.key(NAME, longest + "x")


@pytest.mark.parametrize("name", [None, 7, b"web-01", ["web-01"]])
def test_only_text_is_a_name(name: Any) -> None:
    with pytest.raises(TypeError, match=f"target must be a str, not {type(name).__name__}"):
        dblock.key(name, NAME)
    with pytest.raises(TypeError, match=f"step must be a str, not {type(name).__name__}"):
        dblock.key(NAME, name)


def test_keys_compare_by_value_and_do_not_change() -> None:
    key = dblock.key(NAME, "b")
    assert key == dblock.key(NAME, "b")
    assert {key: 1}[dblock.key(NAME, "b")] == 1
    with pytest.raises(AttributeError):
        key.value = 1  # type: ignore[misc]
