"""Follows pages of docs/ to the letter: writes their files and runs their commands."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

_FILE = re.compile(r"^`([\w./-]+)`:\n\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Page:
    """The files that a page of docs/ has its reader write, and the commands that it has them run."""

    files: dict[str, str]
    """Text of each file by its path in the checkout."""
    commands: list[str]
    """The console lines, in the page's order."""


def read_page(name: str) -> Page:
    """Read the page docs/<name>."""
    text = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
    commands = [line for block in _CONSOLE.findall(text) for line in block.splitlines() if line.strip()]
    return Page(dict(_FILE.findall(text)), commands)


def copy_checkout(folder: Path) -> Path:
    """Copy the checkout's files into a folder and link its .venv there. Returns the folder."""
    listed = ["git", "-C", str(REPOSITORY), "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        source, place = REPOSITORY / name, folder / name
        if source.is_file() and not name.startswith(("benchmarks/results/", "docs/")):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place)
    (folder / ".venv").symlink_to(REPOSITORY / ".venv")
    return folder


def write_files(page: Page, checkout: Path) -> None:
    """Write the page's files into a checkout."""
    for name, text in page.files.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text, encoding="utf-8")


def run_command(command: str, checkout: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run one line of a page in a checkout, where `lorry` and `lorry-<stage>` are those of the checkout."""
    words = shlex.split(command)
    if words[0] == "lorry" or words[0].startswith("lorry-"):
        words = [sys.executable, "-m", f"entrypoints.{words[0].rpartition('-')[2]}", *words[1:]]
    return subprocess.run(
        words, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
