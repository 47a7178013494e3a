"""Whatever stands in a name, a setting, a label, a URL or an argument: the same answer at all doors, or a refusal.

Some hundreds of inputs by default; DBLOCK_TEST_ROUNDS=2000 makes it more than 10,000, against a real server.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dblock
from dblock import label
from dblock.cli import main
from dblock.connect import secret_in
from tests.doors import SQL, Wish, literal, set_wishes
from tests.support import rounds, wait_until

Connection = psycopg.Connection[Any]

KEY, ACQUIRE, INSPECT = ((SQL / f"{name}.sql").read_bytes() for name in ("key", "acquire", "inspect"))
PLANTED = "hunter2-S3cret"
LEADS_NOWHERE = "postgresql://127.0.0.1:1/shared"
EXIT_CODES = {0, 1, 2, 64, 69, 75, 77}

fuzz = settings(
    max_examples=rounds(60),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# What breaks things comes often; whatever else there is, now and then.
PIECES = st.sampled_from([
    "'", '"', "\\", "''", "$$", "$x$", ";", "--", "/*", "*/", "%s", "%", "%(a)s", "{0}", "#{x}", "##octopus[x]", "$(a)",
    "\n", "\r\n", "\t", "\x00", "\x1b[31m", "\x7f", "\x85", " ", "\u00a0", "\u2028", "\u202e", "\ufeff", "\u200b",
    "a", "web-01", "é", "語", "🙂", "İ", "ß", "~", "-", "dblock1", "]", "[", "<", "&", "|", ",", ":", "@", "/",
    "\ud800",
])  # fmt: skip
TEXTS = st.one_of(st.lists(PIECES, max_size=8).map("".join), st.text(max_size=300))


@pytest.fixture(scope="module")
def connection(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def sendable(*texts: str) -> bool:
    """PostgreSQL has no text with a NUL or a lone surrogate, so no script ever sees one."""
    return not any(re.search("[\x00\ud800-\udfff]", text) for text in texts)


def key_of(target: str, step: str) -> int | None:
    try:
        return dblock.key(target, step).value
    except ValueError:
        return None


# --- names ------------------------------------------------------------------------------------------------------------


@fuzz
@given(target=TEXTS, step=TEXTS)
def test_the_server_computes_the_same_key_or_refuses_too(connection: Connection, target: str, step: str) -> None:
    expected = key_of(target, step)
    if not sendable(target, step):
        assert expected is None
        return
    connection.execute(set_wishes(Wish(target, step)).encode())
    row = connection.execute(KEY).fetchone()
    assert row is not None
    assert row[0] == expected
    assert (row[-1] is None) == (expected is not None)


@fuzz
@given(target=TEXTS, step=TEXTS, tenant=TEXTS)
def test_what_a_script_takes_everybody_sees_by_its_names(
    url: str, connection: Connection, target: str, step: str, tenant: str
) -> None:
    if not sendable(target, step, tenant):
        return
    with psycopg.connect(url, autocommit=True) as caller:
        refused = refusal(caller, Wish(target, step, tenant, timeout="0"))
        assert refused == (None if key_of(target, step) else "22023")
        if refused:
            return
        (found,) = connection.execute(
            "SELECT (classid::bigint << 32) | objid::bigint, application_name FROM pg_locks JOIN pg_stat_activity "
            "USING (pid) WHERE locktype = 'advisory'"
        ).fetchall()
        assert found[0] == key_of(target, step)
        said = label.parse(found[1])
        assert said is not None
        assert said.may_name(target, step)
        with pytest.raises(dblock.LockTimeout) as timeout, dblock.lock(connection, target=target, step=step, timeout=0):
            pytest.fail("two inside")
        assert label.printable(str(timeout.value)) == str(timeout.value)
    wait_until(lambda: nobody_holds(connection), "the release")


def refusal(caller: Connection, wish: Wish) -> str | None:
    """Acquire by the script. Return the SQLSTATE of the refusal, or None: it is held."""
    caller.execute(set_wishes(wish).encode())
    try:
        caller.execute(ACQUIRE)
    except psycopg.Error as error:
        return error.sqlstate
    return None


def nobody_holds(connection: Connection) -> bool:
    return not connection.execute("SELECT FROM pg_locks WHERE locktype = 'advisory'").fetchall()


# --- settings ---------------------------------------------------------------------------------------------------------

GRAMMAR = {
    "timeout": r"[0-9]{1,7}(\.[0-9]{1,3})?",
    "slots": r"[1-9][0-9]{0,2}",
    "shared": r"on|off",
    "scope": r"session|transaction",
}
VALUES = st.one_of(
    st.from_regex(r"[0-9]{0,8}(\.[0-9]{0,4})?", fullmatch=True),
    st.sampled_from(
        ["on", "off", "ON", "true", "session", "transaction", "1e3", "٣", "-1", "+1", "Infinity", "NaN", " 1"]
    ),
    TEXTS,
)


@fuzz
@given(name=st.sampled_from(sorted(GRAMMAR)), value=VALUES)
def test_outside_the_grammar_a_setting_is_a_bad_one(url: str, name: str, value: str) -> None:
    if not sendable(value):
        return
    good = value == "" or re.fullmatch(GRAMMAR[name], value, re.ASCII) is not None
    if good and name == "timeout" and value and float(value) > 2147483:
        good = False
    with psycopg.connect(url, autocommit=True) as caller:
        refused = refusal(caller, Wish(timeout=None if name == "timeout" else "0", more={name: value}))
    if not good:
        assert refused == "22023"
    else:
        # A transaction's lock where there is no transaction is refused for that.
        assert refused == ("0A000" if value == "transaction" else None)


# --- labels from other people's sessions ------------------------------------------------------------------------------

LABELS = st.one_of(
    TEXTS,
    st.tuples(st.sampled_from(["", "w"]), st.integers(0, 10**12), TEXTS, TEXTS, TEXTS).map(
        lambda said: f"dblock1 {said[0]}{said[1]} {said[2]} {said[3]} {said[4]}"
    ),
    TEXTS.map(lambda tenant: f"dblock1 1700000000 {tenant} web-01 b"),
)


@fuzz
@given(said=LABELS)
def test_a_label_breaks_nothing_that_reads_it(
    url: str, connection: Connection, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    if not sendable(said):
        return
    key = dblock.key("web-01", "b").value
    with psycopg.connect(url, autocommit=True) as stranger:
        stranger.execute(f"SET application_name = {literal(said)}".encode())
        stranger.execute(f"SELECT pg_advisory_lock({key})".encode())
        lock = dblock.lock(connection, target="web-01", step="b", timeout=0)
        with pytest.raises(dblock.LockTimeout) as timeout, lock:
            pytest.fail("two inside")
        rows = connection.execute(INSPECT).fetchall()
        capsys.readouterr()
        assert main(["status", "--url", url]) == 0
        assert main(["status", "--json", "--url", url]) == 0
        shown = capsys.readouterr()
    texts = [str(timeout.value), *(value for row in rows for value in row if isinstance(value, str))]
    texts += [*shown.out.splitlines(), *shown.err.splitlines()]
    assert [text for text in texts if label.printable(text) != text] == []
    assert label.parse(said) is None or isinstance(label.parse(said), label.Label)
    wait_until(lambda: nobody_holds(connection), "the release")


# --- URLs and arguments -----------------------------------------------------------------------------------------------

URLS = st.one_of(
    st.lists(st.one_of(PIECES, st.just(PLANTED)), max_size=6).map(lambda pieces: f"postgresql://u:{''.join(pieces)}"),
    TEXTS.map(lambda text: f"postgresql://u:{PLANTED}@127.0.0.1:1/{text}"),
    TEXTS.map(lambda text: f"postgresql://u:{PLANTED}{text}@127.0.0.1:1/d"),
    TEXTS.map(lambda text: f"host=127.0.0.1 port=1 password={PLANTED} {text}"),
    TEXTS.map(lambda text: f"mssql+pymssql://u:{PLANTED}{text}@127.0.0.1:1/d"),
    TEXTS,
)


@fuzz
@given(db=URLS)
def test_a_url_that_cannot_be_read_shows_no_password(db: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    for reads in (secret_in, lambda db: dblock.lock(db, target="web-01", step="b")):
        try:
            said.append(repr(reads(db)))
        except (ValueError, dblock.DatabaseError) as error:
            said += chain(error)
    assert [text for text in [*said, caplog.text] if PLANTED in text] == []


def chain(error: BaseException | None) -> list[str]:
    """What is shown of an error, and of what caused it."""
    texts = []
    while error is not None:
        texts += [str(error), repr(error)]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return texts


OPTIONS = st.sampled_from([
    "--target", "--step", "--tenant", "--timeout", "--slots", "--shared", "--heartbeat", "--grace", "--database",
    "--json", "--help", "--conflict-exit-code", "--url", "--allow-session-pooler", "--nonsense", "-x", "--",
])  # fmt: skip
ARGUMENTS = st.lists(st.one_of(OPTIONS, TEXTS, VALUES, st.sampled_from(["web-01", "b", "10m", "5"])), max_size=8)


@fuzz
@given(command=st.sampled_from(["run", "key", "status", "sql"]), arguments=ARGUMENTS)
def test_no_argument_ends_in_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str, arguments: list[str]
) -> None:
    """What could be a command to run is cut off: only the arguments of dblock itself are tried."""
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    monkeypatch.setenv("DBLOCK_URL", LEADS_NOWHERE)
    end = ["--", "true"] if command == "run" else []
    code: Any = None
    try:
        code = main([command, *(argument for argument in arguments if "127.0.0.1" not in argument), *end])
    except SystemExit as exit_:
        code = exit_.code or 0
    shown = capfd.readouterr()
    assert code in EXIT_CODES, (code, shown.err)
    assert "Traceback" not in shown.err
    assert "unexpected" not in shown.err
    if code:
        assert shown.err.splitlines()[-1].startswith("dblock: ")
