"""Octopus Deploy as a step's script sees it: how its variables come, what is in its environment, how its log is read.

A Python step is run by a bootstrap which decrypts the variables with the key that is its last argument, and puts them
and some functions among the script's globals. A bash step is sourced by one that has them in a function; nothing of
either is in the environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

KEY = "5EC2E75EC2E75EC2E75EC2E75EC2E75E"

_CONFIGURATION = """
import base64, itertools, sys

def encode(text):
    return base64.b64encode(text.encode()).decode()

def decrypt(text):
    key = itertools.cycle(bytes.fromhex(sys.argv[-1]))
    return bytes(a ^ b for a, b in zip(base64.b64decode(text), key)).decode()

def get_octopusvariable(name):
    return octopusvariables.get(name, "")

def printhighlight(message):
    print("##octopus[stdout-highlight]")
    print(message)
    print("##octopus[stdout-default]")

octopusvariables = {name: decrypt(text) for name, text in ENCRYPTED.items()}
"""

_PYTHON_BOOTSTRAP = """
from runpy import run_path
configuration = run_path({configuration!r})
run_path({script!r}, configuration, "__main__")
"""

_BASH_BOOTSTRAP = """
sensitiveVariableKey=$1
function get_octopusvariable
{{
  case $(printf %s "$1" | base64 -w0) in
{cases}
    *) echo "" ;;
  esac
}}
cd {folder}
shift
source {script}
"""


def python_step(folder: Path, script: str, variables: Mapping[str, str]) -> list[str]:
    """Lay a Python step's files into a folder, and return the command that runs it."""
    key = bytes.fromhex(KEY)

    def encrypted(text: str) -> str:
        return b64encode(bytes(byte ^ key[i % len(key)] for i, byte in enumerate(text.encode()))).decode()

    configuration = f"ENCRYPTED = { {name: encrypted(value) for name, value in variables.items()} }\n{_CONFIGURATION}"
    (folder / "Configure.py").write_text(configuration, encoding="utf-8")
    (folder / "Script.py").write_text(script, encoding="utf-8")
    bootstrap = folder / "Bootstrap.Script.py"
    paths = {"configuration": str(folder / "Configure.py"), "script": str(folder / "Script.py")}
    bootstrap.write_text(_PYTHON_BOOTSTRAP.format(**paths), encoding="utf-8")
    return [sys.executable, "-u", str(bootstrap), KEY]


def bash_step(folder: Path, script: str, variables: Mapping[str, str]) -> list[str]:
    """The same for a bash step."""

    def encoded(text: str) -> str:
        return b64encode(text.encode()).decode()

    cases = "\n".join(f'"{encoded(name)}") echo {encoded(value)} | base64 -d ;;' for name, value in variables.items())
    path = folder / "Script.sh"
    path.write_text(script, encoding="utf-8")
    bootstrap = folder / "Bootstrap.Script.sh"
    bootstrap.write_text(_BASH_BOOTSTRAP.format(cases=cases, folder=folder, script=path), encoding="utf-8")
    return ["bash", str(bootstrap), KEY]


def environment(**more: str) -> dict[str, str]:
    """What an agent hands on; `dblock` is found, as in the python3 that has it installed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "TentacleHome": "/home/octopus/.octopus/OctopusServer", **more}


class Line(NamedTuple):
    """A line of a step's log, with its level."""

    level: str
    text: str


class Log:
    """What Octopus makes of all that a step has printed.

    Attributes:
        lines: with their levels.
        progress: the texts beside the progress bar.
        results: why it failed.
    """

    def __init__(self, output: str) -> None:
        self.lines: list[Line] = []
        self.progress: list[str] = []
        self.results: list[str] = []
        level = "default"
        # A message begins anywhere, and goes on over the ends of lines.
        for i, piece in enumerate(re.split(r"##octopus(.*?)\]", output, flags=re.DOTALL)):
            if i % 2 == 0:
                self.lines += [Line(level, text) for text in piece.splitlines() if text]
                continue
            name = re.match(r"\[([A-Za-z-]+)", piece)
            assert name, f"a broken message: {piece}"
            values = {key: b64decode(value).decode() for key, value in re.findall(r"(\w+)='([^']*)'", piece)}
            if name[1].startswith("stdout-"):
                level = name[1].removeprefix("stdout-")
            elif name[1] == "progress":
                self.progress.append(values["message"])
            elif name[1] == "resultMessage":
                self.results.append(values["message"])
            else:
                raise AssertionError(f"an unknown message: {piece}")

    def at(self, level: str) -> list[str]:
        return [line.text for line in self.lines if line.level == level]


class Done(NamedTuple):
    """A step that has ended."""

    code: int
    log: Log
    output: str
    stderr: str


class Step:
    """A step that runs, as its agent has started it.

    Attributes:
        process: its first process.
    """

    def __init__(self, folder: Path, command: list[str], **more: str) -> None:
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                command, env=environment(**more), stdin=subprocess.PIPE, stdout=stdout, stderr=stderr
            )

    def output(self) -> str:
        """What it has printed so far."""
        return self._stdout.read_text(encoding="utf-8")

    def finish(self) -> Done:
        """Close its stdin, and wait for its end."""
        self.process.communicate(timeout=60)
        output = self.output()
        return Done(self.process.returncode, Log(output), output, self._stderr.read_text(encoding="utf-8"))
