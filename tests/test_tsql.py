"""Every piece of T-SQL passes a maintained linter's parser, and no script holds what one of its tools would act on.

Where no SQL Server runs this is what finds a slip of the pen; it knows nothing of what the statements mean.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sqlfluff.core import FluffConfig, Linter

import dblock
from dblock import mssql
from dblock.errors import DatabaseError
from dblock.protocol import Conditions, Granted, Wait, Wish

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "sql" / "mssql").glob("*.sql"))
PAGES = ["README.md", "docs/contract.md", "docs/fencing.md", "docs/sql.md", "docs/watching.md"]
EXCLUSIVE = Wish(dblock.key("O'Brien", "b"), "O'Brien", "b", "T1 'x' --")
SLOTS = EXCLUSIVE._replace(slots=2)
IN_TRANSACTION = SLOTS._replace(in_transaction=True)


def said(wish: Wish, *, own: bool) -> dict[str, str]:
    """All that is said of one lock, by the order in which it is yielded."""
    lock = mssql.AppLock(wish, own=own)
    acquiring = lock.acquire(Conditions(), None, lambda *_: None)
    found = {"prepare": str(next(acquiring))}
    transactions = int(wish.in_transaction)
    found["take"] = str(
        acquiring.send(mssql.Opened(57, "shared", "READ_WRITE", transactions, transactions, 2, 5496, None, 0, "NoLock"))
    )
    found["look"] = str(acquiring.send((-1, None)))
    waiting = acquiring.send((1, 0, 61, b"dblock1 1 T1 web-01 b", "app", "octo-7", 3))
    found["wait"] = waiting.text if isinstance(waiting, Wait) else ""
    if wish.slots:
        looking = acquiring.send((0,))
        found["look for a permit"] = looking.text if isinstance(looking, Wait) else ""
    with pytest.raises(DatabaseError):  # and so to its end
        found["give back"] = str(acquiring.throw(DatabaseError("")))
        acquiring.send((0,))
    granted = Granted(b"\x01\xff", slot=1 if wish.slots else None)
    releasing = lock.release(granted)
    found["release"] = str(next(releasing))
    with pytest.raises(StopIteration):
        found["label"] = str(releasing.send(("Shared", "Exclusive") if wish.in_transaction else (0,)))
        releasing.send(())
    found["check"] = str(next(lock.check(granted)))
    return found


STATEMENTS = {
    f"{kind}: {name}": text
    for kind, wish, own in [
        ("exclusive", EXCLUSIVE, True),
        ("shared, borrowed", EXCLUSIVE._replace(shared=True), False),
        ("slots", SLOTS, True),
        ("slots, borrowed", SLOTS, False),
        ("slots in a transaction", IN_TRANSACTION, False),
    ]
    for name, text in said(wish, own=own).items()
} | {"current database": mssql.ENGINE.current_database}


def faults(text: str) -> list[str]:
    linter = Linter(config=FluffConfig(overrides={"dialect": "tsql", "large_file_skip_byte_limit": 0}))
    return [str(violation) for violation in linter.parse_string(text).violations]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statements_of_python_parse(statement: str) -> None:
    assert faults(STATEMENTS[statement]) == []


@pytest.mark.parametrize("page", PAGES)
def test_what_the_pages_show_parses(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = re.findall(r"^```tsql\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert shown
    assert [fault for statements in shown for fault in faults(statements)] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_parse(script: Path) -> None:
    assert faults(script.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
@pytest.mark.parametrize("trap", [
    r"(?im)^\s*GO\b",  # ends a batch
    r"\$\(",  # sqlcmd substitutes
    r"(?m)^\s*:",  # a command of sqlcmd's
    r"#\{",  # Octopus Deploy substitutes
    r"[^\x00-\x7f]",  # read in another encoding by each tool
])  # fmt: skip
def test_no_script_holds_what_a_tool_would_act_on(script: Path, trap: str) -> None:
    assert re.findall(trap, script.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("right", "wrong"), [
    ("EXEC @code = sys.sp_getapplock", "EXEC @code = = sys.sp_getapplock"),
    ("IF @code >= 0", "IF @code >= THEN"),
    ("END;", ""),
])  # fmt: skip
def test_the_parser_finds_a_slip(right: str, wrong: str) -> None:
    assert faults(STATEMENTS["exclusive: take"].replace(right, wrong)) != []
