"""What the documentation says is run as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from psycopg import sql
from psycopg.conninfo import make_conninfo

import dblock
from dblock import label
from dblock.doctor import examine
from tests.backends import Postgres
from tests.doors import SQL
from tests.octopus import Step, bash_step, python_step
from tests.support import wait_until

DOCS = Path(__file__).parent.parent / "docs"
Connection = psycopg.Connection[Any]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


# --- contract.md ------------------------------------------------------------------------------------------------------


def test_the_contracts_key_is_what_the_server_shows(postgres: Postgres, url: str) -> None:
    (typed,) = blocks("contract.md", "console")
    (shown,) = blocks("contract.md", "sql")
    command, _, answer = typed.removeprefix("$ ").partition("\n")
    done = subprocess.run([sys.executable, "-m", *command.split()], capture_output=True, text=True, check=True)
    assert done.stdout == answer
    with dblock.lock(url, target="web-01", step="b"), psycopg.connect(url) as looking:
        assert looking.execute(shown).fetchall() == [(dblock.key("web-01", "b").value,)]


def test_the_contracts_labels_can_be_read() -> None:
    page = (DOCS / "contract.md").read_text(encoding="utf-8")
    holds, waits = (label.parse(text.split("   ")[0]) for text in re.findall(r"^    (dblock1 .*)$", page, re.MULTILINE))
    assert holds == label.Label(waiting=False, time=1795526014, tenant="T1", target="web-01", step="b")
    assert waits == label.Label(waiting=True, time=1795526014, tenant="T2", target="web-01", step="b")


# --- fencing.md -------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        (table,) = blocks("fencing.md", "sql")
        connection.execute(table)
        connection.execute("CREATE TABLE stock AS SELECT 10 AS amount")
        yield connection
        connection.execute("DROP TABLE step_fence, stock")


@pytest.fixture
def recipe(url: str) -> dict[str, Any]:
    functions, _ = blocks("fencing.md", "python")
    names: dict[str, Any] = {"dblock": dblock, "psycopg": psycopg, "url": url}
    exec(functions, names)  # noqa: S102 - the page's own
    return names


def test_the_fences_recipe_works(work: Connection, recipe: dict[str, Any]) -> None:
    _, use = blocks("fencing.md", "python")
    for expected in (9, 8):
        exec(use, recipe)  # noqa: S102
        assert work.execute("SELECT amount FROM stock").fetchone() == (expected,)
    assert work.execute("SELECT token FROM step_fence").fetchone() == (2,)


def test_a_late_holder_changes_nothing(work: Connection, recipe: dict[str, Any]) -> None:
    late = recipe["draw_token"](work, "web-01", "b")
    new = recipe["draw_token"](work, "web-01", "b")
    with pytest.raises(RuntimeError, match="another holder has begun"), work.transaction():
        recipe["refuse_if_late"](work, "web-01", "b", late)
        pytest.fail("the late one goes on")
    with work.transaction():
        recipe["refuse_if_late"](work, "web-01", "b", new)
    other_step = recipe["draw_token"](work, "web-01", "c")
    recipe["refuse_if_late"](work, "web-01", "c", other_step)


def test_a_new_holder_waits_for_the_late_ones_transaction(url: str, work: Connection, recipe: dict[str, Any]) -> None:
    late = recipe["draw_token"](work, "web-01", "b")
    with psycopg.connect(url, autocommit=True) as new:
        new.execute("SET lock_timeout = '100ms'")
        with work.transaction():
            recipe["refuse_if_late"](work, "web-01", "b", late)
            with pytest.raises(psycopg.errors.LockNotAvailable):
                recipe["draw_token"](new, "web-01", "b")
        assert recipe["draw_token"](new, "web-01", "b") > late


# --- security.md ------------------------------------------------------------------------------------------------------


def test_a_database_of_its_own_for_the_locks(url: str) -> None:
    (statements,) = re.findall(r"`(CREATE DATABASE locks;.*?)`", (DOCS / "security.md").read_text(encoding="utf-8"))
    with psycopg.connect(url, autocommit=True) as admin:
        for role in ("deploy", "stranger"):
            admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
        try:
            for statement in statements.rstrip(";").split("; "):
                admin.execute(statement)
            with dblock.lock(make_conninfo(url, dbname="locks", user="deploy"), target="web-01", step="b") as lock:
                assert lock.held
            with pytest.raises(dblock.DatabaseError, match="permission denied for database"):
                dblock.lock(make_conninfo(url, dbname="locks", user="stranger"), target="web-01", step="b").acquire(0)
        finally:
            admin.execute("DROP DATABASE IF EXISTS locks WITH (FORCE)")
            admin.execute("DROP ROLE deploy, stranger")


# --- how-it-works.md --------------------------------------------------------------------------------------------------


def drawn(picture: str, right_edge: int) -> set[tuple[str, str, str]]:
    """What a picture's left half shows as held: the lock, the tenant, the kind of box."""
    texts = re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', picture)
    locks = {float(y) - 4: text for x, y, text in texts if x == "24" and re.match(r"k$|\(h", text)}
    tenants = {float(x): text for x, _, text in texts if re.match(r"T\d$", text)}
    boxes = re.findall(r'<rect class="(holds|shared)" x="([\d.]+)" y="([\d.]+)" width="44"', picture)
    return {(locks[float(y) + 11], tenants[float(x) + 22], kind) for kind, x, y in boxes if float(x) < right_edge}


