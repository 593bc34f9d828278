"""A real Docker engine, the real cpu images, and containers that are removed at the end."""

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from tests.conftest import REPOSITORY
from tests.images.tree import STAGES

VERSION = importlib.metadata.version("lorry")


@dataclass(frozen=True)
class Finished:
    code: int
    output: str


@dataclass
class Containers:
    """Starts containers with docker-py, removes them at the end, and fails if a log has an ERROR line."""

    client: docker.DockerClient
    started: list[Container] = field(default_factory=list)

    def start(self, image: str, *arguments: str, **options: Any) -> Container:
        container = self.client.containers.create(image, list(arguments), **options)
        self.started.append(container)
        container.start()
        return container

    def run(self, image: str, *arguments: str, **options: Any) -> Finished:
        """Run a container to its end."""
        container = self.start(image, *arguments, **options)
        code = container.wait(timeout=900)["StatusCode"]
        output = container.logs().decode(errors="replace")
        bad = [line for line in output.splitlines() if "ERROR" in line or "Traceback" in line]
        assert not bad, f"{image} {' '.join(arguments)}:\n{output}"
        return Finished(code, output)

    def shell(self, image: str, script: str, **options: Any) -> Finished:
        return self.run(image, "-c", script, entrypoint="/bin/sh", **options)


@pytest.fixture(scope="session")
def client() -> Iterator[docker.DockerClient]:
    engine = docker.from_env(timeout=900)
    engine.ping()
    yield engine
    engine.close()


@pytest.fixture
def containers(client: docker.DockerClient) -> Iterator[Containers]:
    wrapped = Containers(client)
    yield wrapped
    for container in wrapped.started:
        container.remove(force=True, v=True)


@pytest.fixture(scope="session")
def images(client: docker.DockerClient) -> dict[str, str]:
    """The four cpu images by stage, built from this checkout."""
    done = subprocess.run(["images/build.sh", "cpu"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    names = {stage: f"lorry-{stage}:{VERSION}-cpu" for stage in STAGES}
    for name in names.values():
        client.images.get(name)
    return names


def compose_environment(**variables: str) -> dict[str, str]:
    """The environment for Compose: of Lorry's variables only those of the test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LORRY_")}
    return {**kept, "TARGET": "cpu", "COMPOSE_ANSI": "never", **variables}


@pytest.fixture(scope="session")
def compose() -> str:
    """The command line of `docker compose`."""
    found = shutil.which("docker")
    assert found is not None
    subprocess.run([found, "compose", "version"], check=True, capture_output=True)
    return found
