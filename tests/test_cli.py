"""The command line as such: what it refuses, what it prints, and that no mistake shows a password."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dblock
from dblock.cli import COMMANDS

DBLOCK = (sys.executable, "-m", "dblock")
VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("key-vectors.json").read_text("utf-8"))
NAMES = ("--target", "web-01", "--step", "b")
# Nobody listens there: whoever gets as far as connecting exits with 69, and so was not refused before.
NOWHERE = "postgresql://somebody@127.0.0.1:1/nothing"


def dblock_command(*arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line without any of dblock's variables but those given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DBLOCK_")}
    return subprocess.run(
        [*DBLOCK, *arguments], env=inherited | environment, capture_output=True, timeout=60, check=False
    )


def complaint(result: subprocess.CompletedProcess[bytes]) -> str:
    """The one line on stderr."""
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith("dblock: ")
    return line


@pytest.mark.parametrize("vector", VECTORS["keys"], ids=lambda v: f"{v['target']!a:.20}-{v['step']!a:.20}")
def test_key_of_each_vector(vector: dict[str, Any]) -> None:
    result = dblock_command("key", f"--target={vector['target']}", f"--step={vector['step']}", "--json")
    assert (result.returncode, result.stderr) == (0, b"")
    computed = dblock.key(vector["target"], vector["step"])
    assert json.loads(result.stdout) == {
        "target": vector["target"],
        "step": vector["step"],
        "key": vector["key"],
        "postgres": {
            "classid": computed.postgres.classid,
            "objid": computed.postgres.objid,
            "objsubid": 1,
        },
        "mssql": f"dblock:{vector['key']}",
    }


def test_key_in_lines_and_from_the_environment() -> None:
    result = dblock_command("key", DBLOCK_TARGET="web-01", DBLOCK_STEP="b")
    assert result.returncode == 0
    assert result.stdout.decode().splitlines() == [
        "key       3736245238665493732",
        "postgres  classid 869912383, objid 3295067364, objsubid 1",
        "mssql     dblock:3736245238665493732",
    ]


def test_key_needs_no_driver(tmp_path: Path) -> None:
    (tmp_path / "psycopg.py").write_text("raise ImportError('not here')")
    result = dblock_command("key", *NAMES, PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stderr) == (0, b"")
    result = dblock_command("run", *NAMES, "--url", NOWHERE, "--", "true", PYTHONPATH=str(tmp_path))
    assert result.returncode == 69
    assert "dblock[postgres]" in complaint(result)


# A NUL cannot stand in an argument. Neither can a lone surrogate: what is no UTF-8 reaches Python as one.
REFUSED = [v for v in VECTORS["refused"] if "\0" not in v["target"] + v["step"]]


@pytest.mark.parametrize("command", ["key", "run"])
@pytest.mark.parametrize("vector", REFUSED, ids=lambda v: f"{v['why']}-{v['target']!a:.12}-{v['step']!a:.12}")
def test_refused_names(command: str, vector: dict[str, str]) -> None:
    target, step = (vector[name].encode("utf-8", "surrogatepass") for name in ("target", "step"))
    rest = ("--url", NOWHERE, "--", "true") if command == "run" else ()
    result = dblock_command(command, b"--target=" + target, b"--step=" + step, *rest)
    assert (result.returncode, result.stdout) == (64, b"")
    assert ("target" if vector["step"] == "b" else "step") in complaint(result)


USAGE = {
    "no command at all": ((), "must be a command"),
    "an unknown command": (("lock",), "run, status, doctor, force-release, timeline, key, sql, demo"),
    "an option before the command": (("--json", "key"), "must be a command"),
    "an unknown option": (("key", *NAMES, "--colour=red"), "--colour"),
    "an abbreviated option": (("key", "--targ", "web-01", "--step", "b"), "--targ"),
    "an argument too many": (("key", *NAMES, "more"), "argument too many"),
    "an option without its value": (("key", "--target"), "--target"),
    "a value for a switch": (("key", *NAMES, "--json=yes"), "--json"),
    "no target": (("key", "--step", "b"), "--target is missing"),
    "a command for dblock key": (("key", *NAMES, "--", "true"), "only dblock run"),
    "no -- before the command": (("run", *NAMES, "--url", NOWHERE, "true"), "argument too many"),
    "nothing after --": (("run", *NAMES, "--url", NOWHERE, "--"), "no command"),
    "an empty command": (("run", *NAMES, "--url", NOWHERE, "--", ""), "no command"),
    "no -- at all": (("run", *NAMES, "--url", NOWHERE), "no command"),
    "no database": (("run", *NAMES, "--", "true"), "DBLOCK_URL"),
    "an empty url": (("run", *NAMES, "--url=", "--", "true"), "--url is empty"),
    "an empty tenant": (("run", *NAMES, "--url", NOWHERE, "--tenant=", "--", "true"), "--tenant is empty"),
    "an empty timeout": (("run", *NAMES, "--url", NOWHERE, "--timeout=", "--", "true"), "--timeout is empty"),
    "another kind of database": (("run", *NAMES, "--url", "mysql://h/d", "--", "true"), "mysql://"),
    "an exit code too large": (("run", *NAMES, "--url", NOWHERE, "--conflict-exit-code=256", "--", "true"), "255"),
    "an exit code below 0": (("run", *NAMES, "--url", NOWHERE, "--conflict-exit-code=-1", "--", "true"), "255"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors(case: str) -> None:
    arguments, said = USAGE[case]
    result = dblock_command(*arguments)
    assert (result.returncode, result.stdout) == (64, b"")
    assert said in complaint(result)


@pytest.mark.parametrize(
    "timeout",
    [
        "-1",
        "2147484",
        "600h",
        "5x",
        "1e3",
        "nan",
        "inf",
        "5\n",
        " 5",
        "1.",
        ".5",
        "0.0001",
        "5 s",
        "5S",
        "٣",
        "12345678",
    ],
)
def test_refused_durations(timeout: str) -> None:
    for environment, option in (({}, [f"--timeout={timeout}"]), ({"DBLOCK_TIMEOUT": timeout}, [])):
        result = dblock_command("run", *NAMES, "--url", NOWHERE, *option, "--", "true", **environment)
        assert result.returncode == 64
        complaint(result)


@pytest.mark.parametrize("timeout", ["0", "600", "600s", "10m", "1.5s", "596h", "250ms", "2147483", "2147483000ms"])
def test_durations(timeout: str) -> None:
    result = dblock_command("run", *NAMES, "--url", NOWHERE, f"--timeout={timeout}", "--", "true")
    assert result.returncode == 69
    assert "cannot connect" in complaint(result)


def test_empty_variables_count_as_absent() -> None:
    empty = dict.fromkeys(("DBLOCK_TENANT", "DBLOCK_TIMEOUT", "DBLOCK_DATABASE"), "")
    assert dblock_command("run", *NAMES, "--url", NOWHERE, "--", "true", **empty).returncode == 69
    result = dblock_command("run", "--step", "b", "--", "true", DBLOCK_TARGET="", DBLOCK_URL=NOWHERE)
    assert result.returncode == 64
    assert "--target is missing" in complaint(result)


SECRET = "s3cr3t-Pw"  # noqa: S105 - opens nothing
SECRETIVE = {
    "a password in the user's part": f"postgresql://u:{SECRET}@127.0.0.1:1/d",
    "the short scheme": f"postgres://u:{SECRET}@127.0.0.1:1/d",
    "SQLAlchemy's scheme": f"postgresql+psycopg://u:{SECRET}@127.0.0.1:1/d",
    "capitals": f"POSTGRESQL://u:{SECRET}@127.0.0.1:1/d",
    "a password in the query": f"postgresql://127.0.0.1:1/d?password={SECRET}",
    "a password in a conninfo string": f"host=127.0.0.1 port=1 password={SECRET}",
    "quoted there": f"host=127.0.0.1 port=1 password = '{SECRET}'",
    "the password of a key file": f"postgresql://127.0.0.1:1/d?sslpassword={SECRET}",
    "not readable": f"postgresql://u:{SECRET}%zz@127.0.0.1:1/d",
    "the wrong kind of database": f"mysql://u:{SECRET}@127.0.0.1:1/d",
}


@pytest.mark.parametrize("case", SECRETIVE)
def test_a_password_in_url_is_refused_and_not_shown(case: str) -> None:
    result = dblock_command("run", *NAMES, "--url", SECRETIVE[case], "--", "true")
    assert result.returncode == 64
    assert SECRET not in complaint(result)
    if case not in ("not readable", "the wrong kind of database"):
        assert "DBLOCK_URL" in complaint(result)
        assert "passfile" in complaint(result)


@pytest.mark.parametrize("case", SECRETIVE)
def test_a_password_in_the_wrong_place_is_not_shown(case: str) -> None:
    url = SECRETIVE[case]
    for arguments in ((url,), (url, "run"), ("run", url), ("run", "--ur", url), ("run", f"--ur={url}"), ("key", url)):
        result = dblock_command(*arguments)
        assert result.returncode == 64
        assert SECRET not in complaint(result)


@pytest.mark.parametrize(
    "case", [case for case in SECRETIVE if case not in ("not readable", "the wrong kind of database")]
)
def test_a_password_in_the_environment_is_used_and_not_shown(case: str) -> None:
    result = dblock_command("run", *NAMES, "--", "true", DBLOCK_URL=SECRETIVE[case])
    assert result.returncode == 69
    assert SECRET not in complaint(result)


def test_a_url_that_only_names_a_password_file_is_no_secret(tmp_path: Path) -> None:
    result = dblock_command(
        "run", *NAMES, "--url", f"postgresql://u@127.0.0.1:1/d?passfile={tmp_path}/passwords", "--", "true"
    )
    assert result.returncode == 69


def test_version_and_help() -> None:
    version = dblock_command("--version")
    assert version.returncode == 0
    assert version.stdout.startswith(b"dblock ")
    overview = dblock_command("--help")
    assert overview.returncode == 0, overview.stderr
    for command in COMMANDS:
        assert command in overview.stdout.decode()
        described = dblock_command(command, "--help")
        assert (described.returncode, described.stderr) == (0, b"")
        assert f"usage: dblock {command}" in described.stdout.decode()


def test_run_starts_without_what_the_other_commands_need() -> None:
    code = "import sys; from dblock.cli import main; code = main(sys.argv[1:]); print(code, *sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code, "run", *NAMES, "--", "true"],
        env={name: value for name, value in os.environ.items() if not name.startswith("DBLOCK_")},
        capture_output=True,
        check=False,
    )
    exit_code, *modules = result.stdout.decode().split()
    assert exit_code == "64"
    assert "dblock.cli.run" in modules
    assert not {"psycopg", "rich", "dblock.cli.demo", "dblock.cli.status", "dblock.cli.key"} & set(modules)


def test_sql_prints_scripts_byte_for_byte() -> None:
    scripts = sorted((Path(__file__).parent.parent / "sql").glob("*/*.sql"))
    names = [f"{script.parent.name}/{script.stem}" for script in scripts]
    listed = dblock_command("sql")
    assert listed.returncode == 0, listed.stderr
    assert sorted(listed.stdout.decode().split()) == names
    assert "postgres/acquire" in names
    for name, script in zip(names, scripts, strict=True):
        printed = dblock_command("sql", name)
        assert (printed.returncode, printed.stdout) == (0, script.read_bytes())
    unknown = dblock_command("sql", "postgres/steal")
    assert unknown.returncode == 64
    assert "postgres/acquire" in complaint(unknown)


def test_output_that_nobody_reads() -> None:
    # The reader's end is closed before anything is written.
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([*DBLOCK, "key", *NAMES], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (process.returncode, process.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the device on which no write succeeds")
def test_output_that_cannot_be_written() -> None:
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run([*DBLOCK, "key", *NAMES], stdout=full, stderr=subprocess.PIPE, check=False)
    assert process.returncode == 70
    assert process.stderr.startswith(b"dblock: ")
    assert b"No space left on device" in process.stderr


def test_stderr_that_nobody_reads_does_not_change_the_exit_code() -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([*DBLOCK, "key"], stderr=write, check=False)
    os.close(write)
    assert process.returncode == 64


def test_an_unexpected_error_is_one_line_too(tmp_path: Path) -> None:
    # A driver that is broken in a way nobody foresaw.
    (tmp_path / "psycopg.py").write_text("raise RuntimeError('broken\\nin two lines')")
    result = dblock_command("run", *NAMES, "--", "true", PYTHONPATH=str(tmp_path), DBLOCK_URL=NOWHERE)
    assert result.returncode == 70
    assert "unexpected RuntimeError: broken in two lines" in complaint(result)
