"""What many tests need: waiting for something to become true, and throw-away databases, poolers and networks."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PATIENCE_SECONDS = 60  # a limit for what hangs; nothing that works comes near it
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.005, 0.04  # each look costs what it looks at some work


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until the condition holds.

    Raises:
        AssertionError: it did not within the seconds; names what was waited for.
    """
    deadline = time.monotonic() + seconds
    pause = _FIRST_PAUSE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)


def rounds(default: int) -> int:
    """How often a test repeats what needs luck to go wrong: DBLOCK_TEST_ROUNDS, for those who have the time."""
    return int(os.environ.get("DBLOCK_TEST_ROUNDS", default))


@contextmanager
def ended_afterwards(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """See to it that a process which was started with pipes is gone when the test is over, however it ended."""
    try:
        yield process
    finally:
        process.kill()
        process.wait(60)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with suppress(OSError):  # nobody reads what was left to be written
                    stream.close()
