"""What every image, and every image of a layer, must be. Run as on a host: no network, read-only root, any user."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.conftest import REPOSITORY
from tests.images.conftest import VERSION, Containers
from tests.images.tree import STAGES, having, layers

pytestmark = pytest.mark.images

AS_COMPOSE_DOES: dict[str, Any] = {
    "network_mode": "none",
    "read_only": True,
    "tmpfs": {"/tmp": "mode=1777"},
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges:true"],
}
COMPILERS = ("gcc", "g++", "clang", "cc1", "nvcc", "ptxas", "ld", "as", "make")


def pins(lock: Path) -> set[tuple[str, str]]:
    """(name, version) of each entry of a lock file."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^ ]+)", lock.read_text(), flags=re.MULTILINE)
    return {(name, version) for name, version in found}


def lock_of(layer: str) -> Path:
    folder = REPOSITORY / "images"
    return folder / layer / "cpu.txt" if layer in STAGES else folder / "base" / f"cpu.{layer}.txt"


def locked(layer: str) -> set[tuple[str, str]]:
    """What a layer's locks name: that of packages which come as source only, too."""
    source = lock_of(layer).with_suffix(".source.txt")
    return pins(lock_of(layer)) | (pins(source) if source.exists() else set())


# system


@pytest.mark.parametrize("stage", having("system"))
def test_selftest_passes_for_any_user_without_network_on_a_read_only_root(
    stage: str, images: dict[str, str], containers: Containers
) -> None:
    options = {**AS_COMPOSE_DOES, "tmpfs": {"/tmp": "mode=1777", "/runs": "mode=1777"}}
    # a volume without a name goes with its container
    done = containers.run(images[stage], "selftest", user="4321:4321", volumes=["/caches"], **options)
    assert done.code == 0, done.output
    assert f"lorry {VERSION}" in done.output and f"lorry-{stage}:{VERSION}-cpu" in done.output
    assert ("GPU not used by this stage" if stage == "eval" else "no GPU visible") in done.output


@pytest.mark.parametrize("stage", having("system"))
def test_runs_as_an_ordinary_user_under_an_init(stage: str, images: dict[str, str], containers: Containers) -> None:
    assert containers.shell(images[stage], "id -u; id -g").output.split() == ["1000", "1000"]
    config = containers.client.images.get(images[stage]).attrs["Config"]
    assert config["Entrypoint"] == ["tini", "--", f"lorry-{stage}"]
    assert config["User"] == "1000:1000"


@pytest.mark.parametrize("stage", having("system"))
def test_sees_no_gpu_and_no_hub_by_default(stage: str, images: dict[str, str], client: docker.DockerClient) -> None:
    environment = client.images.get(images[stage]).attrs["Config"]["Env"]
    assert "NVIDIA_VISIBLE_DEVICES=none" in environment
    assert "HF_HUB_OFFLINE=1" in environment
    assert "LORRY_TARGET=cpu" in environment


@pytest.mark.parametrize("stage", having("system"))
def test_labels_say_what_it_is(stage: str, images: dict[str, str], client: docker.DockerClient) -> None:
    labels = client.images.get(images[stage]).labels
    assert labels["org.opencontainers.image.version"] == VERSION
    assert labels["org.opencontainers.image.title"] == f"lorry-{stage}"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])
    assert labels["lorry.target"] == "cpu"
    assert re.fullmatch("[0-9a-f]{64}", labels["lorry.locks"])
    licences = "Apache-2.0 AND AGPL-3.0-only" if stage == "preprocess" else "Apache-2.0"
    assert labels["org.opencontainers.image.licenses"] == licences


@pytest.mark.parametrize("stage", having("system"))
def test_holds_the_licence(stage: str, images: dict[str, str], containers: Containers) -> None:
    held = containers.shell(images[stage], "cd /opt/lorry && sha256sum LICENSE NOTICE").output.split()
    assert held[::2] == [hashlib.sha256((REPOSITORY / name).read_bytes()).hexdigest() for name in held[1::2]]


@pytest.mark.parametrize("stage", having("system"))
def test_holds_no_compiler_but_tritons(stage: str, images: dict[str, str], containers: Containers) -> None:
    looked = containers.shell(images[stage], f"for c in {' '.join(COMPILERS)}; do command -v $c; done; true")
    assert looked.output == ""
    compiled = containers.shell(
        images[stage],
        "cd /caches && echo '#include <Python.h>\nint f(void) { return 7; }' > a.c && mkdir x && echo > e.c"
        " && tcc -shared -o x/libcuda.so.1 e.c"
        " && $CC a.c -O3 -shared -fPIC -Wno-psabi -o a.so -l:libcuda.so.1 -L/caches/x -I/usr/include/python3.11"
        " && LD_LIBRARY_PATH=/caches/x python3 -c \"import ctypes; print(ctypes.PyDLL('/caches/a.so').f())\"",
    )
    assert compiled.output.strip() == "7"


