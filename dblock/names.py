"""Target and step, and the key that they name.

This module is the first half of the contract that every door keeps to the byte: which names are accepted, and
which 64-bit number they become. It knows no database. ``tests/key-vectors.json`` pins both halves for ever.
"""

from __future__ import annotations

from hashlib import sha256
from typing import NamedTuple

MAX_NAME_BYTES = 255
_SEPARATOR = b"\x1f"


class PostgresKey(NamedTuple):
    """How a key stands in ``pg_locks``: the one-bigint form of an advisory lock."""

    classid: int
    objid: int
    objsubid: int


class Key(NamedTuple):
    """The number that names a lock everywhere: in both engines' lock views, in logs and on the command line.

    Attributes:
        value: the key as a signed 64-bit integer, the argument of ``pg_advisory_lock``.
    """

    value: int

    @property
    def postgres(self) -> PostgresKey:
        """``classid``, ``objid`` and ``objsubid`` of the lock's rows in ``pg_locks``, unsigned as shown there."""
        unsigned = self.value & 0xFFFF_FFFF_FFFF_FFFF
        return PostgresKey(unsigned >> 32, unsigned & 0xFFFF_FFFF, 1)

    @property
    def mssql(self) -> str:
        """The ``@Resource`` for ``sp_getapplock``."""
        return f"dblock:{self.value}"


def key(target: str, step: str) -> Key:
    """Compute the key of the lock for one step on one target.

    Args:
        target: where the step runs, such as a machine's name. Compared exactly: no case folding, no trimming.
        step: what runs there.

    Returns:
        The key, the same in Python, on the command line and in the SQL scripts.

    Raises:
        ValueError: a name is empty, longer than 255 bytes in UTF-8, has a space at an edge, or holds a control
            character or a lone surrogate.
        TypeError: a name is not a ``str``.
    """
    return _hashed(_encode("target", target), _encode("step", step))


def permits(target: str, step: str, slots: int) -> tuple[Key, ...]:
    """Compute the keys of the permits 0 to slots - 1 of a lock that several may hold at once.

    Args:
        target: as for `key`.
        step: as for `key`.
        slots: how many; callers with different numbers share the first ones.

    Raises:
        ValueError: as `key` does.
        TypeError: as `key` does.
    """
    names = _encode("target", target), _encode("step", step)
    return tuple(_hashed(*names, str(number).encode()) for number in range(slots))


def _hashed(*parts: bytes) -> Key:
    return Key(int.from_bytes(sha256(_SEPARATOR.join(parts)).digest()[:8], "big", signed=True))


def _encode(argument: str, name: str) -> bytes:
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a str, not {type(name).__name__}")
    if not name:
        raise ValueError(f"{argument} is empty")
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument} holds a lone surrogate (at position {error.start})") from None
    if len(encoded) > MAX_NAME_BYTES:
        raise ValueError(f"{argument} has {len(encoded)} bytes in UTF-8; at most {MAX_NAME_BYTES} are allowed")
    for position, byte in enumerate(encoded):
        if byte < 0x20 or byte == 0x7F:
            raise ValueError(f"{argument} holds the control character U+{byte:04X} (at byte {position})")
    # Only U+0020: strip() would take off no-break spaces and U+0085 too, which are ordinary characters here.
    if name[0] == " " or name[-1] == " ":
        raise ValueError(f"{argument} begins or ends with a space")
    return encoded
