"""Commands run as a user who is not the one that runs the tests, which needs root."""

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


def as_other_user(environment: dict[str, str], module: str, *arguments: str) -> Finished:
    """Run `python -m module arguments` as uid and gid 1000."""
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
    """A temporary folder that every user may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="lorry-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