@pytest.mark.parametrize("stage", having("system"))
def test_no_layer_keeps_the_builds_configuration(
    stage: str, images: dict[str, str], containers: Containers, client: docker.DockerClient
) -> None:
    left = containers.shell(
        images[stage],
        "ls -A /etc/pip.conf /run/secrets /root/.cache /caches /var/lib/apt/lists 2>/dev/null;"
        " find / -xdev -name '*.whl' -not -path '/usr/share/python-wheels/*' 2>/dev/null; true",
        user="0",
    )
    assert [line for line in left.output.split() if not line.endswith(":")] == []
    history = json.dumps(client.api.history(images[stage]))
    environment = json.dumps(client.images.get(images[stage]).attrs["Config"]["Env"])
    for text in ("http://", "https://", "find-links", "PROXY", "pip.conf="):
        assert text not in history and text not in environment


@pytest.mark.parametrize("stage", having("system"))
def test_wrong_use_is_reported_in_one_line(stage: str, images: dict[str, str], containers: Containers) -> None:
    done = containers.run(images[stage], "no-such-recipe", **AS_COMPOSE_DOES)
    assert done.code == 2
    assert len(done.output.strip().splitlines()) == 1 and "no-such-recipe" in done.output


@pytest.mark.parametrize("stage", having("system"))
def test_a_run_folder_of_somebody_else_is_reported_in_one_line(
    stage: str, images: dict[str, str], containers: Containers, tmp_path: Path
) -> None:
    (tmp_path / "data" / "patent-qa").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "runs").mkdir(mode=0o755)
    mounts = {str(tmp_path / name): {"bind": f"/{name}", "mode": "rw"} for name in ("data", "models", "runs")}
    done = containers.run(images[stage], "patent-qa", "--profile", "tiny", volumes=mounts, **AS_COMPOSE_DOES)
    assert done.code == 2
    assert len(done.output.strip().splitlines()) == 1
    assert "/runs" in done.output and "1000" in done.output


# light, torch, and the stages' own


@pytest.mark.parametrize("stage", STAGES)
def test_holds_exactly_what_is_locked(stage: str, images: dict[str, str], containers: Containers) -> None:
    listed = json.loads(containers.shell(images[stage], "pip list --format json").output)
    installed = {(package["name"].lower().replace("_", "-"), package["version"]) for package in listed}
    wanted = set().union(*(locked(layer) for layer in layers(stage) if layer != "system"))
    assert installed - {("pip", version) for version in ("23.0.1",)} == wanted | {("lorry", VERSION)}


@pytest.mark.parametrize("stage", having("torch"))
def test_torch_computes_on_the_cpu(stage: str, images: dict[str, str], containers: Containers) -> None:
    script = 'python3 -c "import torch; a = torch.ones(64, 64); print(torch.__version__, (a @ a).sum().item())"'
    version = dict(pins(lock_of("torch")))["torch"]
    assert containers.shell(images[stage], script, **AS_COMPOSE_DOES).output.split() == [version, "262144.0"]


TWO_PROCESSES = """
import os
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
mine = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(mine)
os.write(1, b"sum %d\\n" % mine.item())  # in one piece: both write to one pipe
dist.destroy_process_group()
"""


def test_processes_of_one_training_find_each_other_without_a_network(
    images: dict[str, str], containers: Containers
) -> None:
    from stages.train.torchrun import torchrun_command

    options = torchrun_command(Path("job.json"), 2, None)[3:]
    launcher = " ".join(option for option in options if option.startswith("--"))
    script = f"cat > /tmp/two.py <<'E'\n{TWO_PROCESSES}E\n"
    script += f"timeout 120 python3 -m torch.distributed.run {launcher} /tmp/two.py"
    done = containers.shell(images["train"], script, environment={"GLOO_SOCKET_IFNAME": "lo"}, **AS_COMPOSE_DOES)
    assert done.code == 0, done.output
    assert [line for line in done.output.splitlines() if line.startswith("sum")] == ["sum 3", "sum 3"]


def test_images_of_a_line_share_their_layers(images: dict[str, str], client: docker.DockerClient) -> None:
    found = {stage: client.images.get(images[stage]).attrs["RootFS"]["Layers"] for stage in STAGES}
    shared = len(set.intersection(*(set(found[stage]) for stage in having("torch"))))
    assert shared >= 6  # the base's own, and three times two of images/base/Dockerfile
    assert len(set(found["eval"]) & set(found["train"])) >= 4
