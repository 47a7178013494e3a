"""What happens to locks, one JSON line an event, in the file that DBLOCK_EVENTS names; ``dblock timeline`` reads it.

Knows no lock. A file that cannot be written harms none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, Literal

Happening = Literal["waiting", "acquired", "released", "lost", "timed out"]

log = logging.getLogger("dblock")


def wanted() -> bool:
    """Whether anybody wants to know."""
    return bool(os.environ.get("DBLOCK_EVENTS"))


def tell(event: Happening, seconds: float, about: Iterable[Mapping[str, Any]], *, ago: float) -> None:
    """Append a line for each lock.

    Args:
        event: what happened.
        seconds: how long was waited, or, of one that was released or lost, held.
        about: of each lock its key, names, tenant and labels.
        ago: seconds since it happened.
    """
    path = os.environ.get("DBLOCK_EVENTS")
    if not path:
        return
    import json  # slow to import, for what few want

    moment = datetime.now(tz=timezone.utc) - timedelta(seconds=ago)
    common = {
        "time": moment.isoformat(timespec="milliseconds"),
        "event": event,
        "seconds": round(seconds, 3),
        "process": os.getpid(),
    }
    lines = "".join(json.dumps(common | dict(lock)) + "\n" for lock in about)
    try:
        # All at once and to the end, so that lines of several processes do not mix; and no pipe is waited for.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
        try:
            os.write(descriptor, lines.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        log.warning("the events of this lock are not written: DBLOCK_EVENTS=%s: %s", path, error.strerror)


def read(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Read files of events, in the order of their times. A line that is none is left out, with a warning.

    Raises:
        ValueError: a file cannot be read.
    """
    found = []
    for path in paths:
        try:
            with open(path, encoding="utf-8", errors="replace") as lines:  # noqa: PTH123 - also /dev/stdin
                for number, line in enumerate(lines, 1):
                    event = _parsed(line)
                    if event is None:
                        log.warning("%s, line %d, is no event", path, number)
                    else:
                        found.append(event)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return sorted(found, key=lambda event: event["moment"])


def _parsed(line: str) -> dict[str, Any] | None:
    import json

    try:
        event = json.loads(line)
        event["moment"] = datetime.fromisoformat(event["time"]).timestamp()
        event["seconds"] = float(event["seconds"])
        event["lock"] = f"{event['step']}@{event['target']}"
        event["who"] = event["tenant"] or f"process {event['process']}"
    except (ValueError, KeyError, TypeError):
        return None
    return dict(event)
