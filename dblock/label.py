"""The label that a session carries while it waits for or holds a lock.

``application_name`` is the one text of a session that every role may read, so the label is how ``dblock status``,
``inspect.sql`` and the error of somebody who waits know the tenant, the target, the step and the moment of the
grant. It is 63 ASCII bytes on PostgreSQL; what does not fit is shortened and says so with a ``~``.

A label comes from somebody else's session. Nothing here believes it: the reader compares the key of its names with
the key of the lock, and ``printable`` takes the teeth out of what is shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote, unquote

POSTGRES_BYTES = 63
_PREFIX = "dblock1"
_UNIT = re.compile(r"%[0-9A-F]{2}|.", re.DOTALL)
_LABEL = re.compile(r"dblock1 (w?)([0-9]{1,11}) (\S+) (\S+) (\S+)")
_SHORTENED = "~"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ITEM = re.compile(r"([A-Za-z0-9_.-]{1,64})='([A-Za-z0-9_.~%-]*)'")
_COMMENT = re.compile(rf"(/\*|dblock )(({_ITEM.pattern}),?)+")
MAX_COMMENT_BYTES = 400  # of the 1024 that the server shows of a statement


class Label(NamedTuple):
    """A label read back: what some session says of itself, unverified.

    Attributes:
        waiting: the session waits; otherwise it holds.
        time: whole seconds since 1970, of the grant or of the beginning of the wait.
        tenant: as far as it fitted, with a ``~`` where it was shortened; None where none was given.
        target: as far as it fitted.
        step: as far as it fitted.
    """

    waiting: bool
    time: int
    tenant: str | None
    target: str
    step: str

    def may_name(self, target: str, step: str) -> bool:
        """Whether these are the names of a lock that the reader knows, as far as they were kept."""
        return may_be(self.target, target) and may_be(self.step, step)


@lru_cache(maxsize=256)  # one lock after another has the same names
def fields(tenant: str | None, target: str, step: str, *, time_width: int, limit: int = POSTGRES_BYTES) -> str:
    """Encode and fit tenant, target and step for the label ``dblock1 TIME TENANT TARGET STEP``.

    The time is the server's, so the statement that takes the lock puts it in; here only its width counts.

    Args:
        tenant: any text, or None.
        target: the lock's target.
        step: the lock's step.
        time_width: characters that TIME takes.
        limit: bytes the whole label may take.

    Returns:
        The three fields with spaces between.
    """
    room = limit - len(_PREFIX) - 1 - time_width - 1 - 2
    # Ordered as the contract breaks ties: tenant gives way first, then step, then target.
    texts = {"tenant": tenant or "", "step": step, "target": target}
    units = {name: _UNIT.findall(_encode(text)) for name, text in texts.items()}
    # No field can keep more units than there is room, so long ones need not be taken down one by one from the top.
    kept = {name: min(len(field), room + 1) for name, field in units.items()}

    def width(name: str) -> int:
        return sum(map(len, units[name][: kept[name]]))

    def shown(name: str) -> str:
        cut = kept[name] < len(units[name])
        return "".join(units[name][: kept[name]]) + (_SHORTENED if cut else "")

    while sum(len(shown(name)) for name in kept) > room:
        longest = max(kept, key=width)
        kept[longest] -= 1
    return f"{shown('tenant')} {shown('target')} {shown('step')}"


def parse(label: str) -> Label | None:
    """Read a label, or return None where the text is not one."""
    match = _LABEL.fullmatch(label)
    if match is None:
        return None
    waiting, time, tenant, target, step = match.groups()
    return Label(waiting == "w", int(time), None if tenant == "-" else unquote(tenant), unquote(target), unquote(step))


def comment(more: Mapping[str, str]) -> str:
    """Write what is to be told beside the label, in the form of sqlcommenter: ``deployment='Deployments-1',link='…'``.

    It is all ASCII, and holds neither the end of a comment nor a quote that is not its own.

    Raises:
        ValueError: a name is none, or all of it is longer than 400 bytes.
        TypeError: it is no mapping of texts.
    """
    for name, value in more.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError("label must be a mapping of str to str")
        if not _NAME.fullmatch(name):
            raise ValueError(f"label has the name {name!r}: letters, digits and _ . - are allowed, at most 64")
    written = ",".join(
        f"{name}='{quote(value.encode(errors='replace'), safe='')}'" for name, value in sorted(more.items())
    )
    if len(written) > MAX_COMMENT_BYTES:
        raise ValueError(f"label has {len(written)} bytes, encoded; at most {MAX_COMMENT_BYTES} are allowed")
    return written


def read_comment(text: str) -> dict[str, str]:
    """Read what `comment` wrote, at the beginning of a statement or of a program's name; nothing else is believed."""
    found = _COMMENT.match(text)
    return {name: unquote(value) for name, value in _ITEM.findall(found[0])} if found else {}


def printable(text: str) -> str:
    r"""Return the text with everything that a terminal or a log could act on shown as an escape (``\\x1b``).

    So is the second of two ``#``: Octopus Deploy acts on ``##octopus``, wherever it stands in what a step prints.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return re.sub("(?<=#)#", r"\\x23", shown)


def may_be(kept: str, name: str) -> bool:
    """Whether a field that a label kept can be this name."""
    if kept.endswith(_SHORTENED):
        # A cut in the middle of a character leaves a replacement character, which says nothing.
        return name.startswith(kept[:-1].rstrip("\N{REPLACEMENT CHARACTER}"))
    return kept == name


def _encode(text: str) -> str:
    if not text:
        return "-"
    if text == "-":
        return "%2D"
    # quote() leaves the tilde alone, which marks a shortened field here.
    return quote(text.encode(errors="replace"), safe="").replace("~", "%7E")
