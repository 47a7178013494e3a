"""The label that a session carries: encoded, fitted and read back to the byte as the contract says."""

from __future__ import annotations

import re
import threading
from collections import Counter
from random import Random
from typing import Any

import psycopg
import pytest

import dblock
from dblock import protocol
from dblock.label import Label, comment, fields, parse, printable, read_comment
from dblock.postgres import LockNames
from tests.doors import SQL, Wish, set_wishes
from tests.support import wait_until

HOLDING = 10  # digits of TIME; with a w before them while waiting
WAITING = 11
LIMITS = (63, 128)  # PostgreSQL, SQL Server

# --- exact cases ------------------------------------------------------------------------------------------------------

# tenant, target, step: the fields in the label of a holder on PostgreSQL, which has 42 bytes for the three.
EXACT = {
    "plain": ("T1", "web-01", "b", "T1 web-01 b"),
    "no tenant": (None, "web-01", "b", "- web-01 b"),
    "an empty tenant": ("", "web-01", "b", "- web-01 b"),
    "a tenant called -": ("-", "web-01", "b", "%2D web-01 b"),
    "names called -": ("T1", "-", "-", "T1 %2D %2D"),
    "a hyphen among others": ("--", "-a", "a-", "-- -a a-"),
    "what needs no encoding": ("AZaz09", "a.b_c-d", "0", "AZaz09 a.b_c-d 0"),
    "the tilde is the mark of what is shortened": ("~", "a~", "~b~", "%7E a%7E %7Eb%7E"),
    "the percent sign": ("100%", "%41", "%", "100%25 %2541 %25"),
    "a capital X": ("X", "XX", "aX", "X XX aX"),
    "X and slash": ("X/", "/X", "X", "X%2F %2FX X"),
    "space and slash": ("a b", "c/d", "e+f", "a%20b c%2Fd e%2Bf"),
    "control characters": ("\0\n", "x", "\x7f\x1b", "%00%0A x %7F%1B"),
    "two, three and four bytes": ("é", "€", "🙂", "%C3%A9 %E2%82%AC %F0%9F%99%82"),
    "blanks beyond ASCII": ("\xa0", "\u2028", "\x85", "%C2%A0 %E2%80%A8 %C2%85"),
    "a lone surrogate, which only a tenant can hold": ("a\ud800b", "web-01", "b", "a%3Fb web-01 b"),
    "all 42 bytes": (None, "t" * 20, "s" * 21, f"- {'t' * 20} {'s' * 21}"),
    "one byte too many: the longest loses two, for the mark": (
        None, "t" * 20, "s" * 22, f"- {'t' * 20} {'s' * 20}~"),
    "among equals the step before the target, and again": (
        None, "t" * 21, "s" * 21, f"- {'t' * 20}~ {'s' * 19}~"),
    "among equals the tenant first": ("n" * 21, "t" * 21, "s", f"{'n' * 19}~ {'t' * 20}~ s"),
    "three equals": ("n" * 40, "t" * 40, "s" * 40, f"{'n' * 13}~ {'t' * 13}~ {'s' * 13}~"),
    "fields that fit beside a long one stay": ("T1", "t" * 255, "b", f"T1 {'t' * 38}~ b"),
    "a whole %XX is one unit": (None, "é" * 127 + "x", "b", f"- {'%C3%A9' * 6}%C3~ b"),
    "lengths count in bytes of the label": (None, "t" * 20, "é" * 7, f"- {'t' * 20} {'%C3%A9' * 3}~"),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_exact(case: str) -> None:
    tenant, target, step, expected = EXACT[case]
    assert fields(tenant, target, step, time_width=HOLDING) == expected


def test_a_waiter_has_one_byte_less() -> None:
    fits = (None, "t" * 20, "s" * 21)
    assert fields(*fits, time_width=HOLDING) == f"- {'t' * 20} {'s' * 21}"
    assert fields(*fits, time_width=WAITING) == f"- {'t' * 20} {'s' * 19}~"


def test_sql_server_has_128_bytes() -> None:
    assert fields(None, "t" * 50, "s" * 56, time_width=HOLDING, limit=128) == f"- {'t' * 50} {'s' * 56}"
    assert fields(None, "t" * 50, "s" * 57, time_width=HOLDING, limit=128) == f"- {'t' * 50} {'s' * 55}~"


# --- any names ----------------------------------------------------------------------------------------------------

ALPHABETS = (
    "ab",
    "ab-._",
    "a %/~",
    "aé",
    "€語",
    "🙂a",
    "".join(map(chr, range(0x20, 0x7F))),
    "\x80\x85\xa0\u2028\ufeff",
)


def any_name(random: Random) -> str:
    """A name that the contract accepts: up to 255 bytes, short ones more often."""
    alphabet = random.choice(ALPHABETS)
    size = random.choice((1, 5, 12, 20, 40, 255))
    name = "".join(random.choices(alphabet, k=random.randint(1, size)))
    return name.encode()[:255].decode(errors="ignore").strip(" ") or "x"


def any_names(random: Random) -> tuple[str | None, str, str]:
    return random.choice((None, "-", any_name(random))), any_name(random), any_name(random)


def fitted_plainly(texts: dict[str, str], room: int) -> dict[str, str]:
    """The contract's sentences, one unit at a time: `texts` in the order in which they give way among equals."""
    encoded = {
        name: ["-"] if text == "" else ["%2D"] if text == "-" else
              [chr(byte) if re.match("[A-Za-z0-9._-]", chr(byte)) else f"%{byte:02X}" for byte in text.encode()]
        for name, text in texts.items()
    }  # fmt: skip
    cut: set[str] = set()
    while sum(len("".join(units)) for units in encoded.values()) + len(cut) > room:
        # max() takes the first of several: among equals the one that gives way first.
        longest = max(encoded, key=lambda name: len("".join(encoded[name])))
        encoded[longest].pop()
        cut.add(longest)
    return {name: "".join(units) + "~" * (name in cut) for name, units in encoded.items()}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("width", [HOLDING, WAITING])
def test_any_names(limit: int, width: int) -> None:
    random, tally = Random(limit + width), Counter[str]()
    time = "w" * (width - HOLDING) + "1700000000"
    for _ in range(2000):
        tenant, target, step = any_names(random)
        label = f"dblock1 {time} {fields(tenant, target, step, time_width=width, limit=limit)}"
        assert re.fullmatch(r"dblock1 w?\d{10}( ([A-Za-z0-9._-]|%[0-9A-F]{2})+~?){3}", label), (tenant, target, step)
        assert len(label) <= limit
        shown = dict(zip(("tenant", "target", "step"), label.split(" ")[2:], strict=True))
        room = limit - len(f"dblock1 {time} ") - 2
        assert shown == fitted_plainly({"tenant": tenant or "", "step": step, "target": target}, room)

        read = parse(label)
        assert read is not None
        assert (read.waiting, read.time) == (width == WAITING, 1700000000)
        assert read.may_name(target, step)
        for name, text in (("tenant", tenant), ("target", target), ("step", step)):
            if shown[name].endswith("~"):
                tally["cut"] += 1
                assert len(label) > limit - 3  # nothing is cut that would have fitted, down to a unit
            else:
                tally["whole"] += 1
                assert getattr(read, name) == text
    assert min(tally["cut"], tally["whole"]) > 1000, tally


# --- reading ----------------------------------------------------------------------------------------------------------


def test_parse() -> None:
    assert parse("dblock1 1700000000 T1 web-01 b") == Label(False, 1700000000, "T1", "web-01", "b")
    assert parse("dblock1 w1700000000 - w%C3%A9b %2D") == Label(True, 1700000000, None, "wéb", "-")
    assert parse("dblock1 1700000000 %2D a%20b c%7E") == Label(False, 1700000000, "-", "a b", "c~")
    assert parse("dblock1 1700000000 - aaa~ bbb%C3~") == Label(False, 1700000000, None, "aaa~", "bbb\ufffd~")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "psql",
        "dblock1",
        "dblock",
        "dblock2 1700000000 - web-01 b",
        "dblock1  1700000000 - web-01 b",
        "dblock1 1700000000 - web-01",
        "dblock1 1700000000 - web-01 b ",
        "dblock1 1700000000 - web-01 b more",
        "dblock1 1700000000 - web-01 b\n",
        " dblock1 1700000000 - web-01 b",
        "dblock1 W1700000000 - web-01 b",
        "dblock1 -1700000000 - web-01 b",
        "dblock1 1.7 - web-01 b",
        "dblock1 ١٧٠٠٠٠٠٠٠٠ - web-01 b",
        "dblock1 170000000000 - web-01 b",
        "dblock1 soon - web-01 b",
    ],
)
def test_what_is_no_label(text: str) -> None:
    assert parse(text) is None


