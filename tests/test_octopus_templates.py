"""The step templates for Octopus Deploy: their form, and their bash scripts as steps on a real server.

No PowerShell is to be had for these tests: a grammar reads the scripts of its two templates here, and the T-SQL that
one of them sends is tested with the raw scripts. That they run in an agent's PowerShell, and SQL Server's module with
them, only those can prove.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import tree_sitter
import tree_sitter_powershell

import dblock
from octopus.pack import TEMPLATES, packed
from tests.backends import Postgres
from tests.octopus import Done, Step, bash_step
from tests.support import wait_until

CONTENT: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in TEMPLATES}
EACH = pytest.mark.parametrize("name", CONTENT)
MEMBERS = {
    "Id", "Name", "Description", "ActionType", "Version", "CommunityActionTemplateId", "Packages", "Properties",
    "Parameters", "StepPackageId", "$Meta", "LastModifiedBy", "Category",
}  # fmt: skip
PARAMETER_MEMBERS = {"Id", "Name", "Label", "HelpText", "DefaultValue", "DisplaySettings"}
PASSWORD = "Pl4nted+secret"  # noqa: S105 - planted, to be looked for


def body(name: str) -> str:
    return str(CONTENT[name]["Properties"]["Octopus.Action.Script.ScriptBody"])


# --- the form ---------------------------------------------------------------------------------------------------------


def test_there_is_one_for_each_way() -> None:
    assert set(CONTENT) == {"run-bash", "run-powershell", "postgresql", "sql-server"}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_no_template_is_older_than_its_parts(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == packed(path), "run make templates"


@EACH
def test_octopus_knows_its_form(name: str) -> None:
    template = CONTENT[name]
    assert set(template) == MEMBERS
    assert template["ActionType"] == template["StepPackageId"] == "Octopus.Script"
    assert template["$Meta"]["Type"] == "ActionTemplate"
    assert isinstance(template["Version"], int)
    assert template["Properties"]["Octopus.Action.Script.ScriptSource"] == "Inline"
    assert template["Properties"]["Octopus.Action.Script.Syntax"] in ("Bash", "PowerShell")
    for parameter in template["Parameters"]:
        assert set(parameter) == PARAMETER_MEMBERS
        assert re.fullmatch(r"Dblock\.[A-Z][a-z]+", parameter["Name"])
        assert parameter["Label"]


def test_ids_are_everyones_own() -> None:
    ids = [uuid.UUID(each["Id"]) for t in CONTENT.values() for each in (t, *t["Parameters"])]
    assert len(set(ids)) == len(ids)


@EACH
def test_its_script_asks_for_each_parameter_and_no_other(name: str) -> None:
    text = body(name)
    if "dblock acquire" in text:  # of the raw scripts it asks nothing
        text = re.sub(r"/\*.*?^\*/", "", text, flags=re.DOTALL | re.MULTILINE)
    asked = set(re.findall(r"[pP]arameter ['\"]?([A-Z][a-z]+)", text))
    for words in re.findall(r"for(?:each)? \(?\$?name in ([^;){]*)", text):
        asked |= {word for word in re.findall(r"[A-Za-z.]+", words) if "." not in word}
    names = [each["Name"].removeprefix("Dblock.") for each in CONTENT[name]["Parameters"]]
    assert asked == set(names)
    assert len(set(names)) == len(names)


@EACH
def test_secrets_are_sensitive_and_names_come_from_the_step(name: str) -> None:
    parameters = {each["Name"]: each for each in CONTENT[name]["Parameters"]}
    for secret in {"Dblock.Url", "Dblock.Password"} & set(parameters):
        assert parameters[secret]["DisplaySettings"] == {"Octopus.ControlType": "Sensitive"}
    assert {"Dblock.Url", "Dblock.Password"} & set(parameters)
    assert parameters["Dblock.Target"]["DefaultValue"] == "#{Octopus.Machine.Name}"
    tenant = "Octopus.Deployment.Tenant.Name"
    assert parameters["Dblock.Tenant"]["DefaultValue"] == f"#{{if {tenant}}}#{{{tenant}}}#{{/if}}"
    assert parameters["Dblock.Step"]["DefaultValue"] == ""


@EACH
def test_octopus_finds_no_variable_in_its_script(name: str) -> None:
    """It replaces ``#{…}`` there, before the script runs."""
    assert "#{" not in body(name)


def test_a_here_string_ends_where_it_should() -> None:
    for script in ("acquire", "release"):
        text = (TEMPLATES[0].parent.parent / "sql" / "mssql" / f"{script}.sql").read_text(encoding="utf-8")
        assert not re.search(r"^'@", text, re.MULTILINE)
        assert text in body("sql-server")
    assert body("sql-server").count("\n'@\n") == body("sql-server").count("= @'\n") == 2


