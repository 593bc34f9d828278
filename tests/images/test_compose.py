"""The demo's recipe through the real Compose, on four of its documents, as somebody who is not root."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from stages.contract.files import read_jsonl
from tests.conftest import MODELS, REPOSITORY, Lorry
from tests.end_to_end.conftest import OPTIONS
from tests.images.conftest import VERSION, Containers, compose_environment
from tests.serve.test_servers import free_port
from tests.small_inputs import demo_subset

pytestmark = pytest.mark.images

__all__ = ["demo_subset"]

UID, GID = 4321, 4322
SETTINGS = " ".join(OPTIONS[i + 1] for i, option in enumerate(OPTIONS) if option == "--set") + " data.path=few"

TOKEN = "s3cret"

Compose = Callable[..., subprocess.CompletedProcess[str]]


def readable_by_all(folder: Path) -> None:
    """The test's own folders are root's and private; a caller without rights must reach his mounts."""
    for path in (folder, *folder.parents):
        if path == Path("/"):
            break
        path.chmod(path.stat().st_mode | 0o055)
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))


@pytest.fixture(scope="module")
def environment(demo_subset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    runs = tmp_path_factory.mktemp("runs")
    readable_by_all(demo_subset)
    readable_by_all(runs)
    os.chown(runs, UID, GID)
    return compose_environment(
        LORRY_UID=str(UID), LORRY_GID=str(GID), LORRY_DATA=str(demo_subset.parent), LORRY_MODELS=str(MODELS),
        LORRY_RUNS=str(runs), LORRY_PROFILE="tiny", LORRY_RUN="job", LORRY_SET=SETTINGS,
        COMPOSE_PROJECT_NAME="lorry-test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def call(compose: str, environment: dict[str, str], images: dict[str, str]) -> Iterator[Compose]:
    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [compose, "compose", *arguments],
            cwd=REPOSITORY,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=1500,
            check=False,
        )

    yield run
    run("down", "--volumes", "--timeout", "0")


@pytest.fixture(scope="module")
def job(call: Compose, environment: dict[str, str]) -> Path:
    """The run folder after `docker compose up eval`, with a SIGTERM in the middle of training."""
    runs = Path(environment["LORRY_RUNS"])
    up = subprocess.Popen(
        ["docker", "compose", "up", "eval"], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        while not list(runs.glob("job/train/checkpoints/tuned/checkpoint-*/complete.json")):
            assert up.poll() is None, up.stdout.read() if up.stdout else ""
            time.sleep(0.5)
        stopped = call("stop", "train")
        assert stopped.returncode == 0, stopped.stderr
        output, _ = up.communicate(timeout=600)
    finally:
        up.kill()
    assert "exited with code 75" in output or "exit 75" in output, output
    assert not (runs / "job" / "train" / "manifest.json").exists()
    again = call("up", "eval", "--exit-code-from", "eval")
    assert again.returncode == 0, again.stdout + again.stderr
    return runs / "job"


def manifest(job: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((job / stage / "manifest.json").read_text()))


def test_every_output_belongs_to_the_caller(job: Path) -> None:
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in [job, *job.rglob("*")]}
    assert owners == {(UID, GID)}


def test_training_went_on_after_the_stop(job: Path) -> None:
    made = manifest(job, "train")
    assert len(made["starts"]) == 2
    assert [decision["value"] for decision in made["decisions"] if decision["what"] == "resumed"]


def test_manifests_name_their_images(job: Path) -> None:
    for stage in ("preprocess", "train", "infer", "eval"):
        made = manifest(job, stage)
        assert made["image"] == f"lorry-{stage}:{made['version']}-cpu"
        assert made["target"] == "cpu" and made["revision"]


def test_answers_are_those_of_a_local_process(job: Path, environment: dict[str, str], tmp_path: Path) -> None:
    lorry = Lorry(Path(environment["LORRY_DATA"]), MODELS, tmp_path)
    local = lorry("entrypoints.lorry", "run", *OPTIONS, "--set", "data.path=few")
    assert local.code == 0, local.output
    for name in ("base", "tuned"):
        ours = read_jsonl(tmp_path / "job" / "infer" / "predictions" / f"{name}.jsonl")
        assert read_jsonl(job / "infer" / "predictions" / f"{name}.jsonl") == ours


def test_again_is_up_to_date(job: Path, call: Compose) -> None:
    again = call("up", "eval", "--exit-code-from", "eval")
    assert again.returncode == 0
    for stage in ("preprocess", "train", "infer", "eval"):
        logs = call("logs", "--no-log-prefix", "--tail", "5", stage)
        assert f"{stage}: up to date" in logs.stdout + logs.stderr


def test_vllm_answers_in_its_image(job: Path, call: Compose) -> None:
    base = (job / "infer" / "predictions" / "base.jsonl").read_text()
    done = call("run", "--rm", "--no-deps", "infer", "--set", "infer.engine=vllm", *with_settings())
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [(p["id"], p["answer"]) for p in read_jsonl(job / "infer" / "predictions" / "base.jsonl")]
    assert answers == [(p["id"], p["answer"]) for p in map(json.loads, base.splitlines())]


def with_settings() -> list[str]:
    """LORRY_SET as options: the command line's --set replaces the variable's."""
    return [part for setting in SETTINGS.split() for part in ("--set", setting)]


def test_containers_are_as_closed_as_they_can_be(job: Path, containers: Containers, call: Compose) -> None:
    found = containers.client.containers.list(all=True, filters={"label": "com.docker.compose.project=lorry-test"})
    assert {c.labels["com.docker.compose.service"] for c in found} == {"preprocess", "train", "infer", "eval"}
    for container in found:
        host = container.attrs["HostConfig"]
        assert host["ReadonlyRootfs"] and host["Init"] and host["NetworkMode"] == "none"
        assert host["CapDrop"] == ["ALL"] and "no-new-privileges:true" in host["SecurityOpt"]
        assert container.attrs["Config"]["User"] == f"{UID}:{GID}"
        writable = {mount["Destination"] for mount in container.attrs["Mounts"] if mount["RW"]}
        assert writable == {"/runs", "/caches"}
    shm = {c.labels["com.docker.compose.service"]: c.attrs["HostConfig"]["ShmSize"] for c in found}
    assert shm["train"] == shm["infer"] == 2**30


def check_server(port: int) -> None:
    """OpenAI's own client gets answers of base and adapter, as a whole and as a stream, with the token only."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0, timeout=300)
    assert [model.id for model in client.models.list().data] == ["base", "tuned"]
    for name in ("base", "tuned"):
        asked: dict[str, Any] = {
            "model": name,
            "messages": [{"role": "user", "content": "什么是阀？"}],
            "temperature": 0,
            "max_tokens": 8,
        }
        whole = client.chat.completions.create(**asked).choices[0].message.content
        chunks = client.chat.completions.create(**asked, stream=True)
        assert whole == "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_the_server_of_a_run_is_for_this_machine_only(job: Path, containers: Containers, call: Compose) -> None:
    """`up --wait` ends once the service is healthy. The recipe's engine answers."""
    port = str(free_port())
    up = call("up", "--detach", "--wait", "serve", LORRY_PORT=port, LORRY_API_KEY=TOKEN)
    try:
        assert up.returncode == 0, up.stdout + up.stderr + call("logs", "serve").stdout
        labels = ["com.docker.compose.project=lorry-test", "com.docker.compose.service=serve"]
        [container] = containers.client.containers.list(filters={"label": labels})
        host = container.attrs["HostConfig"]
        assert host["PortBindings"] == {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": port}]}
        assert (
            host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges:true"]
        )
        check_server(int(port))
        network = containers.client.networks.get("lorry-test_serve")
        assert network.attrs["Options"]["com.docker.network.bridge.enable_ip_masquerade"] == "false"
        assert call("stop", "serve").returncode == 0
        container.reload()
        assert container.attrs["State"]["ExitCode"] == 0
    finally:
        call("rm", "--force", "--stop", "serve")


def test_lorry_serve_starts_a_container(job: Path, call: Compose, environment: dict[str, str]) -> None:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "entrypoints.lorry",
        "serve",
        job.name,
        "--port",
        str(port),
        "--engine",
        "transformers",
    ]
    served = subprocess.Popen(
        command, cwd=REPOSITORY, env={**environment, "LORRY_API_KEY": TOKEN, "GPUS": ""}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        lines = []
        for line in served.stdout or ():
            lines.append(line)
            if "ready at" in line:
                break
        assert "ready at" in lines[-1], "".join(lines)
        check_server(port)
        served.send_signal(signal.SIGTERM)
        assert served.wait(60) == 0
    finally:
        served.kill()


def test_lorry_chat_reads_a_pipe(job: Path, call: Compose, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["docker", "compose", "run", "--rm", "-T", "chat", "--tuned-only", "--max-tokens", "4"], cwd=REPOSITORY,
        env=environment, input="什么是阀？\n", capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tuned: ")


def test_the_cards_asked_for_reach_the_engine(containers: Containers, call: Compose) -> None:
    """No card is needed to hand a request over: the engine looks for them when the container starts."""
    client = containers.client
    variables = {"TARGET": "rtx4090", "GPUS": "0,2", "LORRY_VERSION": "test", "COMPOSE_PROJECT_NAME": "lorry-cards"}
    try:
        for stage in ("preprocess", "train", "infer", "eval"):
            client.images.get(f"lorry-{stage}:{VERSION}-cpu").tag(f"lorry-{stage}", "test-rtx4090")
        created = call("create", **variables)
        assert created.returncode == 0, created.stderr
        found = client.containers.list(all=True, filters={"label": "com.docker.compose.project=lorry-cards"})
        asked = {c.labels["com.docker.compose.service"]: c.attrs["HostConfig"]["DeviceRequests"] for c in found}
        for stage in ("preprocess", "train", "infer"):
            [request] = asked[stage]
            assert (request["Driver"], request["DeviceIDs"], request["Capabilities"]) == ("nvidia", ["0,2"], [["gpu"]])
        assert not asked["eval"]
        [train] = [c for c in found if c.labels["com.docker.compose.service"] == "train"]
        assert "NCCL_P2P_DISABLE=1" in train.attrs["Config"]["Env"]
        if "nvidia" not in client.info()["Runtimes"]:  # then no card that was asked for may silently be left out
            started = call("up", "train", "--no-deps", **variables)
            assert started.returncode != 0 and "nvidia" in started.stderr
    finally:
        call("down", "--volumes", **variables)
        for stage in ("preprocess", "train", "infer", "eval"):
            client.images.remove(f"lorry-{stage}:test-rtx4090", force=True)
