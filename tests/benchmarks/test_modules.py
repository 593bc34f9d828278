"""Benchmarks share public functions only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

MODULES = sorted((REPOSITORY / "benchmarks").glob("*.py"))


def foreign_private_names(source: str) -> Iterator[str]:
    """Private names of other benchmarks that a module imports, or reads from one that it imports."""
    tree = ast.parse(source)
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name.startswith("benchmarks.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "benchmarks":
            yield from (f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name))
            modules |= {alias.asname or alias.name for alias in node.names if node.module == "benchmarks"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in modules:
            yield f"{ast.unparse(node)}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_uses_private_names_of_another(path: Path) -> None:
    assert list(foreign_private_names(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from benchmarks.passes import _draw, compare", ["benchmarks.passes._draw"]),
        ("from benchmarks import rows as r\nr._merged(1)", ["r._merged"]),
        ("import benchmarks.rows\nbenchmarks.rows._merged(1)", ["benchmarks.rows._merged"]),
        ("from benchmarks import rows\nself._own(rows.write_rows, rows.__name__)", []),
    ],
)
def test_private_names_are_found(source: str, found: list[str]) -> None:
    assert list(foreign_private_names(source)) == found