@pytest.mark.parametrize("name", ["run-bash", "postgresql"])
def test_bash_can_read_it(name: str) -> None:
    subprocess.run(["bash", "-n"], input=body(name), text=True, check=True)


@pytest.mark.parametrize("name", ["run-powershell", "sql-server"])
def test_a_grammar_of_powershell_can_read_it(name: str) -> None:
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_powershell.language()))
    assert not parser.parse(body(name).encode()).root_node.has_error
    slip = body(name).replace(") {", " {", 1)
    assert parser.parse(slip.encode()).root_node.has_error


def test_nothing_given_lets_the_driver_of_sql_server_connect_anew() -> None:
    """In another session the rest of the step would run without the lock."""
    parts = re.findall(r"^\$connection = @\((.*?)^\) -join ';'$", body("sql-server"), re.MULTILINE | re.DOTALL)
    assert parts[0].split("\n")[-3:-1] == ["    Parameter 'Options'", "    'ConnectRetryCount=0;Pooling=False'"]


def test_a_script_of_powershell_runs_as_octopus_runs_it() -> None:
    """That stops at the first error, and takes the last program's exit code; a plain -File would do neither."""
    (run,) = re.findall(r"^\$run = '(.*)'$", body("run-powershell"), re.MULTILINE)
    stops, runs, ends = run.replace("''", "'").split("; ", 2)
    assert stops == "$ErrorActionPreference = 'Stop'"
    assert runs == ". $env:DBLOCK_SCRIPT"
    assert ends == "if (Test-Path variable:global:LASTEXITCODE) { exit $LASTEXITCODE }"


# --- the bash scripts, as steps ---------------------------------------------------------------------------------------