def test_the_queue_is_as_it_is_drawn(postgres: Postgres, url: str) -> None:
    picture = (DOCS / "queue.svg").read_text(encoding="utf-8")
    high = dblock.key("web-01", "b").postgres.classid
    kinds = {"ExclusiveLock": "holds", "ShareLock": "shared"}

    def held() -> set[tuple[str, str, str]]:
        rows = observer.execute(
            "SELECT objsubid, objid, mode, split_part(application_name, ' ', 3) FROM pg_locks JOIN pg_stat_activity"
            " USING (pid) WHERE granted AND locktype = 'advisory' AND classid = %s",
            (high,),
        ).fetchall()
        return {("k" if form == 1 else f"(h, {n})", tenant, kinds[mode]) for form, n, mode, tenant in rows}

    def one_after_the_other(tenant: str) -> None:
        with dblock.lock(url, target="web-01", step="b", tenant=tenant, timeout=60):
            pass

    with (
        psycopg.connect(url, autocommit=True) as observer,
        ThreadPoolExecutor(3) as others,  # waits for them at its end, when the lock is given back
        dblock.lock(url, target="web-01", step="b", tenant="T1"),
    ):
        waits = []
        for number in (2, 3, 4):
            waits.append(others.submit(one_after_the_other, f"T{number}"))
            wait_until(lambda: len(postgres.waiters()) == len(waits), "the next one to queue")
        wait_until(lambda: held() == drawn(picture, right_edge=470), "the locks to be as they are drawn")
    assert [done.result() for done in waits] == [None] * 3


# --- integrations.md --------------------------------------------------------------------------------------------------

PAGE = "integrations.md"
BIN = Path(sys.executable).parent
MIGRATE = """#!/bin/sh
[ "$DBLOCK_HELD" = 1 ] || [ -n "$NO_WRAPPER" ] || exit 3
psql -X -q -A -t "$TEST_URL" -c "SELECT objsubid FROM pg_locks WHERE locktype = 'advisory' AND granted" >> seen
"""


def pipelines() -> dict[str, str]:
    """The lines that run dblock, as the tool would give them to a shell."""
    github, gitlab, azure, ansible = (yaml.safe_load(block) for block in blocks(PAGE, "yaml"))
    (jenkins,) = blocks(PAGE, "groovy")
    (cron,) = blocks(PAGE, "crontab")
    (migrations, _) = blocks(PAGE, "sh")
    task = ansible[0]["ansible.builtin.command"]["argv"]
    return {
        "GitHub Actions": github["jobs"]["deploy"]["steps"][1]["run"],
        "GitLab CI": gitlab["migrate"]["script"][1],
        "Azure DevOps": azure["steps"][1]["script"],
        "Jenkins": re.findall(r"sh '(.*)'", jenkins)[0],
        "Ansible": shlex.join(task).replace("{{ inventory_hostname }}", "web-01"),
        "cron": cron.split(maxsplit=5)[5],
        **{line.split(" -- ")[1]: line for line in migrations.splitlines()},
    }


