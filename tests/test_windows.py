"""Windows, as far as it can be pretended here: what needs Unix says so, and what does not, imports nothing of it.

`make test` also checks the types for that platform, where a module has no `os.fork` and no SIGKILL: only what refuses
Windows at its first line is left out. That the rest runs there, only a Windows can prove.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PRETEND = """
import asyncio, os, psycopg, signal, subprocess, sys  # of the platform that is there
sys.platform = "win32"
for module, names in {{
    os: ("fork", "killpg", "setsid", "setpgid", "register_at_fork", "getpgrp", "geteuid", "tcsetpgrp"),
    signal: ("SIGKILL", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCHLD", "pthread_sigmask", "set_wakeup_fd"),
}}.items():
    for name in names:
        delattr(module, name)
{code}
"""


def pretended(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRETEND.format(code=code), *arguments], capture_output=True, text=True, check=False
    )


MAIN = "from dblock.cli import main; sys.exit(main())"


@pytest.mark.parametrize("command", ["run --target t --step s --url postgresql://h/d -- true", "demo"])
def test_what_needs_unix_says_so(command: str) -> None:
    done = pretended(MAIN, *command.split())
    assert done.returncode == 64
    assert done.stderr.startswith("dblock: ")
    assert "on Windows" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_lock_needs_nothing_of_unix(url: str) -> None:
    code = f"import dblock\nwith dblock.lock({url!r}, target='web-01', step='b') as lock: print(lock.held)"
    done = pretended(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.mark.parametrize(
    "command", ["key --target web-01 --step b", "sql postgres/acquire", "status", "doctor", "--help"]
)
def test_the_other_commands_need_nothing_of_unix(url: str, command: str) -> None:
    done = pretended(f"os.environ['DBLOCK_URL'] = {url!r}; {MAIN}", *command.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_a_console_without_a_letter(url: str) -> None:
    """Its code page has no Greek: the name is shown, in other letters."""
    code = f"os.environ['DBLOCK_URL'] = {url!r}; sys.stdout.reconfigure(encoding='cp1252'); {MAIN}"
    hold = f"import dblock; dblock.lock({url!r}, target='Ω', step='b').acquire()\n"
    done = pretended(hold + code, "status")
    assert done.returncode == 0
    assert "b@\\u03a9" in done.stdout