@pytest.fixture
def role(postgres: Postgres) -> Iterator[str]:
    """A login with a password that would be seen if it were shown."""
    with psycopg.connect(postgres.url, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE octopus LOGIN PASSWORD '{PASSWORD}'")
        yield "octopus"
        admin.execute("DROP ROLE octopus")


class Deployment:
    """Runs a template's step for one tenant."""

    def __init__(self, url: str, folder: Path, role: str) -> None:
        self._parts, self._folder, self._role = urlsplit(url), folder, role
        self._number = 0

    def start(self, name: str, script: str, environment: Mapping[str, str] | None = None, **more: str) -> Step:
        parts = self._parts
        server = f"{parts.hostname}:{parts.port}{parts.path}"
        given = {
            "Target": "web-01", "Step": "b", "Tenant": "T2", "Timeout": "", "Slots": "", "Script": script,
            "Url": f"postgresql://{self._role}:{PASSWORD.replace('+', '%2B')}@{server}",
            "Host": parts.hostname or "", "Port": str(parts.port), "Database": parts.path[1:],
            "User": self._role, "Password": PASSWORD,
        } | more  # fmt: skip
        wanted = {each["Name"].removeprefix("Dblock.") for each in CONTENT[name]["Parameters"]}
        variables = {f"Dblock.{key}": value for key, value in given.items() if key in wanted}
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        command = bash_step(folder, body(name), variables | {"Octopus.Deployment.Id": "Deployments-7"})
        return Step(folder, command, **(environment or {}))

    def run(self, name: str, script: str, environment: Mapping[str, str] | None = None, **more: str) -> Done:
        return self.start(name, script, environment, **more).finish()


@pytest.fixture
def deployment(postgres: Postgres, tmp_path: Path, role: str) -> Deployment:
    return Deployment(postgres.url, tmp_path, role)


INSIDE = {"run-bash": "echo it has run", "postgresql": r"SELECT 'it has run' \g (format=unaligned tuples_only=on)"}
LASTING = {"run-bash": "sleep 60", "postgresql": "SELECT pg_sleep(60);"}
BASH = pytest.mark.parametrize("name", INSIDE)


@BASH
def test_it_runs_under_the_lock(postgres: Postgres, deployment: Deployment, name: str) -> None:
    with dblock.lock(postgres.url, target="web-01", step="b", tenant="T1"):
        step = deployment.start(name, INSIDE[name])
        wait_until(lambda: "waiting for b@web-01: held by tenant T1" in step.output(), "it to say that it waits")
        assert "it has run" not in step.output()
    done = step.finish()
    assert (done.code, done.stderr) == (0, "")
    assert "it has run" in done.log.at("default")
    assert any("waiting for b@web-01" in line for line in done.log.at("wait"))
    assert postgres.all_rows() == []


@BASH
def test_others_wait_for_it_and_a_cancelled_task_leaves_nothing_in_their_way(
    postgres: Postgres, deployment: Deployment, name: str
) -> None:
    """Octopus kills all processes of a cancelled task at once, and none of them can act upon that."""
    step = deployment.start(name, LASTING[name])
    wait_until(postgres.holders, "the holder")
    other = dblock.lock(postgres.url, target="web-01", step="b", tenant="T1")
    assert not other.acquire(timeout=0)
    for pid in descendants(step.process.pid):
        with suppress(ProcessLookupError):  # it has ended with its parent
            os.kill(pid, signal.SIGKILL)
    assert other.acquire(timeout=30)
    other.release()
    assert step.finish().code == -signal.SIGKILL
    assert deployment.run(name, INSIDE[name], Timeout="0").code == 0


def descendants(ancestor: int) -> list[int]:
    """The process and all that it has started, parents first."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in map(str.split, listed.splitlines())}
    found = [ancestor]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


@BASH
def test_what_fails_inside_fails_the_step(deployment: Deployment, name: str) -> None:
    failing = {
        "run-bash": "echo before; exit 7; echo after",
        "postgresql": "\\echo before\nSELECT 1/0;\n\\echo after",
    }
    done = deployment.run(name, failing[name])
    assert done.code == {"run-bash": 7, "postgresql": 3}[name]
    assert "before" in done.log.at("default")
    assert "after" not in done.output


@BASH
def test_not_in_time(postgres: Postgres, deployment: Deployment, name: str) -> None:
    with dblock.lock(postgres.url, target="web-01", step="b", tenant="T1"):
        done = deployment.run(name, INSIDE[name], Timeout="0")
    assert done.code != 0
    assert "it has run" not in done.output
    (result,) = done.log.results
    assert "not acquired" in result
    assert "held by tenant T1" in result


@BASH
@pytest.mark.parametrize("missing", ["Target", "Step"])
@pytest.mark.parametrize("value", ["", "#{Octopus.Machine.Name}"])
@pytest.mark.parametrize("home", ["/home/octopus/.octopus", ""])
def test_no_name_no_step(deployment: Deployment, name: str, missing: str, value: str, home: str) -> None:
    """Also where nothing tells `dblock run` that it is in a step."""
    done = deployment.run(name, INSIDE[name], {"TentacleHome": home}, **{missing: value})
    assert done.code == 1
    assert f"Dblock.{missing} is empty, or a variable that Octopus does not know" in done.output
    assert "it has run" not in done.output


@BASH
def test_untenanted(postgres: Postgres, deployment: Deployment, name: str) -> None:
    step = deployment.start(name, LASTING[name], Tenant="")
    wait_until(postgres.holders, "the holder")
    (label,) = {row.label for row, _ in postgres.all_rows()}
    assert label == "dblock1 T - web-01 b"
    postgres.end(postgres.holders()[0])
    assert step.finish().code != 0


@BASH
def test_so_many_at_a_time(postgres: Postgres, deployment: Deployment, name: str) -> None:
    with dblock.lock(postgres.url, target="web-01", step="b", slots=2):
        assert deployment.run(name, INSIDE[name], Slots="2", Timeout="0").code == 0
        with dblock.lock(postgres.url, target="web-01", step="b", slots=2):
            assert deployment.run(name, INSIDE[name], Slots="2", Timeout="0").code != 0


@BASH
def test_hostile_names_are_names(postgres: Postgres, deployment: Deployment, name: str) -> None:
    hostile = 'a\'; DROP TABLE x; -- $(touch pwned) `id` "q" \\'
    done = deployment.run(name, INSIDE[name], Target=hostile, Step=hostile, Tenant=hostile)
    assert (done.code, done.stderr) == (0, "")
    assert "it has run" in done.log.at("default")


@BASH
def test_nobody_sees_the_password(postgres: Postgres, deployment: Deployment, name: str) -> None:
    step = deployment.start(name, LASTING[name])
    wait_until(postgres.holders, "the holder")
    seen = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    postgres.end(postgres.holders()[0])
    done = step.finish()
    for secret in (PASSWORD, PASSWORD.replace("+", "%2B")):
        assert secret not in seen
        assert secret not in done.output + done.stderr


def test_the_script_finds_its_slot_and_not_the_url(deployment: Deployment) -> None:
    done = deployment.run("run-bash", 'echo "slot $DBLOCK_SLOT url ${DBLOCK_URL-none}"', Slots="3")
    assert "slot 0 url none" in done.log.at("default")
