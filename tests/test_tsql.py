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
from dblock.protocol import Conditions, Granted, Wish

SCRIPTS = sorted((Path(__file__).parent.parent / "sql" / "mssql").glob("*.sql"))
NAMES = mssql.LockNames.of(Wish(dblock.key("O'Brien", "b"), "O'Brien", "b", "T1 'x' --"))
STATEMENTS = {
    "prepare": mssql._prepare(NAMES),
    "take": mssql._take(NAMES, 1),
    "wait": mssql._take(NAMES, -1, label_the_wait=True),
    "release": mssql._release(NAMES, b"\x01\xff"),
    "mode": mssql._mode(NAMES),
    "look": mssql._look(NAMES, 57, 1000),
    "current database": mssql.ENGINE.current_database,
}


def faults(text: str) -> list[str]:
    linter = Linter(config=FluffConfig(overrides={"dialect": "tsql", "large_file_skip_byte_limit": 0}))
    return [str(violation) for violation in linter.parse_string(text).violations]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statements_of_python_parse(statement: str) -> None:
    assert faults(STATEMENTS[statement]) == []


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
    assert faults(STATEMENTS["take"].replace(right, wrong)) != []


def test_all_of_pythons_statements_are_here() -> None:
    """What the engine yields is one of the texts above: no statement escapes the parser."""
    lock = mssql.AppLock(Wish(dblock.key("O'Brien", "b"), "O'Brien", "b", "T1 'x' --"))
    assert next(lock.open(Conditions())) == STATEMENTS["prepare"]
    assert next(lock.acquire(0, print)) == STATEMENTS["take"]
    assert next(lock.release(Granted(b"\x01\xff"))) == STATEMENTS["release"]
    assert next(lock.check()) == STATEMENTS["mode"]
