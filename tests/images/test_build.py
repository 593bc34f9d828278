"""images/build.sh where it must refuse, and the files beside it that must agree. No engine is needed."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from stages.hardware.targets import load_targets
from tests.conftest import REPOSITORY

IMAGES = REPOSITORY / "images"


def build(*arguments: str, folder: Path = REPOSITORY, user: int | None = None, **variables: str) -> tuple[int, str]:
    command = [str(folder / "images" / "build.sh"), *arguments]
    if user is not None:
        command = ["setpriv", "--reuid", str(user), "--clear-groups", *command]
    environment = {**os.environ, "DOCKER_HOST": "unix:///nowhere/docker.sock", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [(), ("p100",), ("cpu", "serve"), ("v100-gptq", "infer"), ("--push", "p100")])
def test_an_unknown_target_or_stage_is_refused_with_the_known_ones(arguments: tuple[str, ...]) -> None:
    code, error = build(*arguments)
    assert code == 2
    assert len(error.splitlines()) == 1
    assert "known targets: cpu v100 " in error or "its stages: " in error


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PIP_CONF", "/no such/pip.conf", "PIP_CONF=/no such/pip.conf: no such file; name another, or leave it out"),
        ("CA_CERT", "/", "CA_CERT=/: no such file; name another, or leave it out"),
        ("KERNELS", "all", "KERNELS=all: no such value; known values: none compiled"),
    ],
)
def test_a_wrong_value_is_refused_before_the_build(variable: str, value: str, message: str) -> None:
    assert build("cpu", **{variable: value}) == (2, f"error: {message}\n")


def test_a_missing_lock_is_named(tmp_path: Path) -> None:
    shutil.copytree(IMAGES, tmp_path / "images")
    (tmp_path / "images" / "train" / "cu128.txt").unlink()
    code, error = build("a800", folder=tmp_path)
    assert code == 2
    assert error.splitlines() == ["error: no images/train/cu128.txt, the lock of train for a800; write it: make lock"]


def test_a_missing_engine_is_reported() -> None:
    code, error = build("cpu")
    assert code == 2
    assert len(error.splitlines()) == 1 and "no Docker engine answers (unix:///nowhere/docker.sock)" in error


def test_a_forbidden_socket_is_reported(tmp_path: Path) -> None:
    import socket

    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    path = Path("/tmp") / f"lorry-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        path.chmod(0o600)
        try:
            copy = Path("/tmp") / f"lorry-build-{os.getpid()}"
            shutil.copytree(IMAGES, copy / "images")
            code, error = build("cpu", folder=copy, user=1000, DOCKER_HOST=f"unix://{path}")
        finally:
            path.unlink()
            shutil.rmtree(copy, ignore_errors=True)
    assert code == 2
    assert len(error.splitlines()) == 1 and "uid 1000 may not use the Docker socket" in error


FAKE_DOCKER = """\
#!/bin/sh
case "$1 ${2-}" in "buildx bake") echo "$TARGET,$LINE,$ARCHITECTURE,$VARIANT,$REGISTRY: $*" ;; *) echo 1 ;; esac
"""


@pytest.mark.parametrize("name", load_targets())
def test_each_target_is_built_from_its_own_facts(name: str, tmp_path: Path) -> None:
    """build.sh reads targets.toml with sed; here it must find what tomllib finds."""
    target = load_targets()[name]
    facts = tomllib.loads((IMAGES / "targets.toml").read_text())[name]
    docker = tmp_path / "docker"
    docker.write_text(FAKE_DOCKER)
    docker.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "REGISTRY": "registry.example/team"}
    done = subprocess.run(
        [str(IMAGES / "build.sh"), name], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    line, stages = facts.get("cuda", "cpu"), "preprocess train infer eval"
    if target.variant_of:
        line, stages = name, "train"
    expected = f"{name},{line},{facts.get('capability', '')},{target.variant_of or ''},"
    command = f"buildx bake --file images/docker-bake.hcl --load {stages}"
    assert done.stdout.splitlines()[0] == f"{expected}: {command}"


def test_versions_of_a_line_carry_the_code_of_its_cards() -> None:
    """Facts of the wheels: torch 2.11 and vLLM 0.20 are the first without code for sm_70."""
    for name, target in load_targets().items():
        if target.capability != (7, 0) or target.variant_of:
            continue
        versions = (IMAGES / "base" / f"{target.cuda}.versions").read_text()
        assert int(re.search(r"^torch==2\.(\d+)", versions, re.M)[1]) <= 10, name  # type: ignore[index]
        assert int(re.search(r"^vllm==0\.(\d+)", versions, re.M)[1]) < 20, name  # type: ignore[index]


@pytest.mark.parametrize("name", load_targets())
def test_a_target_has_an_env_file_that_agrees(name: str) -> None:
    target = load_targets()[name]
    text = (REPOSITORY / "compose" / f"{name}.env").read_text()
    values = dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))
    assert values.pop("LORRY_CARD") == (target.variant_of or name)
    assert values.pop("LORRY_DEVICES") == ("none" if target.capability is None else "gpu")
    assert values.pop("LORRY_SHM")
    assert values == target.environment


@pytest.mark.parametrize("name", load_targets())
@pytest.mark.parametrize("preprocess", ["", "none"])
def test_compose_gives_preprocess_the_gpus_of_train_unless_it_needs_none(name: str, preprocess: str) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker Compose here")
    done = subprocess.run(
        [docker, "compose", "--env-file", os.devnull, "config", "--format", "json"],
        cwd=REPOSITORY,
        env={**os.environ, "TARGET": name, "GPUS": "0,2", "LORRY_PREPROCESS_DEVICES": preprocess},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    services = json.loads(done.stdout)["services"]
    devices = {stage: service.get("deploy", {}).get("resources") for stage, service in services.items()}
    hidden = {stage for stage, one in services.items() if one["environment"].get("NVIDIA_VISIBLE_DEVICES") == "none"}
    on_card = load_targets()[name].capability is not None
    request = {"driver": "nvidia", "device_ids": ["0,2"], "capabilities": ["gpu"]}
    both = {"reservations": {"devices": [request]}} if on_card else None
    assert devices == {
        "preprocess": None if preprocess else both, "train": both, "infer": both, "eval": None,
    }  # fmt: skip
    assert hidden == {stage for stage, given in devices.items() if given is None}


@pytest.mark.parametrize("name", load_targets())
def test_a_target_is_in_the_docs_with_its_driver(name: str) -> None:
    table = (REPOSITORY / "docs" / "cards-and-images.md").read_text().splitlines()
    (row,) = [line for line in table if line.startswith(f"| `{name}` |")]
    target = load_targets()[name]
    if target.capability is not None and target.variant_of is None:
        assert ".".join(map(str, target.capability)) in row
    assert target.min_driver is None or str(target.min_driver) in row


def test_only_the_server_has_a_port_and_that_for_this_machine() -> None:
    compose = yaml.safe_load((REPOSITORY / "compose" / "stages.yaml").read_text())
    services = compose["services"]
    assert {name for name, service in services.items() if "ports" in service} == {"serve"}
    assert services["serve"]["ports"] == ["${LORRY_HOST:-127.0.0.1}:${LORRY_PORT:-8000}:8000"]
    assert {name for name, service in services.items() if service.get("network_mode") != "none"} == {"serve"}
    (network,) = services["serve"]["networks"]
    assert compose["networks"][network]["driver_opts"] == {"com.docker.network.bridge.enable_ip_masquerade": "false"}


def test_serve_and_chat_start_on_request_only_and_in_infers_image() -> None:
    services = yaml.safe_load((REPOSITORY / "compose" / "stages.yaml").read_text())["services"]
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert {name for name, service in services.items() if "profiles" in service} == {"serve", "chat"}
    for name in ("serve", "chat"):
        assert services[name]["image"] == services["infer"]["image"]
        assert services[name]["entrypoint"][:3] == ["tini", "--", f"lorry-{name}"] and f"lorry-{name}" in scripts
        closed = ("user", "init", "read_only", "cap_drop", "security_opt", "tmpfs", "volumes", "extends")
        assert {key: services[name][key] for key in closed} == {key: services["infer"][key] for key in closed}


def test_locks_are_what_their_inputs_give() -> None:
    """Compiled again: needs the package index, as installing does. New releases do not count, changed inputs do."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, str(IMAGES / "lock.py"), "--check"],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
