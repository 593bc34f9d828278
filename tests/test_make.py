"""What `make` gives to the commands, in a copy of the checkout in which `lorry` prints its arguments."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.hardware.targets import load_targets
from tests.conftest import REPOSITORY, Finished

LORRY = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([sys.argv[1:], os.environ.get("LORRY_SET"), os.environ.get("LORRY_TARGET")]))
"""
READY = [f"--old-file={name}" for name in (".venv/.host", ".venv/.ready", ".venv/.gptq", "models/.ready")]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


class Make:
    """Runs `make` in the copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str, **variables: str) -> Finished:
        """Run `make` with these arguments and further environment variables."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("LORRY_", "MAKE"))}
        done = subprocess.run(
            ["make", "--silent", *READY, *arguments],
            cwd=self.folder,
            env={**environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return Finished(done.returncode, done.stdout, 0)

    def lorry(self, *arguments: str, **variables: str) -> list[str]:
        """The arguments that `lorry` gets, and after them LORRY_SET if it is set."""
        done = self(*arguments, **variables)
        assert done.code == 0, done.output
        given, settings, _ = json.loads(done.output)
        return [*given, f"LORRY_SET={settings}"] if settings else given

    def refused(self, *arguments: str, **variables: str) -> str:
        """The error with which make ends."""
        done = self(*arguments, **variables)
        errors = [line for line in done.lines if not line.startswith("make: ***")]
        assert (done.code, len(errors)) == (2, 1), done.output
        return errors[0]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    for name in ("Makefile", "compose", "images/targets.toml", "images/build.sh"):
        source, copy = REPOSITORY / name, tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "lorry").write_text(LORRY)
    (tmp_path / ".venv" / "bin" / "lorry").chmod(0o755)
    return Make(tmp_path)


ODD = ("my docs", "it's", 'a "b" c', "$HOME", "$$", "$(shell echo x)", "`echo x`", "a#b", "a;b", "*", "ä%")


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("by_environment", [False, True])
def test_a_value_reaches_the_command_as_typed(make: Make, value: str, by_environment: bool) -> None:
    names = {"RECIPE": value, "PROFILE": value, "RUN": value, "DATA": value, "GPUS": value, "TARGET": value}
    options = ["--profile", value, "--run", value, "--data", value, "--gpus", value, "--target", value]
    given = [] if by_environment else [f"{name}={value}" for name in names]
    assert make.lorry("train", *given, **(names if by_environment else {})) == ["launch", "train", value, *options]
    assert make.lorry("ledger", f"RUN={value}", f"OUT={value}") == ["ledger", value, "--out", value]


def test_a_launch_on_kubernetes_takes_the_variables_of_the_other_verbs(make: Make) -> None:
    given = ["RECIPE=my.yaml", "PROFILE=tiny", "RUN=my run", "DATA=docs", "GPUS=auto:4", "TARGET=a800", "SET=seed=7"]
    options = ["--profile", "tiny", "--run", "my run", "--data", "docs", "--gpus", "auto:4", "--target", "a800"]
    more = ["--namespace", "lab", "--registry", "host/team", "--kubernetes", "my cluster.yaml"]
    launch = ["launch", "eval", "--on", "kubernetes"]
    assert make.lorry("k8s-run", "TARGET=a800") == [*launch, "patent-qa", "--target", "a800"]
    assert make.lorry("k8s-run", *given, "NAMESPACE=lab", "REGISTRY=host/team", "KUBERNETES=my cluster.yaml") == [
        *launch,
        "my.yaml",
        *options,
        *more,
        "LORRY_SET=seed=7",
    ]


def test_settings_reach_it_as_one_variable(make: Make) -> None:
    settings = 'train.connector={epochs: 2, max_length: 64} train.note="$5" seed=7'
    assert make.lorry("infer", f"SET={settings}")[-1] == f"LORRY_SET={settings}"
    assert make.lorry("infer", LORRY_SET="seed=1")[-1] == "LORRY_SET=seed=1"
    assert make.lorry("infer", "SET=seed=2", LORRY_SET="seed=1")[-1] == "LORRY_SET=seed=2"


def test_the_demo_takes_the_variables_of_the_other_verbs(make: Make) -> None:
    plain = ["run", "patent-qa", "--profile", "tiny", "--run"]
    assert make.lorry("demo") == make.lorry("demo", "TARGET=cpu") == [*plain, "demo"]
    own = make.lorry("demo", "RUN=my run", "PROFILE=small", "SET=seed=3", "DATA=my docs")
    assert own == ["run", "patent-qa", "--profile", "small", "--run", "my run", "--data", "my docs", "LORRY_SET=seed=3"]
    assert make.lorry("demo", "RECIPE=logic-choice")[-1] == "demo-logic-choice"
    first, second = make.lorry("demo", "DATA=a/docs"), make.lorry("demo", "DATA=b/docs")
    assert first[-3].startswith("demo-docs-") and first[-3] != second[-3], "each folder has its own run"
    for variable in ("GPUS=0", "TARGET=a800"):
        assert make.refused("demo", variable).startswith("error: make demo runs on the CPU; leave out GPUS and TARGET")


def test_the_demo_quantises_nothing(make: Make) -> None:
    for name in ("requirements/host.txt", "requirements/cpu.txt", "requirements/dev.txt", "requirements/gptq.txt"):
        (make.folder / name).parent.mkdir(exist_ok=True)
        (make.folder / name).touch()
    for name in ("pyproject.toml", "recipes/demo_models.py"):
        (make.folder / name).parent.mkdir(exist_ok=True)
        (make.folder / name).touch()

    def steps(goal: str) -> str:
        done = subprocess.run(["make", "--dry-run", goal], cwd=make.folder, capture_output=True, text=True, check=True)
        return done.stdout

    assert "demo_models.py models" in steps("demo") and "gptq" not in steps("demo").lower()
    assert "requirements/gptq.txt" in steps("setup"), "for the tests"


@pytest.mark.parametrize("target", ["xyz", "cpu h100", "../compose/cpu", "$TARGET", "*"])
def test_an_env_file_for_an_unknown_target_is_refused(make: Make, target: str) -> None:
    known = " ".join(sorted(load_targets()))
    assert make.refused(".env", f"TARGET={target}") == f"error: no target '{target}'; known targets: {known}"
    assert not (make.folder / ".env").exists()


def test_an_env_file_for_the_cpu_chooses_models_that_it_can_run(make: Make) -> None:
    assert make(".env", "TARGET=cpu").code == 0
    written = (make.folder / ".env").read_text().splitlines()
    assert written[0] == "TARGET=cpu" and "LORRY_PROFILE=tiny" in written
    assert make.refused(".env") == "error: .env exists; edit it, or delete it first"
    (make.folder / ".env").unlink()
    assert make(".env").code == 0
    assert "LORRY_PROFILE" not in (make.folder / ".env").read_text()


def test_a_python_that_is_not_there_is_not_an_old_one(make: Make) -> None:
    for name in ("requirements/host.txt", "pyproject.toml"):
        (make.folder / name).parent.mkdir(exist_ok=True)
        (make.folder / name).touch()
    done = subprocess.run(
        ["make", ".venv/.host", "PYTHON=no such python"], cwd=make.folder, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2,
        "error: no such python: no such command; name a Python from 3.11 on: make .venv/.host PYTHON=python3.12",
    )
