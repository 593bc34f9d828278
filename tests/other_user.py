"""Runs commands as another user than the one who runs the tests, who must be root."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Finished

UID = 1000


def run_as_other_user(environment: dict[str, str], module: str, *arguments: str) -> Finished:
    """Run `python -m module arguments` as uid and gid 1000. Skips the test if that is not possible."""
    prefix = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can run a command as another user, with setpriv of util-linux")
    if subprocess.run([*prefix, "test", "-r", f"{REPOSITORY}/pyproject.toml"], check=False).returncode != 0:
        pytest.skip(f"{REPOSITORY} cannot be read by uid {UID}")
    command = [*prefix, sys.executable, "-B", "-m", module, *arguments]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Finished(done.returncode, done.stdout, 0)


@contextmanager
def folder_for_all() -> Iterator[Path]:
    """Make a temporary folder that all users may enter, unlike pytest's, and delete it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="lorry-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
