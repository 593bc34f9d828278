"""Commands hold options and printing only; what is below them returns lines and never prints."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

COMMANDS = sorted((REPOSITORY / "entrypoints").glob("*.py"))
BELOW = sorted(path for room in ("host", "results") for path in (REPOSITORY / "stages" / room).glob("*.py"))

ALLOWED = ("click", "entrypoints", "stages.contract", "stages.host", "stages.results")
STANDARD = ("collections.abc", "functools", "json", "os", "pathlib", "re", "sys", "typing")

MOST_LINES = 40
"""Of a function of a command, help text included."""

MOST_LINES_OF_ALL = 870
"""Of the whole folder."""


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_command_imports_only_what_it_calls(path: Path) -> None:
    others = [name for name in imports_of(path) if name not in STANDARD and not f"{name}.".startswith(_dotted(ALLOWED))]
    assert others == []


def _dotted(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_no_function_of_a_command_is_long(path: Path) -> None:
    functions = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    long = {n.name for n in functions if (n.end_lineno or 0) - n.lineno >= MOST_LINES}
    assert long == set()


def test_the_commands_stay_short() -> None:
    lines = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in COMMANDS}
    assert sum(lines.values()) < MOST_LINES_OF_ALL
    assert max(lines.values()) <= 120, lines


@pytest.mark.parametrize("path", BELOW, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_nothing_below_the_commands_prints(path: Path) -> None:
    """A table is made by rich's `console.print` into a text, which is returned."""
    names = [n.id for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Name)]
    assert "print" not in names
