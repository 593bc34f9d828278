"""`lorry launch` on a real engine, with stage images that hold a script in the place of the stage."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, Finished, Lorry
from tests.other_user import UID, folder_for_all, run_as_other_user

pytestmark = pytest.mark.images

VERSION = "0.0.0-test"
PROJECT = "lorry-launch-test"
STAGES = ("preprocess", "train", "infer", "eval")

SCRIPT = """\
#!/usr/bin/python3
import os, pathlib, signal, sys, time
def stop(number, _):
    print("asked to stop by", signal.Signals(number).name, flush=True)
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
stage = pathlib.Path(sys.argv[0]).name
print(stage, *sys.argv[1:], {name: value for name, value in os.environ.items() if value and name in
    ("LORRY_DATA_FROM", "LORRY_RECIPE", "LORRY_PROFILE", "LORRY_RUN", "LORRY_SET")}, flush=True)
pathlib.Path("/runs/written-by-" + stage).write_text("")
if "wait" in sys.argv:
    time.sleep(60)
if stage + "-fails" in sys.argv:
    sys.exit(3)
if "killed" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
if "show" in sys.argv:
    print(open(sys.argv[1]).read(), sorted(os.listdir("/data")))
"""

DOCKERFILE = """\
FROM {base}
LABEL org.opencontainers.image.version={version}
COPY --chmod=755 stage /{stage}
ENTRYPOINT ["/{stage}"]
"""


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    docker = pytest.importorskip("docker")
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine answers: {error}")
    yield client
    client.close()


@pytest.fixture(scope="session")
def images(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """lorry-<stage>:<VERSION>-cpu, and one whose label says another version."""
    base = os.environ.get("BASE_IMAGE", "lorry-local/debian:bookworm")
    folder = tmp_path_factory.mktemp("images")
    (folder / "stage").write_text(SCRIPT)
    names = []
    for stage in STAGES:
        (folder / "Dockerfile").write_text(DOCKERFILE.format(base=base, stage=stage, version=VERSION))
        names.append(f"lorry-{stage}:{VERSION}-cpu")
        command = ["docker", "build", "--quiet", "--tag", names[-1], str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    names.append(f"lorry-preprocess:{VERSION}.9-cpu")
    engine.images.get(names[0]).tag(names[-1])
    yield
    for name in names:
        engine.images.remove(name, force=True)


@pytest.fixture
def launched(engine: Any, images: None, lorry: Lorry) -> Iterator[Lorry]:
    """The commands, with mounts that the containers' user may use, in a Compose project of the test's own."""
    extra = {"LORRY_VERSION": VERSION, "COMPOSE_PROJECT_NAME": PROJECT, "TARGET": "cpu", "GPUS": "", "REGISTRY": ""}
    extra |= dict.fromkeys(("LORRY_UID", "LORRY_GID", "LORRY_RECIPE", "LORRY_PROFILE", "LORRY_RUN", "PULL"), "")
    with folder_for_all() as folder:
        for name in ("data", "models", "runs"):
            (folder / name).mkdir()
        (folder / "runs").chmod(0o777)
        yield replace(lorry, data=folder / "data", models=folder / "models", runs=folder / "runs", extra=extra)
        left = engine.containers.list(all=True, filters={"label": f"com.docker.compose.project={PROJECT}"})
        for container in left:
            container.remove(force=True)
        for volume in engine.volumes.list(filters={"label": f"com.docker.compose.project={PROJECT}"}):
            volume.remove(force=True)
        assert not left, "a container was left behind"


def launch(lorry: Lorry, *arguments: str, **variables: str) -> Finished:
    return replace(lorry, extra={**lorry.extra, **variables})("entrypoints.lorry", "launch", *arguments)


def test_a_stage_and_those_before_it_run_in_containers(launched: Lorry, engine: Any) -> None:
    done = launch(launched, "train", "--run", "r", "--profile", "tiny", "--set", "a=x y", "--force")
    version = engine.version()["Version"]
    first, *lines = done.lines
    assert first.startswith(f"Docker engine {version} at ")
    assert first.endswith(f": running lorry-train:{VERSION}-cpu")
    assert lines == [
        "preprocess --profile tiny --run r --set a=x y {}",
        "train --profile tiny --run r --set a=x y --force {}",
    ]
    assert done.code == 0


def test_the_outputs_belong_to_the_caller(launched: Lorry) -> None:
    owner = UID if os.getuid() == 0 else os.getuid()
    assert launch(launched, "preprocess", "--run", "r").code == 0
    assert [path.stat().st_uid for path in launched.runs.iterdir()] == [owner]


@pytest.mark.skipif(os.getuid() != 0, reason="about root as the caller")
def test_roots_own_runs_folder_is_handed_to_the_images_user(launched: Lorry) -> None:
    launched.runs.chmod(0o755)  # as a checkout of root's has it
    assert launch(launched, "preprocess", "--run", "r").code == 0
    assert launched.runs.stat().st_uid == UID
    assert launch(launched, "preprocess", "--run", "r", LORRY_UID="0").code == 0  # never as root
    assert [path.stat().st_uid for path in launched.runs.iterdir()] == [UID]


def test_several_machines_are_refused(launched: Lorry) -> None:
    done = launch(launched, "train", "--run", "r", LORRY_NODES="2")
    assert done.code == 2
    assert len(done.lines) == 1 and "no network" in done.lines[0]


def test_a_missing_runs_folder_is_made_for_the_caller(launched: Lorry) -> None:
    fresh = replace(launched, runs=launched.runs / "not" / "yet")
    assert launch(fresh, "preprocess", "--run", "r").code == 0
    assert (fresh.runs / "written-by-preprocess").exists()


def test_this_machines_recipe_and_data_reach_the_container(launched: Lorry, tmp_path: Path) -> None:
    folder = launched.runs.parent
    recipe = folder / "mine.yaml"
    recipe.write_text("as edited here")
    data = folder / "input"
    (data / "documents").mkdir(parents=True)
    done = launch(launched, "preprocess", str(recipe), "--data", str(data), "--run", "show")
    assert done.lines[1:] == [
        f"preprocess /recipe/mine.yaml --data {data} --run show {{'LORRY_DATA_FROM': '{data}'}}",
        "as edited here ['documents']",
    ]


def test_the_folder_of_a_data_file_reaches_the_container(launched: Lorry) -> None:
    """With the pictures that the file may name."""
    folder = launched.runs.parent
    recipe = folder / "mine.yaml"
    recipe.write_text("as edited here")
    data = folder / "input" / "chats.jsonl"
    data.parent.mkdir()
    data.write_text("{}")
    done = launch(launched, "preprocess", str(recipe), "--data", str(data), "--run", "show")
    assert done.lines[1:] == [
        f"preprocess /recipe/mine.yaml --data {data} --run show {{'LORRY_DATA_FROM': '{data.parent}'}}",
        "as edited here ['chats.jsonl']",
    ]


def test_a_shard_runs_alone(launched: Lorry) -> None:
    done = launch(launched, "infer", "--run", "r", LORRY_SHARD="1/3")
    assert done.lines[1:] == ["infer --run r --shard 1/3 {}"]


def test_the_exit_code_of_the_stage_that_fails_ends_it(launched: Lorry) -> None:
    done = launch(launched, "eval", "--run", "train-fails")
    assert done.code == 3
    assert [line.split()[0] for line in done.lines[1:]] == ["preprocess", "train"]


def test_a_stage_that_the_kernel_kills_is_reported(launched: Lorry) -> None:
    done = launch(launched, "preprocess", "--run", "killed")
    assert done.code == 1
    assert done.lines[-1] == "preprocess: ended by SIGKILL; run the same command again to resume"


@pytest.mark.usefixtures("hang_up")
@pytest.mark.parametrize(
    ("number", "seen"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT"), (signal.SIGHUP, "SIGTERM")],
    ids=["SIGTERM", "SIGINT", "SIGHUP"],
)
def test_a_stop_reaches_the_stage_which_saves(launched: Lorry, number: int, seen: str) -> None:
    process = launched.start("entrypoints.lorry", "launch", "train", "--run", "wait")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Docker engine ")
    assert process.stdout.readline().startswith("preprocess ")
    os.killpg(process.pid, number)  # as a terminal does: the whole group
    output, _ = process.communicate(timeout=30)
    assert output.splitlines() == [f"asked to stop by {seen}", "saved"]
    assert process.returncode == 75


def test_a_stop_before_the_container_is_there_is_not_lost(launched: Lorry) -> None:
    process = launched.start("entrypoints.lorry", "launch", "preprocess", "--run", "wait")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Docker engine ")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_doctor_sees_the_engine_and_its_images(launched: Lorry, engine: Any) -> None:
    done = launched("entrypoints.lorry", "doctor")
    assert done.code == 0, done.output
    assert f"ok          Docker engine: version {engine.version()['Version']} at " in done.output
    assert f"ok          images: of cpu, version {VERSION}: preprocess, train, infer, eval" in done.output
    other = replace(launched, extra={**launched.extra, "LORRY_VERSION": "0.0.0-none"})("entrypoints.lorry", "doctor")
    assert other.code == 2
    assert "FAIL        images: lorry-train:0.0.0-none-cpu: no such image; run `make images TARGET=cpu`" in other.output


# -- wrong use -----------------------------------------------------------------------------------------------------


def refused(done: Finished, code: int, *told: str) -> None:
    assert (done.code, len(done.lines)) == (code, 1), done.output
    for words in told:
        assert words in done.output


def test_an_image_that_is_not_there(launched: Lorry) -> None:
    done = launch(launched, "preprocess", LORRY_VERSION="0.0.0-none")
    refused(done, 2, "lorry-preprocess:0.0.0-none-cpu: no such image; run `make images TARGET=cpu`")


def test_an_image_of_another_version(launched: Lorry) -> None:
    done = launch(launched, "preprocess", LORRY_VERSION=f"{VERSION}.9")
    refused(done, 2, f": holds Lorry {VERSION}, but its name says {VERSION}.9")


def test_an_engine_without_nvidia(launched: Lorry, engine: Any) -> None:
    if "nvidia" in engine.info()["Runtimes"] or shutil.which("nvidia-container-runtime-hook"):
        pytest.skip("this engine has it")
    done = launch(launched, "train", "patent-qa", TARGET="a800", GPUS="0,2")
    refused(
        done, 4, "target a800: needs GPUs, but this Docker engine has no NVIDIA runtime", "nvidia-container-toolkit"
    )


def test_no_client_with_compose(launched: Lorry) -> None:
    refused(
        launch(launched, "preprocess", PATH="/nowhere"),
        2,
        "PATH: a Docker engine answers, but no docker client on it has the compose plugin",
    )


def test_folders_that_are_not_there(launched: Lorry) -> None:
    done = launch(replace(launched, models=launched.runs / "no-models"), "preprocess", "--run", "r")
    refused(done, 2, f"{launched.runs}/no-models: no such folder to mount; create it, or set LORRY_MODELS to another")


def test_a_user_whom_the_socket_does_not_admit(launched: Lorry, engine: Any) -> None:
    address = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    path = Path(address.removeprefix("unix://"))
    if not path.is_socket() or path.stat().st_mode & 0o006 or path.stat().st_uid == UID:
        pytest.skip(f"{address} is no socket that keeps others out")
    environment = {**launched.environment, "HOME": str(launched.runs), "DOCKER_HOST": address}
    done = run_as_other_user(environment, "entrypoints.lorry", "launch", "train", "patent-qa")
    refused(done, 2, f"{address}: no permission on this socket of the Docker engine")


def test_make_calls_it(launched: Lorry) -> None:
    """`make train` as docs/cards-and-images.md has it."""
    if shutil.which("make") is None or not (REPOSITORY / ".venv" / "bin" / "lorry").exists():
        pytest.skip("the Makefile's environment is not here")
    command = [
        "make",
        "--silent",
        "--old-file=.venv/.host",
        "train",
        "RECIPE=patent-qa",
        "RUN=r",
        "GPUS=",
        "TARGET=cpu",
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=launched.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train /recipe/patent-qa.yaml --run r {}" in done.stdout
