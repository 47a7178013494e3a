"""What dblock tells the operator: lines on stderr that begin with ``dblock: ``. stdout is for results, in columns."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from dblock.label import printable

STDERR = 2


def say(message: str) -> None:
    """Write one line to stderr, whatever the message holds."""
    line = f"dblock: {printable(' '.join(message.split()))}\n"
    # Past Python's buffer, in one write: lines of several processes do not mix, and where nobody reads stderr any
    # more nothing is left over that would change the exit code.
    with suppress(OSError):
        if sys.platform == "win32" and sys.stderr is not None:
            # Only Python knows the console's letters; it shows those that a code page lacks as numbers.
            sys.stderr.write(line)
            sys.stderr.flush()
        else:
            os.write(STDERR, line.encode(errors="backslashreplace"))


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines in which each column begins at one place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class LogHandler(logging.Handler):
    """Shows the log of the library, which tells who is in the way while waiting."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())
