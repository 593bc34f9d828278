"""The project's own files: one version, the licence, and what checks a commit."""

import hashlib
import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from entrypoints.lorry import main
from tests.conftest import REPOSITORY
from tests.images.tree import STAGES

PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
VERSION: str = PROJECT["version"]
REPEATS = re.compile(
    r"lorry-[a-z]+:(?P<image>[\d.]+)-"
    r"|newTag: (?P<tag>[\d.]+)-"
    r'|app\.kubernetes\.io/version: "(?P<label>[^"]*)"'
    r"|LORRY_VERSION:-(?P<compose>[^}]*)\}"
    r'|variable "VERSION" \{ default = "(?P<bake>[^"]*)" \}'
)
"""Where files that cannot read pyproject.toml repeat the version: nothing but the version stands there."""
REPEATING = ("README.md", "docs/*.md", "compose.yaml", "compose/*", "images/docker-bake.hcl", "k8s/**/*.yaml")


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def repeating_files() -> list[Path]:
    return sorted(path for pattern in REPEATING for path in REPOSITORY.glob(pattern))


# -- version -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", repeating_files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_the_version_is_repeated_right(path: Path) -> None:
    found = {match[match.lastgroup or 0] for match in REPEATS.finditer(path.read_text(encoding="utf-8"))}
    assert found <= {VERSION}


def test_every_way_to_repeat_the_version_is_in_use() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in repeating_files())
    assert {match.lastgroup for match in REPEATS.finditer(text)} == set(REPEATS.groupindex)


def test_no_other_file_repeats_the_version() -> None:
    """In stages/, entrypoints/ and scripts, importlib.metadata and pyproject.toml tell it."""
    files = [path for pattern in ("stages/**/*.py", "entrypoints/*.py", "images/**/*", "k8s/*.sh", "Makefile")
             for path in REPOSITORY.glob(pattern) if path.is_file() and path.suffix != ".txt"]  # fmt: skip
    alone = re.compile(rf"(?<![\w.=]){re.escape(VERSION)}(?![\w.])")
    texts = {path: REPEATS.sub("", path.read_text(encoding="utf-8")) for path in files}
    assert [path for path, text in texts.items() if alone.search(text)] == []


def test_the_installed_version_is_the_projects() -> None:
    assert importlib.metadata.version("lorry") == VERSION, "pyproject.toml has changed: make setup"


def test_lorry_prints_its_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"lorry {VERSION}\n"


def test_the_changelog_has_the_version() -> None:
    headings = re.findall(r"^## \[(.+)\]$", read("CHANGELOG.md"), re.M)
    assert headings[:2] == ["Unreleased", VERSION]


# -- licence -------------------------------------------------------------------------------------------------------


def test_the_licence_is_whole() -> None:
    """The text as the Apache Software Foundation publishes it."""
    digest = hashlib.sha256((REPOSITORY / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE", "NOTICE"])


def test_images_hold_the_licence() -> None:
    assert "COPY pyproject.toml LICENSE NOTICE /" in read("images/base/Dockerfile")
    assert {"!LICENSE", "!NOTICE"} <= set(read(".dockerignore").splitlines())


@pytest.mark.parametrize("stage", STAGES)
def test_the_notice_and_the_labels_say_which_images_hold_pymupdf(stage: str) -> None:
    locks = [*REPOSITORY.glob(f"images/{stage}/*.txt"), *REPOSITORY.glob("images/base/*.txt")]
    holds = any(re.search("^pymupdf==", lock.read_text(), re.M | re.I) for lock in locks)
    containing, lacking = re.split("Do not contain PyMuPDF:", read("NOTICE"), maxsplit=1)
    assert f"lorry-{stage}:*" in (containing if holds else lacking)
    assert f"lorry-{stage}:*" not in (lacking if holds else containing)
    licences = '"Apache-2.0 AND AGPL-3.0-only"' if holds else "Apache-2.0"
    assert f"org.opencontainers.image.licenses={licences}\n" in read(f"images/{stage}/Dockerfile")


def test_the_notice_says_which_environments_hold_pymupdf() -> None:
    holding = {path.name for path in REPOSITORY.glob("requirements/*.txt") if "\npymupdf==" in path.read_text()}
    assert holding == {"cpu.txt"}


# -- checks of a commit --------------------------------------------------------------------------------------------


def test_hooks_run_what_make_lint_runs_on_python() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert all(hook["entry"].startswith(f".venv/bin/{hook['name']}") for hook in repository["hooks"])
    linted = re.findall(r"\$\(BIN\)/(ruff \w+|mypy|lint-imports)\b", read("Makefile"))
    assert [hook["name"] for hook in repository["hooks"]] == linted


def test_the_workflow_runs_what_ci_runs() -> None:
    (job,) = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"].values()
    steps = job["steps"]
    assert [step["run"].split(" bash ")[-1] for step in steps if "run" in step] == [".ci/run"]
    (python,) = [step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})]
    assert PROJECT["requires-python"] == f">={python}"


def test_nothing_that_checks_a_commit_is_fetched_from_a_named_host() -> None:
    for name in (".pre-commit-config.yaml", ".github/workflows/ci.yml", ".ci/run", "Makefile"):
        assert "://" not in read(name), name


def test_contributing_names_every_suite() -> None:
    suites = re.findall(r"^([a-z-]*test[a-z-]*):.*## ", read("Makefile"), re.M)
    assert len(suites) == 4
    assert [suite for suite in suites if f"| `make {suite}` |" not in read("CONTRIBUTING.md")] == []
