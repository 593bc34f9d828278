"""Qwen2.5-VL's own architecture, tiny, trained on pictures: the pixel budget, what is compared, what is adapted."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load_file

from stages.contract.errors import UsageError
from stages.contract.files import read_json, read_jsonl
from stages.hardware.memory import adapter_parameters
from stages.models.merge import refuse_adapted_vision, write_merged_copy
from stages.models.pictures import read_rules
from stages.models.shape import read_shape
from tests.conftest import Lorry, need_model
from tests.train.conftest import Training


@pytest.fixture(scope="module")
def model() -> Path:
    return need_model("tiny-qwen2.5-vl")


def seeing(lorry: Lorry, samples: int, *overrides: str) -> Training:
    """A training of the tiny model whose samples share one picture of eight times the budget."""
    fixed = ("train.effective_batch=2", "train.max_pixels=12544", "train.rank=4")
    training = Training(lorry, (*fixed, *overrides), "tiny-vlm")
    training.with_samples(samples, images=("preprocess/pages/one.png",))
    page = training.run.path("preprocess", "pages", "one.png")
    page.parent.mkdir(parents=True)
    Image.effect_noise((380, 260), 80).save(page)
    return training


def weights_of(training: Training) -> dict[str, Any]:
    found: dict[str, Any] = load_file(training.run.path("train", "adapters", "tuned", "adapter_model.safetensors"))
    return found


@pytest.mark.long
def test_it_is_trained_with_a_frozen_tower_and_goes_on_after_a_kill(lorry: Lorry, model: Path) -> None:
    training = seeing(replace(lorry, models=model.parent), 12, "train.checkpoint_every=2")
    code, output = training(HUNGER=json.dumps({"during": "saving", "from_step": 4}))
    assert (code, ": ended by SIGKILL (" in output) == (1, True), output
    code, output = training()
    assert code == 0, output + training.run.path("train", "log.txt").read_text()[-3000:]
    assert "resuming from checkpoint-2" in output
    losses = [row["loss"] for row in read_jsonl(training.run.path("train", "metrics.jsonl")) if "loss" in row]
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    weights = weights_of(training)
    assert weights and all(".language_model." in name for name in weights)
    facts = read_json(training.run.path("train", "adapters", "tuned", "training.json"))
    picture = read_rules(model).tokens(*read_rules(model).size(380, 260, 12544))
    assert 12 * picture < facts["tokens"] < 12 * (picture + 60), "padding not counted, no picture above its budget"
    shape = read_shape(model)
    assert sum(tensor.size for tensor in weights.values()) == adapter_parameters(shape, training.run.recipe.train)
    refuse_adapted_vision({"tuned": training.run.path("train", "adapters", "tuned")}, "vllm", ["transformers"])


@pytest.mark.long
def test_an_adapted_tower_is_served_merged_only(lorry: Lorry, model: Path, tmp_path: Path) -> None:
    asked = ("train.freeze_vision=false", "train.gradient_checkpointing=true")
    training = seeing(replace(lorry, models=model.parent), 4, *asked)
    code, output = training()
    assert code == 0, output + training.run.path("train", "log.txt").read_text()[-3000:]
    weights = weights_of(training)
    tower = {name: tensor for name, tensor in weights.items() if ".visual." in name}
    assert tower and len(tower) < len(weights)
    assert all(tensor.any() for tensor in tower.values()), "each has learnt something"
    assert not any("merger" in name or "patch_embed" in name for name in tower)
    parameters = sum(tensor.size for tensor in weights.values())
    assert parameters == adapter_parameters(read_shape(model), training.run.recipe.train)

    folder = training.run.path("train", "adapters", "tuned")
    with pytest.raises(
        UsageError, match=r"adapter tuned: adapts a vision tower or connector .*vllm would.* infer\.merged"
    ):
        refuse_adapted_vision({"tuned": folder}, "vllm", ["transformers"])
    merged = load_file(write_merged_copy(model, folder, tmp_path / "merged", "float32") / "model.safetensors")
    base = load_file(model / "model.safetensors")
    assert any((merged[name] != base[name]).any() for name in merged if "visual." in name)


def test_a_torn_picture_ends_training_in_a_line_and_no_other_sample_takes_its_place(lorry: Lorry, model: Path) -> None:
    training = seeing(replace(lorry, models=model.parent), 4)
    page = training.run.path("preprocess", "pages", "one.png")
    page.write_bytes(page.read_bytes()[: page.stat().st_size // 2])
    code, output = training()
    assert code == 3, output
    assert "one.png: not a readable picture" in output.splitlines()[-1]
