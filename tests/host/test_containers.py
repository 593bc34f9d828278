"""What a launch in containers checks before one starts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.contract.errors import DoesNotFitError
from stages.hardware.targets import load_targets
from stages.host import containers
from stages.host.cards import CardChoice


def test_a_variant_is_an_image_of_train_only() -> None:
    variant = load_targets()["v100-gptq"]
    names = [containers.image_name(stage, "1.2.3", variant) for stage in ("train", "infer")]
    assert names == ["lorry-train:1.2.3-v100-gptq", "lorry-infer:1.2.3-v100"]


@pytest.mark.parametrize(
    "info",
    [
        {"Runtimes": {"runc": {}, "nvidia": {}}},
        {"Runtimes": {"runc": {}}, "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]},
    ],
)
def test_an_engine_that_hands_gpus_on(info: dict[str, object]) -> None:
    containers.refuse_without_nvidia(info, load_targets()["a800"])


def test_an_engine_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DoesNotFitError, match=r"target a800: needs GPUs.*nvidia-container-toolkit"):
        containers.refuse_without_nvidia({"Runtimes": {"runc": {}}, "DiscoveredDevices": None}, load_targets()["a800"])


@pytest.mark.parametrize(
    ("computing", "device"), [(("preprocess", "train"), "gpu"), (("train",), "none"), ((), "none")]
)
def test_preprocess_gets_the_gpus_of_the_choice_only_if_it_computes_on_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, computing: tuple[str, ...], device: str
) -> None:
    started: list[tuple[str | None, str]] = []

    def run_container(*arguments: Any, **_: object) -> int:
        environment = arguments[3]
        started.append((environment.get("LORRY_PREPROCESS_DEVICES"), environment["GPUS"]))
        return 0

    for name in ("LORRY_DATA", "LORRY_MODELS", "LORRY_RUNS"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(containers, "compose_command", lambda: ["docker", "compose"])
    monkeypatch.setattr(containers, "refuse_image", lambda *_: None)
    monkeypatch.setattr(containers, "refuse_without_nvidia", lambda *_: None)
    monkeypatch.setattr(containers, "_collect_signals", list)
    monkeypatch.setattr(containers, "_run_container", run_container)
    options = {"recipe": None, "profile": None, "data": None, "overrides": (), "run_name": "r"}
    engine = SimpleNamespace(info=dict)
    choice = CardChoice(names=("2", "3"), computing=computing)
    run, _ = containers.container_runner(engine, ("preprocess",), options, choice, load_targets()["a800"])
    run("preprocess", [])
    assert started == [(device, "2,3")]
