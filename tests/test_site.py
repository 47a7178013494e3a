"""The documentation as a site, without a warning; and what its pages, and the README, tell to be typed, typed.

Every block of a page is run by a test, or stands in ``ELSEWHERE`` with what is done about it instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import dblock
from benchmarks.__main__ import PINS
from tests.backends import Postgres, SqlServer
from tests.doors import _PYMSSQL as BATCHES
from tests.doors import SQL, TSQL

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PLACEHOLDER = "://deploy@db/app"  # in a URL of whatever driver

# What stands around a page's Python: the step's work, and an agent's variables.
PRELUDE = """
import psycopg

url = {url!r}
octopusvariables = {{"Octopus.Machine.Name": "web-01"}}

def migrate():
    print("migrated")

"""


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# The blocks of these pages are run by test_docs.py, in settings of their own. It takes a page's blocks apart by their
# number: one more is noticed.
IN_SETTINGS = {
    "contract.md": {"console", "sql"},
    "fencing.md": {"python", "sql"},
    "integrations.md": {"crontab", "groovy", "python", "sh", "sql", "yaml"},
    "octopus.md": {"bash", "python"},
    "watching.md": {"sh", "sql"},
}
BY_SPHINX = {"{eval-rst}", "{toctree}"}
ELSEWHERE = {
    "README.md: make demo": "the targets of make are looked up below; test_demo.py",
    "README.md: dblock: b@web-01 not acquired": "compared with the real one below",
    "CONTRIBUTING.md: make test": "the targets of make are looked up below",
    "CONTRIBUTING.md: DBLOCK_TEST_ROUNDS=3000": "half an hour; its files are looked up below",
    "CONTRIBUTING.md: blocking.py, aio.py": "a drawing; test_layers.py",
    "CONTRIBUTING.md: events.py": "a drawing; test_layers.py",
    "command-line.md: dblock run --target web-01 --step b --tenant T1 --timeout 10m -- powershell": (
        "needs Windows; the same in the one that tests/windows.py makes: test_windows_run.py"
    ),
    "contract.md: SHA-256( target in UTF-8": "a formula; test_names.py",
    "contract.md: SHA-256( target, the byte 1F, step": "a formula; test_names.py",
    "contract.md: dblock1 1795526014 T1": "read by test_docs.py",
    "integrations.md: Set-Content run.sql": "needs PowerShell and sqlcmd; the scripts by fisql: test_doors.py",
    "octopus.md: Another deployment has the lock": "what the step of the page says: test_docs.py",
    "soak.md: make soak": "the targets of make are looked up below; test_soak.py",
    "speed.md: make bench": "the targets of make are looked up below",
}


def fenced(page: Path) -> list[tuple[str, str]]:
    """The blocks between fences: language and text."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def indented(page: Path) -> list[str]:
    without_fenced = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"(?<=\n\n)(?: {4}.*\n)+", without_fenced)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in fenced(page) if found == language]


def pages(language: str) -> list[Path]:
    return [page for page in PAGES if language not in IN_SETTINGS.get(page.name, ()) and blocks(page, language)]


def test_every_block_is_run_or_accounted_for() -> None:
    run_by_language = {"python", "sh", "tsql"} | BY_SPHINX
    others = [
        f"{page.name}: {text.strip()}"
        for page in PAGES
        for language, text in [*fenced(page), *(("", text) for text in indented(page))]
        if language not in run_by_language | IN_SETTINGS.get(page.name, set())
    ]
    unaccounted = [block for block in others if not block.startswith(tuple(ELSEWHERE))]
    assert unaccounted == []
    assert [known for known in ELSEWHERE if not any(block.startswith(known) for block in others)] == []


