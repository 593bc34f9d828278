"""docs/add-a-card.md, followed to the letter in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.hardware.targets import load_targets, named_target
from tests.conftest import MODELS, REPOSITORY, need_model

PAGE = (REPOSITORY / "docs" / "add-a-card.md").read_text(encoding="utf-8")
if "rtx5090" in load_targets():  # somebody has followed the page here: take a card that does not exist
    PAGE = PAGE.replace("5090", "5099")
(CARD,) = set(re.findall(r"^\[(\w+)\]$", PAGE, flags=re.M))
COPIED = (
    *("benchmarks", "compose", "docs", "entrypoints", "images", "k8s", "recipes", "stages", "tests"),
    *("Makefile", "compose.yaml", "pyproject.toml"),
)
BLOCK = re.compile(r"(?P<before>[^\n]*\n)?\n```(?P<kind>\w*)\n(?P<text>.*?)```\n", re.S)

Shell = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with all that the page says to write, copy and add; its checks are not run yet."""
    folder = tmp_path_factory.mktemp("project")
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "models").symlink_to(MODELS)
    followed = 0
    for block in BLOCK.finditer(PAGE[: PAGE.index("## 4. Check it")]):
        before, text = block["before"] or "", block["text"]
        append = re.match(r"Append to `([^`]+)`:", before)
        row = re.match(r"Add below the row of `(\w+)` in `([^`]+)`", before)
        if append:
            with (folder / append[1]).open("a", encoding="utf-8") as file:
                file.write(text)
        elif row:
            path = folder / row[2]
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            (place,) = [number for number, line in enumerate(lines) if line.startswith(f"| `{row[1]}` |")]
            path.write_text("".join([*lines[: place + 1], text, *lines[place + 1 :]]), encoding="utf-8")
        else:
            assert block["kind"] == "console", before
            subprocess.run(["sh", "-euc", text], cwd=folder, check=True)
        followed += 1
    assert followed == 3, "the page has another form than this test reads"
    return folder


@pytest.fixture
def shell(project: Path) -> Shell:
    """Runs a command of the page in the copy. No Docker engine is in reach."""

    def run(command: str) -> "subprocess.CompletedProcess[str]":
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("LORRY_", "PYTEST_", "REGISTRY"))
        }
        environment |= {"PYTHONPATH": str(project), "DOCKER_HOST": "unix:///nowhere/docker.sock"}
        return subprocess.run(
            ["sh", "-euc", command], cwd=project, env=environment, capture_output=True, text=True, check=False
        )

    return run


def commands(section: str) -> list[str]:
    """The commands in the blocks of a section of the page."""
    text = PAGE[PAGE.index(f"## {section}") :].partition("\n## ")[0]
    return [line for block in BLOCK.finditer(text) for line in block["text"].splitlines()]


def test_the_card_becomes_a_target(project: Path) -> None:
    target = named_target(CARD, load_targets(project / "images" / "targets.toml"))
    assert (target.capability, target.memory_gib, target.cuda) == ((12, 0), 32, "cu130")


def test_the_checks_of_the_page_pass(shell: Shell) -> None:
    (check,) = [command for command in commands("4. Check it") if "pytest" in command]
    done = shell(check)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 14, done.stdout
    assert "skipped" not in done.stdout


def test_the_checks_see_files_that_are_left_out(shell: Shell, project: Path, tmp_path: Path) -> None:
    (check,) = [command for command in commands("4. Check it") if "pytest" in command]
    files = [project / "compose" / f"{CARD}.env", project / "k8s" / "overlays" / CARD / "kustomization.yaml"]
    moved = [shutil.move(path, tmp_path / path.name) for path in files]
    try:
        done = shell(check.replace("tests/hardware ", ""))
    finally:
        for path, place in zip(files, moved, strict=True):
            shutil.move(place, path)
    assert done.returncode == 1
    assert f"FAILED tests/images/test_build.py::test_a_target_has_an_env_file_that_agrees[{CARD}]" in done.stdout
    assert f"FAILED tests/k8s/test_manifests.py::TestOverlays::test_is_whole[{CARD}]" in done.stdout


def test_lorry_plans_for_the_card(shell: Shell) -> None:
    need_model("SmolLM2-135M-Instruct")
    (plan,) = [command for command in commands("4. Check it") if "lorry plan" in command]
    done = shell(plan)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"on 2 x {CARD} of 32 GiB, in bfloat16" in done.stdout
    assert re.search(r"^fits: ", done.stdout.splitlines()[-1])


def test_compose_reads_the_new_files(shell: Shell) -> None:
    (config,) = [command for command in commands("4. Check it") if "docker compose" in command]
    if shell("docker compose version").returncode != 0:
        pytest.skip("no Docker Compose here")
    done = shell(config.replace("--quiet", ""))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"-{CARD}\n" in done.stdout and "NCCL_P2P_DISABLE" in done.stdout


def test_kubectl_builds_the_overlay(shell: Shell) -> None:
    (build,) = [command for command in commands("4. Check it") if "kubectl" in command]
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here")
    done = shell(build)
    assert done.returncode == 0, done.stderr
    assert f"-{CARD}\n" in done.stdout and '- "32000"' in done.stdout
    assert "4090" not in done.stdout


def test_its_images_can_be_built(shell: Shell) -> None:
    """As far as an engine is needed: target, line and locks are known."""
    (build,) = [command for command in commands("5. Build and run it") if command.startswith("make images")]
    done = shell(build)
    assert "no Docker engine answers" in done.stderr
