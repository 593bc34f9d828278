"""What a launch in containers checks before one starts."""

import pytest

from stages.contract.errors import DoesNotFitError
from stages.hardware.targets import load_targets
from stages.host import containers


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