def test_a_label_may_name_what_it_kept_of_the_names() -> None:
    whole = Label(False, 0, None, "web-01", "b")
    assert whole.may_name("web-01", "b")
    assert not whole.may_name("web-01", "B")
    assert not whole.may_name("web-012", "b")
    assert not whole.may_name("b", "web-01")
    cut = Label(False, 0, None, "web~", "b\ufffd~")  # in the middle of a character
    assert cut.may_name("web-01", "bé")
    assert not cut.may_name("wob-01", "bé")
    assert not cut.may_name("web-01", "cé")
    assert Label(False, 0, None, "~", "X~").may_name("anything", "Xylophone")
    assert not Label(False, 0, None, "webX~", "b").may_name("web-01", "b")
    assert not Label(False, 0, None, "web0~", "b").may_name("web-01", "b")


@pytest.mark.parametrize(("text", "shown"), [
    ("web-01 é 語 🙂", "web-01 é 語 🙂"),
    ("a\nb\tc\0", r"a\nb\tc\x00"),
    ("\x1b[31mred\x7f", r"\x1b[31mred\x7f"),
    ("\x9b31m\x85\xad", r"\x9b31m\x85\xad"),
    ("\u202eright to left\u2028\ufeff\u200b", r"\u202eright to left\u2028\ufeff\u200b"),
    ("\ud800", r"\ud800"),
    ("##octopus[x", r"#\x23octopus[x"),
    ("#" * 5, r"#\x23\x23\x23\x23"),
    ("#1 a#b", "#1 a#b"),
    ("", ""),
])  # fmt: skip
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


