"""What `import dblock` brings: no driver and nothing slow, and a public face that is complete and documented."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dblock
from dblock import errors

NOT_IMPORTED = ("psycopg", "pymssql", "sqlalchemy", "rich", "asyncio")
PUBLIC = [getattr(dblock, name) for name in dblock.__all__]
CLASSES = [each for each in PUBLIC if isinstance(each, type)]


def python(code: str, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_import_is_light() -> None:
    assert python("import dblock, sys; print(*[name for name in sys.modules if 'dblock' in name])") == "dblock\n"


@pytest.mark.parametrize("db", ["postgresql://127.0.0.1:1/d", "mssql+pymssql://127.0.0.1:1/d"])
def test_a_lock_is_made_without_anything_slow(db: str) -> None:
    made = f"import dblock, sys; dblock.lock({db!r}, target='web-01', step='b'); print(*sys.modules)"
    imported = python(made).split()
    assert "dblock.life" in imported
    assert [name for name in imported if name.partition(".")[0] in NOT_IMPORTED] == []


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(AttributeError, match="module 'dblock' has no attribute 'look'"):
        _ = dblock.look  # type: ignore[attr-defined]


def test_import_needs_nothing_but_the_interpreter(tmp_path: Path) -> None:
    """With no site-packages at all: there are no dependencies, and making a lock imports no driver yet."""
    (tmp_path / "dblock").symlink_to(Path(dblock.__file__).parent)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import dblock
lock = dblock.lock("postgresql://127.0.0.1:1/d", target="web-01", step="b")
print(lock.key.value)
try:
    lock.acquire()
except dblock.DatabaseError as error:
    print(error)
"""
    key, said = python(code, "-I", "-S").splitlines()
    assert int(key) == dblock.key("web-01", "b").value
    assert said.startswith("b@web-01 not acquired: the driver psycopg cannot be imported")
    assert said.endswith("pip install 'dblock[postgres]'")


def test_a_driver_whose_import_was_broken_off_once(url: str) -> None:
    """The soak met it: a module that is imported already is no attribute of a package that is imported anew."""
    code = f"""
import psycopg
del psycopg.errors
from dblock.connect import connect
from dblock.errors import DatabaseError
try:
    connect({url!r}).rows("SELECT 1 / 0")
except DatabaseError as error:
    print(error.sqlstate)
"""
    assert python(code) == "22012\n"


def test_all_is_what_there_is() -> None:
    assert dblock.__all__ == sorted(dblock.__all__)
    assert set(dblock.__all__) <= set(dir(dblock))
    listed = python("from dblock import *; print(*sorted(name for name in vars() if name[0] != '_'))").split()
    assert listed == dblock.__all__


def test_every_error_is_public() -> None:
    defined = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, dblock.Error)}
    assert defined == {each for each in CLASSES if issubclass(each, Exception)}
    assert issubclass(dblock.LockTimeout, TimeoutError)


@pytest.mark.parametrize("each", PUBLIC, ids=lambda each: each.__name__)
def test_everything_public_is_documented(each: type) -> None:
    assert vars(each).get("__doc__") or each.__doc__
    undocumented = [
        name
        for name, member in (vars(each).items() if isinstance(each, type) else ())
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
        if not member.__doc__
    ]
    assert undocumented == []


@pytest.mark.parametrize(
    "function", [dblock.lock, dblock.key, dblock.Lock.acquire], ids=lambda function: function.__qualname__
)
def test_every_parameter_is_documented(function: object) -> None:
    assert callable(function)
    described = re.findall(r"^    (\w+): ", inspect.getdoc(function) or "", re.MULTILINE)
    for parameter in inspect.signature(function).parameters:
        assert parameter == "self" or parameter in described
