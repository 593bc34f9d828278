"""Which tests are heavy: those that need a model's weights or a library that runs them, and those that start a process.

`make test-fast` leaves them out. Nobody keeps a list: `is_heavy` reads the code of a test, of its fixtures and of the
helpers in tests/ that these call; `imports_heavy_module` reads what a module imports when it is loaded, so that a fast
run does not even load the modules that take seconds for that.
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
CachedFunction = type(cache(len))
HEAVY_HELPERS = {"need_model"}
"""Functions of tests/ that hand out real weights."""


def is_heavy(item: pytest.Function) -> bool:
    """Whether a test, one of its fixtures or a helper of theirs needs a model or starts a process."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()  # public names tell the fixtures, but not their functions
    return any(_is_heavy(function) for function in (item.function, *(found[-1].func for found in fixtures)))


@cache
def imports_heavy_module(path: Path) -> bool:
    """Whether loading this file of ours loads a heavy module, by itself or through other files of ours."""
    files, modules = [path], set[str]()
    for file in files:
        for name in _imported_by(file):
            modules |= {name, name.partition(".")[0]}
            files += [other for other in _files_of(name) if other not in files]
    return not modules.isdisjoint(HEAVY_MODULES)


def _is_heavy(value: Any) -> bool:
    """Whether a function, or any method of a class, in tests/ is heavy; a fixture is neither: nobody calls it."""
    if not isinstance(value, FunctionType | CachedFunction | type) or not value.__module__.startswith("tests."):
        return False
    if isinstance(value, type):
        return any(_is_heavy(getattr(member, "__func__", member)) for member in vars(value).values())
    tested = getattr(value, "hypothesis", None)  # a property test wraps the function that was written
    return _is_heavy_function(inspect.unwrap(tested.inner_test if tested else value))


_known: dict[FunctionType, bool] = {}


def _is_heavy_function(function: FunctionType) -> bool:
    if function not in _known:
        _known[function] = False  # what a recursive call finds
        names = _names_in(function.__code__)
        ours = [name for name in names if name.partition(".")[0] in OUR_PACKAGES]
        modules = names | {f"{module}.{name}" for module in ours for name in names}  # `from stages.train import worker`
        values = [function.__globals__.get(name) for name in names]
        _known[function] = (
            function.__name__ in HEAVY_HELPERS
            or any(map(_is_heavy_module, modules))
            or any(value is subprocess or _is_heavy(value) for value in values)
        )
    return _known[function]


def _names_in(code: CodeType) -> set[str]:
    """Names of globals, attributes and imported modules in a function and in those inside it."""
    inside = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inside))


@cache
def _is_heavy_module(name: str) -> bool:
    return not HEAVY_MODULES.isdisjoint((name, name.partition(".")[0])) or any(
        map(imports_heavy_module, _files_of(name))
    )


@cache
def _files_of(module: str) -> list[Path]:
    """Our files that importing a module runs: its own and those of the packages around it; none of other projects."""
    parts = module.split(".")
    if parts[0] not in OUR_PACKAGES:
        return []
    folders = [REPOSITORY.joinpath(*parts[: end + 1]) for end in range(len(parts))]
    files = [*(folder / "__init__.py" for folder in folders), folders[-1].with_suffix(".py")]
    return [file for file in files if file.is_file()]


@cache
def _imported_by(path: Path) -> list[str]:
    """Modules that a file imports when it is loaded; of `from a import b`, a and a.b, whatever b is."""
    return list(_imports(ast.parse(path.read_text(encoding="utf-8")).body))


def _imports(statements: list[ast.stmt]) -> Iterator[str]:
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            yield statement.module
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        elif isinstance(statement, ast.Try) or (isinstance(statement, ast.If) and not _for_type_checkers(statement)):
            yield from _imports(statement.body)


def _for_type_checkers(statement: ast.If) -> bool:
    return isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING"
