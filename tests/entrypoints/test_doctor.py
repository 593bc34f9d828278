"""`lorry doctor`: its lines, its exit code, and how soon it answers."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Lorry

NO_ENGINE = {"DOCKER_HOST": "unix:///nowhere/docker.sock", "LORRY_TARGET": "cpu", "TARGET": "cpu"}

PROGRAM = """
import sys
from entrypoints.doctor import doctor
try:
    doctor([], standalone_mode=False)
except SystemExit as end:
    assert end.code == 0, end.code
assert "stages.host.doctor" in sys.modules
assert not {"torch", "numpy", "transformers"} & set(sys.modules)
"""


@pytest.fixture
def lorry(tmp_path: Path) -> Lorry:
    """Folders as they should be, on a machine without a Docker engine."""
    found = Lorry(tmp_path / "data", tmp_path / "models", tmp_path / "runs", NO_ENGINE)
    for folder in (found.data, found.models, found.runs):
        folder.mkdir()
    return found


def test_a_line_for_each_check_and_0_if_none_fails(lorry: Lorry) -> None:
    done = lorry("entrypoints.lorry", "doctor")
    states = {line[:12].strip() for line in done.lines}
    assert states <= {"ok", "warn", "not checked"}, done.output
    assert done.code == 0
    assert f"ok          folders: {lorry.data}: readable for uid {os.getuid()}" in done.lines


def test_the_exit_code_says_what_fails(lorry: Lorry) -> None:
    done = replace(lorry, models=lorry.data / "none")("entrypoints.lorry", "doctor")
    assert done.code == 2
    assert (
        f"FAIL        folders: {lorry.data}/none: no such folder; create it, or name another (LORRY_MODELS)"
        in done.lines
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target", "a100"), "target 'a100': no such target; known targets: cpu, v100"),
        (("no-such-recipe",), "no-such-recipe: no such recipe file"),
    ],
)
def test_wrong_use_is_one_line(lorry: Lorry, arguments: tuple[str, ...], says: str) -> None:
    done = lorry("entrypoints.lorry", "doctor", *arguments)
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert says in done.output


def test_it_answers_at_once_and_imports_nothing_heavy(lorry: Lorry) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env=lorry.environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 5, "about a second on an idle machine"