def test_what_is_said_of_make_and_of_files() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"(?:^    |`)make ([a-z]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"
        for path in re.findall(r"\b(?:tests|benchmarks|octopus|sql|docs)/[a-z][\w-]*(?:/[a-z][\w-]*)*\.\w+", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def real(text: str, url: str) -> str:
    parts = urlsplit(url)
    return text.replace(PLACEHOLDER, f"://{parts.netloc}{parts.path}")


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "docs", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in (*dblock.__all__, "Lock.check", "Lock.lost", "AsyncLock.acquire", "octopus.lock"):
        assert f'id="dblock.{name}"' in api


def test_the_comparison_is_of_what_make_bench_measures() -> None:
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    pins = [pin for pins in PINS.values() for pin in pins if "==" in pin]
    assert pins
    for pin in pins:
        assert f"| {pin.replace('==', ' ')} |" in page


def outcomes(page: str) -> dict[str, list[str]]:
    """The codes of each outcome, as the page's table has them: exit code, SQLSTATE, number in T-SQL."""
    table = re.findall(r"^\|(.*)\|$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)
    rows = [[cell.strip() for cell in row.split("|")] for row in table if re.search(r"\| (5100\d|76) ?\|", f"|{row}|")]
    first = next(i for i, cell in enumerate(rows[0]) if "`" in cell)
    return {row[first].split("`")[1]: row[first + 1 : first + 4] for row in rows}


def test_the_failures_have_the_contracts_codes() -> None:
    contracts, told = outcomes("contract.md"), outcomes("failures.md")
    contracts.pop("LockLost"), told.pop("LockLost")
    contracts.pop("DatabaseError"), told.pop("DatabaseError", None)
    assert told == contracts


def test_the_message_of_the_readme(postgres: Postgres) -> None:
    (told,) = (text for text in indented(ROOT / "README.md") if "not acquired" in text)
    command = ["dblock", "run", "--target", "web-01", "--step", "b", "--timeout", "0.1", "--", "true"]
    with dblock.lock(postgres.url, target="web-01", step="b", tenant="T1"):
        done = subprocess.run(
            [sys.executable, "-m", *command], env=os.environ | {"DBLOCK_URL": postgres.url},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 75
    varying = re.compile(r"[\d.]+(?= s:)|(?<=pid )\d+|(?<=host )[\w.-]+|\d\d:\d\d:\d\d|; \d+ ahead")
    assert varying.sub("", done.stderr.splitlines()[-1]) == varying.sub("", told.strip())


def test_the_wishes_on_sql_server(mssql: SqlServer) -> None:
    wishes = {text for page in ("README.md", "docs/sql.md") for text in blocks(ROOT / page, "tsql")}
    (wish,) = wishes
    done = subprocess.run(
        [sys.executable, "-c", BATCHES, wish, str(TSQL / "acquire.sql"), str(TSQL / "release.sql"), "session"],
        stdin=subprocess.DEVNULL, env=os.environ | {"DBLOCK_TEST_URL": mssql.url},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "held\n"), done.stderr


@pytest.mark.parametrize("page", pages("python"), ids=lambda page: page.stem)
def test_the_python_of_a_page(postgres: Postgres, tmp_path: Path, page: Path) -> None:
    script = tmp_path / "page.py"
    code = "\n".join(blocks(page, "python"))
    script.write_text(PRELUDE.format(url=postgres.url) + real(code, postgres.url), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("migrated") == len(re.findall(r"^\s+migrate\(\)|to_thread\(migrate\)", code, re.MULTILINE))
    assert postgres.all_rows() == []


@pytest.mark.parametrize("page", pages("sh"), ids=lambda page: page.stem)
def test_the_shell_lines_of_a_page(postgres: Postgres, tmp_path: Path, page: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    programs = {tools / "pip": "exit 0", tmp_path / "migrate.sh": "echo migrated"}  # to install is the wheel's test
    for path, does in programs.items():
        path.write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
        path.chmod(0o755)
    for name in ("acquire", "release"):
        (tmp_path / f"{name}.sql").write_text((SQL / f"{name}.sql").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "b.sql").write_text("SELECT 'migrated';\n", encoding="utf-8")
    lines = "\n".join(blocks(page, "sh"))
    env = os.environ | {"PATH": f"{tools}:{BIN}:{os.environ['PATH']}", "DBLOCK_URL": postgres.url}
    done = subprocess.run(
        ["bash", "-eu"], input=real(lines, postgres.url), cwd=tmp_path, env=env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("migrated") == lines.count("./migrate.sh") + lines.count("-f b.sql")
    assert postgres.all_rows() == []
