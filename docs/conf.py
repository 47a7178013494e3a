"""The pages as a site: ``make docs``. Read as they are, in the repository, they need none of this."""

from __future__ import annotations

import re
from importlib.metadata import version as _version
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer

project = "dblock"
version = release = _version("dblock")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns: list[str] = []
html_theme = "furo"
html_title = "dblock"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
myst_heading_anchors = 3
default_role = "py:obj"  # a name between single backticks leads to what it names, where that is public
# A name that leads nowhere is a warning, but for types that nobody names and what is Python's own.
nitpicky = True
nitpick_ignore = [
    ("py:class", "AsyncSource"),
    ("py:class", "Scope"),
    ("py:class", "Source"),
    ("py:class", "dblock.life.Unset"),
    ("py:class", "dblock.names.PostgresKey"),
    ("py:exc", "CancelledError"),
    ("py:obj", "asyncio.Event"),
    ("py:obj", "threading.Event"),
]

_ROOT = Path(__file__).parent.parent


def _outside(found: re.Match[str]) -> str:
    """A link to a file of the repository, which is not on the site: its path. One that leads nowhere is an error."""
    text, path = found.groups()
    if not (_ROOT / path).exists():
        raise ValueError(f"a page links to {path}, which does not exist")
    return f"{text} (`{path}`)"


def _read(app: Any, name: str, source: list[str]) -> None:  # noqa: ARG001 - as Sphinx calls it
    source[0] = re.sub(r"\[([^]]+)\]\(\.\./([^)#]+)\)", _outside, source[0])


def _shorten(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:  # noqa: ARG001, PLR0917
    """An argument whose description is an ellipsis is described where its docstring says."""
    lines[:] = [line for line in lines if not line.endswith(": …")]


def _sign(app: Any, what: str, name: str, obj: object, options: Any, *_: Any) -> tuple[str, str] | None:  # noqa: ARG001
    """Nobody but dblock makes its locks: what they are made of is not told."""
    return ("", "") if what == "class" else None


def setup(app: Any) -> None:
    app.add_lexer("crontab", TextLexer)  # Pygments has none
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _shorten, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", _sign)
