"""The modules of the package depend on each other in one direction, as CONTRIBUTING draws them."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import dblock

PACKAGE = Path(dblock.__file__).parent
NO_DRIVERS = (
    "names", "label", "errors", "protocol", "postgres", "mssql", "events", "watch", "life", "blocking", "session"
)  # fmt: skip


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """The modules of the package that are imported when this one is; not those for types, or within a function."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= names or {node.module} & set(MODULES)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & set(MODULES)
    return found


def test_none_runs_back() -> None:
    graph = {name: imported(path) - {name} for name, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises where there is a circle
    assert len(order) == len(MODULES)
    assert graph["dblock.blocking"], "nothing was found to be imported"


def test_what_is_said_knows_nobody_who_says_it() -> None:
    for engine in ("dblock.postgres", "dblock.mssql"):
        assert imported(MODULES[engine]) <= {
            "dblock.errors", "dblock.label", "dblock.names", "dblock.protocol", "dblock.postgres"
        } - {engine}  # fmt: skip


def test_no_driver_is_known_below_the_drivers() -> None:
    for module in NO_DRIVERS:
        assert not [name for name in imported(MODULES[f"dblock.{module}"]) if "driver_" in name]