# --- what is told beside it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "written"), [
    ({}, ""),
    ({"b": "2", "a": "1"}, "a='1',b='2'"),
    ({"link": "https://x/#/t?a=b&c='d'*/"}, "link='https%3A%2F%2Fx%2F%23%2Ft%3Fa%3Db%26c%3D%27d%27%2A%2F'"),
    ({"a.b_c-D9": "é ~X/"}, "a.b_c-D9='%C3%A9%20~X%2F'"),
    ({"x": "\ud800"}, "x='%3F'"),
])  # fmt: skip
def test_comment(more: dict[str, str], written: str) -> None:
    assert comment(more) == written
    back = {name: value.replace("\ud800", "?") for name, value in more.items()}
    assert read_comment(f"/*{written}*/ SELECT 1") == back
    assert read_comment(f"dblock {written}") == back


@pytest.mark.parametrize(("more", "kind", "why"), [
    ({"a b": "1"}, ValueError, "label has the name 'a b': letters, digits and _ . - are allowed, at most 64"),
    ({"": "1"}, ValueError, "label has the name ''"),
    ({"n" * 65: "1"}, ValueError, "label has the name"),
    ({"a": 1}, TypeError, "label must be a mapping of str to str"),
    ({1: "a"}, TypeError, "label must be a mapping of str to str"),
    ({"a": "x" * 397}, ValueError, "label has 401 bytes, encoded; at most 400 are allowed"),
])  # fmt: skip
def test_what_is_no_comment(more: Any, kind: type[Exception], why: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(why)}"):
        comment(more)


def test_a_comment_may_have_400_bytes() -> None:
    assert len(comment({"a": "x" * 396})) == 400
    assert comment({"n" * 64: "1"}) == f"{'n' * 64}='1'"


@pytest.mark.parametrize(
    "text", ["", "SELECT 1", "SELECT 1 /*a='1'*/", "/*a=1*/", "x dblock a='1'", "/* a='1'*/", "/*a='\"'*/"]
)
def test_what_is_no_comment_of_ours(text: str) -> None:
    assert read_comment(text) == {}


# --- the script makes the same one ------------------------------------------------------------------------------------

ACQUIRE = (SQL / "acquire.sql").read_text()
RELEASE = (SQL / "release.sql").read_text()


def run(connection: psycopg.Connection[Any], text: str) -> None:
    connection.execute(text.encode())


def test_acquire_sql_sets_the_same_label(url: str) -> None:
    random = Random(7)
    with (
        psycopg.connect(url, autocommit=True) as observer,
        psycopg.connect(url, autocommit=True, client_encoding="UTF8") as connection,
    ):

        def label() -> str:
            query = "SELECT application_name FROM pg_stat_activity WHERE pid = %s"
            (name,) = observer.execute(query, (connection.info.backend_pid,)).fetchone() or ("",)
            return re.sub(r"^(dblock1 w?)\d{10} ", r"\1T ", str(name))

        for _ in range(200):
            tenant, target, step = any_names(random)
            names = LockNames.of(protocol.Wish(dblock.key(target, step), target, step, tenant))
            run(observer, f"SELECT pg_advisory_lock({names.key})")
            run(connection, set_wishes(Wish(target=target, step=step, tenant=tenant)))
            thread = threading.Thread(target=run, args=(connection, ACQUIRE))
            thread.start()
            wait_until(lambda: label().startswith("dblock1 w"), "the waiter's label")
            assert label() == f"dblock1 wT {names.waiting_fields}", (tenant, target, step)
            run(observer, f"SELECT pg_advisory_unlock({names.key})")
            thread.join()
            assert label() == f"dblock1 T {names.holding_fields}", (tenant, target, step)
            run(connection, RELEASE)