def in_a_shell(url: str, folder: Path, line: str, **more: str) -> subprocess.CompletedProcess[str]:
    variables = ("GITHUB_REPOSITORY", "GITHUB_RUN_ID", "CI_PROJECT_PATH", "CI_JOB_ID", "BUILD_DEFINITIONNAME",
                 "BUILD_BUILDID", "JOB_NAME", "BUILD_NUMBER")  # fmt: skip
    environment = dict.fromkeys(variables, "some") | {"DBLOCK_URL": url, "TEST_URL": url} | more
    path = {"PATH": f"{folder}:{BIN}:{os.environ['PATH']}"}
    return subprocess.run(
        ["sh", "-euc", line],
        cwd=folder,
        env=os.environ | environment | path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a command, also under the names of tools that are not installed here."""
    for name in ("migrate.sh", "alembic", "flyway", "liquibase"):
        (tmp_path / name).write_text(MIGRATE)
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("tool", pipelines())
def test_a_pipelines_line_holds_the_lock(postgres: Postgres, folder: Path, tool: str) -> None:
    done = in_a_shell(postgres.url, folder, pipelines()[tool])
    assert done.returncode == 0, done.stderr
    assert (folder / "seen").read_text() == "1\n"


def test_a_shell_without_python(postgres: Postgres, folder: Path) -> None:
    _, line = blocks(PAGE, "sh")
    for script in ("acquire", "release"):
        (folder / f"{script}.sql").symlink_to(SQL / f"{script}.sql")
    assert in_a_shell(postgres.url, folder, line, NO_WRAPPER="1").returncode == 0
    assert (folder / "seen").read_text() == "1\n"
    (folder / "migrate.sh").write_text("exit 5")
    assert in_a_shell(postgres.url, folder, line).returncode == 5
    # psql's own code where the lock is not held, and nothing has run.
    with dblock.lock(postgres.url, target="web-01", step="b"):
        code = in_a_shell(postgres.url, folder, line, PGOPTIONS="-c dblock.timeout=0.1").returncode
    assert code == 3


def test_a_default_for_a_role(postgres: Postgres) -> None:
    (statement,) = blocks(PAGE, "sql")
    with psycopg.connect(postgres.url, autocommit=True) as admin:
        admin.execute("CREATE ROLE deploy LOGIN")
        try:
            admin.execute(statement.replace("1800", "0.1"))
            with (
                dblock.lock(postgres.url, target="web-01", step="b"),
                psycopg.connect(make_conninfo(postgres.url, user="deploy"), autocommit=True) as caller,
            ):
                caller.execute("SET dblock.target = 'web-01'")
                caller.execute("SET dblock.step = 'b'")
                with pytest.raises(psycopg.errors.LockNotAvailable, match="not acquired"):
                    caller.execute((SQL / "acquire.sql").read_bytes())
        finally:
            admin.execute("DROP ROLE deploy")


ALEMBIC_INI = "[alembic]\nscript_location = .\nversion_locations = versions\nsqlalchemy.url = {url}\n"
MIGRATION = """
import time, alembic.op
revision, down_revision = "one", None
def upgrade():
    alembic.op.execute("SELECT 1 FROM pg_sleep(0.3)")
    alembic.op.execute("CREATE TABLE migrated ()")
def downgrade():
    alembic.op.execute("DROP TABLE migrated")
"""


def test_an_alembic_migration_under_the_lock(postgres: Postgres, tmp_path: Path) -> None:
    """Two at once: the second one waits, and finds nothing left to do."""
    _, *_, env = ["", *blocks(PAGE, "python")]
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "one.py").write_text(MIGRATION)
    (tmp_path / "script.py.mako").touch()
    imports = "import dblock, sqlalchemy\nfrom alembic import context\n"
    (tmp_path / "env.py").write_text(f"{imports}{env}\nrun_migrations_online()\n")
    (tmp_path / "alembic.ini").write_text(ALEMBIC_INI.format(url=postgres.url.replace("://", "+psycopg://", 1)))
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("one",)]
        connection.execute("DROP TABLE migrated, alembic_version")


# --- watching.md ------------------------------------------------------------------------------------------------------


def test_the_doctors_checks_are_told(postgres: Postgres, url: str) -> None:
    page = (DOCS / "watching.md").read_text(encoding="utf-8")
    table = page.partition("| check |")[2].partition("\n\n")[0]
    told = {name for line in table.splitlines()[2:] for name in line.split("|")[1].strip().split(", ")}
    assert told == {finding.check for finding in examine(url)}


def test_who_watches_as_the_page_says(postgres: Postgres, url: str) -> None:
    looking, with_psql, _, ending = blocks("watching.md", "sh")
    environment = os.environ | {"DBLOCK_URL": url, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-e", "-c", script], env=environment, cwd=DOCS.parent, capture_output=True, text=True, check=False
        )

    plain, _, for_scripts = looking.splitlines()
    with dblock.lock(url, target="web-01", step="b", tenant="T1"):
        key = str(dblock.key("web-01", "b").value)
        assert "b@web-01" in run(plain).stdout
        assert run(for_scripts).returncode == 1
        seen = run(with_psql)
        assert seen.returncode == 0, seen.stderr
        assert "T1" in seen.stdout
        assert re.search(rf"^key +\| {key}$", seen.stdout, re.MULTILINE)  # inspect.sql's
        assert re.search(rf"^ {key} \| ", seen.stdout, re.MULTILINE)  # key.sql's
        by_names, by_key = ending.splitlines()
        assert "tenant      T1" in run(by_names).stdout
        assert key in by_key
        assert "4123 is not a holder's pid" in run(by_key).stderr
    assert run(for_scripts).returncode == 0


def test_a_query_alone_shows_who_holds(postgres: Postgres, url: str) -> None:
    (query,) = blocks("watching.md", "sql")
    with dblock.lock(url, target="web-01", step="b", tenant="T1"), psycopg.connect(url) as looking:
        ((_, says, granted, mode),) = looking.execute(query).fetchall()
    assert (re.sub(r" \d+ ", " ", says), granted, mode) == ("dblock1 T1 web-01 b", True, "ExclusiveLock")


def test_the_events_have_the_fields_of_the_page(url: str, tmp_path: Path) -> None:
    page = (DOCS / "watching.md").read_text(encoding="utf-8")
    _, _, happening, _ = blocks("watching.md", "sh")
    (tmp_path / "migrate.sh").write_text("#!/bin/sh\n", encoding="utf-8")
    (tmp_path / "migrate.sh").chmod(0o755)
    in_a_shell(url, tmp_path, happening).check_returncode()
    lines = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["acquired", "released"]
    table = page.partition("| field |")[2].partition("\n\n")[0]
    fields = {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert all(set(json.loads(line)) == fields for line in lines)
    assert (tmp_path / "timeline.svg").exists()


# --- octopus.md -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["python", "bash"])
def test_the_steps_of_the_octopus_page(url: str, tmp_path: Path, language: str) -> None:
    """As the tool's bootstrap runs them, while another tenant is at it."""
    (script,) = blocks("octopus.md", language)
    variables = {"Locks.Url": url, "Octopus.Machine.Name": "web-01", "Octopus.Deployment.Tenant.Name": "T2"}
    lay = {"python": python_step, "bash": bash_step}[language]
    (tmp_path / "b.sh").write_text('#!/bin/sh\necho "the work of step b"\n', encoding="utf-8")
    (tmp_path / "b.sh").chmod(0o755)
    with dblock.lock(url, target="web-01", step="b", tenant="T1"):
        step = Step(tmp_path, lay(tmp_path, script, variables))
        wait_until(lambda: "waiting for b@web-01: held by tenant T1" in step.output(), "it to say that it waits")
    done = step.finish()
    assert (done.code, done.stderr) == (0, "")
    assert done.log.at("default") == ["the work of step b"]
    assert done.log.at("wait")[0].startswith("Another deployment has the lock")


def test_the_templates_of_the_octopus_page_are_those_that_there_are() -> None:
    named = re.findall(r"`([a-z-]+\.json)`", (DOCS / "octopus.md").read_text(encoding="utf-8"))
    assert set(named) == {path.name for path in (DOCS.parent / "octopus").glob("*.json")}
