"""The workflows, as far as they can be judged without the service that runs them: sound, and of what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_one(workflow: Path) -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", workflow],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_runs_is_there(workflow: Path) -> None:
    steps = [step for job in yaml.safe_load(workflow.read_text("utf-8"))["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step.get("run", "") for step in steps)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", commands)) <= targets
    for file in re.findall(r"\btests/\w+\.py", commands):
        assert (ROOT / file).is_file()


def test_the_oldest_and_the_newest_python_are_tested() -> None:
    supported = re.findall(r"Python :: (3\.\d+)\"", (ROOT / "pyproject.toml").read_text("utf-8"))
    floor = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert floor
    assert floor[1] == supported[0]
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf-8"))["jobs"]
    linux, windows = (jobs[name]["strategy"]["matrix"] for name in ("postgres", "windows"))
    assert windows["python"] == [supported[0], supported[-1]]
    assert {supported[0], supported[-1]} <= {each["python"] for each in linux["include"]}


def test_what_is_checked_before_a_commit_is_what_make_test_checks() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert local["repo"] == "local"  # the tools of .venv, in their versions
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for hook in local["hooks"]:
        program, *_ = hook["entry"].split()
        assert program.startswith(".venv/bin/")
        assert program in makefile
