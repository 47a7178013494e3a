"""The command that ``dblock run`` runs: says that it is inside until its time is over, or it is told to end.

    python -m tests.soak.command LOG SECTION SECONDS stubborn|willing

A stubborn one is told, and goes on until it is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from tests.soak.events import Inside, Log


def main() -> None:
    path, section, seconds, manner = sys.argv[1:]
    log = Log(path)
    inside = Inside(log, section, float(seconds))

    def told(_number: int, _frame: object) -> None:
        inside.told()
        if manner == "willing":
            os._exit(0)

    log.write("party", section, pid=os.getpid())
    signal.signal(signal.SIGTERM, told)
    inside.enter([int(slot) for slot in os.environ["DBLOCK_SLOT"].split()])
    for pause in inside.pauses():
        time.sleep(pause)
        inside.still()
    inside.leave()


if __name__ == "__main__":
    main()
