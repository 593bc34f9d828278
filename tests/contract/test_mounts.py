"""A runs mount that cannot be written is one line, with whose it is and what to do, and exit code 2."""

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stages.contract.machine_errors import machine_error
from tests.conftest import Finished, Lorry
from tests.other_user import UID, folder_for_all, run_as_other_user


@pytest.fixture
def mounts(small_mounts: Lorry, recipe_file: Path) -> Iterator[Lorry]:
    """The mounts of the other tests, where another user reaches them; `runs` belongs to that user."""
    with folder_for_all() as folder:
        for source in (small_mounts.data, small_mounts.models):
            shutil.copytree(source, folder / source.name)
        shutil.copy(recipe_file, folder / "small.yaml")
        (folder / "runs").mkdir()
        os.chown(folder / "runs", UID, UID) if os.getuid() == 0 else None
        yield replace(small_mounts, data=folder / "data", models=folder / "models", runs=folder / "runs")


def preprocess(mounts: Lorry) -> Finished:
    recipe = str(mounts.runs.parent / "small.yaml")
    return run_as_other_user(mounts.environment, "tests.contract.some_stage", "write", recipe)


def refused(done: Finished, folder: Path) -> None:
    assert done.code == 2, done.output
    assert len(done.lines) == 1, done.output
    assert f"{folder} belongs to uid 0, this process is uid {UID}" in done.output
    assert f"chown -R {UID}:{UID} {folder}," in done.output
    assert "LORRY_UID=$(id -u) LORRY_GID=$(id -g)" in done.output


def test_outputs_belong_to_whoever_ran_it(mounts: Lorry) -> None:
    assert preprocess(mounts).code == 0
    owners = {path.stat().st_uid for path in (mounts.runs / "r").rglob("*")}
    assert owners == {UID}


def test_a_runs_mount_of_another_user(mounts: Lorry) -> None:
    os.chown(mounts.runs, 0, 0)
    refused(preprocess(mounts), mounts.runs)


def test_a_runs_mount_of_another_user_in_a_pod(mounts: Lorry) -> None:
    os.chown(mounts.runs, 0, 0)
    pod = {"LORRY_IMAGE": "lorry-train:0.1.0-a800", "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    done = preprocess(replace(mounts, extra=pod))
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert "give the pod its group (securityContext: fsGroup 0) or its uid (runAsUser)" in done.output
    assert "Compose" not in done.output


def test_a_run_of_another_user_in_a_mount_of_ones_own(mounts: Lorry) -> None:
    (mounts.runs / "r").mkdir()
    os.chown(mounts.runs / "r", 0, 0)
    refused(preprocess(mounts), mounts.runs / "r")


def test_a_run_that_root_has_begun(mounts: Lorry) -> None:
    done = mounts("tests.contract.some_stage", "write", str(mounts.runs.parent / "small.yaml"))
    assert done.code == 0
    os.chown(mounts.runs / "r", UID, UID)
    done = preprocess(mounts)
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert f"belongs to uid 0, this process is uid {UID}" in done.output
    assert f"chown -R {UID}:{UID} {mounts.runs}/r/preprocess," in done.output


def test_a_mount_of_ones_own_without_the_permission(mounts: Lorry) -> None:
    mounts.runs.chmod(0o555)
    done = preprocess(mounts)
    assert done.code == 2
    assert (
        f"{mounts.runs} belongs to this uid {UID}, but its mode forbids access; chmod -R u+rwX {mounts.runs}"
        in done.output
    )


def test_data_that_may_not_be_read(mounts: Lorry) -> None:
    questions = mounts.data / "few" / "questions.jsonl"
    questions.chmod(0o600)
    os.chown(questions, 0, 0)
    done = preprocess(mounts)
    assert (done.code, len(done.lines)) == (2, 1), done.output
    assert f"{questions}: not permitted (Permission denied); {questions} belongs to uid 0" in done.output


def test_a_read_only_mount_says_to_mount_it_otherwise() -> None:
    message = str(machine_error(OSError(errno.EROFS, "Read-only file system", "/runs/r")))
    assert "the run folder writable (mount it read-write)" in message
