"""The raw SQL scripts: one set of files, beside the package in a checkout and inside it in a wheel.

They are a product of their own, for psql and for drivers. Where Python needs the same thing it runs the same file.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

_PACKED = Path(__file__).parent / "sql"
_CHECKOUT = Path(__file__).parent.parent / "sql"


def names() -> list[str]:
    """The scripts there are, such as ``postgres/acquire``."""
    return sorted(_files())


def script(name: str) -> str:
    """Return the text of a script.

    Args:
        name: the engine and the script, such as ``postgres/acquire``.

    Raises:
        ValueError: there is none of that name. The message lists those there are.
    """
    found = _files().get(name)
    if found is None:
        raise ValueError(f"there is no script {name!r}; there are {', '.join(names())}")
    return found.read_text(encoding="utf-8")


@cache
def _files() -> dict[str, Path]:
    root = _PACKED if _PACKED.is_dir() else _CHECKOUT
    return {f"{file.parent.name}/{file.stem}": file for file in root.glob("*/*.sql")}
