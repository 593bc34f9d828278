"""Doctor's checks: a finding for each, the cure on those that fail, and the exit code."""

import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.contract.errors import DoesNotFitError, UsageError
from stages.hardware import probe
from stages.hardware.holds import Holds
from stages.host import doctor as module
from stages.host import needs
from stages.host.needs import LIBRARIES
from stages.host.runs import open_run
from tests.conftest import Lorry, make_data
from tests.hardware.recorded import Box
from tests.other_user import UID

NO_ENGINE = "unix:///nowhere/docker.sock"
GB = 10**9


@dataclass
class Examined:
    code: int
    lines: list[str]

    def of(self, what: str, state: str | None = None) -> list[str]:
        """The lines of a check, without their beginning."""
        found = [line for line in self.lines if line[12:].startswith(f"{what}: ")]
        return [line[12 + len(what) + 2 :] for line in found if state is None or line[:12].strip() == state]

    @property
    def failed(self) -> list[str]:
        return [line[12:] for line in self.lines if line.startswith("FAIL")]


Doctor = Callable[..., Examined]


@pytest.fixture
def healthy(lorry: Lorry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lorry:
    """Folders as they should be, with one small model, on a machine without an engine."""
    models = tmp_path / "models"
    make_model(models / "small")
    found = Lorry(lorry.data, models, lorry.runs)
    mounts = {"LORRY_DATA": lorry.data, "LORRY_MODELS": models, "LORRY_RUNS": lorry.runs, "DOCKER_HOST": NO_ENGINE}
    for name, value in mounts.items():
        monkeypatch.setenv(name, str(value))
    for name in ("LORRY_RECIPE", "LORRY_PROFILE", "LORRY_RUN", "LORRY_SET", "LORRY_UID", "LORRY_GID", "PULL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TARGET", "LORRY_VERSION", "REGISTRY", "LORRY_GPU_DENY"):
        monkeypatch.delenv(name, raising=False)
    usage = SimpleNamespace(total=900 * GB, used=0, free=800 * GB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    return found


@pytest.fixture
def doctor(healthy: Lorry) -> Doctor:
    """All findings: `doctor(target, **options of a run)`."""

    def run(target: str | None = None, **options: Any) -> Examined:
        findings = list(module.examine(target, open_run(**options) if options else None))
        return Examined(int(module.exit_code(findings)), [str(finding) for finding in findings])

    return run


def make_model(folder: Path) -> Path:
    """A model folder with one tensor, in a whole safetensors file."""
    folder.mkdir(parents=True)
    config = {"num_attention_heads": 2, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 4}))
    header = json.dumps({"embed_tokens.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(128))
    return folder


# -- a machine without cards and without an engine -----------------------------------------------------------------


@pytest.fixture
def bare(box: Box) -> Box:
    box.recorded["init_error"] = "LIBRARY_NOT_FOUND"
    box.save()
    return box


def test_a_machine_without_cards_and_engine_can_do_cpu_work(bare: Box, doctor: Doctor) -> None:
    told = doctor()
    assert (told.code, told.failed) == (0, [])
    assert told.of("driver", "ok") == ["no NVIDIA GPU here, so the target is cpu"]
    assert told.of("Docker engine", "warn") == [
        f"none answers at {NO_ENGINE}, so stages run as local processes; to run them in containers, start Docker or set"
        " DOCKER_HOST"
    ]
    assert told.of("/dev/shm", "not checked") == ["only needed for several GPUs"]
    assert told.of("GPUs", "not checked") == ["NVML shows none"]


def test_an_engine_that_hangs_is_given_up_soon(
    bare: Box, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        monkeypatch.setattr(module, "ENGINE_TIMEOUT", 0.2)
        began = time.monotonic()
        told = doctor()
    assert time.monotonic() - began < 5
    assert told.code == 2
    assert "cannot be used" in told.of("Docker engine", "FAIL")[0]


def test_a_target_that_needs_a_driver(bare: Box, doctor: Doctor) -> None:
    told = doctor("h100")
    assert told.code == 4
    assert told.of("driver", "FAIL") == [
        "none, and target h100 needs NVIDIA driver 580 or newer; install it, or set TARGET=cpu"
    ]


def test_a_card_without_a_driver(bare: Box, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "bus" / "card"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    monkeypatch.setattr(probe, "PCI_DEVICES", tmp_path / "bus")
    told = doctor()
    assert told.code == 0
    assert "an NVIDIA GPU is on the PCI bus; install its driver" in told.of("driver", "warn")[0]


def test_a_library_that_is_not_here(bare: Box, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "LIBRARIES", {**LIBRARIES, "train": ("click", "no_such_library")})
    lines = doctor().of("libraries", "warn")
    assert "train: needs no_such_library, which is not installed here; run `make setup`, or start Docker" in lines


# -- the box of eight ----------------------------------------------------------------------------------------------


def test_every_card_with_what_is_free_and_who_has_the_rest(
    box: Box, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_GPU_DENY", "5,6,7")
    holds = Holds()
    assert holds.take(box.uuid(1), exclusive=True)
    told = doctor()
    holds.close()
    assert (told.code, told.failed) == (0, []), told.lines
    assert told.of("driver", "ok") == ["535.183.06; target a800 (cu128) needs 525"]
    cards = told.of("GPUs", "ok")
    assert len(cards) == 8
    assert cards[0] == (
        "GPU 0 (NVIDIA A800-SXM4-80GB): 12.1 GiB free of 80.0; python (alice, pid 41120) 67.4 GiB; " + box.uuid(0)
    )
    assert f"; held by lorry, pid {os.getpid()} of " in cards[1] and "(auto)" in cards[1]
    assert "VLLM::EngineCor (chen, pid 41988) 22.1 GiB; python3 (alice, pid 43017) 18.2 GiB" in cards[2]
    assert ["denied by LORRY_GPU_DENY" in card for card in cards] == [False] * 5 + [True] * 3


def test_a_slip_in_the_deny_list(box: Box, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_GPU_DENY", "5,9")
    told = doctor()
    assert told.code == 2
    assert "LORRY_GPU_DENY=5,9: no GPU 9; this machine has: " in told.of("GPUs", "FAIL")[0]


def test_a_list_for_cuda_that_hides_cards(box: Box, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-0000")
    told = doctor()
    assert told.code == 2
    assert "CUDA_VISIBLE_DEVICES=0,GPU-0000: no GPU's UUID begins with GPU-0000" in told.of("GPUs", "FAIL")[0]


def test_cards_that_cannot_be_used(box: Box, doctor: Doctor) -> None:
    box.lose(3)
    box.slice(1)
    box.cards[0]["cuda_compute_capability"] = [6, 0]
    box.save()
    told = doctor()
    assert told.code == 4
    (lost,) = told.of("GPUs", "FAIL")
    assert "GPU 3 no longer answers (NVML: GPU is lost); see `dmesg | grep Xid`; nvidia-smi --gpu-reset -i 3" in lost
    old, sliced = told.of("GPUs", "warn")
    assert "older than every target" in old
    assert "in MIG mode, but Lorry binds whole GPUs; sudo nvidia-smi -i 1 -mig 0" in sliced


def test_a_driver_too_old(box: Box, doctor: Doctor) -> None:
    told = doctor("h100")
    assert told.code == 4
    assert "(cu130) needs NVIDIA driver 580 or newer, but this machine has 535.183.06" in told.of("driver", "FAIL")[0]


def test_every_kind_of_card_has_its_driver_checked(box: Box, doctor: Doctor) -> None:
    box.cards[1]["cuda_compute_capability"] = [9, 0]
    box.save()
    told = doctor()
    assert (len(told.of("driver", "ok")), len(told.of("driver", "FAIL"))) == (1, 1)


def test_a_driver_of_another_version_than_its_library(box: Box, doctor: Doctor) -> None:
    box.recorded["init_error"] = "LIB_RM_VERSION_MISMATCH"
    box.save()
    told = doctor()
    assert told.code == 4
    assert "driver/library version mismatch" in told.of("driver", "FAIL")[0]
    assert "reboot" in told.of("driver", "FAIL")[0]


# -- an engine -----------------------------------------------------------------------------------------------------


class Engine:
    """What doctor asks of docker-py's client."""

    def __init__(self, folder: Path, labels: dict[str, str], **info: Any) -> None:
        self.images, self._labels = self, labels
        self._info = {"ServerVersion": "28.1", "DockerRootDir": str(folder), "Runtimes": {"nvidia": {}}, **info}

    def info(self) -> dict[str, Any]:
        return self._info

    def get(self, image: str) -> SimpleNamespace:
        from docker.errors import ImageNotFound

        if image not in self._labels:
            raise ImageNotFound(image)
        return SimpleNamespace(labels={"org.opencontainers.image.version": self._labels[image]})


@pytest.fixture
def engine(healthy: Lorry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv("LORRY_VERSION", "1.2.3")
    names = {f"lorry-{stage}:1.2.3-a800": "1.2.3" for stage in ("preprocess", "train", "infer", "eval")}
    found = Engine(tmp_path, names)
    monkeypatch.setattr(module, "find_engine", lambda timeout: (found, "unix:///x"))
    monkeypatch.setattr(module, "compose_command", lambda: ["/usr/bin/docker", "compose", "--more"])
    yield found


def test_an_engine_with_all_that_is_needed(box: Box, engine: Engine, doctor: Doctor, healthy: Lorry) -> None:
    if os.getuid() != 0:
        healthy.runs.chmod(0o777)
    told = doctor("a800")
    assert told.of("Docker engine", "ok") == ["version 28.1 at unix:///x", "can give GPUs to containers of target a800"]
    assert told.of("compose", "ok") == ["/usr/bin/docker compose"]
    assert told.of("images", "ok") == ["of a800, version 1.2.3: preprocess, train, infer, eval"]
    assert told.of("/dev/shm", "ok") == ["containers get their own (LORRY_SHM in compose/<target>.env)"]
    assert [line.partition(" (")[0] for line in told.of("disk", "ok")] == [
        "800 GB free for runs",
        "800 GB free for Docker's images",
    ]


def test_images_that_are_not_built_or_of_another_version(box: Box, engine: Engine, doctor: Doctor) -> None:
    engine._labels = {"lorry-train:1.2.3-a800": "1.2.2"}
    told = doctor()
    assert told.code == 2
    missing = told.of("images", "FAIL")
    assert len(missing) == 4
    assert "lorry-preprocess:1.2.3-a800: no such image; run `make images TARGET=a800`" in missing[0]
    assert ": holds Lorry 1.2.2, but its name says 1.2.3" in missing[1]


def test_images_that_compose_fetches(box: Box, engine: Engine, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PULL", "missing")
    assert doctor().of("images", "not checked") == ["of a800: PULL=missing, Compose fetches them"]


def test_an_engine_without_nvidia_and_a_client_without_compose(
    box: Box, engine: Engine, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compose() -> list[str]:
        raise UsageError("no compose plugin: install it")

    engine._info |= {"Runtimes": {"runc": {}}}
    monkeypatch.setattr(module, "compose_command", no_compose)
    monkeypatch.setenv("PATH", "/nowhere")
    told = doctor()
    assert told.code == 4, "hardware before usage"
    assert "nvidia-container-toolkit" in told.of("Docker engine", "FAIL")[0]
    assert told.of("compose", "FAIL") == ["no compose plugin: install it"]


def test_an_engine_that_refuses_us(box: Box, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(timeout: float) -> None:
        raise UsageError("/run/docker.sock: no permission on this socket of the Docker engine; join its group")

    monkeypatch.setattr(module, "find_engine", refuse)
    told = doctor()
    assert told.code == 2
    assert "join its group" in told.of("Docker engine", "FAIL")[0]


# -- disk, memory, folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "state", "code"), [(800, "ok", 0), (49, "warn", 0), (4, "FAIL", 4)])
def test_disk(bare: Box, doctor: Doctor, monkeypatch: pytest.MonkeyPatch, free: int, state: str, code: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=900 * GB, free=free * GB))
    told = doctor()
    assert told.code == code
    assert told.of("disk", state)[0].startswith(f"{free} GB free for runs (")
    if code:
        assert "delete old runs, or name another folder (LORRY_RUNS)" in told.failed[0]


def test_shared_memory_of_local_processes_on_several_cards(
    box: Box, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor().of("/dev/shm", "ok")
    usage = {"/dev/shm": 64 << 20}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=usage.get(str(path), 0), free=800 * GB)
    )
    told = doctor()
    assert told.code == 4
    assert told.of("/dev/shm", "FAIL") == [
        "0.1 GiB for the processes of several GPUs, but 1 GiB is needed; sudo mount -o remount,size=16g /dev/shm"
    ]


def test_folders_that_are_not_there(bare: Box, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_MODELS", "/nowhere/models")
    told = doctor()
    assert told.code == 2
    assert told.of("folders", "FAIL") == ["/nowhere/models: no such folder; create it, or name another (LORRY_MODELS)"]


def test_folders_are_looked_at_for_the_containers_user(
    box: Box, engine: Engine, doctor: Doctor, healthy: Lorry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything; uid 1000, as which the containers run, may not."""
    weights = healthy.models / "small" / "model.safetensors"
    monkeypatch.setattr(module, "container_user", lambda: (54321, 54321))
    for path in (healthy.models, healthy.models / "small", healthy.data, healthy.runs):
        path.chmod(0o755)
    weights.chmod(0o600)
    told = doctor()
    assert told.code == 2
    unreadable, *others = told.of("folders", "FAIL")
    assert unreadable == f"{weights}: uid 54321 cannot read it; sudo chmod o+r {weights} (and what is below)"
    if os.getuid() != 0:
        assert others == [
            f"{healthy.runs}: uid 54321 cannot write there; sudo chown 54321:54321 {healthy.runs}, or name"
            " another folder (LORRY_RUNS)"
        ]
    else:
        assert told.of("folders", "ok")[-1] == f"{healthy.runs}: owned by root; the next launch gives it to uid 54321"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_another_users_run_is_reported(
    box: Box, engine: Engine, doctor: Doctor, healthy: Lorry, recipe_file: Path
) -> None:
    make_data(healthy.data / "few")
    os.chown(healthy.runs, UID, UID)
    (healthy.runs / "r" / "train").mkdir(parents=True)
    told = doctor("a800", recipe=str(recipe_file), run_name="r", overrides=("model.path=small",))
    assert f"{healthy.runs}: writable for uid {UID}" in told.of("folders", "ok")
    failed = told.of("folders", "FAIL")
    assert f"{healthy.runs}/r: uid {UID} cannot write there; sudo chown -R {UID}:{UID} {healthy.runs}/r" in failed[0]
    assert len(failed) == 2


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_runs_folder_of_somebody_else(box: Box, engine: Engine, doctor: Doctor, healthy: Lorry) -> None:
    os.chown(healthy.runs, 4242, 4242)
    healthy.runs.chmod(0o755)
    told = doctor()
    assert told.code == 2
    assert (
        f"{healthy.runs}: uid {UID} cannot write there; sudo chown {UID}:{UID} {healthy.runs}"
        in told.of("folders", "FAIL")[0]
    )


def test_a_runs_folder_that_is_not_made_yet(
    bare: Box, doctor: Doctor, healthy: Lorry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORRY_RUNS", str(healthy.runs / "yet"))
    told = doctor()
    assert told.code == 0
    assert told.of("folders", "ok")[-1].endswith("(created by the first launch)")
    monkeypatch.setenv("LORRY_RUNS", str(healthy.runs / "not" / "yet"))
    told = doctor()
    assert told.code == 2
    assert told.of("folders", "FAIL")[-1].startswith(f"{healthy.runs}/not/yet: no such folder, and no ")


# -- weights -------------------------------------------------------------------------------------------------------


def test_every_model_is_looked_at_without_a_recipe(bare: Box, doctor: Doctor, healthy: Lorry) -> None:
    other = make_model(healthy.models / "other") / "config.json"
    other.write_text('{"model_type": "clip"}')
    cut = make_model(healthy.models / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    told = doctor()
    assert told.code == 2
    assert "damaged (219 bytes, but its header says 220); copy it again" in told.of("weights", "FAIL")[0]
    assert told.of("weights", "ok") == [f"{healthy.models}/small: 1 tensors, 0.0 GB, whole"]
    assert len(told.of("weights", "not checked")) == 1


def test_the_recipes_models_are_looked_at_with_one(
    bare: Box, doctor: Doctor, healthy: Lorry, recipe_file: Path
) -> None:
    make_data(healthy.data / "few")
    cut = make_model(healthy.models / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    told = doctor(recipe=str(recipe_file), overrides=("model.path=small", "preprocess.retrieval.embedder=none"))
    assert told.code == 2
    assert told.failed == [
        f"weights: {healthy.models}/none: no such model folder; set preprocess.retrieval.embedder to a folder"
        f" below LORRY_MODELS ({healthy.models}), which has cut, small"
    ]
    assert told.of("folders", "ok")[0] == f"{healthy.data}/few: readable for uid {os.getuid()}"


def test_no_model_at_all(bare: Box, doctor: Doctor, healthy: Lorry) -> None:
    shutil.rmtree(healthy.models / "small")
    told = doctor()
    assert told.code == 0
    assert "no model in" in told.of("weights", "warn")[0]


def test_every_line_that_fails_or_warns_says_the_cure(box: Box, doctor: Doctor) -> None:
    box.lose(0)
    for line in doctor().lines:
        if line.startswith(("FAIL", "warn")):
            assert "; " in line[12:].partition(": ")[2], line


def test_the_errors_that_are_reported_keep_their_code() -> None:
    assert module._error_finding("x", DoesNotFitError("a\n b")).text == "a b"
    assert module._error_finding("x", DoesNotFitError("a")).code == 4
