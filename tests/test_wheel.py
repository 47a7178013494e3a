"""What is installed from an index: the wheel, built by way of the sdist, in an empty environment with each extra alone.

On the oldest and the newest supported Python of this machine; the others are the workflow's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OLDEST, NEWEST = (3, 10), (3, 14)
DRIVERS = {"postgres": "psycopg", "mssql": "pymssql", "sqlalchemy": "sqlalchemy", "cli": "rich"}
EXTRAS = {
    "": set(),
    "[postgres]": {"psycopg"},
    "[mssql]": {"pymssql"},
    "[sqlalchemy]": {"sqlalchemy"},
    "[cli]": {"rich"},
    "[demo]": {"psycopg", "rich"},
}  # fmt: skip
URLS = {"psycopg": "postgresql://127.0.0.1:1/d", "pymssql": "mssql+pymssql://u@127.0.0.1:1/d"}

pytestmark = [pytest.mark.xdist_group("wheel"), pytest.mark.timeout(300)]


def pythons() -> list[str]:
    """The interpreters of the oldest and of the newest version; one, if there is no other than this."""
    found = {sys.version_info[:2]: sys.executable}
    beside = Path(sys.base_prefix).parent.glob("*/bin/python3")  # where a version manager keeps them
    named = (shutil.which(f"python3.{minor}") for minor in range(OLDEST[1], NEWEST[1] + 1))
    for each in [*map(str, beside), *filter(None, named)]:
        asked = subprocess.run(
            [each, "-c", "import sys, venv; print(*sys.version_info[:2])"], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            major, minor = map(int, asked.stdout.split())
            if OLDEST <= (major, minor) <= NEWEST:
                found[major, minor] = each
    return list(dict.fromkeys([found[min(found)], found[max(found)]]))


def run(*command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == code, done.stdout + done.stderr
    return done


@cache
def built(folder: Path) -> Path:
    """The wheel, by way of the sdist; or, for a release, the one in DBLOCK_TEST_DIST that is to be uploaded."""
    if "DBLOCK_TEST_DIST" in os.environ:
        folder = ROOT / os.environ["DBLOCK_TEST_DIST"]
    else:
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.getbasetemp() / "dist")


class Environment:
    """An empty environment with the wheel and one extra."""

    def __init__(self, python: str, folder: Path, wheel: Path, extra: str) -> None:
        run(python, "-m", "venv", "--without-pip", folder)
        self.bin = folder / ("Scripts" if sys.platform == "win32" else "bin")
        pip = (sys.executable, "-m", "pip", "--python", self.bin / "python")
        run(*pip, "install", "--quiet", "--no-compile", f"{wheel}{extra}")

    def python(self, text: str) -> str:
        return run(self.bin / "python", "-I", "-c", text).stdout

    def dblock(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return run(self.bin / "dblock", *arguments, code=code)


@pytest.mark.parametrize("python", pythons(), ids=lambda path: run(path, "-V").stdout.split()[1])
@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: extra.strip("[]") or "none")
def test_installed_with_one_extra(wheel: Path, tmp_path: Path, python: str, extra: str) -> None:
    installed = Environment(python, tmp_path / "env", wheel, extra)
    assert f" {version('dblock')}\n" in installed.dblock("--version").stdout
    assert installed.dblock("key", "--target", "web-01", "--step", "b").stdout.split()[1] == "3736245238665493732"
    assert installed.dblock("sql", "mssql/key").stdout == (ROOT / "sql/mssql/key.sql").read_text(encoding="utf-8")
    there = f"from importlib.util import find_spec; print(*[n for n in {[*DRIVERS.values()]!r} if find_spec(n)])"
    assert set(installed.python(there).split()) == EXTRAS[extra]
    extra_of = {module: name for name, module in DRIVERS.items()}
    for module, url in URLS.items():
        done = installed.dblock("run", "--target", "t", "--step", "s", "--url", url, "--", "true", code=69)
        advice = f"pip install 'dblock[{extra_of[module]}]'"
        assert (advice in done.stderr) == (module not in EXTRAS[extra])
        assert done.stderr.count("\n") == 1


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        scripts = {name: archive.read(name) for name in names if name.endswith(".sql")}
    # Also what no import asks for: on the way through the sdist nothing was lost.
    assert {name for name in names if name.startswith("dblock/") and not name.startswith("dblock/sql/")} == {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dblock").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert "dblock/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dblock"}
    assert scripts == {
        f"dblock/{path.relative_to(ROOT).as_posix()}": path.read_bytes() for path in (ROOT / "sql").rglob("*.sql")
    }
