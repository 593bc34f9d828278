"""A wheel of Lorry holds what its commands read: recipes, targets, templates."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Finished


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of a real wheel, which is what pip installs from it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools writes into the tree that it builds
    for name in ("stages", "entrypoints", "recipes", "images"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    for name in ("pyproject.toml", "LICENSE", "NOTICE"):
        shutil.copy(REPOSITORY / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def lorry(installed: Path, *arguments: str) -> Finished:
    """Run the installed `lorry` in an empty folder."""
    empty = installed.parent / "empty"
    empty.mkdir(exist_ok=True)
    mounts = dict.fromkeys(("LORRY_DATA", "LORRY_MODELS", "LORRY_RUNS"), "")
    done = subprocess.run(
        [sys.executable, "-m", "entrypoints.lorry", *arguments],
        cwd=empty,
        env={**os.environ, **mounts, "PYTHONPATH": str(installed), "DOCKER_HOST": "unix:///nowhere"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Finished(done.returncode, done.stdout, 0)


def test_the_recipes_are_in_it(installed: Path) -> None:
    done = lorry(installed, "recipe", "list")
    names = sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.yaml"))
    assert (done.code, [line.split()[0] for line in done.lines]) == (0, names)
    assert lorry(installed, "recipe", "show", "patent-qa", "--profile", "tiny").code == 0


def test_the_targets_are_in_it(installed: Path) -> None:
    done = lorry(installed, "plan", "patent-qa", "--profile", "tiny", "--target", "a800")
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert "empty/models/SmolLM2-135M-Instruct: no such model folder" in done.output
    done = lorry(installed, "doctor", "--target", "rtx9999")
    known = tomllib.loads((REPOSITORY / "images" / "targets.toml").read_text())
    assert (done.code, done.lines) == (
        2,
        [f"error: target 'rtx9999': no such target; known targets: {', '.join(known)}"],
    )
    assert "Traceback" not in lorry(installed, "doctor").output


def test_the_files_of_the_report_and_the_ledger_are_in_it(installed: Path) -> None:
    for name in ("eval/report.html.jinja", "results/ledger.html"):
        assert (installed / "stages" / name).read_bytes() == (REPOSITORY / "stages" / name).read_bytes()
    assert not (installed / "recipes" / "data").exists()


def test_its_requirements_are_the_hosts(installed: Path) -> None:
    (metadata,) = installed.glob("*.dist-info/METADATA")
    stated = re.findall(r"^Requires-Dist: (\S+)", metadata.read_text(), re.MULTILINE)
    wanted = re.findall(r"^[a-z][\w-]+", (REPOSITORY / "requirements" / "host.in").read_text(), re.MULTILINE)
    assert sorted(stated) == sorted(set(wanted) - {"setuptools"})


def test_without_recipes_it_says_so(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(installed, tmp_path / "site", ignore=shutil.ignore_patterns("recipes", "targets.toml"))
    done = lorry(tmp_path / "site", "recipe", "list")
    assert (done.code, done.lines) == (
        2,
        [f"error: {tmp_path}/site/recipes: no recipes here; install Lorry again, or name a recipe by its path"],
    )
    done = lorry(tmp_path / "site", "doctor")
    assert (done.code, done.lines) == (
        2,
        [f"error: {tmp_path}/site/images/targets.toml: no such file; install Lorry again"],
    )
