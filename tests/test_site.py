"""The documentation as a site, without a warning; and what its pages, and the README, tell to be typed, typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.backends import Postgres
from tests.doors import SQL

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


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def pages(language: str) -> list[Path]:
    # The others are run by test_docs.py, in settings of their own.
    own = {"fencing.md", "integrations.md", "octopus.md", "watching.md"}
    found = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if page.name not in own]
    return [page for page in found if blocks(page, language)]


def real(text: str, url: str) -> str:
    parts = urlsplit(url)
    return text.replace(PLACEHOLDER, f"://{parts.netloc}{parts.path}")


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "docs", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ("dblock.lock", "dblock.alock", "dblock.Lock.check", "dblock.errors.LockLost", "dblock.octopus.lock"):
        assert f'id="{name}"' in api


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
