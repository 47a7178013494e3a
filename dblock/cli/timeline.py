"""``dblock timeline``: waits and holds from the files of DBLOCK_EVENTS, as numbers and as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from dblock import events
from dblock.cli.messages import columns
from dblock.cli.options import UsageError
from dblock.label import printable

_HEADINGS = ("LOCK", "ACQUIRED", "WAITED", "AT WORST", "HELD", "AT WORST", "TIMED OUT", "LOST")
_LEGEND = {"b": "held", "collided": "lost while it was held", "wait": "waited, in the end in vain where no bar follows"}
_ENDS_A_HOLD = ("released", "lost")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "timeline",
        help="draw who waited for and who held which lock",
        description="Print for each lock how long it was waited for and held, median and worst, from files that "
        "dblock.lock and dblock run have written where DBLOCK_EVENTS names one; and draw it.",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="what DBLOCK_EVENTS named")
    parser.add_argument("-o", "--output", metavar="SVG", help="where to put the picture (needs dblock[cli])")
    parser.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    found = events.read(args.files)
    if not found:
        print("no event is found")
        return 0
    _print_numbers(found)
    if args.output:
        picture = _picture(found)
        try:
            Path(args.output).write_text(picture, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{args.output} cannot be written: {error.strerror}") from None
    return 0


def _print_numbers(found: list[dict[str, Any]]) -> None:
    rows: list[tuple[str, ...]] = [_HEADINGS]
    for lock in sorted({event["lock"] for event in found}):
        seconds: dict[str, list[float]] = {}
        for event in found:
            if event["lock"] == lock:
                seconds.setdefault(event["event"], []).append(event["seconds"])
        waited = seconds.get("acquired", [])
        held = [each for end in _ENDS_A_HOLD for each in seconds.get(end, [])]
        counts = (str(len(seconds.get(end, []))) for end in ("timed out", "lost"))
        rows.append((printable(lock), str(len(waited)), *_median_and_worst(waited), *_median_and_worst(held), *counts))
    print(*columns(rows), sep="\n")


def _median_and_worst(seconds: list[float]) -> tuple[str, str]:
    return (f"{median(seconds):.2f} s", f"{max(seconds):.2f} s") if seconds else ("", "")


def _picture(found: list[dict[str, Any]]) -> str:
    try:
        from dblock.picture import Bar, Row, draw
    except ImportError as error:
        raise UsageError(f"-o needs svg.py ({error}): pip install 'dblock[cli]'") from None

    begin = min(event["moment"] - event["seconds"] for event in found)
    rows: dict[str, dict[str, Row]] = {}
    asked: dict[tuple[str, str, int], float] = {}
    for event in found:
        now, lasted = event["moment"] - begin, event["seconds"]
        row = rows.setdefault(event["lock"], {}).setdefault(event["who"], Row(printable(event["who"])))
        who = (event["lock"], event["who"], event["process"])
        told = f"{printable(event['who'])}, {printable(event['lock'])}: {event['event']}"
        if event["event"] == "acquired":
            asked[who] = now - lasted
        elif event["event"] == "timed out":
            row.bars.append(Bar(now, now, "", f"{told} after {lasted:.2f} s", now - lasted))
        elif event["event"] in _ENDS_A_HOLD:
            kind = "b" if event["event"] == "released" else "collided"
            start = now - lasted
            row.bars.append(Bar(start, now, kind, f"{told} after {lasted:.2f} s", asked.pop(who, start)))
    groups = {printable(lock): list(by_tenant.values()) for lock, by_tenant in sorted(rows.items())}
    return draw("Who waited for which lock, and who held it", _LEGEND, groups)
