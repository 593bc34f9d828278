"""Find heavy tests: those that need a model, import a library that runs models, run a whole stage or start a process.

`make test-fast` leaves them out. No list has to be kept: `is_heavy` reads the code of a test, of its fixtures and of
the helpers in tests/ that they call. `imports_heavy_module` reads what a file imports, so that a fast run can skip the
files that take seconds to import. Neither reads the code under test: what a light test calls may import a heavy library
or start a process.
"""

import ast
import inspect
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
OUR_PACKAGES = {"benchmarks", "entrypoints", "recipes", "stages", "tests"}
HEAVY_MODULES = {
    *("datasets", "peft", "sentence_transformers", "swift", "torch", "transformers", "vllm"),  # take seconds to import
    *("pebble", "stages.preprocess.data_juicer"),  # start processes
}
HEAVY_NAMES = {"need_model", "run_stage"}
"""Functions that return the folder of a real model, or run a whole stage in the test's process."""
CachedFunction = type(cache(len))


def is_heavy(item: pytest.Function) -> bool:
    """Whether a test is heavy, or one of its fixtures, or a helper that these call."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()  # pytest's public attributes name fixtures only
    return any(_is_heavy(function) for function in (item.function, *(found[-1].func for found in fixtures)))


@cache
def imports_heavy_module(path: Path) -> bool:
    """Whether importing a file imports a heavy module, directly or through other files of the project."""
    files, modules = [path], set[str]()
    for file in files:
        for name in _imported_modules(file):
            modules |= {name, name.partition(".")[0]}
            files += [other for other in _files_of(name) if other not in files]
    return not modules.isdisjoint(HEAVY_MODULES)


def _is_heavy(value: Any) -> bool:
    """Whether `value` is a heavy function of tests/, or a class of tests/ with one. Fixtures do not count here."""
    if not isinstance(value, FunctionType | CachedFunction | type) or not (value.__module__ or "").startswith("tests."):
        return False
    if isinstance(value, type):
        return any(_is_heavy(getattr(member, "__func__", member)) for member in vars(value).values())
    tested = getattr(value, "hypothesis", None)  # hypothesis wraps a property test
    return _is_heavy_function(inspect.unwrap(tested.inner_test if tested else value))


_known: dict[FunctionType, bool] = {}


def _is_heavy_function(function: FunctionType) -> bool:
    """Whether a function uses a heavy name, module or function."""
    if function not in _known:
        _known[function] = False  # the answer for recursive calls
        names = _names_in(function.__code__)
        ours = [name for name in names if name.partition(".")[0] in OUR_PACKAGES]
        modules = names | {f"{module}.{name}" for module in ours for name in names}  # `from stages.train import worker`
        values = [function.__globals__.get(name) for name in names]
        _known[function] = (
            not names.isdisjoint(HEAVY_NAMES)
            or any(map(_is_heavy_module, modules))
            or any(value is subprocess or _is_heavy(value) for value in values)
        )
    return _known[function]


def _names_in(code: CodeType) -> set[str]:
    """Names of globals, attributes and imported modules in a function and in functions inside it."""
    inside = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inside))


@cache
def _is_heavy_module(name: str) -> bool:
    """Whether a module is heavy, or one of the project's files that its import runs imports a heavy one."""
    return not HEAVY_MODULES.isdisjoint((name, name.partition(".")[0])) or any(
        map(imports_heavy_module, _files_of(name))
    )


@cache
def _files_of(module: str) -> list[Path]:
    """The project's files that importing a module runs: its own file and those of the packages around it."""
    parts = module.split(".")
    if parts[0] not in OUR_PACKAGES:
        return []
    folders = [REPOSITORY.joinpath(*parts[: end + 1]) for end in range(len(parts))]
    files = [*(folder / "__init__.py" for folder in folders), folders[-1].with_suffix(".py")]
    return [file for file in files if file.is_file()]


@cache
def _imported_modules(path: Path) -> list[str]:
    """Modules that a file imports. `from a import b` gives a and a.b, since b may be a module."""
    return list(_imports(ast.parse(path.read_text(encoding="utf-8")).body))


def _imports(statements: list[ast.stmt]) -> Iterator[str]:
    """Yield the modules that statements import, except for type checkers only."""
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            yield statement.module
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        elif isinstance(statement, ast.Try) or (isinstance(statement, ast.If) and not _is_for_type_checkers(statement)):
            yield from _imports(statement.body)


def _is_for_type_checkers(statement: ast.If) -> bool:
    """Whether a statement is `if TYPE_CHECKING`."""
    return isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING"
