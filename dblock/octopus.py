"""A lock around a step of Octopus Deploy: named by the step's own variables, and speaking in the step's own log.

>>> import dblock.octopus
>>> with dblock.octopus.lock(url, step="b", timeout=600):
...     migrate()

Octopus acts on what a step prints: ``##octopus[…]`` switches the level of the lines that follow, moves the progress
bar, or says why the step failed. Here stands all that dblock knows of that. The last argument of a Python step is the
key to all of the deployment's secrets: nothing here looks at the arguments.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import dblock
from dblock.label import comment, printable
from dblock.life import log

if TYPE_CHECKING:
    from dblock.connect import Source
    from dblock.events import Happening
    from dblock.session import Scope

_STDOUT = 1
_MOST_BYTES = 1500  # with its copy in base64 and all around it less than a pipe takes at once


def lock(
    db: Source,
    *,
    step: str,
    target: str | Sequence[str] | None = None,
    tenant: str | None = None,
    label: Mapping[str, str] | None = None,
    timeout: float | None = None,
    shared: bool = False,
    slots: int | None = None,
    scope: Scope = "session",
    heartbeat: float = 10,
    database: str | None = None,
    allow_session_pooler: bool = False,
) -> Lock:
    """Make the lock for this step of a deployment, or of a runbook's run, on the target for which it runs.

    While it waits, the step's log says for whom, at the level that Octopus has for waiting, and at least every half
    minute; so does the progress bar. An error of dblock that nobody catches fails the step with its text as the reason,
    in place of a traceback. Both begin with the first call of this function, for all locks of this process.

    Args:
        db: as for `dblock.lock`, as is everything that is not told here.
        step: what may run only once at a time on the target: the same text in all projects that share it.
        target: None: Octopus.Machine.Name, also where a worker runs the step on behalf of that target.
        tenant: None: Octopus.Deployment.Tenant.Name, where the deployment has a tenant.
        label: more to be seen of the holder, beside the deployment's or run's id, the environment's name and the link
            of the task. A name among these that is given here wins.
        timeout: …
        shared: …
        slots: …
        scope: …
        heartbeat: …
        database: …
        allow_session_pooler: …

    Returns:
        A `dblock.Lock`, not held yet.

    Raises:
        NoTarget: the step has none, and none is given.
        ValueError: an argument is not acceptable; a name still has a ``#{…}`` in it, for which Octopus had no variable.
        TypeError: an argument is of the wrong kind.
    """
    speak()
    sys.excepthook = _fail
    if target is None and not (target := _variable("Octopus.Machine.Name")):
        raise NoTarget(
            "This step has no target to lock: Octopus.Machine.Name is empty. Run it on, or on behalf of, each "
            "deployment target, or give dblock.octopus.lock(…, target=…)"
        )
    if tenant is None:
        tenant = _variable("Octopus.Deployment.Tenant.Name") or None
    return Lock(
        db,
        target=target,
        step=step,
        tenant=tenant,
        label=_with_labels_of_the_step(dict(label or {})),
        timeout=timeout,
        shared=shared,
        slots=slots,
        scope=scope,
        heartbeat=heartbeat,
        database=database,
        allow_session_pooler=allow_session_pooler,
    )


class NoTarget(ValueError):  # noqa: N818 - says what is wrong
    """There is nothing to lock: the step runs for no target, and none is named."""


class Lock(dblock.Lock):
    """A `dblock.Lock` whose wait reads well to somebody who has never heard of it."""

    def __init__(self, db: Source, **arguments: Any) -> None:
        super().__init__(db, **arguments)
        for name in (*self.targets, self.step, self.tenant or ""):
            if "#{" in name:  # left as it was written; all steps that lack it would share the name
                raise ValueError(f"{name!r} is a variable that Octopus does not know in this step")

    def _tell(self, event: Happening, since: float, until: float | None = None) -> None:
        super()._tell(event, since, until)
        lock = f"the lock for step {self.step} on {', '.join(self.targets)}"
        if event == "waiting":
            write("wait", f"Another deployment has {lock}. This step waits for its turn, and goes on by itself.")
        elif event == "acquired" and self._waits:
            said = f"This step has {lock} now, after {time.monotonic() - since:.0f} s of waiting."
            write("wait", said, progress=True)


# --- what is said -----------------------------------------------------------------------------------------------------


def in_a_step() -> bool:
    """Whether this process was started by a step: Octopus's agents tell it where they live."""
    return bool(os.environ.get("TentacleHome"))  # noqa: SIM112 - theirs


def speak() -> None:
    """Let dblock's log be a part of the step's."""
    if not any(isinstance(handler, _LogHandler) for handler in log.handlers):
        log.addHandler(_LogHandler())
        log.setLevel(logging.INFO)
        log.propagate = False


def write(level: Literal["wait", "warning"], text: str, *, progress: bool = False) -> None:
    """Write a line to the step's log, as one that waits or warns, and where asked for beside the progress bar too.

    The switch, the line and the switch back go out in one write: between two, another process of the step could write
    a line of its own, at the wrong level.
    """
    line = _one_line(text)
    _send(
        f"{_message(f'stdout-{level}')}{line}\n{_message('stdout-default')}"
        + (_message("progress", percentage="0", message=line) if progress else "")
    )


def tell_result(error: Exception) -> None:
    """Say why the step fails, for the head of the task's page."""
    in_time = isinstance(error, (dblock.LockTimeout, dblock.LockDeadlock))
    _send(_message("resultMessage", message=_one_line(f"The step has not run: {error}" if in_time else str(error))))


class _LogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno <= logging.INFO:
            write("wait", record.getMessage(), progress=True)
        else:
            write("warning", record.getMessage())


def _fail(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if isinstance(error, (dblock.Error, NoTarget)):
        tell_result(error)
    else:
        sys.__excepthook__(kind, error, traceback)


def _one_line(text: str) -> str:
    return printable(" ".join(text.split())).encode(errors="backslashreplace")[:_MOST_BYTES].decode(errors="ignore")


def _message(name: str, **values: str) -> str:
    encoded = "".join(f" {key}='{b64encode(value.encode()).decode()}'" for key, value in values.items())
    return f"##octopus[{name}{encoded}]\n"


def _send(text: str) -> None:
    with suppress(OSError, ValueError):  # ValueError: it is closed
        sys.stdout.flush()  # what the script has printed comes first
    with suppress(OSError):  # nobody reads the log any more; the lock is none the worse
        os.write(_STDOUT, text.encode())


# --- what is known of the step ----------------------------------------------------------------------------------------


def _variable(name: str) -> str:
    """One of the step's variables, which Octopus puts among the globals of a Python step's script; else ""."""
    variables = getattr(sys.modules["__main__"], "octopusvariables", {})
    return str(variables.get(name) or "")


def _with_labels_of_the_step(given: dict[str, str]) -> dict[str, str]:
    """Add what the step knows of itself, as far as there is room."""
    task = _variable("Octopus.Task.Id")
    server, space = _variable("Octopus.Web.ServerUri").rstrip("/"), _variable("Octopus.Space.Id")
    known = {
        "deployment": _variable("Octopus.Deployment.Id") or _variable("Octopus.RunbookRun.Id"),
        "environment": _variable("Octopus.Environment.Name"),
        "task": f"{server}/app#/{space}/tasks/{task}" if server and space and task else task,
    }
    labels = dict(given)
    for name, value in known.items():
        if value and name not in given:
            with suppress(ValueError):
                comment(labels | {name: value})
                labels[name] = value
    return labels
