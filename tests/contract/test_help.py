"""`--help` answers at once, because it imports nothing heavy."""

import subprocess
import sys
import tomllib

import pytest

from tests.conftest import REPOSITORY

HEAVY = [
    "torch",
    "transformers",
    "peft",
    "swift",
    "vllm",
    "sentence_transformers",
    "pymupdf",
    "pyarrow",
    "numpy",
    "pandas",
    "PIL",
    "datasets",
    "pebble",
    "docker",
    "pydantic",
    "stages.contract.recipe",
    "stages.tasks.patent_qa",
]

COMMANDS = ["preprocess", "train", "infer", "eval", "lorry", "serve", "chat"]

PROGRAM = """
import runpy, sys
sys.argv = [sys.argv[1], *sys.argv[2:]]
try:
    runpy.run_module(sys.argv[0], run_name="__main__")
finally:
    print("IMPORTED", *sorted(sys.modules))
"""


def imported_by(module: str, *arguments: str) -> tuple[str, set[str]]:
    """The output of a module run as a command, and the modules that it imports. Fails if there is no such module."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, module, *arguments], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    output, _, modules = done.stdout.rpartition("IMPORTED")
    return output, set(modules.split())


def test_every_command_is_checked() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert sorted(scripts.values()) == sorted(f"entrypoints.{command}:main" for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    output, modules = imported_by(f"entrypoints.{command}", "--help")
    assert "Usage:" in output
    assert modules & set(HEAVY) == set()


def test_a_command_that_is_gone_fails() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        imported_by("entrypoints.gone", "--help")


def test_the_check_sees_a_heavy_import() -> None:
    _, modules = imported_by("stages.preprocess.render")
    assert "pymupdf" in modules


@pytest.mark.parametrize("module", ["stages.contract.stage", "stages.contract.recipe", "stages.hardware.targets"])
def test_contract_and_hardware_are_light(module: str) -> None:
    _, modules = imported_by(module)
    assert modules & (set(HEAVY) - {"pydantic", "stages.contract.recipe"}) == set()
